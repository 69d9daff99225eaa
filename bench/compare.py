"""`python -m bench compare A.json B.json`: what moved from one file of results to another.

Rows are compared by their ratio to eager with kept memory where both files have it, else to the peer whose intervals are the
narrowest, and so across machines too, with a warning. A baseline's interval is from the lowest to the highest of its runs; that
of a single run knows nothing of other runs, so for the verdict it is widened by how much more all rows differ than the
intervals say: for noise, or because many rows moved, each by another factor. What is apart only as it stands has a "?". Times
have no verdict, and stand beside each other only where both files name the same device; files of pytest-benchmark without
rows of bench have them alone. Exit code 0: compared, whatever moved; 1: nothing could be.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import files
from bench.files import Results

INTERVAL = "from the lowest to the highest of a baseline's runs, else one run's own 95 %"
# Fewer do not say how much two runs differ beyond their intervals.
LEAST_ROWS = 8
# Of the logarithm of a ratio; what agrees better does by chance.
LEAST_WIDTH = 1e-3


@dataclass(frozen=True)
class Change:
    """A row's figure in two files, with 95 % intervals: (value, low, high); `peer` None: a time in seconds. `single`: whether
    each is of one run, and its interval of that run's rounds alone."""

    name: str
    peer: str | None
    then: tuple[float, float, float]
    now: tuple[float, float, float]
    single: tuple[bool, bool] = (True, True)

    @property
    def factor(self) -> float:
        """How many times faster ours is now."""
        return self.now[0] / self.then[0] if self.peer else self.then[0] / self.now[0]

    def moved(self, excess: float = 1.0) -> bool:
        """Whether the intervals, those of single runs so many times as wide, are apart."""
        low, high = self._bounds(0, excess)
        least, most = self._bounds(1, excess)
        return least > high or most < low

    def _bounds(self, side: int, excess: float) -> tuple[float, float]:
        value, low, high = figure = (self.then, self.now)[side]
        if not self.single[side]:
            return low, high
        wide = math.exp(_half(figure) * excess)
        return min(low, value / wide), max(high, value * wide)

    def verdict(self, excess: float) -> str:
        """In a word; with a question mark where it is by the intervals as they stand alone."""
        if not self.moved():
            return "within noise"
        return ("slower" if self.factor < 1 else "faster") + ("" if self.moved(excess) else "?")


def excess(changes: Sequence[Change]) -> float:
    """How many times as much as their intervals say two files differ: the spread of all rows' changes about their median, by
    the median deviation, of which a few rows that did move are no part; 1 for fewer than `LEAST_ROWS`, and for baselines."""
    changes = [change for change in changes if any(change.single)]
    if len(changes) < LEAST_ROWS:
        return 1.0
    # In standard deviations, of which 1.96 are a 95 % interval's half, and 0.6745 a median deviation.
    units = [math.log(change.factor) / math.hypot(*map(_half, (change.then, change.now))) * 1.96 for change in changes]
    middle = statistics.median(units)
    return max(1.0, statistics.median(abs(unit - middle) for unit in units) / 0.6745)


def _half(figure: tuple[float, float, float]) -> float:
    return max(math.log(figure[2] / figure[1]) / 2, LEAST_WIDTH)


def ratios(then: Results, now: Results) -> tuple[list[Change], list[str]]:
    """Every common row's change, by the peer that the module names, and a line for what has none."""
    changes, notes = [], []
    old, new = files.measured(then), files.measured(now)
    for name in old.keys() & new.keys():
        if difference := _differs(old[name], new[name]):
            notes.append(f"{name}: {difference}, not compared")
            continue
        found = {}
        for peer in (*old[name]["peers"], files.KEPT):
            one, other = files.ratio(old[name], peer), files.ratio(new[name], peer)
            if one and other:
                single = tuple(peer not in row.get("runs", {}) for row in (old[name], new[name]))
                found[peer] = Change(name, peer, _interval(one), _interval(other), single)
        if found:
            changes.append(found.get(files.KEPT) or min(found.values(), key=_width))
        else:
            notes.append(f"{name}: no peer in common")
    notes.sort()
    for one, other, words in ((then, now, "only then"), (now, then, "only now")):
        alone = sorted(one.rows.keys() - other.rows.keys())
        if alone:
            notes.append(f"{words}: {', '.join(alone)}")
    for results in (then, now):
        notes += [f"{results.path}: {name}: {row['error']}" for name, row in results.rows.items() if "error" in row]
    return sorted(changes, key=lambda change: (change.factor, change.name)), notes


def _differs(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    # In what two rows are not of the same work.
    sides = [{**row.get("sizes", {}), "dtype": row.get("dtype"), "backend": row.get("backend")} for row in (old, new)]
    then, now = (
        ", ".join(f"{n}={side.get(n)}" for n in side if side[n] != other.get(n)) for side, other in (sides, sides[::-1])
    )
    return f"{then} then and {now} now" if then or now else ""


def _interval(ratio: Mapping[str, Any]) -> tuple[float, float, float]:
    return ratio["value"], ratio["low"], ratio["high"]


def _width(change: Change) -> float:
    return _half(change.then) + _half(change.now)


def times(then: Results, now: Results) -> list[Change]:
    """The medians of everything of one size and type in both files, with quartiles; by row, or by test where a file has no
    rows."""
    sides = []
    for results in (then, now):
        found = {name: results.rows.get(name, {}).get("ours", b["stats"]) for name, b in results.benchmarks.items()}
        sides.append({name: (t["median"], t["q1"], t["q3"]) for name, t in found.items()})
    old, new = sides
    one, other = files.measured(then), files.measured(now)
    alike = {name for name in old.keys() & new.keys() if not _differs(one.get(name, {}), other.get(name, {}))}
    changes = [Change(name, None, old[name], new[name]) for name in alike]
    return sorted(changes, key=lambda change: (change.factor, change.name))


def report(then: Results, now: Results) -> str:
    """What moved, as text.

    Raises:
        Unusable: nothing in the two files can be compared.
    """
    if not files.same_contract(then, now):
        old, new = then.machine.get("contract_version"), now.machine.get("contract_version")
        raise files.Unusable(
            f"{then.path} is of timing contract {old} and {now.path} of {new}: their numbers differ in kind"
        )
    changes, notes = ratios(then, now)
    lines = [*files.warnings(then), *files.warnings(now), *files.differences(then, now), *notes]
    if changes:
        wide = excess(changes)
        lines += ["", f"ratios: the peer's time over ours, {INTERVAL}; lowest change first"]
        if wide >= 1.05:
            words = "for noise or because many moved: single runs' are taken so much wider"
            lines.append(f"rows differ {wide:.1f} times as much as these say, {words}; ? is what is apart as it stands")
        lines.append(_table(changes, _ratio, [change.verdict(wide) for change in changes]))
    if then.device == now.device:
        if found := times(then, now):
            lines += ["", f"ABSOLUTE times on {now.device}: median, quartiles; they move with the machine's load too"]
            lines.append(_table(found, _seconds, [""] * len(found)))
    else:
        lines += ["", "times are not compared: the devices differ"]
        found = []
    if not changes and not found:
        why = f": {notes[0]}" if notes else ""
        raise files.Unusable(f"{then.path} and {now.path} have nothing in common that can be compared{why}")
    return "\n".join(lines).lstrip("\n")


def _ratio(figure: tuple[float, float, float]) -> str:
    return "{:.3g} [{:.3g}, {:.3g}]".format(*figure)


def _seconds(figure: tuple[float, float, float]) -> str:
    return "{:.4g} ms [{:.4g}, {:.4g}]".format(*(value * 1e3 for value in figure))


def _table(changes: Sequence[Change], cell: Any, verdicts: Sequence[str]) -> str:
    cells = [("row", "peer", "then", "now", "speed of ours", "")]
    for change, verdict in zip(changes, verdicts, strict=True):
        values = cell(change.then), cell(change.now)
        cells.append((change.name, change.peer or "", *values, f"{change.factor - 1:+.1%}", verdict))
    return "\n".join(files.table(cells))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.add_argument("then", type=Path)
    parser.add_argument("now", type=Path)
    options = parser.parse_args(arguments)
    try:
        print(report(files.load(options.then), files.load(options.now)))
    except files.Unusable as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0
