"""The shapes that are measured, by name, and what a run may change of them; whether a shape fits in memory."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiger_fast import _checks as limits
from tiger_fast import available_backends
from tiger_fast._examples import Sizes
from tiger_fast._extras import unknown
from tiger_fast.ops import backends

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")
# In the order of the table. "algebra" is the kernels' algebra in plain PyTorch, so that what the algebra gains is not taken
# for what fusion gains.
PEERS = (
    "eager",
    "compile",
    "compile-max-autotune",
    "algebra",
    "algebra-compile",
    "sdpa",
    "flash-attn",
    "xformers",
    "liger",
    "quack",
)
# Limits of the contract; other sizes have none above.
MOST = {"M": limits.MAX_EXPERTS, "T": limits.MAX_TASKS, "R": limits.MAX_RANK, "G": limits.MAX_GROUP}


@dataclass(frozen=True)
class Preset:
    """A shape and what goes with it.

    Attributes:
        about: what it is, in a line.
        sizes: of every op but those in `changes`, which lists what differs by op.
        dtype, device: where --dtype and --device say nothing; device None: CUDA where there is a GPU.
        ops: what is measured of the contract's functions.
        models: whether the Router, the TIGER head and its training step are measured.
        batch, grid, patch_size, decoder, hidden, query_width: of these, beside the sizes (`TIGERSettings`).
        peers: names of those that are measured unless --peers says otherwise; None: all.
        compiled: the ops that torch.compile takes part for, at the preset's sizes; None: everything.
        seconds: of rounds for each callable.
        ends: whether the scaling suite takes the outermost values of each size alone.
        kept_threads: of the process with kept memory; None: as many as the run has. Calls of a tenth of a millisecond
            wait for a second thread for about as long as they work, and for how long changes from process to process.
    """

    about: str
    sizes: Sizes
    changes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    dtype: str = "float32"
    device: str | None = None
    ops: tuple[str, ...] = backends.OPS
    models: bool = True
    batch: int = 1
    grid: tuple[int, int] = (32, 32)
    patch_size: int = 4
    decoder: tuple[tuple[int, int], ...] = ((128, 1), (64, 1))
    hidden: int = 1024
    query_width: int = 16
    peers: tuple[str, ...] | None = None
    compiled: tuple[str, ...] | None = None
    seconds: float = 2.0
    ends: bool = False
    kept_threads: int | None = None


# The papers' decoder and query encoder, at full size; what stands around the routing in a real step.
_FULL: dict[str, Any] = {"patch_size": 16, "decoder": ((1024, 8), (512, 2)), "query_width": 64}

PRESETS: dict[str, Preset] = {
    "smoke": Preset(
        "small: every benchmark against eager, route and leave_one_out against torch.compile too",
        Sizes(B=2, N=256, D=192, M=4, T=3, R=16, C=20, G=4, heads=4),
        {"adapter": {"C": 192}},
        grid=(16, 16),
        batch=2,
        decoder=((32, 1), (16, 1)),
        hidden=192,
        peers=("eager", "compile"),
        compiled=("route", "leave_one_out"),
        seconds=0.12,
        ends=True,
        kept_threads=1,
    ),
    "design": Preset(
        "the shape that figures for CPUs are stated for; a small decoder",
        Sizes(),
        {"alignment_loss": {"B": 8}, "causal_target": {"B": 8}, "adapter": {"C": 768}},
        device="cpu",
    ),
    "nyud-b": Preset(
        "NYUD-v2, CLIP-B, DINOv2-B and SAM-B: 448 x 576 pixels at patch 16, 4 tasks, 40 classes, 2 images",
        Sizes(B=2, N=28 * 36, M=3, T=4, G=3),
        {"adapter": {"C": 768}},
        batch=2,
        grid=(28, 36),
        **_FULL,
    ),
    "pascal-l": Preset(
        "PASCAL-Context, CLIP-L, DINOv2-L, SAM-B and OWLv2-L: 512 x 512 pixels at patch 16, 5 tasks, 2 images",
        Sizes(B=2, C=21),
        {"adapter": {"C": 1024}},
        batch=2,
        **_FULL,
    ),
    "gpu": Preset(
        "the shape that figures for GPUs are stated for; the papers' decoder, at batch 4",
        Sizes(B=32),
        {"adapter": {"C": 768}},
        dtype="bfloat16",
        device="cuda",
        batch=4,
        **_FULL,
    ),
    # D = 768 with three adapters and q, k, v of the concatenated width 3 D is 19.4M parameters, of the paper's 19.9M.
    "taver-cls": Preset(
        "TAVER, classification: 224 pixels at patch 14, CLIP-L, DINOv2-L and SAM-B, one task",
        Sizes(B=32, N=16 * 16, M=3, T=1, C=1024, G=3, heads=3),
        ops=("adapter", "competency_aggregate", "confidence_loss", "improvement_loss"),
        models=False,
    ),
}


class NoGPU(ValueError):
    """A GPU was asked for, and there is none that torch can use."""


@dataclass(frozen=True)
class Settings:
    """What a run was asked for; `settings` makes one from options as text.

    Attributes:
        name: the preset's.
        preset: the preset itself.
        changes: sizes that differ from it.
        dtype, device: of activations, and where they are.
        backend: of ours; None: the device's own for what is native there.
        seconds: of rounds for each callable.
        peers: names of those that take part; None: those of the preset.
        max_autotune: torch.compile's max-autotune on a CPU too; on CUDA it always takes part.
    """

    name: str
    preset: Preset
    changes: Mapping[str, int]
    dtype: str
    device: str
    backend: str | None
    seconds: float
    peers: tuple[str, ...] | None = None
    max_autotune: bool = False

    def sizes(self, subject: str, variant: Mapping[str, int] | None = None) -> Sizes:
        """The sizes of an op, or of a model, with a variant's.

        Raises:
            ValueError: where they do not go together.
        """
        found = replace(
            self.preset.sizes, **{**self.preset.changes.get(subject, {}), **self.changes, **(variant or {})}
        )
        check(found)
        return found

    def options(self) -> dict[str, Any]:
        """What `settings` makes the same of, but for the peers; plain values."""
        return {
            "preset": self.name,
            "shape": ",".join(f"{name}={value}" for name, value in self.changes.items()) or None,
            "dtype": self.dtype,
            "device": self.device,
            "backend": self.backend,
            "seconds": self.seconds,
            "max_autotune": self.max_autotune,
        }

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of activations."""
        return getattr(torch, self.dtype)

    def backend_of(self, op: str) -> str:
        """The backend whose numbers are "ours": the one asked for, else the device's, where the op is native there, else
        "reference" (against itself)."""
        if self.backend is not None:
            return self.backend
        chosen = "triton" if self.device == "cuda" else "cpu"
        return chosen if op in native_ops(chosen) else "reference"


def native_ops(backend: str = "cpu") -> tuple[str, ...]:
    """The ops that the backend fuses here; none where this installation does not have it."""
    return tuple(op for op in backends.OPS if backend in available_backends() and op in backends._NATIVE[backend])


def settings(
    preset: str = "smoke",
    *,
    shape: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    backend: str | None = None,
    seconds: float | None = None,
    peers: str | None = None,
    max_autotune: bool = False,
) -> Settings:
    """Settings from options as they are typed.

    Args:
        preset: a name among `PRESETS`.
        shape: "B=8,N=4096": sizes that differ.
        dtype, device, backend, seconds, max_autotune: see `Settings`; None: the preset's.
        peers: "eager,sdpa"; "all".

    Raises:
        ValueError: in one line, what is wrong and what would do.
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    chosen = PRESETS[preset]
    changes = parse_shape(shape) if shape else {}
    device = device or chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for kind, name, known in (("device", device, DEVICES), ("dtype", dtype or chosen.dtype, DTYPES)):
        if name not in known:
            raise unknown(kind, name, known)
    if device == "cuda" and not torch.cuda.is_available():
        raise NoGPU("device cuda: there is no GPU here that torch can use; --device cpu measures the same on the CPU")
    if backend is not None:
        backends.resolve(backend, torch.device(device))
        if device not in backends._DEVICES.get(backend, (device,)):
            raise ValueError(f"backend {backend!r} does not run on {device} tensors")
    if seconds is not None and not 0 < seconds < 3600:
        raise ValueError(f"seconds must be more than 0 and less than an hour, got {seconds}")
    wanted = chosen.peers if peers is None else None if peers == "all" else tuple(peers.split(","))
    for name in wanted or ():
        if name not in PEERS:
            raise unknown("peer", name, PEERS)
    found = Settings(
        preset,
        chosen if peers is None else replace(chosen, compiled=None),
        changes,
        dtype or chosen.dtype,
        device,
        backend,
        seconds or chosen.seconds,
        wanted,
        max_autotune,
    )
    for op in chosen.ops:
        found.sizes(op)
    return found


def parse_shape(text: str) -> dict[str, int]:
    """ "B=8,N=4096" as a dict.

    Raises:
        ValueError: for a word of another form, a size that does not exist or is named twice, or one that is not a whole number
            from 1 to 2^31 - 1.
    """
    found: dict[str, int] = {}
    names = tuple(asdict(Sizes()))
    for word in text.split(","):
        name, equals, value = word.strip().partition("=")
        if not equals or not value.isdecimal() or not 0 < int(value) < 2**31:
            raise ValueError(
                f"shape {text!r}: {word.strip()!r} is not NAME=NUMBER, such as B=8,N=4096, from 1 to 2^31 - 1"
            )
        if name not in names:
            raise ValueError(f"shape {text!r}: there is no size {name!r} (known: {', '.join(names)})")
        if name in found:
            raise ValueError(f"shape {text!r} names {name} twice")
        found[name] = int(value)
    return found


def check(sizes: Sizes) -> None:
    """Refuses sizes that no op takes.

    Raises:
        ValueError: in one line.
    """
    for name, most in MOST.items():
        if getattr(sizes, name) > most:
            raise ValueError(f"shape: {name}={getattr(sizes, name)} is above the limit of {most}")
    if sizes.D % sizes.heads:
        raise ValueError(f"shape: heads={sizes.heads} does not divide D={sizes.D}")


# -- memory ------------------------------------------------------------------------------------------------------------


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operators have made and that are still alive, and the most of them at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        result = operator(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone(_: object) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)


def peak(make: Callable[[], Callable[[], Any]]) -> int:
    """Bytes of all tensors at once that `make`, a call of what it returns, and a second one with the first one's results
    still there hold at most; without holding any."""
    with FakeTensorMode(), _Live() as live:
        call = make()
        results = call(), call()
        del results
    return live.peak


def available(device: str) -> int | None:
    """Bytes that can still be had: of what the machine, its container or its batch job, or the GPU has. None: not known."""
    if device == "cuda":
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + kept
    found = [_available_to_machine(), _available_to_groups()]
    return min((value for value in found if value is not None), default=None)


def _available_to_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


# Of both versions of Linux's control groups: where they are mounted, what /proc/self/cgroup calls the controller, a group's
# files of its limit and of its use, and what stands before the fields of its memory.stat that are of it and the groups in it.
_GROUPS = (
    ("sys/fs/cgroup", "", "memory.max", "memory.current", ""),
    ("sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


def _available_to_groups(root: Path = Path("/")) -> int | None:
    # The least of the process's own group and of those around it, each of which may have a limit.
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    groups = (line.split(":", 2) for line in lines)
    paths = {controller: path for _, controllers, path in groups for controller in controllers.split(",")}
    found = []
    for mounted, controller, *files in _GROUPS:
        # In a container the path may be the one that is seen from outside; the container's group is mounted at the top then.
        top = root / mounted
        own = top / paths.get(controller, "/")[1:]
        found += [_available_to_group(each, *files) for each in (own, *own.parents) if each.is_relative_to(top)]
    return min((value for value in found if value is not None), default=None)


def _available_to_group(folder: Path, limit: str, use: str, prefix: str) -> int | None:
    try:
        most, used = ((folder / name).read_text().strip() for name in (limit, use))
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # Files that it has in memory are dropped before anything runs short.
        files = sum(int(fields[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
        return None if most == "max" else int(most) - int(used) + files
    except (OSError, KeyError, ValueError):
        return None
