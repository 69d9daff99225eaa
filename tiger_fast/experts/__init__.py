"""Frozen vision experts behind one interface."""

from tiger_fast.experts.base import Expert
from tiger_fast.experts.specialists import SPECIALISTS, Specialist, load_specialists

__all__ = ["SPECIALISTS", "Expert", "Specialist", "load_specialists"]
