"""`python -m bench baseline`: runs the benchmarks several times and writes what the gate compares with.

One run says nothing about how much the next will differ. Runs of different hours and days say it best: the files that this
command leaves in runs/baseline/, of one revision, can be merged. Those of a plain --benchmark-json can too, but no row of
theirs was measured again, and the gate allows more. What this command does not know goes to pytest (--preset, -k, ...).
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bench import files, gate, slowed
from bench.again import in_fresh_processes
from bench.files import Results
from bench.presets import PRESETS, Settings
from bench.suites import Benchmark

# What a baseline keeps of machine_info: nothing that names a machine's owner, and not a processor's list of flags.
KEPT_FACTS = (
    "device",
    "driver",
    "cpu_name",
    "cores",
    "threads",
    "instructions",
    "torch",
    "triton",
    "compiler",
    "python",
    "huge_pages",
    "allocator",
    "revision",
    "dirty",
    "load",
    "busy",
    "date",
    "contract",
    "contract_version",
    "seconds",
    "backend",
)
# What has to be the same in runs that are merged.
SAME = ("device", *files.DECISIVE, "revision", "dirty", "contract_version", "backend")
DIGITS = 6
# Options of pytest's that a baseline's runs do not take, and why.
NOT_PASSED = {
    "--shape": "a baseline is of a preset as it is, without --shape",
    "--gate": "a baseline is what the gate compares with: --gate is for later runs",
    "--benchmark-json": "a baseline's runs have files of their own, in runs/baseline/: --out says where the baseline goes",
}


def merge(runs: Sequence[Results]) -> tuple[dict[str, Any], list[str]]:
    """One document of several runs, and a line for each row that is not in all of them.

    The rows are of one run, so that its times can be compared with one another: of the one that is nearest to the medians.
    Beside each is `runs`: for each peer, the ratios (lower quartile over lower quartile) and the rounds' noise of all runs, and
    the ratios that were measured again after each, where they were.

    Raises:
        Unusable: too few runs, or runs that cannot be merged.
    """
    _enough(len(runs))
    for i, run in enumerate(runs):
        _as_preset(run)
        for other in runs[:i]:
            if (run.machine.get("date"), run.rows) == (other.machine.get("date"), other.rows):
                raise files.Unusable(f"{run.path} is the same run as {other.path}")
        for name in SAME:
            if run.machine.get(name) != runs[0].machine.get(name):
                old, new = runs[0].machine.get(name), run.machine.get(name)
                raise files.Unusable(
                    f"{run.path}: {name} {new}, and {old} in {runs[0].path}: not the runs of one baseline"
                )
    several, notes, lost = [], [], []
    for name in dict.fromkeys(name for run in runs for name in run.rows):
        found = [run.benchmarks[name] for run in runs if "ours" in run.rows.get(name, {})]
        again = sum("again" in benchmark["extra_info"] for benchmark in found)
        if 0 < again < len(found):
            lost.append(name)
        if len(found) == len(runs) and all(b["extra_info"]["sizes"] == found[0]["extra_info"]["sizes"] for b in found):
            several.append(found)
        else:
            notes.append(f"{name}: measured at one size in {len(found)} of {len(runs)} runs, left out")
    if lost:
        notes.append(f"measured again after some of the runs only, which does not count: {files.some(lost)}")
    beside = [_runs([benchmark["extra_info"] for benchmark in found]) for found in several]
    chosen = _nearest(beside, len(runs))
    benchmarks = [_benchmark(found[chosen], ratios) for found, ratios in zip(several, beside)]
    facts = {name: runs[chosen].machine[name] for name in KEPT_FACTS if name in runs[chosen].machine}
    return _rounded({"machine_info": facts, "benchmarks": benchmarks}), notes


def _enough(runs: int) -> None:
    if runs < gate.LEAST_RUNS:
        raise files.Unusable(f"{runs} runs: at least {gate.LEAST_RUNS} are needed to see how much runs differ")


def _as_preset(run: Results) -> None:
    # A baseline is of the preset as it is, and of ours as it is.
    if run.machine.get("slowed"):
        raise files.Unusable(f"{run.path}: ours was slowed on purpose ({run.machine['slowed']})")
    for name, row in files.measured(run).items():
        if (preset := PRESETS.get(row["preset"])) is None:
            raise files.Unusable(f"{run.path}: {name}: there is no preset {row['preset']} here")
        settings = Settings(row["preset"], preset, {}, row["dtype"], row["device"], None, 0.0)
        own = asdict(Benchmark(row["subject"], row["direction"], row["variant"]).sizes(settings))
        if row["sizes"] != own:
            other = ", ".join(f"{size}={value}" for size, value in row["sizes"].items() if value != own.get(size))
            raise files.Unusable(f"{run.path}: {name}: {other} is not the preset's: a baseline is made without --shape")


def _runs(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    # What all runs say of a row, by peer.
    runs = {}
    for peer in (*rows[0]["peers"], files.KEPT):
        seen = [gate.observed(row, peer) for row in rows]
        if None not in seen:
            runs[peer] = {"ratio": [math.exp(value) for value, _ in seen], "noise": [noise for _, noise in seen]}
            second = [gate.observed(row.get("again", {}), peer) for row in rows]
            if None not in second:
                runs[peer]["again"] = [math.exp(value) for value, _ in second]
    return runs


def _nearest(beside: Sequence[Mapping[str, Mapping[str, Sequence[float]]]], runs: int) -> int:
    # The run whose ratios are, over all rows and peers, the least far from the medians.
    apart = [0.0] * runs
    for ratios in (one["ratio"] for peers in beside for one in peers.values()):
        middle = statistics.median(ratios)
        for i, ratio in enumerate(ratios):
            apart[i] += abs(math.log(ratio / middle))
    return apart.index(min(apart))


def _benchmark(benchmark: Mapping[str, Any], runs: Mapping[str, Any]) -> dict[str, Any]:
    stats = {name: value for name, value in benchmark["stats"].items() if name != "data"}
    row = {name: value for name, value in benchmark["extra_info"].items() if name != "again"}
    return {**benchmark, "stats": stats, "extra_info": {**row, "runs": runs}}


def _rounded(value: Any) -> Any:
    # Six digits are more than any noise leaves; a file half the size is easier to review.
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, (list, tuple)) else value


def run(options: Sequence[str], file: Path) -> int:
    """One run of the benchmarks in a process of its own, and its rows with kept memory once more in another; pytest's exit
    code."""
    command = [sys.executable, "-m", "pytest", "bench/", "-q", *options, f"--benchmark-json={file}"]
    code = subprocess.run(command, cwd=files.ROOT).returncode
    if file.exists():
        found = json.loads(file.read_text())
        _measure_again(found)
        file.write_text(json.dumps(found))
    return code


def _measure_again(found: dict[str, Any]) -> None:
    # Into `again` of each row: what the gate's passes are to a run.
    kinds: dict[tuple[str, str, str], list[Any]] = {}
    for benchmark in found["benchmarks"]:
        row = benchmark["extra_info"]
        if row.get("memory", {}).get("eager_kept") and row["backend"] != "reference":
            kinds.setdefault((row["preset"], row["dtype"], row["device"]), []).append(row)
    asked = {name: found["machine_info"][name] for name in ("seconds", "backend")}
    for (preset, dtype, device), rows in kinds.items():
        again = in_fresh_processes({"preset": preset, "dtype": dtype, "device": device, **asked})
        measured = again((row["id"], files.KEPT) for row in rows)
        for row in rows:
            if row["id"] in measured:
                row["again"] = measured[row["id"]]


def write(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """One file for each preset and type among the rows."""
    kinds: dict[tuple[str, str], list[Any]] = {}
    for benchmark in document["benchmarks"]:
        row = benchmark["extra_info"]
        kinds.setdefault((row["preset"], row["dtype"]), []).append(benchmark)
    paths = []
    for kind, some in kinds.items():
        path = files.baseline_path(document["machine_info"], *kind, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**document, "benchmarks": some}, indent=1) + "\n")
        paths.append(path)
    return paths


def _made(count: int, options: Sequence[str]) -> list[Path]:
    # So many new runs' files, which stay, since hours may be in them.
    folder = files.ROOT / "runs" / "baseline" / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    paths = [folder / f"run-{i + 1}.json" for i in range(count)]
    for i, path in enumerate(paths):
        print(f"run {i + 1} of {count}: {path}", flush=True)
        code = run(options, path)
        if not path.exists():
            if not i:
                folder.rmdir()
            raise files.Unusable(f"run {i + 1} ended with {code} and measured nothing")
        if code == pytest.ExitCode.INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            print(f"run {i + 1} ended with {code}; what it measured counts", file=sys.stderr)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench baseline", description=__doc__)
    parser.add_argument("--runs", type=int, default=7, help="how many runs to make (default: 7)")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="merge these runs' JSON, make none")
    parser.add_argument("--out", type=Path, default=files.RESULTS, help="folder (default: bench/results)")
    options, others = parser.parse_known_args(arguments)
    try:
        if slowed.VARIABLE in os.environ:
            raise files.Unusable(f"{slowed.VARIABLE} is set: ours would be slowed on purpose")
        for word in others:
            if why := NOT_PASSED.get(word.partition("=")[0]):
                raise files.Unusable(why)
        if options.merge and others:
            raise files.Unusable(f"--merge makes no runs, so there is nothing for {' '.join(others)} to change")
        _enough(len(options.merge) if options.merge else options.runs)
        files.make(options.out)
        runs = [files.load(path) for path in options.merge or _made(options.runs, others)]
        document, notes = merge(runs)
        written = write(document, options.out)
    except files.Unusable as problem:
        print(problem, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; --merge takes the runs that are whole", file=sys.stderr)
        return 130
    for line in [*files.warnings(runs[0]), *notes]:
        print(line)
    for path in written:
        head, lines = gate.noticed(files.load(path))
        if blind := [line[0] for line in lines if float(line[2]) > math.exp(gate.BLIND)]:
            print(f"too noisy to notice ours at half its speed, make it again on an idle machine: {', '.join(blind)}")
        print("\n".join([f"wrote {path}; with it the gate notices ours slower by", *files.table([head, *lines])]))
    return 0 if written else 1
