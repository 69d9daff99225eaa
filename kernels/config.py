"""Launch configurations: a frozen dataclass, a heuristic for each kernel, and files of tuned ones that go before it.

Nothing here depends on B or N. No threshold has been measured on a GPU yet: they come from counting registers and shared
memory (`profiling/static_report.py`), so that nothing spills at the limits and every load is 16 bytes wide.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from tiger_fast.kernels.launch import power


@dataclass(frozen=True)
class Architecture:
    """What a heuristic may ask of a device: threads of a warp, registers (32 bits) and shared bytes of a multiprocessor,
    shared bytes that one program may have, and how many registers a thread may have."""

    name: str
    warp: int
    registers: int
    shared: int
    shared_of_program: int
    registers_of_thread: int = 255


ARCHITECTURES = {
    each.name: each
    for each in (
        Architecture("sm_80", 32, 65536, 164 << 10, 163 << 10),
        Architecture("sm_90", 32, 65536, 228 << 10, 227 << 10),
        Architecture("sm_100", 32, 65536, 228 << 10, 227 << 10),
        Architecture("gfx942", 64, 131072, 64 << 10, 64 << 10, 512),
    )
}


@dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    rows: tokens of a program's tile; width: channels (or classes) of a step; group: what a kernel says it is; resident:
    programs of a multiprocessor, where each goes on to further tiles."""

    rows: int
    width: int
    num_warps: int
    num_stages: int = 2
    group: int = 1
    resident: int = 1


_assumed: str | None = None


def assume(architecture: str | None) -> None:
    """Makes heuristics choose for this architecture rather than for the tensors' device (None: for the device again)."""
    global _assumed
    _assumed = architecture


@lru_cache(maxsize=64)
def _architecture_of(index: int | None) -> Architecture:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return ARCHITECTURES["gfx942"]
    major, minor = properties.major, properties.minor
    known = [name for name in ARCHITECTURES if name.startswith("sm_") and int(name[3:]) <= 10 * major + minor]
    return ARCHITECTURES[known[-1] if known else "sm_80"]


def architecture(device: torch.device) -> Architecture:
    """The architecture that heuristics choose for: the newest known one that is not newer than the device's."""
    if _assumed is not None:
        return ARCHITECTURES[_assumed]
    return _architecture_of(device.index) if device.type == "cuda" else ARCHITECTURES["sm_90"]


@lru_cache(maxsize=64)
def _multiprocessors_of(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has: the sums over tokens are split among them."""
    return _multiprocessors_of(device.index) if device.type == "cuda" else 132


def unspilled(device: torch.device) -> dict[str, int]:
    """A launch's constants that keep ptxas from spilling a few registers for the sake of one more resident program, as it
    does without a limit: it then uses what it needs, up to all that a thread can have."""
    return {"maxnreg": 255} if architecture(device).name.startswith("sm_") else {}


_HEURISTICS: dict[str, Callable[..., Config]] = {}


def heuristic(function: Callable[..., Config]) -> Callable[..., Config]:
    """Makes a function of (architecture, itemsize, **facts) the choice for the kernel of its name."""
    _HEURISTICS[function.__name__] = function
    return function


@lru_cache(maxsize=4096)
def _choose(kernel: str, arch: Architecture, itemsize: int, facts: tuple[tuple[str, int], ...]) -> Config:
    tuned = _tuned().get(_key(kernel, arch.name, itemsize, facts))
    return tuned if tuned is not None else _HEURISTICS[kernel](arch, itemsize, **dict(facts))


def choose(kernel: str, device: torch.device, dtype: torch.dtype, **facts: int) -> Config:
    """The configuration of a kernel for an activation type and the sizes that it is compiled for (never B or N)."""
    return _choose(kernel, architecture(device), dtype.itemsize, tuple(facts.items()))


# --- tuned configurations -------------------------------------------------------------------------------------------


def _key(kernel: str, arch: str, itemsize: int, facts: tuple[tuple[str, int], ...]) -> str:
    return " ".join([kernel, arch, f"{itemsize} bytes", *(f"{name}={value}" for name, value in sorted(facts))])


@lru_cache(maxsize=1)
def _tuned() -> dict[str, Config]:
    # Files beside this one are part of the package; TIGER_FAST_TUNED names one more, which goes before them.
    files = sorted(Path(__file__).with_name("tuned").glob("*.json"))
    if named := os.environ.get("TIGER_FAST_TUNED"):
        files.append(Path(named))
    found: dict[str, Config] = {}
    for file in files:
        found |= {key: Config(**value) for key, value in json.loads(file.read_text())["configs"].items()}
    return found


def save(path: Path, configs: dict[str, Config], measured_on: dict[str, str]) -> None:
    """Writes tuned configurations to a file that `TIGER_FAST_TUNED`, or a place in kernels/tuned/, makes effective."""
    content = {"measured_on": measured_on, "configs": {key: asdict(value) for key, value in sorted(configs.items())}}
    path.write_text(json.dumps(content, indent=1) + "\n")


def reload() -> None:
    """Forgets every choice made so far, and reads the tuned files again."""
    _tuned.cache_clear()
    _choose.cache_clear()


# --- heuristics -----------------------------------------------------------------------------------------------------


def even_width(size: int, limit: int) -> int:
    """The power of two up to `limit`, and not under 16, that pads `size` least; the largest of equals."""
    widths = [w for w in (16, 32, 64, 128, 256, 512, 1024) if w <= limit] or [16]
    return min(widths, key=lambda w: (-(-size // w) * w, -w)) if size > 16 else 16


@heuristic
def leave_one_out(arch: Architecture, itemsize: int, D: int, M: int) -> Config:
    # Eight elements a thread: two vectors of 16 bytes in float32, one in 16-bit types. Sixteen experts' tiles are then
    # 64 (128) of a thread's registers.
    width = even_width(D, 128)
    elements = 1024 if M <= 8 or itemsize == 2 else 512
    return Config(rows=max(1, elements // width), width=width, num_warps=128 // arch.warp)


@heuristic
def leave_one_out_backward(arch: Architecture, itemsize: int, D: int, M: int, T: int) -> Config:
    # M gradients in float32 beside M experts' tiles and M cotangents'.
    width = even_width(D, 128)
    elements = (1024 if M <= 4 else 512) // (itemsize // 2)
    return Config(rows=max(1, elements // width), width=width, num_warps=128 // arch.warp, group=power(T))


@heuristic
def alignment(arch: Architecture, itemsize: int, M: int) -> Config:
    # Four elements a thread: a row of four experts in float32 is one load, one of sixteen four lanes'.
    width = power(M)
    return Config(rows=1024 // width, width=width, num_warps=256 // arch.warp)


def _row(arch: Architecture, itemsize: int, D: int, registers: float, limit: float) -> Config | None:
    # Tiles of 16 bytes a thread, a row on as few threads as leave its elements there within the limit at this many
    # registers each.
    vector = 16 // itemsize
    for threads in (128, 256):
        width = min(32 * vector, max(16, power(D)))
        while width <= threads * vector:
            if -(-D // width) * vector * registers <= limit:
                return Config(rows=threads * vector // width, width=width, num_warps=threads // arch.warp)
            width *= 2
    return None


def _norm(arch: Architecture, itemsize: int, D: int, registers: float, held: float = 0, others: int = 40) -> Config:
    # A kernel with rows in registers, `registers` for each element of one, and `held` more if it is to read nothing
    # twice (group 2), or without these (group 1); tile by tile if no row fits (group 0). `others` is what the rest takes.
    for group, each in ((2, registers + held), (1, registers)):
        if (group == 1 or held) and (found := _row(arch, itemsize, D, each, 240 - others)):
            used = -(-D // found.width) * 16 // itemsize * each + others
            resident = arch.registers // int(used * found.num_warps * arch.warp)
            return replace(found, group=group, resident=min(8, resident))
    return Config(rows=1, width=4096 // itemsize, num_warps=256 // arch.warp, group=0, resident=2)


@heuristic
def column_sums(arch: Architecture, itemsize: int, D: int) -> Config:
    # Few columns a program, for there are few columns; a warp reads 128 bytes of each of eight rows.
    return Config(rows=32, width=32, num_warps=128 // arch.warp)


@heuristic
def competency_aggregate(arch: Architecture, itemsize: int, D: int, M: int) -> Config:
    # The row, and what is loaded ahead of it: more with more experts, for ptxas takes what registers there are.
    return _norm(arch, itemsize, D, registers=2, others=140 + 4 * M)


@heuristic
def competency_aggregate_backward(arch: Architecture, itemsize: int, D: int, M: int) -> Config:
    # x or h, g and two sums; the experts' tiles, in float32 whatever they were, for nothing is converted twice.
    return _norm(arch, itemsize, D, registers=6, held=M, others=48 + 7 * M)


@heuristic
def adapter(arch: Architecture, itemsize: int, D: int) -> Config:
    # Both norms' forwards: a row.
    return _norm(arch, itemsize, D, registers=2, others=150)


@heuristic
def adapter_in_backward(arch: Architecture, itemsize: int, D: int) -> Config:
    # x or h, g and two sums.
    return _norm(arch, itemsize, D, registers=5)


@heuristic
def adapter_out_backward(arch: Architecture, itemsize: int, D: int) -> Config:
    # s or h, g, the gate's slope and four sums.
    return _norm(arch, itemsize, D, registers=9)
