"""`python -m profiling.cpu_report ID`: where the time of a benchmark goes on this CPU, and how near it is to its limits.

The time of operators is torch.profiler's. Counts of cycles, instructions and cache misses are those of `perf stat`, of the
calls alone, where the machine and perf have them; what is missing is named. Limits are measured in the same run: torch's copy
and torch's matrix product, of large squares or at the op's own shapes where that goes faster. Bytes and operations of an op
are the formulas of bench/cases.py. A function of the library is one operator here, however many loops it fuses.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from bench import files, measure, presets, suites, timing
from profiling import roofline
from tiger_fast import profiler_ranges

OUT = Path(__file__).with_name("out")
MISSES = (("LLC-load-misses", "LLC-store-misses"), ("cache-misses",))  # the first of which all are counted
EVENTS = ("cycles", "instructions", *(name for group in MISSES for name in group), "task-clock", "page-faults")
RANGES = ("tiger_fast.", "tiger.", "trainer.")
COUNTED_SECONDS = 1.0  # counters are read over so many calls that they take that long


# --- perf stat -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counters:
    """What `perf stat -x,` wrote of `calls` calls: values by event; events that the machine lacks; of what; what makes it
    none."""

    values: dict[str, float]
    lacking: tuple[str, ...]
    calls: int
    of: str | None = None
    synthetic: str | None = None

    def misses(self) -> tuple[str, float] | None:
        """The misses of the last cache, and the events that they are the sum of."""
        for group in MISSES:
            if all(name in self.values for name in group):
                return " + ".join(group), sum(self.values[name] for name in group)
        return None


def parse(text: str) -> Counters:
    """`perf stat -x,`'s output, with the lines `# calls: N` and `# of: WHAT` that `count` adds.

    Raises:
        ValueError: where there is no count in it.
    """
    values, lacking, calls, of = {}, [], 1, None
    for line in text.splitlines():
        if line.startswith("# calls: "):
            calls = int(line.removeprefix("# calls: "))
        if line.startswith("# of: "):
            of = line.removeprefix("# of: ")
        cells = line.split(",")
        if line.startswith("#") or len(cells) < 3:
            continue
        event = cells[2].partition(":")[0]  # cycles:u where the kernel may not be counted
        try:
            values[event] = float(cells[0])
        except ValueError:
            if cells[0].startswith("<"):  # <not supported>, <not counted>
                lacking.append(event)
    if calls < 1:
        raise ValueError(f"it is of {calls} calls")
    if not values and not lacking:
        raise ValueError("there is no line of `perf stat -x,` in it")
    return Counters(values, tuple(lacking), calls, of, roofline.synthetic(text))


def count(call: Callable[[], Any], calls: int, path: Path, of: str) -> str | None:
    """Count `calls` calls in this process, its threads included, into a file that says of what; why not, or None.

    perf starts with its counters off, and is told through a pipe to put them on and off around the calls."""
    if shutil.which("perf") is None:
        return "perf is not installed"
    asked, ask = os.pipe()
    answered, answer = os.pipe()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # an earlier run's, which are not to be taken for this one's
    command = ["perf", "stat", "-x", ",", "-D", "-1", "-e", ",".join(EVENTS), "--control", f"fd:{asked},{answer}"]
    with subprocess.Popen(
        [*command, "-p", str(os.getpid()), "-o", str(path)],
        pass_fds=(asked, answer),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as perf:
        os.close(asked)
        os.close(answer)
        try:
            for word in ("enable", "disable"):
                os.write(ask, f"{word}\n".encode())
                if not os.read(answered, 16):  # its end was closed: it has ended
                    break
                for _ in range(calls if word == "enable" else 0):
                    call()
        except BrokenPipeError:
            pass
        finally:
            os.close(ask)
            os.close(answered)
            perf.send_signal(signal.SIGINT)
        said = perf.communicate()[1].strip().splitlines()
    if not path.exists() or not path.read_text().strip():
        return f"perf stat counted nothing: {said[0] if said else f'it ended with {perf.returncode}'}"
    with path.open("a") as file:
        file.write(f"# calls: {calls}\n# of: {of}\n")
    return None


def line_bytes() -> int:
    """Of a line of the last cache, as the system says; else 64, what x86-64 has."""
    found = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = sorted(found.glob("index*/coherency_line_size"))
    return int(sizes[-1].read_text()) if sizes else 64


# --- the report ----------------------------------------------------------------------------------------------------------


def profiled(call: Callable[[], Any], calls: int, top: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The operators with the most time of their own, and the ranges of tiger_fast with all the time in them: name, times
    called, seconds of a call, share."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded, profiler_ranges():
        for _ in range(calls):
            call()
    events = recorded.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)

    def row(event: Any, micros: float) -> dict[str, Any]:
        found = {"name": event.key, "calls": event.count / calls}
        return found | {"seconds": micros / calls / 1e6, "share": micros / whole}

    ranges = [row(event, event.cpu_time_total) for event in events if event.key.startswith(RANGES)]
    own = [row(event, event.self_cpu_time_total) for event in events if not event.key.startswith(RANGES)]
    operators, ranges = (sorted(rows, key=lambda found: -found["seconds"]) for rows in (own, ranges))
    return operators[:top], ranges


def counted_lines(counters: Counters, seconds: float, bandwidth: float, floor: int | None) -> list[str]:
    """What the counters say, a line each.

    Args:
        counters: see `Counters`.
        seconds: of a call.
        bandwidth: bytes a second that the machine copies.
        floor: the least bytes of a call, if there is a formula.
    """
    lines = [f"THESE COUNTS ARE NOT OF A REAL RUN: {counters.synthetic}"] if counters.synthetic else []
    values = {name: value / counters.calls for name, value in counters.values.items()}
    if "cycles" in values and "instructions" in values:
        each = values["instructions"] / values["cycles"] if values["cycles"] else math.nan
        lines.append(
            f"{values['cycles']:.4g} cycles, {values['instructions']:.4g} instructions, {each:.2f} for each cycle"
        )
    if (found := counters.misses()) is not None:
        moved = found[1] / counters.calls * line_bytes()
        text = (
            f"{moved / 1e6:.2f} MB from memory on demand ({found[0]}, lines of {line_bytes()} bytes; what the hardware "
        )
        text += f"fetches ahead is not in it): {moved / seconds / 1e9:.2f} GB/s, {moved / seconds / bandwidth:.0%} of the copy"
        lines.append(text + (f", {moved / floor:.2f}x the floor" if floor else ""))
    if "page-faults" in values:
        lines.append(f"{values['page-faults']:.0f} page faults")
    if counters.lacking:
        lines.append(f"this machine does not count: {', '.join(counters.lacking)}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 64 for what does not exist, 2 for what does not fit into memory, 1 for counters that are of no use."""
    parser = argparse.ArgumentParser(prog="python -m profiling.cpu_report", description=__doc__)
    parser.add_argument("id", help="a benchmark, as `python -m bench list` names it")
    parser.add_argument("--preset", default="design", help="default: design")
    parser.add_argument("--shape", help="sizes that differ: B=8,N=4096")
    parser.add_argument("--dtype", help="of activations")
    parser.add_argument("--backend", help="of ours (default: cpu where it is native)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring time (default: 2)")
    parser.add_argument("--top", type=int, default=12, help="operators listed (default: 12)")
    parser.add_argument("--counters", type=Path, help="counts of `perf stat -x,` from this file instead of counting")
    parser.add_argument(
        "--out", type=Path, default=OUT, help="folder of the picture and the counts (default: profiling/out)"
    )
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = parser.parse_args(arguments)
    try:
        settings = presets.settings(
            options.preset,
            shape=options.shape,
            dtype=options.dtype,
            device="cpu",
            backend=options.backend,
            peers="eager",
        )
        benchmark = suites.find(options.id, settings)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 64
    try:
        if lack := measure.lack(benchmark, settings):
            print(f"{benchmark.id}: {lack}", file=sys.stderr)
            return 2
        what = f"{benchmark.id}: {benchmark.sizes(settings)}, {settings.dtype}, backend {benchmark.backend(settings)}"
        counters = parse(options.counters.read_text()) if options.counters else None
        if counters and counters.of not in (None, what):
            raise ValueError(f"{options.counters} is of {counters.of}")
        built = benchmark.build(settings)
        for folder in (options.out, *([options.json.parent] if options.json else [])):
            files.make(folder)
    except OSError as problem:
        print(f"{options.counters}: {problem.strerror}", file=sys.stderr)
        return 1
    except (ValueError, files.Unusable) as problem:
        print(problem, file=sys.stderr)
        return 1
    facts = timing.provenance()
    call = built.calls["ours"]
    plan = timing.Plan(seconds=options.seconds)
    measured = timing.interleave({"ours": call}, plan)["ours"]
    seconds, (low, high) = measured.median, measured.quartiles
    bandwidth = timing.copy_bandwidth(plan).reused
    rate, _ = measure.product_limit(built.cost, settings, measure.square_rate(settings))
    stem = options.out / benchmark.id.replace("/", ".")
    print(timing.describe(facts))
    print(what)
    print(f"{seconds * 1e3:.3f} ms, quartiles {low * 1e3:.3f} and {high * 1e3:.3f}")
    print(f"limits of this run: copy {bandwidth / 1e9:.2f} GB/s, product {rate / 1e9:.1f} GFLOP/s")

    spent, ranges = profiled(call, max(1, min(20, round(0.5 / seconds))), options.top)
    for heading, rows in (
        ("each operator's own time", spent),
        ("all time within the ranges of docs/profiling.md", ranges),
    ):
        print(f"\n{heading} (torch.profiler, of a call; its own work is in these times)")
        for row in rows:
            print(
                f"  {row['seconds'] * 1e3:10.3f} ms {row['share']:5.0%} {row['calls']:7.1f} calls  {row['name'][:80]}"
            )

    cost = built.cost
    print("\nagainst the limits")
    points = []
    if cost is None:
        print("  a model has no formula for its bytes and operations")
    else:
        floors = {"bytes": cost.bytes / bandwidth, "operations": cost.operations / rate}
        held = max(floors, key=floors.get)
        gigabytes, gigaflops = cost.bytes / seconds / 1e9, cost.operations / seconds / 1e9
        print(
            f"  {cost.bytes / 1e6:.2f} MB at least: {gigabytes:.2f} GB/s, {floors['bytes'] / seconds:.0%} of the copy"
        )
        print(
            f"  {cost.operations / 1e6:.1f} MFLOP: {gigaflops:.2f} GFLOP/s, {floors['operations'] / seconds:.0%} of the product"
        )
        print(f"  first limit: {held}, {floors[held] / seconds:.0%} reached")
        points.append(roofline.Point(f"{benchmark.id}, least bytes", cost.operations, cost.bytes, seconds))

    why = None
    if counters is None:
        path = stem.with_name(f"{stem.name}.perf.csv")
        why = count(call, max(5, math.ceil(COUNTED_SECONDS / seconds)), path, what)
        counters = parse(path.read_text()) if why is None else None
    print("\ncounters of a call (perf stat)")
    if counters is None:
        print(f"  {why}")
    else:
        for text in counted_lines(counters, seconds, bandwidth, cost.bytes if cost else None):
            print(f"  {text}")
        if cost and (misses := counters.misses()):
            moved = misses[1] / counters.calls * line_bytes()
            points.append(roofline.Point(f"{benchmark.id}, bytes counted", cost.operations, moved, seconds))
    title = f"{benchmark.id}, {settings.dtype}{' (SYNTHETIC COUNTS)' if counters and counters.synthetic else ''}"
    png = stem.with_name(f"{stem.name}.cpu.png")
    print(roofline.draw(png, title, bandwidth, {"torch's product": rate}, points, "measured in the same run"))
    if options.json:
        result: dict[str, Any] = {
            "id": benchmark.id,
            "sizes": asdict(benchmark.sizes(settings)),
            "dtype": settings.dtype,
        }
        result |= {"time": measured.summary(), "operators": spent, "ranges": ranges}
        result |= {"cost": asdict(cost) if cost else None}
        result |= {"limit": {"copy_bandwidth": bandwidth, "product_rate": rate}}
        result |= {"counters": asdict(counters) if counters else None, "uncounted": why}
        result |= {"provenance": facts}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
