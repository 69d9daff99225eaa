"""Rows measured again for the gate, in a process of its own: no limits, no kept memory, no pytest."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench import files

Row = dict[str, Any]


def in_fresh_processes(options: Mapping[str, Any]) -> Callable[[Sequence[str]], Mapping[str, Row]]:
    """`gate.Again` with the options of the run that is judged (those of `presets.settings`)."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(files.ROOT), *sys.path])}

    def again(names: Sequence[str]) -> Mapping[str, Row]:
        command = [sys.executable, "-m", "bench.again", json.dumps(dict(options)), *names]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        # A line a row: what was measured before a crash counts.
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        return {row["id"]: row for row in rows if "ours" in row}

    return again


def main(arguments: Sequence[str]) -> None:
    """The process: options and ids in, a row a line out."""
    from bench import presets, suites
    from bench.measure import Session

    settings = presets.settings(**json.loads(arguments[0]))
    session = Session(settings, alone=True)
    for name in arguments[1:]:
        row, _ = session.row(suites.find(name, settings))
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
