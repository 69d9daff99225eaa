"""`python -m profiling.ncu_report FILE`: what Nsight Compute counted for each kernel, against the least that had to be moved.

Reads ncu's CSV, of `--page raw` or of the default page, several of them in one file too, as profiling/ncu.sh and gpu_check.sh
write them. The device's limits are ncu's own figures for it. With the ids of what was run, the floor is that of bench/cases.py.
"""

import argparse
import csv
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from profiling import names, roofline

TIME = "gpu__time_duration.sum"
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
BANDWIDTH = "dram__bytes.sum.peak_sustained_elapsed.per_second"
DRAM = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
TENSOR = re.compile(r"sm__pipe_tensor_cycles_active\w*\.avg\.pct_of_peak_sustained_elapsed")
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
WAVES = "launch__waves_per_multiprocessor"
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
LIMIT = re.compile(r"launch__occupancy_limit_(registers|shared_mem|warps|blocks)")
OPERATIONS = re.compile(r"sm__ops_path_tensor_src_(\w+)\.sum")
PEAK = re.compile(r"sm__ops_path_tensor_src_(\w+?)(?:_dst_\w+)?\.sum\.peak_sustained_elapsed\.per_second")
SCALAR = "smsp__sass_thread_inst_executed_op_{}_pred_on.sum"
SCALAR_PEAK = SCALAR.format("ffma") + ".peak_sustained_elapsed.per_second"
REGISTERS = "launch__registers_per_thread"
LOCAL = tuple(f"smsp__inst_executed_op_local_{kind}.sum" for kind in ("ld", "st"))
L2_HITS = "lts__t_sector_hit_rate.pct"
# What can hold a kernel, by the share of its peak that it has: the metric of each.
UNITS = {
    "device memory": DRAM,
    "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "L1 and shared memory": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "instruction issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
}
# From here on a unit holds the kernel, as ncu's own rules have it; below, it waits (for what, the stalls say).
BUSY = 60.0
# Of the time in which a warp waits; these are not waiting for anything.
NO_WAIT = ("selected", "not_selected")
# ncu writes "us" and "Kbyte" unless it is asked for base units, which for time are nanoseconds.
_SECONDS = {
    "s": 1.0,
    "second": 1.0,
    "ms": 1e-3,
    "msecond": 1e-3,
    "us": 1e-6,
    "usecond": 1e-6,
    "ns": 1e-9,
    "nsecond": 1e-9,
}
_THOUSANDS = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Kernel:
    """One launch: its symbol, the operator that made it (None: it is not known), its metrics in bytes, seconds and counts."""

    symbol: str
    operator: str | None
    grid: str
    metrics: Mapping[str, float]

    def sum(self, *wanted: str) -> float | None:
        """Of metrics; None where one is missing."""
        found = [self.metrics.get(name) for name in wanted]
        return None if None in found else sum(found)


@dataclass
class Recording:
    """What a file holds: the kernels in order; `synthetic`, its first line's word that no GPU made it."""

    kernels: list[Kernel]
    synthetic: str | None = None
    device: str = ""


def read(path: Path) -> Recording:
    """A file of ncu's.

    Raises:
        ValueError: where there is no table of ncu's in it, with what stands there instead.
    """
    text = path.read_text(errors="replace")
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith('"ID",')]
    if not starts:
        said = next((line for line in lines if line.startswith("==ERROR==")), 'no line begins with "ID"')
        raise ValueError(f"{path} has no table of Nsight Compute: {said}")
    kernels, compute = [], ""
    for start, stop in zip(starts, [*starts[1:], len(lines)]):
        rows = list(csv.reader(line for line in lines[start:stop] if line.startswith('"')))
        head, body = rows[0], [row for row in rows[1:] if len(row) == len(rows[0])]
        if body and "CC" in head:
            compute = next((row[head.index("CC")] for row in body if row[head.index("CC")]), compute)
        kernels += list(_long(head, body) if "Metric Name" in head else _wide(head, body))
    return Recording(kernels, roofline.synthetic(text), f"compute capability {compute}" if compute else "")


def _wide(head: list[str], rows: list[list[str]]) -> Iterator[Kernel]:
    # --page raw: a row of units below the names, then a row for each launch.
    if not rows:
        return
    units = rows[0]
    for row in rows[1:]:
        metrics = {name: _number(value, unit) for name, value, unit in zip(head, row, units) if "__" in name}
        yield _kernel(head, row, {name: value for name, value in metrics.items() if value is not None})


def _long(head: list[str], rows: list[list[str]]) -> Iterator[Kernel]:
    # A row for each metric of each launch.
    at = {name: head.index(name) for name in ("ID", "Metric Name", "Metric Unit", "Metric Value")}
    launches: dict[str, tuple[list[str], dict[str, float]]] = {}
    for row in rows:
        _, metrics = launches.setdefault(row[at["ID"]], (row, {}))
        value = _number(row[at["Metric Value"]], row[at["Metric Unit"]])
        if value is not None:
            metrics[row[at["Metric Name"]]] = value
    for row, metrics in launches.values():
        yield _kernel(head, row, metrics)


def _kernel(head: list[str], row: list[str], metrics: Mapping[str, float]) -> Kernel:
    cells = dict(zip(head, row))
    ranges = " ".join(value for name, value in cells.items() if "_Range:" in name)
    operators = re.findall(rf"{re.escape(names.RANGE)}(\w+)", ranges)
    return Kernel(cells["Kernel Name"], operators[-1] if operators else None, cells.get("Grid Size", ""), metrics)


def _number(text: str, unit: str) -> float | None:
    try:
        value = float(text.replace(",", ""))
    except ValueError:  # "n/a", "(!) nan"
        return None
    if math.isnan(value):
        return None
    return value * _SECONDS.get(unit, _THOUSANDS.get(unit[:1], 1.0))


# --- one line for each kernel --------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A kernel's launches within an operator, added up; shares are the mean over their time, from 0 to 1."""

    operator: str | None
    symbol: str
    launches: int
    seconds: float
    bytes: float | None
    bandwidth: float | None
    tensor: float | None
    occupancy: float | None
    l2_hits: float | None
    registers: float | None
    local: float | None
    limiter: str
    operations: float | None
    peaks: dict[str, float] = field(default_factory=dict)


def rows(recording: Recording) -> list[Row]:
    """The kernels of a recording, those of an operator together, in the order of their first launch."""
    groups: dict[tuple, list[Kernel]] = {}
    for kernel in recording.kernels:
        groups.setdefault((kernel.operator, kernel.symbol), []).append(kernel)
    return [_row(operator, symbol, group) for (operator, symbol), group in groups.items()]


def _row(operator: str | None, symbol: str, group: list[Kernel]) -> Row:
    seconds = sum(kernel.metrics.get(TIME, 0.0) for kernel in group)
    longest = max(group, key=lambda kernel: kernel.metrics.get(TIME, 0.0))

    def total(values: list[float | None]) -> float | None:
        return None if None in values else sum(values)

    def share(name: str | None) -> float | None:
        parts = [(k.metrics[name], k.metrics.get(TIME, 0.0)) for k in group if name in k.metrics]
        weight = sum(time for _, time in parts)
        return sum(value * time for value, time in parts) / weight / 100 if weight else None

    moved = total([kernel.sum(READ, WRITTEN) for kernel in group])
    peak = longest.metrics.get(BANDWIDTH)
    tensor = next((name for name in longest.metrics if TENSOR.fullmatch(name)), None)
    return Row(
        operator,
        symbol,
        len(group),
        seconds,
        moved,
        moved / seconds / peak if peak and seconds and moved is not None else share(DRAM),
        share(tensor),
        share(OCCUPANCY),
        share(L2_HITS),
        longest.metrics.get(REGISTERS),
        total([kernel.sum(*LOCAL) for kernel in group]),
        limiter(longest.metrics),
        total([_operations(kernel.metrics) for kernel in group]),
        _peaks(longest.metrics),
    )


def limiter(metrics: Mapping[str, float]) -> str:
    """What holds a kernel first, and the metric that says so."""
    units = {name: metrics[metric] for name, metric in UNITS.items() if metric in metrics}
    tensor = next((metrics[name] for name in metrics if TENSOR.fullmatch(name)), None)
    if tensor is not None:
        units["tensor cores"] = tensor
    if units:
        name = max(units, key=units.get)
        if units[name] >= BUSY:
            return f"{name} ({units[name]:.0f}% of its peak)"
    waves = metrics.get(WAVES)
    if waves is not None and waves < 1:
        return f"too few programs ({waves:.2f} waves fill the multiprocessors once at 1)"
    stalls = {found[1]: value for name, value in metrics.items() if (found := STALL.fullmatch(name))}
    waiting = {name: value for name, value in stalls.items() if name not in NO_WAIT}
    if not waiting:
        return "not known: nothing is busy, and no stalls were counted"
    worst, total = max(waiting, key=waiting.get), sum(stalls.values())
    text = f"latency: {worst.replace('_', ' ')} ({waiting[worst] / total:.0%} of a warp's time)" if total else "latency"
    limits = {found[1]: value for name, value in metrics.items() if (found := LIMIT.fullmatch(name))}
    if limits and metrics.get(OCCUPANCY, 100.0) < 50:
        held = min(limits, key=limits.get)
        text += f"; occupancy held by {held.replace('_', ' ')} ({limits[held]:.0f} programs)"
    return text


def _operations(metrics: Mapping[str, float]) -> float | None:
    # Of the tensor cores as ncu counts them; a fused multiply-add of one thread is two.
    tensor = [value for name, value in metrics.items() if OPERATIONS.fullmatch(name)]
    scalar = [metrics.get(SCALAR.format(kind)) for kind in ("ffma", "fadd", "fmul")]
    if None in scalar:
        return sum(tensor) if tensor else None
    return sum(tensor) + 2 * scalar[0] + scalar[1] + scalar[2]


def _peaks(metrics: Mapping[str, float]) -> dict[str, float]:
    types: dict[float, list[str]] = {}  # by rate: 16-bit types have one
    for name, value in metrics.items():
        if (found := PEAK.fullmatch(name)) and value:
            types.setdefault(value, []).append(found[1])
    peaks = {f"tensor cores, {' and '.join(names)}": rate for rate, names in types.items()}
    if metrics.get(SCALAR_PEAK):
        peaks["float32 units"] = 2 * metrics[SCALAR_PEAK]
    if metrics.get(BANDWIDTH):
        peaks["bandwidth"] = metrics[BANDWIDTH]
    return peaks


# --- an operator's kernels against its floor -----------------------------------------------------------------------------


def against_floor(found: Sequence[Row], floors: Mapping[str, int], calls: int) -> dict[str, dict[str, float]]:
    """For each operator with a floor: bytes that its kernels moved, the floor of `calls` calls, and their ratio."""
    result = {}
    for operator, floor in floors.items():
        own = [row for row in found if row.operator == operator]
        if own and all(row.bytes is not None for row in own):
            moved = sum(row.bytes for row in own)
            result[operator] = {"bytes": moved, "floor": floor * calls, "ratio": moved / (floor * calls)}
    return result


def resolved(recording: Recording, symbols: Mapping[str, Sequence[str]]) -> Recording:
    """Kernels without a range given the one operator that has a kernel of their symbol."""

    def owner(kernel: Kernel) -> Kernel:
        owners = [operator for operator, own in symbols.items() if kernel.symbol in own]
        if kernel.operator is not None or len(owners) != 1:
            return kernel
        return replace(kernel, operator=owners[0])

    return replace(recording, kernels=[owner(kernel) for kernel in recording.kernels])


def table(found: Sequence[Row]) -> str:
    """One line for each kernel."""
    head = f"{'operator':<34} {'kernel':<26} {'n':>3} {'us':>9} {'MB':>9} {'memory':>7} {'tensor':>7} {'occup.':>7} "
    lines = [head + f"{'L2 hits':>7} {'regs':>5} {'local':>6}  first limiter"]
    for row in found:
        parts = [f"{row.operator or '-':<34} {row.symbol[:26]:<26} {row.launches:3} {row.seconds * 1e6:9.1f}"]
        parts.append(f"{'-' if row.bytes is None else f'{row.bytes / 1e6:.2f}':>9}")
        for share in (row.bandwidth, row.tensor, row.occupancy, row.l2_hits):
            parts.append(f"{'-' if share is None else f'{share:.0%}':>7}")
        for count, width in ((row.registers, 5), (row.local, 6)):
            parts.append(f"{'-' if count is None else f'{count:.0f}':>{width}}")
        lines.append(" ".join(parts) + "  " + row.limiter)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 for a file that cannot be read, 2 for ids without Triton, 64 for an id or a preset that there is not."""
    parser = argparse.ArgumentParser(prog="python -m profiling.ncu_report", description=__doc__)
    parser.add_argument("file", type=Path)
    names.add_arguments(parser)
    parser.add_argument("--repeat", type=int, default=1, help="calls of `bench once` that were counted (default: 1)")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--png", type=Path, help="of the roofline (default: beside FILE)")
    options = parser.parse_intermixed_args(arguments)
    try:
        if options.repeat < 1:
            raise ValueError(f"--repeat must be at least 1, got {options.repeat}")
        benchmarks = list(names.chosen(options))
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 64
    try:
        recording = read(options.file)
        uses = [use for benchmark, settings in benchmarks for use in names.uses_of(benchmark, settings)]
    except OSError as problem:
        print(f"{options.file}: {problem.strerror}", file=sys.stderr)
        return 1
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 2 if isinstance(problem, names.NoTriton) else 1
    if recording.synthetic:
        print(f"THESE NUMBERS ARE NOT OF A REAL RUN: {recording.synthetic}")
    recording = resolved(recording, {use.operator: use.symbols for use in uses})
    found = rows(recording)
    print(f"{options.file}: {len(recording.kernels)} launches{recording.device and f', {recording.device}'}")
    print(table(found))
    floors: dict[str, int] = {}
    for use in uses:
        if use.floor_bytes:
            floors[use.operator] = floors.get(use.operator, 0) + use.floor_bytes
    compared = against_floor(found, floors, options.repeat)
    for operator, numbers in compared.items():
        moved, floor = (numbers[key] / 1e6 for key in ("bytes", "floor"))
        print(f"{operator}: {moved:.2f} MB moved, at least {floor:.2f} MB to move: {numbers['ratio']:.2f}x the floor")
    peaks = next((row.peaks for row in found if row.peaks), {})
    rates = {name: value for name, value in peaks.items() if name != "bandwidth"}
    points = [
        roofline.Point(f"{row.operator or ''} {row.symbol}".strip(), row.operations or 0, row.bytes or 0, row.seconds)
        for row in found
    ]
    title = f"{options.file.name}{' (SYNTHETIC NUMBERS)' if recording.synthetic else ''}"
    png = options.png or options.file.with_suffix(".png")
    print(roofline.draw(png, title, peaks.get("bandwidth", 0.0), rates, points, "Nsight Compute's for this device"))
    if options.json:
        result: dict[str, Any] = {"file": str(options.file), "synthetic": recording.synthetic, "peaks": peaks}
        result |= {"kernels": [asdict(row) for row in found], "operators": compared}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
