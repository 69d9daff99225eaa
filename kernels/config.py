"""Launch configurations: a frozen dataclass, a heuristic for each kernel, and files of tuned ones that go before it.

Nothing here depends on B or N. No threshold has been measured on a GPU yet: they come from counting registers and shared
memory (`profiling/static_report.py`), so that nothing spills at the default shape and loads are 16 bytes wide.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from tiger_fast.kernels.launch import power


@dataclass(frozen=True)
class Architecture:
    """What a heuristic may ask of a device: threads of a warp, registers (32 bits) and shared bytes of a multiprocessor,
    shared bytes that one program may have, and whether products can round float32 to tf32."""

    name: str
    warp: int
    registers: int
    shared: int
    shared_of_program: int
    tf32: bool = True


ARCHITECTURES = {
    each.name: each
    for each in (
        Architecture("sm_80", 32, 65536, 164 << 10, 163 << 10),
        Architecture("sm_90", 32, 65536, 228 << 10, 227 << 10),
        Architecture("sm_100", 32, 65536, 228 << 10, 227 << 10),
        Architecture("gfx90a", 64, 131072, 64 << 10, 64 << 10, tf32=False),
        Architecture("gfx942", 64, 131072, 64 << 10, 64 << 10),
        Architecture("gfx950", 64, 131072, 160 << 10, 160 << 10, tf32=False),
    )
}


@dataclass(frozen=True)
class Config:
    """How a kernel is launched. What a kernel has no use for is 0.

    rows: tokens of a program's tile; width: channels (or, without channels, classes) of a step.
    registers: the most that a thread may have, on NVIDIA. Without a limit ptxas looks for the most resident programs, and at
    times spills a few registers for the sake of one more: `ALL` keeps it from that, at the price of residents.
    experts: how many are held at a time. classes: of a tile, beside the channels. members: what a group is padded to for
    products. held: how much of a row is in registers (see `_norm`). columns: of route's factors in one product. one_pass:
    route's first design. resident: programs of a multiprocessor, where each goes on to further tiles."""

    rows: int
    width: int
    num_warps: int
    num_stages: int = 2
    registers: int = 0
    experts: int = 0
    classes: int = 0
    members: int = 0
    held: int = 0
    columns: int = 0
    one_pass: bool = False
    resident: int = 0

    @property
    def options(self) -> dict[str, int]:
        """The launch options that are Triton's own."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


ALL = 255  # registers a thread

_assumed: str | None = None


def assume(architecture: str | None) -> None:
    """Makes heuristics choose for this architecture rather than for the tensors' device (None: for the device again)."""
    global _assumed
    _assumed = architecture


@lru_cache(maxsize=64)
def _architecture_of(index: int | None) -> Architecture:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.partition(":")[0]
        like = ARCHITECTURES["gfx90a"]  # what every one can do
        return ARCHITECTURES.get(name) or replace(like, name=name, warp=properties.warp_size)
    major, minor = properties.major, properties.minor
    known = [name for name in ARCHITECTURES if name.startswith("sm_") and int(name[3:]) <= 10 * major + minor]
    return ARCHITECTURES[known[-1] if known else "sm_80"]


def architecture(device: torch.device) -> Architecture:
    """The architecture that heuristics choose for: the device's own, or the newest known one that can do no more."""
    if _assumed is not None:
        return ARCHITECTURES[_assumed]
    return _architecture_of(device.index) if device.type == "cuda" else ARCHITECTURES["sm_90"]


# Multiprocessors that sums over tokens are split for, a large device's, whatever the device has: the order of a sum, and so
# a parameter's gradient to the bit, is then the same on devices of an architecture.
MULTIPROCESSORS = 132


def precision(tensor: Tensor) -> str:
    """`input_precision` of float32 products beside activations like `tensor`: tf32 beside 16-bit ones, whose rounding is
    coarser or equal; IEEE beside float32, unless torch's own setting allows tf32, and where there is no tf32."""
    allowed = tensor.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and architecture(tensor.device).tf32 else "ieee"


_HEURISTICS: dict[str, Callable[..., Config]] = {}


def heuristic(*kernels: str) -> Callable[[Callable[..., Config]], Callable[..., Config]]:
    """Makes a function of (architecture, itemsize, **facts) the choice for these kernels, each tuned by itself."""

    def registered(function: Callable[..., Config]) -> Callable[..., Config]:
        _HEURISTICS.update(dict.fromkeys(kernels, function))
        return function

    return registered


@lru_cache(maxsize=4096)
def _choose(kernel: str, arch: Architecture, itemsize: int, facts: tuple[tuple[str, int], ...]) -> Config:
    tuned = _tuned().get(_key(kernel, arch.name, itemsize, facts))
    chosen = tuned if tuned is not None else _HEURISTICS[kernel](arch, itemsize, **dict(facts))
    return chosen if arch.name.startswith("sm_") else replace(chosen, registers=0)  # LLVM for AMD takes no limit


_trial: tuple[dict[str, Config], dict[str, Config]] | None = None


def choose(kernel: str, device: torch.device, dtype: torch.dtype, **facts: int) -> Config:
    """The configuration of a kernel for an activation type and the sizes that it is compiled for (never B or N)."""
    arch, found = architecture(device), tuple(facts.items())
    if _trial is None:
        return _choose(kernel, arch, dtype.itemsize, found)
    given, made = _trial
    key = _key(kernel, arch.name, dtype.itemsize, found)
    made[key] = given.get(key) or _choose(kernel, arch, dtype.itemsize, found)
    return made[key]


@contextmanager
def trying(given: dict[str, Config]) -> Iterator[dict[str, Config]]:
    """Within the context these, by their keys, go before everything else. Yields all choices made, by theirs."""
    global _trial
    previous, _trial = _trial, (given, {})
    try:
        yield _trial[1]
    finally:
        _trial = previous


# --- tuned configurations -------------------------------------------------------------------------------------------


def _key(kernel: str, arch: str, itemsize: int, facts: tuple[tuple[str, int], ...]) -> str:
    return " ".join([kernel, arch, f"{itemsize} bytes", *(f"{name}={value}" for name, value in sorted(facts))])


@lru_cache(maxsize=1)
def _tuned() -> dict[str, Config]:
    found: dict[str, Config] = {}
    for file in tuned_files():
        found |= load(file)
    return found


def tuned_files() -> list[Path]:
    """The files that go before the heuristics, the last before the first: the package's, then TIGER_FAST_TUNED."""
    files = sorted(Path(__file__).with_name("tuned").glob("*.json"))
    named = os.environ.get("TIGER_FAST_TUNED")
    return [*files, Path(named)] if named else files


def load(path: Path) -> dict[str, Config]:
    """The configurations of a file that `save` has written.

    Raises:
        ValueError: for a file that cannot be read, or that holds something else; the message names it."""
    of = f"tuned configurations {str(path)!r} (of TIGER_FAST_TUNED, kernels/tuned/ or --out)"
    try:
        configs = json.loads(path.read_text())["configs"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{of} cannot be read: {problem!r}") from problem
    found = {}
    for key, value in configs:
        try:
            found[key] = Config(**value)
            if others := [name for name, number in value.items() if not isinstance(number, int)]:
                raise TypeError(f"{others[0]} is no whole number")
        except TypeError as problem:  # of another version
            raise ValueError(f"{of}, {key!r}: {problem}") from problem
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
    """The power of two from 32 to `limit` that pads `size` least, the largest of equals; less only where `size` is."""
    widths = [w for w in (32, 64, 128, 256, 512, 1024) if w <= limit]
    return min(widths, key=lambda w: (-(-size // w) * w, -w)) if size > 32 else max(16, power(size))


@heuristic("leave_one_out")
def leave_one_out(arch: Architecture, itemsize: int, D: int, M: int) -> Config:
    # Eight elements a thread: two vectors of 16 bytes in float32, one in 16-bit types. Sixteen experts' tiles are then
    # 64 (128) of a thread's registers: of more than eight the forward holds some at a time.
    width = even_width(D, 128)
    elements = 1024 if M <= 8 or itemsize == 2 else 512
    registers = ALL if M > 8 else 0
    return Config(max(1, elements // width), width, 128 // arch.warp, registers=registers, experts=8)


@heuristic("leave_one_out_backward")
def leave_one_out_backward(arch: Architecture, itemsize: int, D: int, M: int, T: int, RENORMALIZE: bool) -> Config:
    # One vector of 16 bytes a thread, and not of many rows, which have numbers of their own. For four experts at a time:
    # cotangents, and gradients in float32.
    width = even_width(D, 128)
    rows = max(1, 2048 // itemsize // width)
    if M > 8 and RENORMALIZE and itemsize == 2:
        return Config(2 * rows, width, 256 // arch.warp, registers=ALL, experts=2)
    registers = ALL if M == 1 or M > 8 else 0
    return Config(min(32, rows), width, 128 // arch.warp, registers=registers, experts=min(M, 4))


def _route(arch: Architecture, itemsize: int, D: int, experts: int, columns: int, stages: int) -> Config:
    # 8 (4 in float32) elements a thread of each tile. Sums of `columns` for each of the experts held.
    width = max(16, min(128 // itemsize, power(D)))
    return Config(16, width, 128 // arch.warp, stages, experts=experts, columns=columns)


@heuristic("route")
def route(arch: Architecture, itemsize: int, D: int, M: int, T: int, W: int) -> Config:
    # Smaller steps where more is held: many tasks' logits of many experts, and many experts' float32 tiles.
    crowded, heavy = M > 8 and T > 16, M > 4 and itemsize == 4
    # Rows shorter than a vector are loaded element by element, with an address each: of fewer experts at a time.
    experts = min(M, 2 if crowded or D * itemsize < 16 else 4)
    c = _route(arch, itemsize, D, experts, 32 if heavy or T > 16 else 64, 1 if crowded and heavy else 2)
    c = replace(c, registers=ALL if M > 8 or T > 16 or itemsize == 4 or D * itemsize < 16 else 0)
    # In one pass every program reads W0, from L2: where that is no more than its own bytes, of 16 tokens' experts and
    # mixtures. Not in float32, whose products by IEEE arithmetic spill.
    return replace(c, one_pass=itemsize == 2 and M <= experts and D <= 16 * (M + T))


@heuristic("route_backward")
def route_backward(arch: Architecture, itemsize: int, D: int, M: int, T: int, W: int) -> Config:
    experts = (1 if M > 8 else 2) if T > 16 else 2 if itemsize == 4 and (M > 4 or W > 128) else 4
    c = _route(arch, itemsize, D, min(M, experts), 32, 1)
    if M > 8 and T > 16 and W > 128:
        c = replace(c, width=min(c.width, 32))
    return replace(c, registers=ALL if M == 1 or M > 8 or T > 16 or W <= 16 or D % c.width else 0)


@heuristic("route_factor_gradients")
def route_factor_gradients(arch: Architecture, itemsize: int, D: int, M: int, W: int) -> Config:
    # A stage holds the tiles of some experts and their Y.
    stages, experts = (3 if arch.warp == 32 else 1, 4) if itemsize == 2 else (1, 2)
    registers = ALL if itemsize == 2 else 0
    return Config(32, even_width(D, 64), 128 // arch.warp, stages, registers, min(M, experts), columns=64)


def _attention_by_elements(warp: int, head: int, vector: int) -> tuple[Config, int]:
    # One vector a thread and member. A head lies within a warp, so that sums over its channels are shuffles; where that is
    # more than a vector a thread, each takes several. The number is elements a thread.
    width = power(head)
    warps = 4 if width <= warp * vector else 1
    each = max(min(vector, width), width // warp)
    return Config(warp * warps * each // width, width, warps, num_stages=1), each


def _attention_by_products(warp: int, G: int, head: int, elements: int, widest: int) -> Config:
    # `elements` of each tile a thread. A warp has whole rows, so that tiles pass between layouts within it; where one row
    # is more than a warp's, several share it.
    members = 16 if G <= 16 else 32
    width = max(16, min(power(head), widest))
    per_warp = warp * elements // (members * width)
    if per_warp == 0:
        return Config(1, width, min(members * width // (warp * elements), 8), 1, members=members)
    return Config(4 * per_warp, width, 4, 1, members=members)


# `vector` is how many elements, of at most 16 bytes, heads begin at multiples of. By elements the whole group is in registers,
# G times `each` of them a tensor, and the work grows with G x G; by products groups are padded to 16. Instructions a byte are
# about even at G = 6 forward in 16-bit types; backward registers are full at 5. Float32 products would have to be by IEEE, on
# the same units, so there elements go on to the last group that does not spill. Beyond heads of 256 only products take steps.
@heuristic("group_attention")
def group_attention(arch: Architecture, itemsize: int, G: int, head: int, vector: int) -> Config:
    if head <= 256:
        c, each = _attention_by_elements(arch.warp, head, vector)
        if G <= (6 if itemsize == 2 else 8) and G * each <= 48:
            return c
    if itemsize == 2:
        return _attention_by_products(arch.warp, G, head, 64 if vector == 8 else 16, 256 if head <= 256 else 128)
    return _attention_by_products(arch.warp, G, head, 16, 64 if G <= 16 or head > 32 else 32)


@heuristic("group_attention_backward")
def group_attention_backward(arch: Architecture, itemsize: int, G: int, head: int, vector: int) -> Config:
    if head <= 256:
        c, each = _attention_by_elements(arch.warp, head, vector)
        if G <= (5 if itemsize == 2 else 8) and G * each <= 40:
            return c
    if itemsize == 2:
        return _attention_by_products(arch.warp, G, head, 32 if vector == 8 else 16, 256 if head <= 256 else 128)
    return _attention_by_products(arch.warp, G, head, 8, 32)


@heuristic("counterfactual")
def counterfactual(arch: Architecture, itemsize: int, D: int, M: int, C: int) -> Config:
    # One tile of all classes; 0 where the library is to make the products. Four warps: small programs, so that
    # while one makes its losses, others read. A thread has M accumulators beside as much of some three tiles more (logits,
    # target and what is made of them) and M + 1 numbers of each token.
    classes = power(max(C, 16))
    if M * classes > 512 or (M + 3) * classes > 1024:
        return Config(rows=16, width=0, num_warps=4)
    rows = 32 if itemsize == 2 and M <= 4 and (M + 3) * classes <= 448 else 16
    stages = 3 if arch.warp == 32 else 2
    # Rows of whole lines of 128 bytes, if there is room.
    shared = stages * (rows * M + classes) * itemsize
    width = next((w for w in (128 // itemsize, 64 // itemsize) if w * shared <= arch.shared_of_program), 16)
    # Products in float32 are done in registers. Left to itself ptxas spills 36 bytes on sm_90 for a sixth resident program;
    # with either limit five are resident without a spill. On sm_80 the limits give it 128 registers in place of 96, for four.
    registers = 0 if itemsize == 2 else 128 if 1 < M <= 4 else ALL
    return Config(rows, min(width, max(16, power(D))), 128 // arch.warp, stages, registers, classes=classes)


def _counterfactual_tile(arch: Architecture, M: int, C: int, elements: int) -> Config:
    # `elements` a thread of each of the M tiles; up to 128 classes in one tile, more in such that pad them least.
    width = max(16, power(C)) if C <= 128 else 64 if -(-C // 64) % 2 else 128
    return Config(max(1, elements * 128 // width), width, 128 // arch.warp, 1, ALL if M > 4 else 0)


# Where classes come in several tiles, a thread keeps addresses (one for each element that is loaded alone, so fewer
# elements where rows are not aligned) and up to four numbers of each token and expert between them.


@heuristic("counterfactual_from_projections")
def counterfactual_from_projections(arch: Architecture, itemsize: int, M: int, C: int, ALIGN: int) -> Config:
    if C <= 128:
        return _counterfactual_tile(arch, M, C, 8 if M <= 8 else 16 // itemsize)
    elements = 8 if M <= 4 else 4 if M <= 8 else 1
    return _counterfactual_tile(arch, M, C, elements if ALIGN * itemsize >= 8 else max(1, elements // 2))


@heuristic("counterfactual_gradients")
def counterfactual_gradients(arch: Architecture, itemsize: int, M: int, C: int, ALIGN: int) -> Config:
    # M projections and M + 1 gradients of logits at once.
    if C <= 128:
        # A vector of 16 bytes each, except of more than eight experts in 16-bit types, which would be too many registers.
        return _counterfactual_tile(arch, M, C, 8 if M <= 8 else itemsize)
    elements = 8 if M <= 4 else 2 if M <= 8 else 1
    return _counterfactual_tile(arch, M, C, elements if ALIGN * itemsize >= 8 else max(1, elements // 4))


@heuristic("counterfactual_features")
def counterfactual_features(arch: Architecture, itemsize: int, D: int, C: int) -> Config:
    if itemsize == 4:
        # Four warps: of eight with twice the rows ptxas spills a few registers for one more resident program.
        return Config(32, min(64, max(16, power(D))), 128 // arch.warp, 2, classes=16)
    return Config(64, min(128, max(16, power(D))), 256 // arch.warp, 2, classes=min(64, power(max(16, C))))


@heuristic("counterfactual_head")
def counterfactual_head(arch: Architecture, itemsize: int, D: int, C: int) -> Config:
    # `rows`, the tokens of a step, are how deep a product is: for float32 in registers. Of many classes larger tiles, for
    # the features are read once for each.
    stages = 3 if arch.warp == 32 else 2
    if itemsize == 4:
        classes = min(64, power(max(16, C)))
        registers = 80 if classes == 16 else 0  # three programs without a spill rather than four
        return Config(16, min(64, max(16, power(D))), 256 // arch.warp, stages, registers, classes=classes)
    if C <= 64:
        return Config(64, min(64, max(16, power(D))), 128 // arch.warp, stages, classes=power(max(16, C)))
    return Config(64, min(128, max(16, power(D))), 256 // arch.warp, 2, classes=128)


@heuristic("alignment_loss", "alignment_loss_backward", "causal_target", "causal_target_backward")
def _rows_of_experts(arch: Architecture, itemsize: int, M: int) -> Config:
    # Four elements a thread: a row of four experts in float32 is one load, one of sixteen four lanes'.
    width = power(M)
    return Config(rows=1024 // width, width=width, num_warps=256 // arch.warp)


@heuristic("competency_confidences")
def _parts_of_experts(arch: Architecture, itemsize: int, M: int) -> Config:
    # One program a sample: a tile of the rows' sums is what it adds up at a time.
    width = power(M)
    return Config(rows=512 // width, width=width, num_warps=256 // arch.warp)


def _row(arch: Architecture, itemsize: int, D: int, registers: float, limit: float) -> Config | None:
    # Tiles of 16 bytes a thread, a row on as few threads as leave its elements there within the limit at this many
    # registers each.
    vector = 16 // itemsize
    for threads in (128, 256):
        width = min(32 * vector, max(16, power(D)))
        while width <= threads * vector:
            if -(-D // width) * vector * registers <= limit:
                return Config(threads * vector // width, width, threads // arch.warp, registers=ALL)
            width *= 2
    return None


def _norm(arch: Architecture, itemsize: int, D: int, registers: float, more: float = 0, others: int = 40) -> Config:
    # A kernel with rows in registers, `registers` for each element of one, and `more` if it is to read nothing
    # twice (held 2), or without these (held 1); tile by tile if no row fits (held 0). `others` is what the rest takes.
    for held, each in ((2, registers + more), (1, registers)):
        if (held == 1 or more) and (found := _row(arch, itemsize, D, each, 240 - others)):
            used = -(-D // found.width) * 16 // itemsize * each + others
            resident = arch.registers // int(used * found.num_warps * arch.warp)
            return replace(found, held=held, resident=min(8, resident))
    return Config(rows=1, width=4096 // itemsize, num_warps=256 // arch.warp, registers=ALL, resident=2)


@heuristic("column_sums")
def column_sums(arch: Architecture, itemsize: int, D: int) -> Config:
    # Few columns a program, for there are few columns; a warp reads 128 bytes of each of eight rows.
    return Config(rows=32, width=32, num_warps=128 // arch.warp)


@heuristic("competency_aggregate")
def competency_aggregate(arch: Architecture, itemsize: int, D: int, M: int) -> Config:
    # The row, and what is loaded ahead of it: more with more experts, for ptxas takes what registers there are.
    return _norm(arch, itemsize, D, registers=2, others=140 + 4 * M)


@heuristic("competency_aggregate_backward")
def competency_aggregate_backward(arch: Architecture, itemsize: int, D: int, M: int) -> Config:
    # x or h, g and two sums; the experts' tiles, in float32 whatever they were, for nothing is converted twice.
    return _norm(arch, itemsize, D, registers=6, more=M, others=48 + 7 * M)


@heuristic("adapter_in_forward", "adapter_out_forward")
def _adapter_forward(arch: Architecture, itemsize: int, D: int) -> Config:
    # A row.
    return _norm(arch, itemsize, D, registers=2, others=150)


@heuristic("adapter_in_backward")
def adapter_in_backward(arch: Architecture, itemsize: int, D: int) -> Config:
    # x or h, g and two sums.
    return _norm(arch, itemsize, D, registers=5)


@heuristic("adapter_out_backward")
def adapter_out_backward(arch: Architecture, itemsize: int, D: int) -> Config:
    # s or h, g, the gate's slope and four sums.
    return _norm(arch, itemsize, D, registers=9)
