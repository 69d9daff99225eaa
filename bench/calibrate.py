"""`python -m bench calibrate`: how often the gate raises a false alarm, and how often it catches a kernel that got slower.

Makes whole runs with the gate as they are, each alarm a false one, and then, for one subject after the other, runs of its rows
with ours slowed on purpose (see `bench.slowed`). These are judged as in a whole run, which counts all of the baseline's rows;
only how noisy rounds are now is seen in the rows that run. Each run is a file in --folder, and one that is there is not
made again: the command can be stopped and started, with the same code, baseline and options. Needs a baseline and an
idle machine. What this command does not know goes to pytest.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import files, slowed, timing

SLOWER = "gate: FAILED, slower than allowed: "


def run(options: Sequence[str], subject: str | None, factor: float) -> dict[str, Any]:
    """One run with the gate: how it ended, what it said, and the checks that it called slower.

    Raises:
        Unusable: the gate did not judge anything.
    """
    command = [sys.executable, "-m", "pytest", "bench/", "--gate", "-p", "no:cacheprovider", *options]
    environment = {name: value for name, value in os.environ.items() if name != slowed.VARIABLE}
    if subject:
        command += ["-k", f"[{subject}/"]
        environment[slowed.VARIABLE] = f"{subject}={factor}"
    begin = time.monotonic()
    done = subprocess.run(command, cwd=files.ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    said = [line for line in done.stdout.splitlines() if line.startswith("gate: ")]
    slower = [name for line in said if line.startswith(SLOWER) for name in line[len(SLOWER) :].split("; ")]
    if not slower and done.returncode:
        # A row that fails, or no baseline: nothing is known of the gate.
        raise files.Unusable(next(iter(said), f"pytest ended with {done.returncode} and without a word of the gate"))
    return {"slower": slower, "said": said, "seconds": time.monotonic() - begin, "subject": subject, "factor": factor}


def rates(found: Sequence[Mapping[str, Any]]) -> str:
    """What the runs so far show."""
    lines = []
    plain = [one for one in found if one["subject"] is None]
    if plain:
        alarms = [one for one in plain if one["slower"]]
        lines.append(f"unchanged: {len(alarms)} false alarms in {len(plain)} runs")
        lines += [f"  {'; '.join(one['slower'])}" for one in alarms]
    slow = [one for one in found if one["subject"] is not None]
    for subject in dict.fromkeys(one["subject"] for one in slow):
        some = [one for one in slow if one["subject"] == subject]
        lines.append(f"{subject} slowed by {some[0]['factor']:g}: caught in {_caught(some)} of {len(some)} runs")
    if slow:
        lines.append(f"all of them: caught in {_caught(slow)} of {len(slow)} runs")
    return "\n".join(lines)


def _caught(found: Sequence[Mapping[str, Any]]) -> int:
    # By a row of the subject, or all of its rows as one.
    return sum(
        any(name.startswith((f"{one['subject']}/", f"{one['subject']},")) for name in one["slower"]) for one in found
    )


def _left(found: Sequence[Mapping[str, Any]], plans: Sequence[tuple[str | None, int]]) -> str:
    # From how long the runs of the same kind took: whole ones, or one subject's.
    seconds = 0.0
    for whole in (True, False):
        took = [one["seconds"] for one in found if (one["subject"] is None) == whole]
        count = sum((subject is None) == whole for subject, _ in plans)
        if count and not took:
            return f"{len(plans)} runs left"
        seconds += count * sum(took) / max(len(took), 1)
    return f"{len(plans)} runs left, some {seconds / 60:.0f} minutes"


def subjects(then: files.Results) -> list[str]:
    """Those of a baseline that have rows of ours."""
    from bench.gate import gated

    return list(dict.fromkeys(then.rows[name]["subject"] for name in gated(then)))


def _plans(options: argparse.Namespace, there: Sequence[str]) -> list[tuple[str | None, int]]:
    wanted = there if options.subjects is None else options.subjects.split(",")
    for subject in wanted:
        if subject not in there:
            raise files.Unusable(f"{options.baseline}: no rows of ours for {subject!r}, only for {', '.join(there)}")
    return [(None, i) for i in range(options.runs)] + [(subject, i) for i in range(options.each) for subject in wanted]


def code() -> str:
    """A digest of what is measured and of what measures; unlike a revision it knows what is not committed."""
    kinds = (("bench", "*.py"), ("tiger_fast", "**/*.py"), ("tiger_fast", "**/*.so"))
    return _digest(sorted(path for folder, kind in kinds for path in (files.ROOT / folder).glob(kind)))


def _digest(paths: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    return found.hexdigest()


def _made(path: Path, made_with: Mapping[str, Any]) -> dict[str, Any]:
    # A run that is there already, if it is of what is calibrated now.
    try:
        found = json.loads(path.read_text())
        then = found["made_with"]
    except (ValueError, TypeError, KeyError):
        raise files.Unusable(f"{path}: not a run of this command: take it away") from None
    for name, value in made_with.items():
        if then.get(name) != value:
            raise files.Unusable(f"{path}: made with other {name}: take such runs away, or name another --folder")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench calibrate", description=__doc__)
    parser.add_argument("baseline", type=Path, help="the baseline that the runs are compared with")
    parser.add_argument("--runs", type=int, default=20, help="unchanged ones (default: 20)")
    parser.add_argument("--each", type=int, default=10, help="slowed ones for each subject (default: 10)")
    parser.add_argument("--subjects", metavar="A,B", help="slow these only (default: all that have rows of ours)")
    parser.add_argument("--slow", type=float, default=1.10, metavar="FACTOR", help="default: 1.10")
    parser.add_argument(
        "--folder", type=Path, default=files.ROOT / "runs" / "calibrate", help="default: runs/calibrate"
    )
    options, others = parser.parse_known_args(arguments)
    if options.runs < 0 or options.each < 0 or options.slow <= 1:
        parser.error("--runs and --each are 0 or more, and --slow is more than 1")
    done: dict[Path, dict[str, Any]] = {}
    try:
        then = files.load(options.baseline)
        kind = next(iter(files.measured(then).values()), None)
        if kind is None:
            raise files.Unusable(f"{options.baseline}: no rows of bench in it")
        if kind["device"] != "cpu":
            raise files.Unusable(f"{options.baseline}: of {kind['device']}, and ours can be slowed on a CPU only")
        if then.device_class != (here := timing.device_class("cpu")):
            raise files.Unusable(f"{options.baseline}: measured on {then.device_class}, and this is {here}")
        others = ["--preset", kind["preset"], "--dtype", kind["dtype"], "--device", kind["device"], *others]
        made_with = {"code": code(), "baseline": _digest([options.baseline]), "options": others}
        own = files.baseline_path(then.machine, kind["preset"], kind["dtype"], options.baseline.resolve().parents[1])
        if own != options.baseline.resolve():
            raise files.Unusable(f"{options.baseline}: the gate looks for it at {own}")
        pytest = [*others, "--baselines", str(own.parents[1])]
        plans = _plans(options, subjects(then))
        files.make(options.folder)
        paths = []
        for subject, i in plans:
            name = f"{subject}-{options.slow:g}" if subject else "unchanged"
            paths.append(options.folder / f"{name}-{i:03d}.json")
        done = {path: _made(path, made_with) for path in paths if path.exists()}
        for i, ((subject, _), path) in enumerate(zip(plans, paths)):
            if path not in done:
                left = [plan for plan, other in zip(plans[i:], paths[i:]) if other not in done]
                print(f"{path.stem}; {_left(list(done.values()), left)}", flush=True)
                found = run(pytest, subject, options.slow)
                if code() != made_with["code"]:
                    raise files.Unusable("bench/ or tiger_fast/ has changed since the first run: start again")
                facts = timing.provenance()
                noted = {name: facts[name] for name in ("revision", "dirty", "load", "date")}
                done[path] = {**found, "made_with": made_with, **noted}
                # In one step: what is there is whole.
                path.with_suffix(".part").write_text(json.dumps(done[path], indent=1) + "\n")
                path.with_suffix(".part").replace(path)
    except files.Unusable as problem:
        print(problem, file=sys.stderr)
        return 1
    finally:
        if done:
            print(rates(list(done.values())))
    return 0
