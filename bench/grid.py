"""`python -m bench grid`: is "cpu" anywhere slower than "reference"? 81 sizes from 1 token to 65,536, both directions.

Exit code 1 if it is, or if the two disagree. An op that is not native on "cpu" is left out unless named with --op: then
the reference runs against itself, which shows how often this measurement raises a false alarm.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import files, timing
from bench.cases import DIRECTIONS, LOSSES, OPS, TOLERANCE, Case, Sizes, footprint
from bench.presets import native_ops
from bench.timing import Plan, Row

LIMIT_BYTES = 4 * 10**9
# (M, T), and what else goes with it: classes, channels per D.
MEMBERS = {(1, 1): (3, 1), (4, 5): (40, 2), (8, 8): (150, 0.5), (2, 3): (17, 1)}
TOKENS = (1, 5, 64, 777, 4096)
WIDTHS = (8, 52, 192, 768, 1536)
LARGE = (
    (65536, 8, (4, 5)),
    (65536, 64, (8, 8)),
    (65536, 384, (4, 5)),
    (65536, 768, (1, 1)),
    (65536, 768, (2, 3)),
    (65536, 1536, (8, 8)),
)

FIRST = Plan(warmup=0.03, seconds=0.1, least=7, most=150)
# What looks slower is measured again, for longer: of some 1500 intervals of 95 % many miss once, few twice.
SECOND = Plan(warmup=0.3, seconds=1.0, least=15, most=400)
# Ratios of at least this in each of the first three rounds need no further ones.
CLEAR = 1.3
# Intervals do not see what differs between two callables for a whole measurement, such as where their memory lies.
MARGIN = 0.02


def cells(op: str) -> list[tuple[Sizes, dict[str, Any]]]:
    """The sizes for an op, each once, with keywords that go through the op's modes."""
    grid = [*itertools.product(TOKENS, WIDTHS, list(MEMBERS)[:3]), *LARGE]
    found = []
    for number, (tokens, width, (members, tasks)) in enumerate(grid):
        batch = next(b for b in (4, 3, 2, 1) if tokens % b == 0)
        classes, channels = MEMBERS[members, tasks]
        sizes = Sizes(
            B=batch,
            N=tokens // batch,
            D=width,
            M=members,
            T=tasks,
            R=32 if width >= 64 else 4,
            C=max(1, int(channels * width)) if op == "adapter" else classes,
            G=members,
            heads=width // 64 if width % 64 == 0 else 4,
        )
        keywords: dict[str, Any] = {}
        if op.startswith("counterfactual"):
            keywords["loss"] = LOSSES[number % len(LOSSES)]
        if op == "leave_one_out":
            # Of two experts the other's share is 1 whatever the weights: their gradient is rounding, nothing to compare.
            keywords["renormalize"] = bool(number % 2) and members != 2
        found.append((sizes, keywords))
    return found


def measure(op: str, sizes: Sizes, keywords: Mapping[str, Any], direction: str) -> Row:
    """Ours against the reference in one cell; a cell that looks slower is measured again."""
    case = Case(op, sizes, **keywords)
    calls = {
        name: case.call(case.function(b), direction)
        for name, b in (("ours", "cpu" if op in native_ops() else "reference"), ("reference", "reference"))
    }

    def clear(samples: Mapping[str, list[float]]) -> bool:
        return all(r / o > CLEAR for o, r in zip(samples["ours"], samples["reference"], strict=True))

    def compared(plan: Plan) -> Row:
        return timing.compare(calls, ours="ours", reference="reference", tolerance=TOLERANCE, plan=plan, enough=clear)

    row = compared(FIRST)
    # Seven rounds give an interval from the lowest to the highest: what only looks slower gets more of them, too.
    found = row.ratios.get("reference")
    return compared(SECOND) if found is not None and found.value < 1 else row


def slower(row: Row) -> bool:
    """Whether ours is slower than the reference by more than the noise and `MARGIN`."""
    found = row.ratios.get("reference")
    return found is not None and found.high < 1 and found.value < 1 - MARGIN


def run(ops: Sequence[str], most_tokens: int) -> dict[str, Any]:
    """Every cell of every op with at most `most_tokens` tokens, in both directions."""
    measured, skipped = [], []
    for op in ops:
        begin = time.monotonic()
        for (sizes, keywords), direction in itertools.product(cells(op), DIRECTIONS):
            if sizes.B * sizes.N > most_tokens:
                continue
            place = {"op": op, "direction": direction, "sizes": asdict(sizes), "keywords": keywords}
            place["name"] = " ".join([op, direction, str(sizes), *(f"{k}={v}" for k, v in keywords.items())])
            size = footprint(op, sizes, direction, **keywords)
            if size > LIMIT_BYTES:
                skipped.append({**place, "bytes": size})
                continue
            row = measure(op, sizes, keywords, direction)
            cell = {
                **place,
                "bytes": size,
                "slower": slower(row),
                "refused": row.refused,
                "timings": {name: value.summary() for name, value in row.timings.items()},
                "ratio": asdict(row.ratios["reference"]) if row.ratios else None,
            }
            measured.append(cell)
            for line in _complaints(cell):
                print(line, file=sys.stderr, flush=True)
        print(f"{op}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    return {"cells": measured, "skipped": skipped}


def report(result: Mapping[str, Any], worst: int = 10) -> str:
    """What was skipped, what disagrees, what is slower, and the worst ratios of each op and direction."""
    lines = [f"skipped, {c['bytes'] / 1e9:.1f} GB: {c['name']}" for c in result["skipped"]]
    found = result["cells"]
    lines += [line for cell in found for line in _complaints(cell)]
    lines += ["", "| op | direction | cells | slower | worst ratio | median | best |", "|---|---|---|---|---|---|---|"]
    rated = [cell for cell in found if cell["ratio"]]
    for key, group in itertools.groupby(
        sorted(rated, key=lambda c: (c["op"], c["direction"])), key=lambda c: (c["op"], c["direction"])
    ):
        some = list(group)
        values = [c["ratio"]["value"] for c in some]
        count = sum(c["slower"] for c in some)
        figures = f"{min(values):.2f} | {statistics.median(values):.2f} | {max(values):.2f}"
        lines.append(f"| {key[0]} | {key[1]} | {len(some)} | {count} | {figures} |")
    lines += ["", f"The {worst} lowest ratios (reference / ours):"]
    lines += [f"{_times(c)}: {c['name']}" for c in sorted(rated, key=lambda c: c["ratio"]["value"])[:worst]]
    return "\n".join(lines)


def _complaints(cell: Mapping[str, Any]) -> list[str]:
    lines = [f"{why} ({which}): {cell['name']}" for which, why in cell["refused"].items()]
    return [*lines, f"SLOWER {_times(cell)}: {cell['name']}"] if cell["slower"] else lines


def _times(cell: Mapping[str, Any]) -> str:
    ratio, t = cell["ratio"], cell["timings"]
    interval = f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    return f"{interval}, {t['ours']['median'] * 1e6:.1f} us against {t['reference']['median'] * 1e6:.1f} us"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench grid", description=__doc__)
    parser.add_argument(
        "--op", action="append", choices=OPS, help="this op; may be repeated (default: all native ones)"
    )
    parser.add_argument("--most-tokens", type=int, default=65536, help="only cells of at most so many tokens, B N")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    options = parser.parse_args(arguments)
    if options.most_tokens < 1 or (options.threads is not None and options.threads < 1):
        parser.error("--most-tokens and --threads are 1 or more")
    if options.json:
        try:
            files.make(options.json.parent)
        except files.Unusable as problem:
            parser.error(str(problem))
    if options.threads:
        torch.set_num_threads(options.threads)
    ops = options.op or native_ops()
    if not ops:
        print('No op is native on "cpu" here: nothing to measure. --op NAME runs the reference against itself.')
        return 0
    facts = timing.provenance()
    result = {"provenance": facts, **run(ops, options.most_tokens)}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(timing.describe(facts))
    print(report(result))
    return int(any(cell["slower"] or cell["refused"] for cell in result["cells"]))
