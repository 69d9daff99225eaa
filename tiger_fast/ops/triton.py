"""The "triton" backend: the kernels of kernels/, on CUDA and ROCm tensors, or on CPU tensors in Triton's interpreter."""

import importlib.util
import os
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module

import torch

from tiger_fast import _ranges
from tiger_fast.ops.adapter import adapter
from tiger_fast.ops.alignment import alignment_loss, causal_target
from tiger_fast.ops.competency_aggregate import competency_aggregate
from tiger_fast.ops.counterfactual import counterfactual_losses, counterfactual_losses_from_projections
from tiger_fast.ops.group_attention import group_attention, group_attention_packed
from tiger_fast.ops.leave_one_out import leave_one_out
from tiger_fast.ops.library import DEFINED, LIBRARY, define
from tiger_fast.ops.route import route

# Where in kernels/ an op is implemented, under its own name. A module is imported, and Triton with it, at the first call.
_MODULES = {
    "adapter": ("adapter", "adapter_backward"),
    "alignment": ("alignment_loss", "alignment_loss_backward", "causal_target", "causal_target_backward"),
    "competency_aggregate": ("competency_aggregate", "competency_aggregate_backward"),
    "counterfactual": (
        "counterfactual_losses",
        "counterfactual_losses_backward",
        "counterfactual_losses_from_projections",
        "counterfactual_losses_from_projections_backward",
    ),
    "group_attention": (
        "group_attention",
        "group_attention_backward",
        "group_attention_packed",
        "group_attention_packed_backward",
    ),
    "leave_one_out": ("leave_one_out", "leave_one_out_backward"),
    "route": ("route",),
    "route_backward": ("route_backward",),
}

# What these kernels run; everything else runs the reference.
NATIVE: dict[str, Callable] = {
    "adapter": adapter,
    "alignment_loss": alignment_loss,
    "causal_target": causal_target,
    "competency_aggregate": competency_aggregate,
    "counterfactual_losses": counterfactual_losses,
    "counterfactual_losses_from_projections": counterfactual_losses_from_projections,
    "group_attention": group_attention,
    "group_attention_packed": group_attention_packed,
    "leave_one_out": leave_one_out,
    "route": route,
}

# Triton reads this when it is imported: kernels are interpreted, in numpy, on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> str | None:
    """Why this installation cannot run the kernels, and what would mend it; None if it can."""
    # device_count rather than is_available, which would start the driver and leave forked processes without it.
    if not INTERPRETED and not torch.cuda.device_count():
        return (
            "torch finds no CUDA or ROCm device; TRITON_INTERPRET=1 runs its kernels in Triton's interpreter, for tests"
        )
    try:
        found = importlib.util.find_spec("triton") is not None
    except ModuleNotFoundError:  # an import hook that refuses it
        found = False
    return None if found else "Triton is not installed: pip install 'tiger_fast[triton]'"


def describe() -> str:
    """A line for `show_config`: where launch configurations come from."""
    files = import_module("tiger_fast.kernels.config").tuned_files()
    return f"triton: launched by {', then '.join([*map(str, reversed(files)), 'heuristics'])}"


@cache
def launcher(name: str) -> Callable:
    """What an operator of this name runs; Triton is imported with it."""
    module = next(module for module, names in _MODULES.items() if name in names)
    return getattr(import_module(f"tiger_fast.kernels.{module}"), name)


def _implementation(name: str, device: str) -> Callable:
    def run(*arguments: object) -> object:
        # Autograd is on where no autograd.Function is around, as in exported programs, and autocast in a backward that is
        # called under it: the library's products would refuse to write into our memory, or round.
        function = launcher(name)
        if _ranges.on:
            function = _ranges.ranged(f"tiger_fast.kernels.{name}", function)
        with torch.no_grad():
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return function(*arguments)
            return function(*arguments)

    return run


def _register(library: torch.library.Library, device: str) -> None:
    for name in (name for names in _MODULES.values() for name in names):
        library.impl(name, _implementation(name, device), device.upper())


_register(LIBRARY, "cuda")
if INTERPRETED:
    _INTERPRETED = torch.library.Library("tiger_fast_interpreted", "DEF")
    for _schema, _fake in tuple(DEFINED.values()):
        define(_schema, _fake, _INTERPRETED)
    _register(_INTERPRETED, "cpu")
    NATIVE = {name: partial(function, namespace=_INTERPRETED.ns) for name, function in NATIVE.items()}
