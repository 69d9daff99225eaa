"""The timing core: callables measured against each other in one process, interleaved, once their outputs agree.

A measurement runs in rounds. A round calls every callable in a shuffled order (a fixed one would always put the same
neighbour's data into the caches before the same callable), as often in a row as makes a sample long enough for the
clock. Outputs are dropped after each call, inside the sample, so every call allocates as a user's would.
"""

import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
Clock = Callable[[], float]

ROOT = Path(__file__).resolve().parents[1]
# A sample shorter than this is one of several calls: perf_counter's own cost, 0.1 us, stays below a thousandth.
SAMPLE_SECONDS = 2e-4
# Larger than any last-level cache in use, and large enough that its pages dominate a fresh allocation.
COPY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Plan:
    """How long to measure: seconds of warm-up and of rounds for each callable, and the least and most rounds.

    `least` rounds are made however long they take; fewer than 6 give no noise estimate (see `median_interval`).
    """

    warmup: float = 0.3
    seconds: float = 2.0
    least: int = 9
    most: int = 400


@dataclass(frozen=True)
class Timing:
    """Seconds per call, a sample a round, and how many calls a sample is the mean of."""

    samples: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile of the rounds."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    def summary(self) -> dict[str, float | int]:
        """For JSON; times in seconds."""
        low, high = self.quartiles
        return {
            "median": self.median,
            "q1": low,
            "q3": high,
            "min": min(self.samples),
            "rounds": len(self.samples),
            "calls": self.calls,
        }


@dataclass(frozen=True)
class Ratio:
    """How many times slower the peer is than ours: the ratio of medians, and the noise around it.

    low, high: a 95 % interval for the median of the rounds' own ratios; it holds for any distribution of noise, but not
    for what lasts longer than the measurement. `certain` says whether there were rounds enough for it.
    """

    value: float
    low: float
    high: float
    certain: bool

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def median_interval(values: Iterable[float]) -> tuple[float, float, bool]:
    """A 95 % interval for the median from order statistics: low, high, and False where under 6 values allow none.

    The number of values below the true median is binomial(n, 1/2), whatever the distribution.
    """
    ordered = sorted(values)
    n = len(ordered)
    outside, rank = 0.0, 0
    while rank < n // 2:
        outside += math.comb(n, rank) / 2**n
        if outside > 0.025:
            break
        rank += 1
    return (ordered[rank - 1], ordered[n - rank], True) if rank else (ordered[0], ordered[-1], False)


def ratio(peer: Timing, ours: Timing) -> Ratio:
    """Peer's time over ours, from the same interleaved measurement."""
    low, high, certain = median_interval(p / o for p, o in zip(peer.samples, ours.samples, strict=True))
    value = peer.median / ours.median
    # The ratio of medians may lie outside the interval of the median ratio: the two are different estimates.
    return Ratio(value, min(low, value), max(high, value), certain)


def interleave(
    calls: Mapping[str, Call],
    plan: Plan | None = None,
    *,
    clock: Clock = time.perf_counter,
    enough: Callable[[Mapping[str, list[float]]], bool] = lambda samples: False,
) -> dict[str, Timing]:
    """Measure callables against each other.

    Args:
        calls: what to measure, by name.
        plan: how long; None: `Plan()`.
        clock: seconds from any origin.
        enough: asked after every round from the third, given the samples so far; True ends the measurement early.

    Returns:
        A timing for each name, all of them of the same rounds.
    """
    plan = plan or Plan()
    repeats = {name: _warm(call, plan, clock) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    draws, budget, spent = random.Random(0), plan.seconds * len(calls), 0.0
    for count in range(plan.most):
        if count >= plan.least and spent >= budget:
            break
        for name in draws.sample(list(calls), len(calls)):
            call, repeat = calls[name], repeats[name]
            begin = clock()
            for _ in range(repeat):
                call()
            elapsed = clock() - begin
            samples[name].append(elapsed / repeat)
            spent += elapsed
        if count >= 2 and enough(samples):
            break
    return {name: Timing(tuple(values), repeats[name]) for name, values in samples.items()}


def _warm(call: Call, plan: Plan, clock: Clock) -> int:
    # Warm-up by time, at least one call. Returns how many calls make a sample, from the fastest: the first may compile,
    # load libraries and grow a memory pool.
    fastest, begin = math.inf, clock()
    while True:
        start = clock()
        call()
        now = clock()
        fastest = min(fastest, now - start)
        if now - begin >= plan.warmup:
            break
    return max(1, math.ceil(SAMPLE_SECONDS / fastest)) if fastest > 0 else 1


# -- agreement ---------------------------------------------------------------------------------------------------------


def error(outputs: Any, expected: Any) -> float:
    """The largest difference of two results of a call, relative to the largest value of the tensor it is in.

    Infinite where the results differ in structure, shape or type, or where one has a NaN and the other has none.
    """
    ours, theirs = _tensors(outputs), _tensors(expected)
    if [(t.shape, t.dtype) for t in ours] != [(t.shape, t.dtype) for t in theirs]:
        return math.inf
    return max((_difference(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach()]
    return [t for part in value for t in _tensors(part)] if isinstance(value, (tuple, list)) else []


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if not theirs.numel():
        return 0.0
    scale = theirs.abs().max().item()
    gap = (ours - theirs).abs().max().item()
    if math.isnan(gap):
        same = torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True)
        return 0.0 if same else math.inf
    return gap / scale if scale else gap


@dataclass(frozen=True)
class Row:
    """One comparison: timings by name, ours among them, and the ratio to each peer that agrees with the reference.

    errors: relative to the reference's outputs. refused: for the names that have no ratio, why.
    """

    timings: dict[str, Timing]
    ratios: dict[str, Ratio]
    errors: dict[str, float]
    refused: dict[str, str]


def compare(
    calls: Mapping[str, Call],
    *,
    ours: str,
    reference: str,
    tolerance: float,
    plan: Plan | None = None,
    clock: Clock = time.perf_counter,
    enough: Callable[[Mapping[str, list[float]]], bool] = lambda samples: False,
) -> Row:
    """Check every callable's outputs against the reference's, then measure those that agree.

    A callable that raises or disagrees is not timed: it has no ratio, and `refused` says why. Where ours disagrees
    nothing has a ratio.
    """
    errors, refused = {}, {}
    expected = calls[reference]()
    for name, call in calls.items():
        if name == reference:
            continue
        try:
            errors[name] = error(call(), expected)
        except Exception as problem:  # a peer's failure is a line in the table, not the end of the run
            refused[name] = f"raised {type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
            continue
        if not errors[name] <= tolerance:
            refused[name] = f"DISAGREES: error {errors[name]:.2g} against {tolerance:.0e}"
    del expected
    if ours in refused:
        return Row({}, {}, errors, refused)
    agreeing = {name: call for name, call in calls.items() if name not in refused}
    timings = interleave(agreeing, plan, clock=clock, enough=enough)
    ratios = {name: ratio(timing, timings[ours]) for name, timing in timings.items() if name != ours}
    return Row(timings, ratios, errors, refused)


# -- limits ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second, reads and writes added, of a large copy into a reused and into a fresh buffer."""

    reused: float
    fresh: float


def copy_bandwidth(plan: Plan | None = None) -> Bandwidth:
    """Measure torch's copy of `COPY_BYTES`; the best round, since a limit is what the machine can do."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.ones(COPY_BYTES // 4)
    timings = interleave({"reused": lambda: target.copy_(source), "fresh": source.clone}, plan)
    best = {name: 2 * COPY_BYTES / min(timing.samples) for name, timing in timings.items()}
    return Bandwidth(**best)


def product_rate(sizes: Iterable[tuple[int, int, int]], plan: Plan | None = None) -> float:
    """Operations a second of torch's float32 product over (rows, inner, columns), into reused buffers; best rounds."""
    operations, seconds = 0, 0.0
    for (rows, inner, columns), times in _counted(sizes).items():
        left, right = torch.randn(rows, inner), torch.randn(inner, columns)
        out = torch.empty(rows, columns)
        call = {"product": lambda a=left, b=right, c=out: torch.mm(a, b, out=c)}
        seconds += times * min(interleave(call, plan)["product"].samples)
        operations += times * 2 * rows * inner * columns
    return operations / seconds


def _counted(sizes: Iterable[tuple[int, int, int]]) -> dict[tuple[int, int, int], int]:
    counts: dict[tuple[int, int, int], int] = {}
    for size in sizes:
        counts[size] = counts.get(size, 0) + 1
    return counts


# -- provenance --------------------------------------------------------------------------------------------------------

# What changes how glibc or torch hand out memory: a run under any of them is not a user's run.
ALLOCATOR_VARIABLES = (
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_TRIM_THRESHOLD_",
    "THP_MEM_ALLOC_ENABLE",
)


def provenance() -> dict[str, Any]:
    """What a number depends on: machine, threads, versions, revision, allocator, load."""
    revision = _git("rev-parse", "HEAD")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "allocator": {name: os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ},
        "revision": revision,
        "dirty": None if revision is None else bool(_git("status", "--porcelain")),
        "load": list(os.getloadavg()),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def describe(facts: Mapping[str, Any]) -> str:
    """`provenance` in two lines."""
    revision = "no git revision" if facts["revision"] is None else facts["revision"][:12]
    state = " DIRTY" if facts["dirty"] else ""
    allocator = " ".join(f"{k}={v}" for k, v in facts["allocator"].items()) or "the system's default"
    return (
        f"{facts['cpu']}, {facts['threads']} threads of {facts['cores']} cores, {facts['instructions']}, "
        f"torch {facts['torch']}, revision {revision}{state}, {facts['date']}\n"
        f"load at start {facts['load'][0]:.2f}; huge pages {facts['huge_pages']}; allocator: {allocator}"
    )


def _cpu_model() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
