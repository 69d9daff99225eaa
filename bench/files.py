"""Result files: pytest-benchmark's JSON with a row of bench in each benchmark's extra_info.

A baseline is such a file too: one row an id, with `runs` beside it (see `bench.baseline`).
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
# Eager in a process where glibc keeps all memory, beside ours there: without the page faults of fresh outputs, which depend on
# whatever else the machine's memory was used for, it is the steadier peer of what is bound by memory.
KEPT = "eager, kept memory"
# The facts of a machine that ratios depend on, beside the device.
DECISIVE = (
    "driver",
    "instructions",
    "torch",
    "triton",
    "compiler",
    "threads",
    "seconds",
    "allocator",
    "huge_pages",
    "slowed",
)
# Versions of the timing contract that differ in the noise of numbers only: since 2 each process with kept memory has a parent
# of its own.
ALIKE = {1, 2}
# Of a row, and of one with times.
ROW = {"id", "suite", "preset", "subject", "direction", "variant", "sizes", "dtype", "device", "backend"}
TIMED = {"peers", "memory", "limit"}


class Unusable(Exception):
    """A result file that cannot be used; the message is one line that names the file and says why."""


@dataclass(frozen=True)
class Results:
    """One file: the machine's facts, pytest-benchmark's own benchmarks by id, or by name where they have no row, and the rows
    among them by id, those that could not be measured too."""

    path: Path
    machine: Mapping[str, Any]
    benchmarks: Mapping[str, Mapping[str, Any]]
    rows: Mapping[str, Mapping[str, Any]]

    @property
    def device(self) -> str:
        """The device's name; a plain file of pytest-benchmark has its processor's."""
        found = self.machine.get("device", {}).get("name")
        return found or self.machine.get("cpu", {}).get("brand_raw") or "unknown device"

    @property
    def device_class(self) -> str | None:
        """The device's class, such as cpu-x86_64-avx2-2c."""
        return self.machine.get("device", {}).get("class")


def make(folder: Path) -> None:
    """A folder for results, with those above it; before anything is measured that could not be written then.

    Raises:
        Unusable: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise Unusable(f"{folder}: {problem.strerror}") from None


def load(path: Path) -> Results:
    """Read a file.

    Raises:
        Unusable: it cannot be read, is no JSON, or not pytest-benchmark's.
    """
    try:
        document = json.loads(Path(path).read_text())
    except OSError as problem:
        raise Unusable(f"{path}: {problem.strerror or problem}") from None
    except ValueError as problem:
        raise Unusable(f"{path}: not JSON ({problem})") from None
    return results(document, Path(path))


def results(document: Any, path: Path = Path("this run")) -> Results:
    """The same of a document in memory."""
    try:
        found = {b["extra_info"].get("id", b["fullname"]): b for b in document["benchmarks"]}
        rows = {name: b["extra_info"] for name, b in found.items() if "id" in b["extra_info"]}
        rows |= {row["id"]: row for row in document.get("not_measured", ())}
        for row in rows.values():
            _whole(row)
        return Results(path, dict(document["machine_info"]), found, rows)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise Unusable(f"{path}: not a result of pytest-benchmark (--benchmark-json)") from None


def _whole(row: Mapping[str, Any]) -> None:
    # KeyError, TypeError, ValueError or AttributeError where a row lacks what everyone reads.
    lacks = ROW - row.keys()
    if "ours" in row:
        lacks |= TIMED - row.keys()
        for time in (row["ours"], *(peer for peer in row["peers"].values() if "ratio" in peer)):
            lacks |= {"median", "q1", "q3"} - time.keys()
        if row["limit"]:
            lacks |= {"copy_bandwidth", "product_rate", "share", "held_by"} - row["limit"].keys()
    for runs in row.get("runs", {}).values():
        lacks |= {"ratio", "noise"} - runs.keys()
        if not runs["ratio"] or min(runs["ratio"]) <= 0:
            raise ValueError("a ratio is positive")
    if lacks:
        raise KeyError(*lacks)


def measured(found: Results) -> dict[str, Mapping[str, Any]]:
    """The rows that have times."""
    return {name: row for name, row in found.rows.items() if "ours" in row}


def ratio(row: Mapping[str, Any], peer: str | None) -> Mapping[str, Any] | None:
    """A row's ratio to a peer or to `KEPT`: in a baseline the median of its runs, from the lowest to the highest; else the
    run's own with its 95 % interval; None where there is none."""
    if runs := row.get("runs", {}).get(peer):
        values = runs["ratio"]
        return {"value": statistics.median(values), "low": min(values), "high": max(values), "certain": True}
    found = row.get("memory", {}).get("eager_kept") if peer == KEPT else row.get("peers", {}).get(peer)
    return (found or {}).get("ratio")


def baseline_path(machine: Mapping[str, Any], preset: str, dtype: str, folder: Path = RESULTS) -> Path:
    """Where the baseline of a device class, preset and type is."""
    return folder / machine["device"]["class"] / f"{preset}-{dtype}.json"


def busy(facts: Mapping[str, Any]) -> bool:
    """Whether an eighth of the cores that a run might use, or more, had other work when it began."""
    return (facts.get("busy") or 0.0) > (facts.get("cores") or math.inf) / 8


def warnings(found: Results) -> list[str]:
    """A line for what makes one file's numbers doubtful: a dirty tree, other work beside them."""
    lines = []
    if found.machine.get("dirty"):
        lines.append(f"{found.path} was measured on a dirty tree: no revision stands behind its numbers")
    if busy(found.machine):
        lines.append(f"{found.path} was begun on a BUSY machine: its numbers may be of other work too")
    return lines


def differences(then: Results, now: Results) -> list[str]:
    """A line for each fact that ratios depend on and that differs between two files."""
    lines = []
    contracts = [results.machine.get("contract_version") for results in (then, now)]
    if same_contract(then, now) and contracts[0] != contracts[1]:
        lines.append(
            "timing contract {} then and {} now: ratios mean the same, and their noise differs".format(*contracts)
        )
    facts = {"device": (then.device, now.device), "device class": (then.device_class, now.device_class)}
    for name in DECISIVE:
        facts[name] = (then.machine.get(name), now.machine.get(name))
    for name, (old, new) in facts.items():
        if old != new:
            lines.append(f"{name} differs, {old} then and {new} now: ratios may have moved for that reason")
    return lines


def same_contract(then: Results, now: Results) -> bool:
    """Whether the numbers of both mean the same by their timing contracts; files without one, pytest-benchmark's own, agree."""
    old, new = (results.machine.get("contract_version") for results in (then, now))
    return old == new or {old, new} <= ALIKE


def table(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table in columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    found = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return [found[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *found[1:]]


def some(ids: Sequence[str]) -> str:
    """The first few."""
    return ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
