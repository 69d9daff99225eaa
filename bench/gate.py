"""The gate: has a ratio to a peer of the same run fallen, since the committed baseline, by more than its noise allows?

What is compared is the logarithm of a row's ratio, lower quartile over lower quartile: a burst of somebody else's load has to
cover three quarters of the rounds to move it. The peer, the row's yardstick, is eager with kept memory where that is measured,
as the mean over its processes, of which a burst may cover one; and else the one whose ratio was the steadiest over the
baseline's runs. Noise is known twice: within a run, from its rounds, and from run to run, from the baseline. A few runs say
little about one row's spread, so it is drawn towards what the row's rounds say times what is common to all rows (how much more
runs differ than rounds let expect).

Beside every row, all rows of a subject are judged as one, by the mean of their changes: a kernel that got slower shows in
each of them, and their mean has less noise than any. Where the yardstick is eager with kept memory, the subject is judged
once more as it is used, by eager with the run's threads and fresh memory: what keeps a second thread idle shows there alone.

A change is judged in two steps. What looks slower is measured again, up to `PASSES` times and each time in a fresh process,
and is slower if most of these say so; the first look is not among them, since it was chosen for being low. With so many rows
one is always low: what is allowed is such that all checks together raise a false alarm in `FALSE_ALARMS` of all runs, as long
as runs differ no more now than the baseline's did.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import files
from bench.files import KEPT, Results
from bench.timing import student

# The slow-down to notice, and how surely. A check whose noise is too large for it says what it notices instead.
NOTICED, POWER = math.log(1.10), 0.95
# Of all runs, at most: 1 in 20.
FALSE_ALARMS = 0.05
# The least that is allowed: another day, or the same kernel linked elsewhere, is not in the spread of a baseline's runs.
LEAST_ALLOWED = math.log(1.05)
# Odd. The median of five has half the noise of one, and two of them may meet a burst.
PASSES = 5
# How many further runs the noise common to all rows counts as, beside the runs of the row itself.
COMMON_RUNS = 4
# Ratios of rounds that agree better than this agree by chance, or by the clock's resolution.
LEAST_NOISE = 1e-3
# A check that does not notice this is none.
BLIND, QUIETER = math.log(2), "this run or the baseline's were too noisy"
# How the name of a check ends that is by eager with the run's threads and fresh memory.
AS_USED = ", as used"
# Fewer runs say nothing about the noise between them.
LEAST_RUNS = 3

Row = Mapping[str, Any]
# Measures rows again: ids, each with a yardstick -> rows by id; what failed is left out.
Again = Callable[[Iterable[tuple[str, str]]], Mapping[str, Row]]


def observed(row: Row, peer: str) -> tuple[float, float] | None:
    """(logarithm of the ratio to a peer, its noise by the rounds, with kept memory by the processes); None where there is no
    such ratio."""
    if peer == KEPT:
        values = [math.log(ratio) for ratio in row.get("memory", {}).get("eager_kept", {}).get("processes", ())]
        if len(values) < 2:
            return None
        return statistics.mean(values), max(statistics.stdev(values) / math.sqrt(len(values)), LEAST_NOISE)
    found, ours = row.get("peers", {}).get(peer, {}), row.get("ours")
    if ours is None or "ratio" not in found:
        return None
    # The interval holds 95 %, which is 1.96 standard deviations on each side.
    noise = math.log(found["ratio"]["high"] / found["ratio"]["low"]) / (2 * 1.96)
    return math.log(found["q1"] / ours["q1"]), max(noise, LEAST_NOISE)


def median_noise(count: int) -> float:
    """The noise of the median of `count` values, in that of one of them; for normal ones exact to 2 %."""
    return math.sqrt(math.pi / 2 / (count + math.pi / 2 - 1))


# -- what the baseline says --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """A logarithm of a ratio over the baseline's runs, and its noise by the rounds of a run.

    again: what a second measurement right after each run said, in a fresh process; empty where there was none.
    """

    values: tuple[float, ...]
    rounds: float
    again: tuple[float, ...] = ()

    @property
    def centre(self) -> float:
        return statistics.median(self.values + self.again)

    @property
    def variance(self) -> float:
        found = [statistics.variance(values) for values in (self.values, self.again) if values]
        return max(statistics.mean(found), LEAST_NOISE**2)


def series(row: Row) -> dict[str, Series]:
    """Those of a baseline's row, by peer."""
    return {
        peer: Series(
            tuple(map(math.log, runs["ratio"])),
            statistics.median(runs["noise"]),
            tuple(map(math.log, runs.get("again", ()))),
        )
        for peer, runs in row["runs"].items()
    }


def noises(found: Sequence[Series]) -> list[float]:
    """The noise of one measurement of each, between runs."""
    if not found:
        return []
    free = len(found[0].values) - 1
    # The median of a variance from few values is below its mean; this is the ratio, to 1 %, by Wilson and Hilferty.
    common = statistics.median(s.variance / s.rounds**2 for s in found) / (1 - 2 / (9 * free)) ** 3
    return [math.sqrt((free * s.variance + COMMON_RUNS * common * s.rounds**2) / (free + COMMON_RUNS)) for s in found]


def lasting(found: Sequence[Series]) -> float:
    """The share of the variance between runs that a run and its passes have in common, so that no number of passes averages
    it out; 1, the worst case, where the baseline's runs were not measured again.

    Half the mean square of the differences between a run and what was measured again after it is the variance that they do
    not share. Its share is a sum over all over a sum over all, each in its own rounds' noise: a mean of quotients would be too
    large, since few runs often have a variance near zero. What is returned is one standard error to the safe side.
    """
    pairs = [
        (statistics.mean((a - b) ** 2 for a, b in zip(s.values, s.again)) / s.rounds**2, 2 * s.variance / s.rounds**2)
        for s in found
        if s.again
    ]
    if len(pairs) < max(2, len(found)):
        return 1.0
    total = sum(whole for _, whole in pairs)
    apart = sum(one for one, _ in pairs) / total
    error = math.sqrt(sum((one - apart * whole) ** 2 for one, whole in pairs) * len(pairs) / (len(pairs) - 1)) / total
    return min(1.0, max(0.0, 1 - apart + error))


@dataclass
class Check:
    """A row, or all rows of a subject, and what came out.

    peers: the yardstick of each row by id. weights: what each row counts, 1 in all. then: the logarithm of the ratio over the
    baseline's runs. noise: of one measurement. lasting: the share of its variance that passes have in common. allowed: how
    far it may fall. noticed: the slow-down that is noticed with `POWER`. first: the first look now; again: one value for
    each pass. lost: a row could not be measured again.
    """

    name: str
    peers: dict[str, str]
    weights: dict[str, float]
    then: Series
    noise: float = math.nan
    lasting: float = 1.0
    allowed: float = math.inf
    noticed: float = math.inf
    first: float = math.nan
    again: list[float] = field(default_factory=list)
    lost: bool = False

    @property
    def centre(self) -> float:
        return self.then.centre

    def allow(self, checks: int, worse: float) -> None:
        """Set what is allowed where so many checks share `FALSE_ALARMS`, and rounds are `worse` times as noisy as then."""
        self.noise = math.hypot(self.noise, self.then.rounds * math.sqrt(worse**2 - 1))
        runs, values = len(self.then.values), len(self.then.values + self.then.again)
        noise = self.noise * math.hypot(self._left(runs, values), self._left(1, PASSES))
        # What was measured again says as much about the noise as a run of its own, but for what it shares with its run.
        free = runs - 1 + int((1 - self.lasting) * (values - runs)) + COMMON_RUNS
        self.allowed = max(LEAST_ALLOWED, student(1 - FALSE_ALARMS / checks, free) * noise)
        self.noticed = max(NOTICED, self.allowed + student(POWER, free) * noise)

    def _left(self, runs: int, values: int) -> float:
        # The noise of the median of so many values of so many runs, in that of one.
        return math.sqrt(self.lasting * median_noise(runs) ** 2 + (1 - self.lasting) * median_noise(values) ** 2)

    def value(self, rows: Mapping[str, Row]) -> float | None:
        """The check's logarithm of a ratio in one run; None where a row of it is missing."""
        found = {name: observed(rows[name], peer) for name, peer in self.peers.items() if name in rows}
        if len(found) < len(self.peers) or None in found.values():
            return None
        return sum(weight * found[name][0] for name, weight in self.weights.items())

    @property
    def suspect(self) -> bool:
        """Whether the first look asks for another: low by what is allowed, or by less where it is as noisy as that."""
        doubt = 1.96 * self.noise * math.hypot(1, median_noise(len(self.then.values)))
        return self.first - self.centre < -min(self.allowed, self.noticed - doubt)

    @property
    def low(self) -> int:
        """How many passes are lower than is allowed."""
        return sum(value - self.centre < -self.allowed for value in self.again)

    @property
    def slower(self) -> bool:
        return self.suspect and (self.lost or self.low > PASSES // 2)

    @property
    def settled(self) -> bool:
        """Whether no further pass can change the verdict."""
        return not self.suspect or self.slower or len(self.again) - self.low > PASSES // 2

    @property
    def now(self) -> float:
        """The median of the passes, or the first look where there are none."""
        return statistics.median(self.again) if self.again else self.first

    @property
    def verdict(self) -> str:
        """For the table; a check that is too noisy for `NOTICED` says what it notices."""
        if self.slower:
            return "LOST: not measured again" if self.lost else f"SLOWER in {self.low} of {len(self.again)} passes"
        words = ["faster" if self.now - self.centre > self.allowed else "ok"]
        if self.again:
            words.append(f"{self.low} of {len(self.again)} passes low")
        if self.noticed > NOTICED:
            words.append(f"notices {math.exp(self.noticed):.2f}x and more")
        return ", ".join(words)


def checks(then: Mapping[str, Row], now: Mapping[str, Row]) -> list[Check]:
    """Every row of the baseline that is measured now, then every subject with several rows, all of them measured now.

    Allowances count all rows of the baseline, so that a selection of rows is judged as they are in a whole run, but for how
    noisy rounds are now, of which a few rows say little.
    """
    peers: dict[str, dict[str, Check]] = {}
    for name, row in then.items():
        for peer, found in series(row).items():
            peers.setdefault(peer, {})[name] = Check(name, {name: peer}, {name: 1.0}, found)
    for some in peers.values():
        _learn(list(some.values()))
    rows: dict[str, Check] = {}
    for name in then:
        found = {peer: some[name] for peer, some in peers.items() if name in some}
        found = {peer: c for peer, c in found.items() if name in now and observed(now[name], peer)} or found
        if found:
            rows[name] = found.get(KEPT) or min(found.values(), key=lambda check: check.noise)
    used = {n: peers["eager"][n] for n, check in rows.items() if check.peers[n] == KEPT and n in peers.get("eager", {})}
    result = list(rows.values())
    for some, words in ((rows, ""), (used, AS_USED)):
        groups = _subjects(some, then, words)
        _learn(groups)
        result += groups
    count, worse = len(result), _worse(rows, now)
    for check in result:
        check.allow(count, worse)
        value = check.value(now)
        check.first = math.nan if value is None else value
    return [check for check in result if not math.isnan(check.first)]


def noticed(then: Results) -> tuple[list[str], list[list[str]]]:
    """What the gate notices with this baseline in a run no noisier than its own, as a table's header and rows: for each subject
    the check of all its rows, or of the one that it has, and the one as used."""
    rows = {name: then.rows[name] for name in gated(then)}
    found: dict[str, dict[str, Check]] = {}
    for check in checks(rows, rows):
        used = check.name.endswith(AS_USED)
        beside = found.setdefault(rows[next(iter(check.peers))]["subject"], {})
        if used or len(check.peers) >= len(beside.get("", check).peers):
            beside["used" if used else ""] = check
    lines = []
    for subject, beside in found.items():
        factors = [f"{math.exp(beside[name].noticed):.2f}" if name in beside else "" for name in ("", "used")]
        lines.append([subject, str(len(beside[""].peers)), *factors])
    return ["subject", "rows", "notices", "as used"], lines


def _learn(some: Sequence[Check]) -> None:
    # Their noise, from what all of them say.
    found = [check.then for check in some]
    share = lasting(found)
    for check, noise in zip(some, noises(found)):
        check.noise, check.lasting = noise, share


def _subjects(rows: Mapping[str, Check], then: Mapping[str, Row], words: str) -> list[Check]:
    # A check for each subject with several rows.
    found: dict[str, list[Check]] = {}
    for name, check in rows.items():
        found.setdefault(then[name]["subject"], []).append(check)
    return [_together(f"{subject}, its {len(some)} rows{words}", some) for subject, some in found.items() if some[1:]]


def _together(name: str, some: Sequence[Check]) -> Check:
    # The less noise a row has the more it counts.
    raw = {check.name: check.noise**-2 for check in some}
    weights = {name: value / sum(raw.values()) for name, value in raw.items()}
    values = _mean(weights, {check.name: check.then.values for check in some})
    measured_again = all(check.then.again for check in some)
    again = _mean(weights, {check.name: check.then.again for check in some}) if measured_again else ()
    rounds = math.hypot(*(weights[c.name] * c.then.rounds for c in some))
    peers = {name: peer for check in some for name, peer in check.peers.items()}
    return Check(name, peers, weights, Series(values, rounds, again))


def _mean(weights: Mapping[str, float], values: Mapping[str, Sequence[float]]) -> tuple[float, ...]:
    return tuple(sum(weights[name] * value for name, value in zip(values, run)) for run in zip(*values.values()))


def _worse(rows: Mapping[str, Check], now: Mapping[str, Row]) -> float:
    # How much noisier rounds are in this run than in the baseline's, and with them all else.
    found = [observed(now[name], check.peers[name]) for name, check in rows.items() if name in now]
    then = [check.then.rounds for name, check in rows.items() if name in now]
    return max(1.0, statistics.median([o[1] / t for o, t in zip(found, then) if o] or [1.0]))


# -- what this run says ------------------------------------------------------------------------------------------------


def judge(found: Iterable[Check], again: Again) -> list[Check]:
    """Measure again what looks slower until every verdict is settled."""
    found = list(found)
    while waiting := [check for check in found if not check.settled]:
        rows = again(dict.fromkeys(pair for check in waiting for pair in check.peers.items()))
        for check in waiting:
            value = check.value(rows)
            if value is None:
                check.lost = True
            else:
                check.again.append(value)
    return found


@dataclass(frozen=True)
class Report:
    """What to print, and whether the run fails."""

    text: str
    failed: bool


def check(now: Results, again: Again, folder: Path = files.RESULTS) -> Report:
    """Judge a run against the baseline of its device class; whatever stands in the way is a line of the report."""
    kinds = sorted({(row["preset"], row["dtype"]) for row in now.rows.values() if "preset" in row})
    if not kinds:
        return Report("gate: FAILED, nothing was measured", True)
    lines, failed = files.warnings(now), False
    for preset, dtype in kinds:
        path = files.baseline_path(now.machine, preset, dtype, folder)
        rows = {name: row for name, row in now.rows.items() if (row.get("preset"), row.get("dtype")) == (preset, dtype)}
        try:
            then = baseline(path, now)
        except files.Unusable as problem:
            lines.append(f"FAILED, {problem}")
            failed = True
            continue
        comparable, notes = _comparable(then, rows)
        broken = [f"FAILED, {name}: {rows[name]['error']}" for name in then.rows if "error" in rows.get(name, {})]
        broken += _without_yardstick(then, comparable)
        found = checks({name: then.rows[name] for name in gated(then)}, comparable)
        if then.machine.get("threads") != now.machine.get("threads"):
            found = [check for check in found if not check.name.endswith(AS_USED)]
            notes.append("subjects as used are not judged: the threads differ")
        found = judge(found, again)
        blind = [check for check in found if check.noticed > BLIND]
        lines += [*files.warnings(then), *files.differences(then, now), *notes, *broken, table(found) if found else ""]
        slower = [check.name for check in found if check.slower]
        failed = failed or bool(slower or broken or len(blind) == len(found))
        if slower:
            lines.append(f"FAILED, slower than allowed: {'; '.join(slower)}")
        elif not found:
            lines.append("FAILED, no row can be compared")
        elif len(blind) == len(found):
            lines.append(f"FAILED, none of {len(found)} checks would notice ours at half its speed: {QUIETER}")
        else:
            lines.append(f"{len(found)} checks, none slower")
            if blind:
                lines[-1] += f"; {len(blind)} of them would not notice ours at half its speed: {QUIETER}"
    return Report("\n".join(f"gate: {line}" if "\n" not in line else line for line in lines if line), failed)


def _missing(path: Path) -> str:
    # That there is no baseline, and how to make one.
    preset, _, dtype = path.stem.rpartition("-")
    make = f"python -m bench baseline --preset {preset} --dtype {dtype}"
    if path.parents[1] != files.RESULTS:
        make += f" --out {path.parents[1]}"
    return f"no baseline for {path.parent.name}, {path.stem}: `{make}` makes one in 7 runs, with -k of some rows"


def baseline(path: Path, now: Results) -> Results:
    """The baseline in a file.

    Raises:
        Unusable: there is none, it is not the result of `python -m bench baseline`, or it is of another contract, class or
            --seconds.
    """
    if not path.exists():
        raise files.Unusable(_missing(path))
    then = files.load(path)
    if any("runs" not in row for row in files.measured(then).values()) or not then.rows:
        raise files.Unusable(f"{path}: not made by `python -m bench baseline`, so nothing is known of its noise")
    if not files.same_contract(then, now):
        old, new = then.machine.get("contract_version"), now.machine.get("contract_version")
        raise files.Unusable(f"{path}: timing contract {old}, and this run's is {new}: make it again")
    if then.device_class != now.device_class:
        raise files.Unusable(f"{path}: measured on {then.device_class}, and this is {now.device_class}")
    if (old := then.machine.get("seconds")) != (new := now.machine.get("seconds")):
        # The same code with 0.02 and 0.12 had ratios a third apart in causal_target's rows.
        raise files.Unusable(f"{path}: measured with --seconds {old}, and this run with {new}")
    return then


def gated(then: Results) -> list[str]:
    """The rows of a baseline that have a kernel of ours: the reference against itself cannot get slower."""
    return [name for name, row in files.measured(then).items() if row["backend"] != "reference"]


def _comparable(then: Results, rows: Mapping[str, Row]) -> tuple[dict[str, Row], list[str]]:
    # The rows that can be compared, and a line for what cannot.
    notes = []
    missing = [name for name in gated(then) if name not in rows]
    new = [name for name, row in rows.items() if name not in then.rows and "ours" in row]
    other = [
        name for name in gated(then) if "ours" in rows.get(name, {}) and rows[name]["sizes"] != then.rows[name]["sizes"]
    ]
    for names, words in (
        (missing, "in the baseline and not in this run, nor any subject of theirs as a whole"),
        (new, "new: not in the baseline"),
        (other, "of other sizes than the baseline's, not compared"),
    ):
        if names:
            notes.append(f"{len(names)} rows {words}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
    same = {}
    for name in gated(then):
        row, old = rows.get(name, {}), then.rows[name]
        if "ours" not in row or name in other:
            continue
        if not any(observed(row, peer) for peer in old["runs"]):
            notes.append(f"{name}: no peer of the baseline in this run ({', '.join(old['runs'])}), not compared")
        else:
            same[name] = row
            if row["backend"] != old["backend"]:
                notes.append(f"{name}: backend {row['backend']} now, {old['backend']} then")
    return same, notes


def _without_yardstick(then: Results, rows: Mapping[str, Row]) -> list[str]:
    # By another peer they would be judged too, and what is noticed so is far more than what the baseline stands for.
    lost: dict[str, list[str]] = {}
    for name, row in rows.items():
        if KEPT in then.rows[name]["runs"] and observed(row, KEPT) is None:
            why = next((note for note in row.get("notes", ()) if note.startswith("kept memory: ")), "not measured")
            lost.setdefault(why, []).append(name)
    return [
        f"FAILED, {len(names)} rows without {KEPT}, their yardstick: {', '.join(names[:4])}"
        f"{', ...' if len(names) > 4 else ''} ({why.removeprefix('kept memory: ')})"
        for why, names in lost.items()
    ]


def table(found: Sequence[Check]) -> str:
    """A line for each check, the lowest change first."""
    header = ("row", "peer", "ratio then", "now", "change", "allowed", "verdict")
    cells = [header]
    for check in sorted(found, key=lambda check: (not check.slower, check.now - check.centre)):
        peers = sorted(set(check.peers.values()))
        change, allowed = math.expm1(check.now - check.centre), math.expm1(-check.allowed)
        cells.append(
            (
                check.name,
                peers[0] if len(peers) == 1 else "each row's own",
                f"{math.exp(check.centre):.3g}",
                f"{math.exp(check.now):.3g}",
                f"{change:+.1%}",
                f"{allowed:+.1%}",
                check.verdict,
            )
        )
    return "\n".join(files.table(cells))
