"""Modules: the router and what stands around it in TIGER, each usable on its own."""

from tiger_fast.nn.counterfactual import (
    Counterfactual,
    CounterfactualLoss,
    FirstOrderCounterfactual,
    LinearCounterfactual,
    TokenLosses,
)
from tiger_fast.nn.decoder import SharedDecoder
from tiger_fast.nn.encoders import ExpertProjection, QueryEncoder
from tiger_fast.nn.instructions import TaskInstructionEncoder, encode_instructions
from tiger_fast.nn.interaction import ExpertInteraction, TaskInteraction
from tiger_fast.nn.router import Router

__all__ = [
    "Counterfactual",
    "CounterfactualLoss",
    "ExpertInteraction",
    "ExpertProjection",
    "FirstOrderCounterfactual",
    "LinearCounterfactual",
    "QueryEncoder",
    "Router",
    "SharedDecoder",
    "TaskInstructionEncoder",
    "TaskInteraction",
    "TokenLosses",
    "encode_instructions",
]
