"""One benchmark, measured: a row, a dict of plain values that pytest-benchmark's JSON takes as it is."""

import ctypes
import gc
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import presets, slowed, timing
from bench.cases import Cost
from bench.kept import PARENTS_BYTES, Kept
from bench.presets import Settings
from bench.suites import Benchmark, Built
from bench.timing import Plan, Timing
from tiger_fast.ops.cpu import empty_cache

Row = dict[str, Any]

# Work so small that its floor is under the cost of a call says nothing about a limit.
FLOOR_SECONDS = 5e-6
SQUARE = {"cpu": (1536, 1536, 1536), "cuda": (8192, 8192, 8192)}
# What other processes take of the machine changes while the rows are made: limits are measured again after this long.
LIMITS_SECONDS = 60.0


class Session:
    """What the rows of a run share: its settings, limits as last measured, and processes with kept memory.

    Args:
        settings: of the run.
        alone: times and ratios only, in the same interleaved rounds; no limits, and no kept memory.
    """

    def __init__(self, settings: Settings, *, alone: bool = False) -> None:
        self.settings, self.alone = settings, alone
        self._limits: tuple[float, timing.Bandwidth, float] | None = None
        self._kept: Kept | None = None

    def close(self) -> None:
        """Ends the processes with kept memory, if there are any."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def row(self, benchmark: Benchmark, *, timed: bool = True) -> tuple[Row, Timing | None]:
        """Measure one benchmark.

        Args:
            benchmark: which.
            timed: False: build it and compare outputs, no more.

        Returns:
            The row, and the samples of ours; None where there is an "error" in the row, or nothing was timed.
        """
        row, settings, built = _header(benchmark, self.settings), self.settings, None
        keeps = settings.device == "cpu" and not self.alone and timed and row["backend"] != "reference"
        try:
            if short := lack(benchmark, settings, PARENTS_BYTES if keeps and self._kept is None else 0):
                return row | {"error": short}, None
            if keeps and self._kept is None:
                self._kept = Kept(settings)  # which imports while this process builds and compiles
            torch.compiler.reset()
            built = benchmark.build(settings)
            if settings.device == "cpu":
                built.calls["ours"] = slowed.slow(built.calls["ours"], slowed.factor(benchmark.subject))
            errors, refused = built.check()
            if "ours" in refused:
                return row | {"error": f"ours {refused['ours']}"}, None
            row["peers"] = _untimed(built, errors, refused)
            if not timed:
                return row, None
            if self._kept is not None:
                self._kept.wait()
            row, ours = self._timed(row, benchmark, built, refused)
            built = None
            self._collect()
            if keeps and "eager" not in refused:
                self._add_kept(row, benchmark)
            return row, ours
        except Exception as problem:  # the other rows are still to be measured
            return row | {"error": timing.raised(problem)}, None
        finally:
            del built
            if settings.device == "cuda":
                torch.cuda.empty_cache()

    def _collect(self) -> None:
        gc.collect()
        if not gc.get_freeze_count():
            gc.freeze()  # what the first row leaves stays for good, torch's modules above all: 0.3 s to go through

    def _timed(self, row: Row, benchmark: Benchmark, built: Built, refused: Mapping[str, str]) -> tuple[Row, Timing]:
        settings, plan = self.settings, benchmark.plan(self.settings)
        cuda = settings.device == "cuda"
        calls = {name: call for name, call in built.calls.items() if name not in refused}
        clock = timing.CudaClock(4 * timing.l2_bytes() if built.flush else 0) if cuda else timing.HostClock()
        emptied = not cuda and benchmark.suite == "ops" and row["backend"] == "cpu"
        beside = built.beside | ({"emptied": _emptied(calls["ours"])} if emptied else {})
        timings = timing.interleave(calls | beside, plan, clock=clock)
        if cuda:
            host = {name: timing.host_seconds(call, torch.cuda.synchronize) for name, call in calls.items()}
            row["host_seconds"] = host["ours"]
            # A host that is held up for longer than the device was kept busy would be in the time of so short a call.
            if not built.flush and any(timings[name].median < 2 * host[name] for name in calls):
                timings = self._replayed(row, calls, timings, plan, clock)
        elif built.small is not None:
            small = timing.interleave({"ours": built.small}, Plan(0.01, 0.05, 9, 100))
            row["host_seconds"] = small["ours"].median
        else:
            row["notes"].append("host time: a model's is not taken on a CPU")
        ours = timings["ours"]
        row["ours"] = ours.summary()
        apart = _against({name: timings.pop(name) for name in beside}, ours)
        if emptied:
            row["memory"]["ours_emptied"] = apart["emptied"]
        row |= {name: apart[name] for name in built.beside}
        for name, found in _against(timings, ours).items():
            row["peers"][name] = found | row["peers"][name]
        medians = {name: row["peers"][name]["median"] for name in timings if name != "ours"}
        row["fastest"] = min(medians, key=medians.__getitem__, default=None)
        if self.alone:
            return row, ours
        if built.cost is not None:
            row |= self._limit(built.cost, ours.median)
        memory = {name: peak_memory(calls[name], settings.device) for name in ("ours", "eager") if name in calls}
        row["peak_bytes"], row["kept_bytes"] = memory["ours"] or (None, None)
        if "eager" in calls:
            row["peers"]["eager"]["peak_bytes"] = (memory["eager"] or (None, None))[0]
        if memory["ours"] is None:
            row["notes"].append("peak memory: this system does not say")
        return row, ours

    def _replayed(
        self,
        row: Row,
        calls: Mapping[str, timing.Call],
        launched: dict[str, Timing],
        plan: Plan,
        clock: timing.Clock,
    ) -> dict[str, Timing]:
        # Timings of graphs; what cannot be captured is launched in the same rounds. `calls` has ours first.
        replays: dict[str, timing.Call] = {}
        for name, call in calls.items():
            try:
                replays[name] = timing.Graph(call)
            except Exception as problem:
                why = f"{name} cannot be captured into a CUDA graph ({timing.raised(problem)})"
                if name == "ours":
                    row["notes"].append(f"{why}: everyone is timed as launched")
                    return launched
                row["notes"].append(f"{why}: it is timed as launched")
                replays[name] = call
        row["launched"] = {"ours": launched["ours"].summary()} | _against(launched, launched["ours"])
        row["notes"].append("shorter than its launch: replayed from a CUDA graph; with launches under launched")
        return timing.interleave(replays, plan, clock=clock)

    def _limit(self, cost: Cost, seconds: float) -> Row:
        bandwidth, rate = self._measured_limits()
        rate, at_shapes = product_limit(cost, self.settings, rate)
        by = {"bytes": cost.bytes / bandwidth.reused, "operations": cost.operations / rate}
        floor = max(by.values())
        return {
            "cost": {"bytes": cost.bytes, "operations": cost.operations},
            "achieved": {
                "bytes_per_second": cost.bytes / seconds,
                "operations_per_second": cost.operations / seconds,
            },
            "limit": {
                "copy_bandwidth": bandwidth.reused,
                "copy_bandwidth_fresh": bandwidth.fresh,
                "product_rate": rate,
                "product_rate_at_shapes": at_shapes,
                "floor": floor,
                "held_by": max(by, key=by.__getitem__),
                "share": floor / seconds if floor >= FLOOR_SECONDS else None,
            },
        }

    def _measured_limits(self) -> tuple[timing.Bandwidth, float]:
        if self._limits is None or time.monotonic() - self._limits[0] > LIMITS_SECONDS:
            settings = self.settings
            bandwidth = timing.copy_bandwidth(Plan(warmup=0.05, seconds=0.4, least=3), settings.device)
            self._limits = time.monotonic(), bandwidth, square_rate(settings)
        return self._limits[1:]

    def _add_kept(self, row: Row, benchmark: Benchmark) -> None:
        found = self._kept.ask(benchmark.id)
        if "refused" in found:
            row["error"] = f"{found['refused']}, with kept memory"
        elif "error" in found:
            row["notes"].append(f"kept memory: {found['error']}")
        else:
            row["memory"]["eager_kept"] = found


def square_rate(settings: Settings) -> float:
    """Operations a second of torch's product of large squares."""
    plan = Plan(warmup=0.1, seconds=0.3, least=3)
    return timing.product_rate([SQUARE[settings.device]], plan, settings.torch_dtype, settings.device)


def product_limit(cost: Cost | None, settings: Settings, squares: float) -> tuple[float, float | None]:
    """(what an op is held against, the most that the machine was seen to multiply: the rate of large squares, or that at the
    op's own products, which may be narrow, or go faster; that one, None where it has none)."""
    if cost is None or not cost.products:
        return squares, None
    plan = Plan(warmup=0.05, seconds=min(0.3, settings.seconds / 2), least=3)
    found = timing.product_rate(cost.products, plan, settings.torch_dtype, settings.device)
    return max(squares, found), found


def _header(benchmark: Benchmark, settings: Settings) -> Row:
    return {
        "id": benchmark.id,
        "suite": benchmark.suite,
        "subject": benchmark.subject,
        "direction": benchmark.direction,
        "variant": dict(benchmark.variant),
        "preset": settings.name,
        "sizes": asdict(benchmark.sizes(settings)),
        "dtype": settings.dtype,
        "device": settings.device,
        "backend": benchmark.backend(settings),
        "peers": {},
        "fastest": None,
        "memory": {},
        "cost": None,
        "achieved": None,
        "limit": None,
        "peak_bytes": None,
        "kept_bytes": None,
        "host_seconds": None,
        "notes": [],
    }


def lack(benchmark: Benchmark, settings: Settings, beside: int = 0) -> str | None:
    """Why a benchmark does not fit into memory, in a line, or None, where `beside` bytes are still to be taken by others;
    allocates nothing to find out."""
    try:
        needed, there = benchmark.needs(settings) + beside, presets.available(settings.device)
    except RuntimeError as problem:
        if "overflow" not in str(problem):
            raise
        return "does not fit: its bytes are more than 64 bits count"
    if there is None or needed <= there:
        return None
    return (
        f"does not fit: {needed / 1e9:.1f} GB are needed, and {there / 1e9:.1f} GB of {settings.device} memory are free"
    )


def _untimed(built: Built, errors: Mapping[str, float], refused: Mapping[str, str]) -> Row:
    found: Row = {name: {"error": errors.get(name, 0.0)} for name in built.calls if name != "ours"}
    found |= {name: {"refused": why} for name, why in refused.items()}
    return found | {name: {"missing": why} for name, why in built.missing.items()}


def _against(timings: Mapping[str, Timing], ours: Timing) -> Row:
    return {
        name: value.summary() | {"ratio": asdict(timing.ratio(value, ours))}
        for name, value in timings.items()
        if value is not ours
    }


def _emptied(call: timing.Call) -> timing.Call:
    def emptied() -> Any:
        empty_cache()
        return call()

    return emptied


# -- peak memory -------------------------------------------------------------------------------------------------------


def peak_memory(call: timing.Call, device: str) -> tuple[int, int] | None:
    """(bytes that a call takes beyond what is there before it, bytes of these that are kept when its results are dropped):
    results, temporaries, and what an allocator takes and does not use. On a CPU the kernel's high-water mark of resident
    memory, and what is kept when glibc has given back what it can (Linux); None where there is none."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # of what earlier calls left in torch's pool
        torch.cuda.reset_peak_memory_stats()
        before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        results = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del results
        return peak, torch.cuda.memory_reserved() - reserved
    empty_cache()
    _trim()  # what other calls have left in glibc's heap
    try:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        results = call()
        peak = resident("VmHWM") - before
        del results
        _trim()  # blocks in a hole of its heap stay there otherwise, which says what came before and nothing of the call
        return max(peak, 0), max(resident("VmRSS") - before, 0)
    except (OSError, RuntimeError):
        return None


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status: "VmRSS" now, "VmHWM" the peak.

    Raises:
        OSError, RuntimeError: on a system that does not have it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system's /proc/self/status has no {field}")


def _trim() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # not glibc
        pass
