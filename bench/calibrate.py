"""`python -m bench calibrate`: how often the gate raises a false alarm, and how often it catches a kernel that got slower.

Makes whole runs with the gate as they are, each alarm a false one, and then, for one subject after the other, runs of its rows
with ours slowed on purpose (see `bench.slowed`). What is allowed does not depend on which rows run. Each run is a file in
--folder, and one that is there is not made again: the command can be stopped and started. Needs a baseline and an idle
machine. What this command does not know goes to pytest.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import files, slowed

SLOWER = "gate: FAILED, slower than allowed: "


def run(options: Sequence[str], subject: str | None, factor: float) -> dict[str, Any]:
    """One run with the gate: how it ended, what it said, and the checks that it called slower.

    Raises:
        Unusable: the gate did not judge anything.
    """
    command = [sys.executable, "-m", "pytest", "bench/", "--gate", "-p", "no:cacheprovider", *options]
    environment = dict(os.environ)
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench calibrate", description=__doc__)
    parser.add_argument("baseline", type=Path, help="the baseline that the runs are compared with")
    parser.add_argument("--runs", type=int, default=20, help="unchanged ones (default: 20)")
    parser.add_argument("--each", type=int, default=10, help="slowed ones for each subject (default: 10)")
    parser.add_argument("--slow", type=float, default=1.10, metavar="FACTOR", help="default: 1.10")
    parser.add_argument(
        "--folder", type=Path, default=files.ROOT / "runs" / "calibrate", help="default: runs/calibrate"
    )
    options, others = parser.parse_known_args(arguments)
    found = []
    try:
        then = files.load(options.baseline)
        kind = next(iter(files.measured(then).values()), None)
        if kind is None:
            raise files.Unusable(f"{options.baseline}: no rows of bench in it")
        if kind["device"] != "cpu":
            raise files.Unusable(f"{options.baseline}: of {kind['device']}, and ours can be slowed on a CPU only")
        others = ["--preset", kind["preset"], "--dtype", kind["dtype"], "--device", kind["device"], *others]
        others += ["--baselines", str(options.baseline.resolve().parents[1])]
        plans = [(None, i) for i in range(options.runs)]
        plans += [(subject, i) for i in range(options.each) for subject in subjects(then)]
        options.folder.mkdir(parents=True, exist_ok=True)
        for left, (subject, i) in zip(range(len(plans), 0, -1), plans):
            name = f"{subject}-{options.slow:g}" if subject else "unchanged"
            path = options.folder / f"{name}-{i:03d}.json"
            if not path.exists():
                print(f"{name}, run {i + 1}; {_left(found, plans[-left:])}", flush=True)
                path.write_text(json.dumps(run(others, subject, options.slow), indent=1) + "\n")
            found.append(json.loads(path.read_text()))
    except files.Unusable as problem:
        print(problem, file=sys.stderr)
        return 1
    finally:
        print(rates(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
