"""`python -m bench.ratios`: every op at the shapes in cases.py against its peers and against the machine's limits."""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import timing
from bench.cases import DIRECTIONS, OPS, TARGETS, TOLERANCE, Case, ours, peers
from bench.timing import Plan, Ratio
from tiger_fast.ops.cpu import empty_cache

# An environment in which glibc serves every block from one heap that it grows 256 MB at a time, never returns, and puts
# on huge pages (torch's own switch asks for them too, for what it allocates): eager PyTorch with nothing left to gain
# from memory. Found by trying: each variable alone left eager up to three times slower.
KEPT_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_TOP_PAD_": str(256 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_MMAP_THRESHOLD_": str(2**40),
    "THP_MEM_ALLOC_ENABLE": "1",
}
COLUMNS = ("eager", "compile", "algebra", "algebra compile", "sdpa")
# Work so small that its floor is under the cost of a call says nothing about a limit.
FLOOR_SECONDS = 5e-6
SQUARE = (1536, 1536, 1536)


def measure(
    op: str,
    direction: str,
    *,
    plan: Plan,
    only: Sequence[str] | None,
    compiled: bool,
    limits: bool,
) -> dict[str, Any]:
    """One row: ours and the peers, interleaved, then the machine's limits and the floor that follows from them.

    Args:
        op, direction: what to measure.
        plan: how long.
        only: names of the peers; None: all.
        compiled: torch.compile among the peers.
        limits: measure those too, and ours with its kept memory given back before every call.
    """
    torch.compiler.reset()
    case = Case(op)
    backend = ours(op)
    functions = {name: f for name, f in peers(case, compiled).items() if only is None or name in only}
    calls = {"ours": case.call(case.function(backend), direction)}
    calls |= {name: case.call(function, direction) for name, function in functions.items()}
    if limits and backend == "cpu":
        calls["emptied"] = _emptied(calls["ours"])
    compared = timing.compare(calls, ours="ours", reference="eager", tolerance=TOLERANCE, plan=plan)
    row = {
        "op": op,
        "direction": direction,
        "sizes": asdict(case.sizes),
        "backend": backend,
        "timings": {name: value.summary() for name, value in compared.timings.items()},
        "ratios": {name: asdict(value) for name, value in compared.ratios.items()},
        "errors": compared.errors,
        "refused": compared.refused,
    }
    if limits and compared.timings:
        row["limit"] = _limit(case, direction, compared.timings["ours"].median)
    return row


def _emptied(call: timing.Call) -> timing.Call:
    def emptied() -> Any:
        empty_cache()
        return call()

    return emptied


def _limit(case: Case, direction: str, seconds: float) -> dict[str, Any]:
    # Beside each row, not once: what other processes take of the machine changes while the table is made.
    cost = case.cost(direction)
    bandwidth = timing.copy_bandwidth(Plan(warmup=0.05, seconds=0.4))
    # The most that the machine was seen to multiply: a large square product, or the op's own if they go faster. What the
    # library reaches at the op's shapes, which may be narrow, stands beside it.
    plan = Plan(warmup=0.1, seconds=0.3)
    at_shapes = timing.product_rate(cost.products, plan) if cost.products else None
    rate = max(timing.product_rate([SQUARE], plan), at_shapes or 0.0)
    by = {"bytes": cost.bytes / bandwidth.reused, "operations": cost.operations / rate}
    floor = max(by.values())
    return {
        "bytes": cost.bytes,
        "operations": cost.operations,
        "bandwidth": asdict(bandwidth),
        "product_rate": rate,
        "product_rate_at_shapes": at_shapes,
        "floor": floor,
        "held_by": max(by, key=by.get),
        "share": floor / seconds if floor >= FLOOR_SECONDS else None,
        "achieved_bandwidth": cost.bytes / seconds,
    }


def run(options: argparse.Namespace, *, limits: bool) -> dict[str, Any]:
    """All rows of this process, printed as they come."""
    result: dict[str, Any] = {"provenance": timing.provenance(), "rows": []}
    for op in options.op or OPS:
        for direction in options.direction or DIRECTIONS:
            print(f"measuring {op} {direction}", file=sys.stderr, flush=True)
            row = measure(
                op,
                direction,
                plan=Plan(seconds=options.seconds),
                only=options.peers,
                compiled=options.compile,
                limits=limits,
            )
            result["rows"].append(row)
    return result


def with_kept_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Ours and eager again in a process of its own under `KEPT_MEMORY`, interleaved there."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kept.json"
        command = [sys.executable, "-m", "bench.ratios", "--peers", "eager", "--no-compile", "--plain"]
        command += ["--seconds", str(options.seconds), "--json", str(file)]
        for name, values in (("--op", options.op), ("--direction", options.direction)):
            command += [word for value in values or () for word in (name, value)]
        if options.threads:
            command += ["--threads", str(options.threads)]
        done = subprocess.run(command, env={**os.environ, **KEPT_MEMORY}, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise RuntimeError(f"the measurement with kept memory ended with {done.returncode}")
        return json.loads(file.read_text())


def table(result: Mapping[str, Any]) -> str:
    """The result as a Markdown table, and a line for every peer that was refused."""
    kept = {(row["op"], row["direction"]): row for row in result.get("kept", {}).get("rows", ())}
    names = [c for c in COLUMNS if any(c in row["ratios"] for row in result["rows"])]
    header = [
        "op",
        "direction",
        "ours",
        "ms (quartiles)",
        *names,
        "target",
        "eager, kept memory",
        "emptied",
        "of the limit",
    ]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    notes = []
    for row in result["rows"]:
        key = row["op"], row["direction"]
        cells = [*key, row["backend"], _milliseconds(row), *(_ratio(row, name) for name in names)]
        cells += [_target(row), _ratio(kept[key], "eager") if key in kept else "", _ratio(row, "emptied"), _share(row)]
        lines.append("| " + " | ".join(cells) + " |")
        notes += [f"{row['op']} {row['direction']}: {name} {why}" for name, why in row["refused"].items()]
    return "\n".join([*lines, *notes])


def _milliseconds(row: Mapping[str, Any]) -> str:
    if "ours" not in row["timings"]:
        return "DISAGREES" if row["refused"]["ours"].startswith("DISAGREES") else "raised"
    t = row["timings"]["ours"]
    return f"{t['median'] * 1e3:.3g} ({t['q1'] * 1e3:.3g}-{t['q3'] * 1e3:.3g})"


def _ratio(row: Mapping[str, Any], name: str) -> str:
    if name not in row["ratios"]:
        return ""
    found = Ratio(**row["ratios"][name])
    noise = max(found.high / found.value - 1, 1 - found.low / found.value)
    return f"{found.value:.2f} ±{noise:.0%}" + ("" if found.certain else "?")


def against_targets(row: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(peer, target, ratio, NaN where it was not measured) for the peers that have a target."""
    if (row["op"], row["direction"]) not in TARGETS:
        return []
    eager, compiled = TARGETS[row["op"], row["direction"]]
    values = {name: ratio["value"] for name, ratio in row["ratios"].items()}
    best = min((values[name] for name in ("eager", "sdpa") if name in values), default=math.nan)
    return [("eager", eager, best), ("compile", compiled, values.get("compile", math.nan))]


def _target(row: Mapping[str, Any]) -> str:
    words = {True: "met", False: "MISSED"}
    cells = [
        f"{peer} {target:g} {'not measured' if math.isnan(value) else words[value >= target]}"
        for peer, target, value in against_targets(row)
    ]
    return ", ".join(cells)


def _share(row: Mapping[str, Any]) -> str:
    limit = row.get("limit")
    if limit is None:
        return ""
    if limit["share"] is None:
        return "too small"
    return f"{limit['share']:.0%} of {limit['floor'] * 1e3:.3g} ms ({limit['held_by']})"


def _limits(rows: Sequence[Mapping[str, Any]]) -> str:
    found = [row["limit"] for row in rows if "limit" in row]
    values = {
        "copy into a reused buffer, GB/s": [limit["bandwidth"]["reused"] / 1e9 for limit in found],
        "into a fresh one, GB/s": [limit["bandwidth"]["fresh"] / 1e9 for limit in found],
        "products, GFLOP/s": [limit["product_rate"] / 1e9 for limit in found],
        "at the ops' shapes": [
            limit["product_rate_at_shapes"] / 1e9 for limit in found if limit["product_rate_at_shapes"]
        ],
    }
    spans = [f"{name} {min(some):.1f}-{max(some):.1f}" for name, some in values.items() if some]
    return f"limits, lowest and highest of the rows: {'; '.join(spans)}\n" if spans else ""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.ratios", description=__doc__)
    parser.add_argument("--op", action="append", choices=OPS, help="this op; may be repeated (default: all)")
    parser.add_argument("--direction", action="append", choices=DIRECTIONS)
    parser.add_argument("--peers", action="append", choices=COLUMNS, help="only these peers; eager is always one")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of rounds for each callable (default: 2)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="no torch.compile among the peers")
    parser.add_argument("--plain", action="store_true", help="neither limits nor the second run with kept memory")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    options = parser.parse_args(arguments)
    if options.peers is not None and "eager" not in options.peers:
        options.peers.append("eager")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    result = run(options, limits=not options.plain)
    if not options.plain:
        result["kept"] = with_kept_memory(options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(timing.describe(result["provenance"]))
    print(_limits(result["rows"]))
    print(table(result))


if __name__ == "__main__":
    main()
