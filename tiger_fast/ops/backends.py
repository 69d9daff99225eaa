"""The choice of a backend: an argument, else `use_backend`, else TIGER_FAST_BACKEND, else the device's default."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from tiger_fast import _ranges, reference
from tiger_fast._extras import unknown
from tiger_fast._switch import Switch
from tiger_fast._version import __version__
from tiger_fast.ops import cpu, triton

BACKENDS = ("reference", "cpu", "triton")

# Every function of the contract; the reference has them all.
OPS = (
    "route",
    "leave_one_out",
    "counterfactual_losses",
    "counterfactual_losses_from_projections",
    "causal_target",
    "alignment_loss",
    "group_attention",
    "group_attention_packed",
    "adapter",
    "competency_aggregate",
    "confidence_loss",
    "improvement_loss",
)

# backend -> op -> implementation. An op that a backend does not fuse is absent and runs the reference.
_NATIVE: dict[str, dict[str, Callable]] = {"reference": {name: getattr(reference, name) for name in OPS}}
if cpu.LOADED:
    _NATIVE["cpu"] = cpu.NATIVE
if triton.missing() is None:
    _NATIVE["triton"] = triton.NATIVE
_DEFAULTS = {"cpu": "cpu", "cuda": "triton"}  # by device type; torch calls ROCm devices cuda too

_DEVICES = {"cpu": ("cpu",), "triton": ("cuda", "cpu") if triton.INTERPRETED else ("cuda",)}

# Set by use_backend. A plain global, which torch.compile guards on.
_forced: str | None = None


def _force(backend: str | None) -> None:
    global _forced
    _forced = backend


_SWITCH: Switch[str | None] = Switch(None, _force)


def available_backends() -> tuple[str, ...]:
    """The backends that this installation can run, "reference" always among them."""
    return tuple(name for name in BACKENDS if name in _NATIVE)


def _check(backend: str, source: str) -> str:
    if backend not in BACKENDS:
        raise unknown(f"backend ({source})", backend, BACKENDS)
    if backend not in _NATIVE:
        reason = f" ({triton.missing()})" if backend == "triton" else ""
        raise ValueError(
            f"{source} asks for backend {backend!r}, which this installation of tiger_fast {__version__} does not "
            f"have{reason}; available here: {', '.join(available_backends())}"
        )
    return backend


def resolve(backend: str | None, device: torch.device) -> str:
    """The name of the backend that a call runs on.

    Raises:
        ValueError: for a name that does not exist or that cannot run here.
    """
    if backend is not None:
        return _check(backend, "backend=")
    if _forced is not None:
        return _forced
    from_environment = os.environ.get("TIGER_FAST_BACKEND")
    if from_environment:
        return _check(from_environment, "TIGER_FAST_BACKEND")
    default = _DEFAULTS.get(device.type, "reference")
    return default if default in _NATIVE else "reference"


def select(op: str, backend: str | None, *inputs: Tensor) -> Callable:
    """The implementation of `op` for a backend's name (None: the default) and its inputs' device and types.

    Raises:
        ValueError: for a backend that does not run on the inputs' device.
        TypeError: for one that does not run on their type, if it was asked for by name.
    """
    device = inputs[0].device
    chosen = resolve(backend, device)
    if op not in _NATIVE[chosen]:
        chosen = "reference"
    if chosen != "reference" and device.type not in (*_DEVICES[chosen], "meta"):  # on meta every op gives shapes
        raise ValueError(f"backend {chosen!r} runs on {' and '.join(_DEVICES[chosen])} tensors, got one on {device}")
    if chosen == "triton" and any(t.dtype == torch.float64 for t in inputs):
        if backend is not None or _forced is not None or os.environ.get("TIGER_FAST_BACKEND"):
            raise TypeError(
                "backend 'triton' runs float32, bfloat16 and float16, got float64; backend='reference' has it"
            )
        chosen = "reference"
    implementation = _NATIVE[chosen][op]
    return _ranges.ranged(f"tiger_fast.{op}", implementation) if _ranges.on else implementation


def use_backend(backend: str) -> AbstractContextManager[None]:
    """Within the context, calls without a `backend=` of their own run on this backend, in every thread; of several contexts
    the one entered last counts.

    Raises:
        ValueError: for a name that does not exist or that cannot run here.
    """
    return _SWITCH.to(_check(backend, "use_backend"))


def show_config() -> str:
    """A table, as text: for each function of the contract, what each backend runs ("native" or "reference").

    Below it what calls run on here and now, the instruction set of the compiled CPU kernels, how much memory they keep, and the
    files of tuned launch configurations that are in effect.

    Raises:
        ValueError: where TIGER_FAST_BACKEND names no backend that can run here.
    """
    names = available_backends()
    width = max(map(len, OPS))
    lines = [f"tiger_fast {__version__}, torch {torch.__version__}"]
    lines.append(" ".join([" " * width, *(f"{name:>10}" for name in names)]))
    for op in OPS:
        cells = ["native" if op in _NATIVE[name] and name != "reference" else "reference" for name in names]
        lines.append(" ".join([f"{op:<{width}}", *(f"{cell:>10}" for cell in cells)]))
    lines.append(", ".join(f"{device} tensors: {resolve(None, torch.device(device))}" for device in ("cpu", "cuda")))
    lines.append(cpu.describe() if cpu.LOADED else "cpu: not compiled here")
    lines.append(triton.describe() if "triton" in names else f"triton: not here, {triton.missing()}")
    return "\n".join(lines)
