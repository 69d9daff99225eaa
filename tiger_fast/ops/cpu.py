"""The "cpu" backend: the compiled kernels of csrc/, if this installation has them."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from tiger_fast.ops.adapter import adapter
from tiger_fast.ops.alignment import alignment_loss, causal_target
from tiger_fast.ops.competency_aggregate import competency_aggregate
from tiger_fast.ops.counterfactual import counterfactual_losses, counterfactual_losses_from_projections
from tiger_fast.ops.group_attention import group_attention, group_attention_packed
from tiger_fast.ops.leave_one_out import leave_one_out
from tiger_fast.ops.library import LIBRARY
from tiger_fast.ops.route import route

for _schema in (
    "cpu_empty_cache() -> ()",
    "cpu_cached_bytes() -> int",
    "cpu_cache_limit() -> int",
    "cpu_level() -> str",
    "cpu_set_poison(bool on) -> ()",
):
    LIBRARY.define(_schema)

# What the compiled library runs; everything else runs the reference.
NATIVE: dict[str, Callable] = {
    "route": route,
    "group_attention": group_attention,
    "group_attention_packed": group_attention_packed,
    "leave_one_out": leave_one_out,
    "causal_target": causal_target,
    "alignment_loss": alignment_loss,
    "adapter": adapter,
    "competency_aggregate": competency_aggregate,
    "counterfactual_losses": counterfactual_losses,
    "counterfactual_losses_from_projections": counterfactual_losses_from_projections,
}


def _load() -> bool:
    # The variable lets a build with a sanitizer, or of another instruction set, take the place of the installed one.
    if named := os.environ.get("TIGER_FAST_NATIVE_LIBRARY"):
        try:
            torch.ops.load_library(Path(named))
        except OSError as error:
            raise ImportError(f"TIGER_FAST_NATIVE_LIBRARY is {named!r}: {error}") from error
        if not torch._C._dispatch_has_kernel_for_dispatch_key("tiger_fast::route", "CPU"):
            raise ImportError(f"TIGER_FAST_NATIVE_LIBRARY is {named!r}, a library without tiger_fast's kernels")
        return True
    package = Path(__file__).parents[1]
    path = package / "_native.abi3.so"
    if not path.exists():
        if os.environ.get("TIGER_FAST_BACKEND") == "reference":
            return False  # nothing is missing
        reason = f"has no compiled CPU kernels in {package}"
        if (package.parent / "csrc").exists():
            reason += ", a source tree, where `make native` compiles them"
        else:
            reason += ": it was installed where no C++ compiler was found, or with TIGER_FAST_NATIVE=0"
    else:
        try:
            torch.ops.load_library(path)
            return True
        except OSError as error:
            reason = f"cannot load its compiled CPU kernels: {error}"
    warnings.warn(f"tiger_fast {reason}; on CPUs it runs the slower reference backend", stacklevel=2)
    return False


LOADED = _load()


def empty_cache() -> None:
    """Returns the memory that the "cpu" backend keeps for later outputs to the system.

    It keeps the blocks of outputs of 1 MiB and more that no tensor uses any more, at most TIGER_FAST_CACHE_MIB mebibytes
    of them, by default 1 GiB or an eighth of the machine's or the container's memory, whichever is less.
    """
    if LOADED:
        torch.ops.tiger_fast.cpu_empty_cache()


def describe() -> str:
    """The instruction set that the kernels run with, and the memory that they keep, in a line."""
    ops = torch.ops.tiger_fast
    kept, limit = ops.cpu_cached_bytes() >> 20, ops.cpu_cache_limit() >> 20
    return f"cpu: level {ops.cpu_level()}, keeps {kept} of at most {limit} MiB for later outputs (TIGER_FAST_CACHE_MIB)"
