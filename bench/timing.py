"""The timing core: callables measured against each other in one process, interleaved, once their outputs agree.

A measurement runs in rounds. A round calls every callable in a shuffled order (a fixed one would always put the same
neighbour's data into the caches before the same callable), as often in a row as makes a sample long enough for the
clock. Outputs are dropped after each call, inside the sample, so every call allocates as a user's would. The clock is the
host's, or CUDA events; what one of two callables does to the caches the other sees on a CPU, as in use, while on CUDA
arguments are rotated (`Turns`) or the cache is flushed before each call, so that it finds them in device memory.
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
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]

# What a number means; whoever compares two files compares numbers of one contract only.
CONTRACT_VERSION = 2
CONTRACT = (
    "Outputs are compared before anything is timed, and what disagrees has no time. Callables run interleaved in shuffled "
    "order; times are medians of rounds with quartiles; a ratio is the peer's median over ours, with a 95 % interval for the "
    "median of the rounds' own ratios. CPU: perf_counter, samples of at least 0.2 ms, fresh outputs. CUDA: events, begun while "
    "the device still works on something else, for twice as long as the host takes to launch the sample; ops rotate through up "
    "to 64 copies of their arguments, as many as fill four L2 caches, and everyone's are replayed from CUDA graphs, each copy "
    "with outputs of its own, where one's call is under twice its host time; models: one call a sample, the L2 flushed before. "
    "Warm-up is by time. Limits (copy bandwidth, library product) are measured in the same run, best rounds. With kept memory: "
    "ours and eager again in four processes, one by one, each of its own parent's and with an allocator that returns nothing; "
    "the ratio is the geometric mean of theirs, lower quartile over lower quartile, with Student's 95 % interval over the four."
)

ROOT = Path(__file__).resolve().parents[1]
# A sample shorter than this is one of several calls: perf_counter's own cost, 0.1 us, stays below a thousandth.
SAMPLE_SECONDS = 2e-4
# Larger than any last-level cache in use, and large enough that its pages dominate a fresh allocation; on a GPU also that the
# launch is nothing beside it.
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
# How long a GPU is kept busy before a sample, at least and at most (the first call may have compiled), and the cycles of its
# clock in a second, of the fastest: a slower one is busy for longer.
BUSY_SECONDS, CYCLES = (1e-4, 1.0), 2.5e9


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


def student(probability: float, free: int) -> float:
    """The quantile, for a probability of a half or more, of Student's t with so many degrees of freedom."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        # The distribution's finite sum for whole degrees, in the angle whose tangent is t / sqrt(free).
        term, total = (math.cos(angle), 0.0) if free % 2 else (1.0, 0.0)
        for i in range(1 + free % 2, free, 2):
            total += term
            term *= math.cos(angle) ** 2 * i / (i + 1)
        inside = math.sin(angle) * total
        if free % 2:
            inside = (angle + inside) * 2 / math.pi
        low, high = (low, angle) if (1 + inside) / 2 > probability else (angle, high)
    return math.sqrt(free) * math.tan(low)


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
    clock: "Clock | None" = None,
    enough: Callable[[Mapping[str, list[float]]], bool] = lambda samples: False,
) -> dict[str, Timing]:
    """Measure callables against each other.

    Args:
        calls: what to measure, by name; a `Graph` makes several calls at once.
        plan: how long; None: `Plan()`.
        clock: takes the samples; None: the host's clock.
        enough: asked after every round from the third, given the samples so far; True ends the measurement early.

    Returns:
        A timing for each name, all of them of the same rounds.
    """
    plan, clock = plan or Plan(), clock or HostClock()
    repeats = {name: _warm(call, plan, clock) for name, call in calls.items()}
    counts = {name: repeats[name] * getattr(call, "count", 1) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    draws, budget, spent = random.Random(0), plan.seconds * len(calls), 0.0
    for count in range(plan.most):
        if count >= plan.least and spent >= budget:
            break
        for name in draws.sample(list(calls), len(calls)):
            elapsed = clock.sample(calls[name], repeats[name])
            samples[name].append(elapsed / counts[name])
            spent += elapsed
        if count >= 2 and enough(samples):
            break
    return {name: Timing(tuple(values), counts[name]) for name, values in samples.items()}


def _warm(call: Call, plan: Plan, clock: "Clock") -> int:
    # Warm-up by time, at least one call. Returns how many calls make a sample, from the fastest: the first may compile,
    # load libraries and grow a memory pool. Of several calls only the first would find the cache flushed.
    fastest, begin = math.inf, clock.now()
    while True:
        fastest = min(fastest, clock.sample(call, 1))
        if clock.now() - begin >= plan.warmup:
            break
    return max(1, math.ceil(SAMPLE_SECONDS / fastest)) if fastest > 0 and not clock.flushes else 1


# -- clocks ------------------------------------------------------------------------------------------------------------


class HostClock:
    """The host's clock around calls that are over when they return.

    Args:
        now: seconds from any origin.
    """

    flushes = False

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    def sample(self, call: Call, repeat: int) -> float:
        """Seconds of `repeat` calls."""
        begin = self.now()
        for _ in range(repeat):
            call()
        return self.now() - begin


class CudaClock:
    """CUDA events around calls, which only launch work.

    The device is given work before every sample, longer than the host takes to launch the sample: the first event lies behind
    that work, so that neither the host's time before the first launch nor gaps between launches are between the events. Where a
    call waits for the device, or launches more than the queue holds, the host's time is in it again, as it is in use.

    Args:
        flush: bytes to write before every sample, which pushes everything else out of the L2 cache; for what has no
            arguments to rotate.
        cuda: what has Event, synchronize and _sleep; torch.cuda but in tests.
        now: the host's clock.
    """

    def __init__(self, flush: int = 0, cuda: Any = None, now: Callable[[], float] = time.perf_counter) -> None:
        self.now, self.cuda = now, cuda or torch.cuda
        self._flushed = torch.empty(flush, dtype=torch.uint8, device="cuda") if flush else None
        self._launch: dict[Call, float] = {}  # the least seconds in which the host has launched a call

    @property
    def flushes(self) -> bool:
        """Whether the cache is flushed before every sample."""
        return self._flushed is not None

    def sample(self, call: Call, repeat: int) -> float:
        """Seconds of `repeat` calls on the device, from the first's beginning to the last's end."""
        known = self._launch.get(call)
        begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.cuda.synchronize()
        if self._flushed is not None:
            self._flushed.zero_()
        # At a call's first sample, of the warm-up, the host's time is not known.
        least, most = BUSY_SECONDS
        self.cuda._sleep(math.ceil(min(max(least, 2 * repeat * (known or 0.0)), most) * CYCLES))
        begin.record()
        start = self.now()
        for _ in range(repeat):
            call()
        took = (self.now() - start) / repeat
        self._launch[call] = took if known is None else min(known, took)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


Clock = HostClock | CudaClock


class Turns:
    """A callable that is the next of several at each call: the same work on other copies of the arguments."""

    def __init__(self, calls: Iterable[Call]) -> None:
        self.calls, self._next = list(calls), 0

    def __call__(self) -> Any:
        call = self.calls[self._next]
        self._next = (self._next + 1) % len(self.calls)
        return call()


class Graph:
    """Every turn of a callable captured into one CUDA graph; calling it replays them all, with no launches in between.

    All results are there until the last turn is captured, so that each turn writes memory of its own: one block for all of
    them would stay in the L2 cache.

    Raises:
        RuntimeError: for work that cannot be captured.
    """

    def __init__(self, turns: Turns) -> None:
        self.count = len(turns.calls)
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # what happens at first calls only must not be captured
            for call in turns.calls[:3]:
                call()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # A capture that fails leaves torch on the stream of the capture: the outer context goes back from it.
        with torch.cuda.stream(current), torch.cuda.graph(graph):
            results = [call() for call in turns.calls]
            del results
        self.graph = graph

    def __call__(self) -> None:
        self.graph.replay()


def l2_bytes() -> int:
    """The L2 cache of the current CUDA device."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def host_seconds(call: Call, synchronize: Call, rounds: int = 20) -> float:
    """Median seconds until a call of a device's work returns, with nothing in the device's queue before it."""
    samples = []
    for _ in range(rounds):
        synchronize()
        begin = time.perf_counter()
        result = call()
        samples.append(time.perf_counter() - begin)
        del result
    synchronize()
    return statistics.median(samples)


# -- agreement ---------------------------------------------------------------------------------------------------------


def error(outputs: Any, expected: Any) -> float:
    """The largest difference of two results of a call, relative to the largest value of the tensor it is in.

    Infinite where there is no tensor to compare, where the results differ in structure, shape or type, or where one has a NaN
    or an infinity and they are not the same throughout.
    """
    ours, theirs = _tensors(outputs), _tensors(expected)
    if [(t.shape, t.dtype) for t in ours] != [(t.shape, t.dtype) for t in theirs]:
        return math.inf
    return max((_difference(a, b) for a, b in zip(ours, theirs, strict=True)), default=math.inf)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach()]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [t for part in parts for t in _tensors(part)]


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if not theirs.numel():
        return 0.0
    scale = theirs.abs().max().item()
    gap = (ours - theirs).abs().max().item()
    if not (math.isfinite(gap) and math.isfinite(scale)):
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


def check(
    calls: Mapping[str, Call],
    *,
    reference: str,
    tolerance: float,
    difference: Callable[[Any, Any], float] | None = None,
    truth: Call | None = None,
) -> tuple[dict[str, float], dict[str, str]]:
    """(errors by name, why by name for those that raise or disagree); each is called once.

    What is right is what `truth` returns, or the reference where there is none. The reference itself is never refused.
    """
    errors, refused, difference = {}, {}, difference or error
    expected = (truth or calls[reference])()
    for name, call in calls.items():
        if name == reference and truth is None:
            continue
        try:
            errors[name] = difference(call(), expected)
        except Exception as problem:  # a peer's failure is a line in the table, not the end of the run
            refused[name] = raised(problem)
            continue
        if name != reference and not errors[name] <= tolerance:
            refused[name] = f"DISAGREES: error {errors[name]:.2g} against {tolerance:.0e}"
    return errors, refused


def raised(problem: BaseException) -> str:
    """An exception in one line."""
    text = str(problem).strip().splitlines()
    return f"raised {type(problem).__name__}: {text[0] if text else ''}"


def compare(
    calls: Mapping[str, Call],
    *,
    ours: str,
    reference: str,
    tolerance: float,
    plan: Plan | None = None,
    clock: Clock | None = None,
    enough: Callable[[Mapping[str, list[float]]], bool] = lambda samples: False,
    difference: Callable[[Any, Any], float] | None = None,
) -> Row:
    """Check every callable's outputs against the reference's, then measure those that agree.

    difference: of two results of a call, relative; None: `error`.

    A callable that raises or disagrees is not timed: it has no ratio, and `refused` says why. Where ours disagrees
    nothing has a ratio.
    """
    errors, refused = check(calls, reference=reference, tolerance=tolerance, difference=difference)
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


def copy_bandwidth(plan: Plan | None = None, device: str = "cpu") -> Bandwidth:
    """Measure torch's copy of `COPY_BYTES`; the best round, since a limit is what the machine can do."""
    size = COPY_BYTES[device]
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    timings = interleave({"reused": lambda: target.copy_(source), "fresh": source.clone}, plan, clock=clock_of(device))
    best = {name: 2 * size / min(timing.samples) for name, timing in timings.items()}
    return Bandwidth(**best)


def product_rate(
    sizes: Iterable[tuple[int, int, int]],
    plan: Plan | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> float:
    """Operations a second of torch's product over (rows, inner, columns), into reused buffers; best rounds."""
    operations, seconds = 0, 0.0
    for (rows, inner, columns), times in _counted(sizes).items():
        left, right = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (inner, columns)))
        out = torch.empty(rows, columns, dtype=dtype, device=device)
        call = {"product": lambda a=left, b=right, c=out: torch.mm(a, b, out=c)}
        seconds += times * min(interleave(call, plan, clock=clock_of(device))["product"].samples)
        operations += times * 2 * rows * inner * columns
    return operations / seconds


def clock_of(device: str) -> Clock:
    """The clock for work on a device."""
    return CudaClock() if device == "cuda" else HostClock()


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
# How long others are watched before a run.
BUSY_SAMPLE_SECONDS = 0.3


def provenance(device: str = "cpu") -> dict[str, Any]:
    """What a number depends on: device, threads, versions, revision, allocator, load, timing contract.

    Results that are yet to be committed make no tree dirty: no number depends on them.
    """
    busy = busy_cores()
    revision = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", ":/", ":(top,exclude)bench/results", ":(top,exclude)docs/results*")
    return {
        "device": {"name": _device_name(device), "class": device_class(device)},
        "driver": _driver(device),
        "cpu_name": _cpu_model(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "compiler": _compiler(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "allocator": {name: os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ},
        "revision": revision,
        "dirty": None if revision is None else bool(changed),
        "load": list(os.getloadavg()),
        "busy": busy,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "contract": CONTRACT,
        "contract_version": CONTRACT_VERSION,
    }


def describe(facts: Mapping[str, Any]) -> str:
    """`provenance` in two lines."""
    revision = "no git revision" if facts["revision"] is None else facts["revision"][:12]
    state = " DIRTY" if facts["dirty"] else ""
    allocator = " ".join(f"{k}={v}" for k, v in facts["allocator"].items()) or "the system's default"
    busy = "" if facts["busy"] is None else f", {facts['busy']:.1f} cores busy without this"
    return (
        f"{facts['device']['name']}, {facts['threads']} threads of {facts['cores']} cores, {facts['instructions']}, "
        f"torch {facts['torch']}, revision {revision}{state}, {facts['date']}\n"
        f"load at start {facts['load'][0]:.2f}{busy}; huge pages {facts['huge_pages']}; allocator: {allocator}"
    )


def busy_cores() -> float | None:
    """How many of the cores that this process may use others have while it waits, what a hypervisor gives to other machines
    included; None where the system does not say. The load of the last minute also knows of what has ended."""
    before = _processor_times()
    time.sleep(BUSY_SAMPLE_SECONDS)
    after = _processor_times()
    if not before or before.keys() != after.keys():
        return None
    spent = [[end - begin for begin, end in zip(before[core], after[core])] for core in before]
    # Idle, and waiting for a disk, are neither's.
    return round(sum(1 - sum(times[3:5]) / sum(times) for times in spent if sum(times) > 0), 2)


def _processor_times() -> dict[str, list[int]]:
    # Of each core: user, nice, system, idle, iowait, irq, softirq, steal; a guest's time is in user already.
    if not hasattr(os, "sched_getaffinity"):
        return {}
    cores = {f"cpu{i}" for i in os.sched_getaffinity(0)}
    lines = [line.split() for line in (_read("/proc/stat") or "").splitlines()]
    return {words[0]: [int(word) for word in words[1:9]] for words in lines if words and words[0] in cores}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def device_class(device: str) -> str:
    """What devices of comparable numbers share: "cpu-x86_64-avx2-2c", "cuda-sm_90", "hip-gfx942".

    A processor's is by the instructions that torch uses on it: with others eager and ours have other ratios.
    """
    if device != "cuda":
        return f"cpu-{platform.machine()}-{torch.backends.cpu.get_cpu_capability().lower()}-{_cores()}c"
    if torch.version.hip:
        return f"hip-{torch.cuda.get_device_properties(0).gcnArchName.partition(':')[0]}"
    return "cuda-sm_{}{}".format(*torch.cuda.get_device_capability())


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else _cpu_model()


def _driver(device: str) -> str | None:
    # The kernel module's own word for it; where it is hidden, the version of CUDA or ROCm that torch was built with.
    if device != "cuda":
        return None
    found = _read("/sys/module/nvidia/version") or _read("/sys/module/amdgpu/version")
    return found or f"torch's CUDA {torch.version.cuda}, ROCm {torch.version.hip}"


def _version(module: str) -> str | None:
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        return None


def _compiler() -> str | None:
    # What torch.compile and Triton build their code with.
    try:
        done = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.partition("\n")[0]


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
