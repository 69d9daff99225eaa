"""Named ranges for profilers: what Nsight Systems, Nsight Compute and torch.profiler show around the kernels.

Off, which is how a process starts without TIGER_FAST_NVTX=1, a function of the contract pays one look at `on`, a phase of a
model one call that makes nothing. On, a range is torch.profiler's, on any device, and NVTX's where torch is built for a GPU.
What torch.compile or torch.export traces has none of its own; the operators that it then calls still have theirs.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function

from tiger_fast._switch import Switch

_DEFAULT = os.environ.get("TIGER_FAST_NVTX") == "1"
# Read where ranges begin. A plain global, which torch.compile guards on.
on = _DEFAULT
_NVTX = torch.backends.cuda.is_built()


def _turn(enabled: bool) -> None:
    global on
    on = enabled


_SWITCH = Switch(_DEFAULT, _turn)


def profiler_ranges(enabled: bool = True) -> AbstractContextManager[None]:
    """Within the context ranges are on, or off, in every thread; of several contexts the one entered last counts.
    TIGER_FAST_NVTX=1 puts them on for a process.

    The names are `tiger_fast.<function>` for the functions of the contract, `tiger_fast.kernels.<operator>` for what Triton
    runs, forward and backward, `tiger.<phase>` for the parts of a TIGER model, and `trainer.<part>` for a training step's.
    """
    return _SWITCH.to(enabled)


def phase(name: str) -> AbstractContextManager:
    """The range of a name, or a context that does nothing where ranges are off."""
    return _range(name) if on and not torch.compiler.is_compiling() else nullcontext()


def ranged(name: str, function: Callable) -> Callable:
    """`function` in the range of a name; for where `on` has been looked at already."""
    if torch.compiler.is_compiling():
        return function

    def call(*arguments: Any) -> Any:
        with _range(name):
            return function(*arguments)

    return call


@contextmanager
def _range(name: str) -> Iterator[None]:
    with record_function(name):
        if not _NVTX:
            yield
            return
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()
