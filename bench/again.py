"""Rows measured again for the gate, in processes of their own: no limits and no pytest."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench import files, presets, suites
from bench.files import KEPT
from bench.gate import Again
from bench.kept import Kept
from bench.measure import Session

Row = dict[str, Any]


def in_fresh_processes(options: Mapping[str, Any]) -> Again:
    """`gate.Again` with the options of the run that is judged (those of `presets.settings`)."""

    def again(wanted: Iterable[tuple[str, str]]) -> Mapping[str, Row]:
        pairs = list(wanted)
        kept = dict.fromkeys(name for name, peer in pairs if peer == KEPT)
        others = dict.fromkeys(name for name, peer in pairs if peer != KEPT)
        peers = ",".join(dict.fromkeys(["eager", *(peer for _, peer in pairs if peer != KEPT)]))
        rows = _measured({**options, "peers": peers}, list(others))
        for name, found in _kept(options, list(kept)).items():
            rows.setdefault(name, {}).setdefault("memory", {})["eager_kept"] = found
        return rows

    return again


def _measured(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Row]:
    if not names:
        return {}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(files.ROOT), *sys.path])}
    command = [sys.executable, "-m", "bench.again", json.dumps(dict(options)), *names]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    # A line a row: what was measured before a crash counts.
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["id"]: row for row in rows}


def _kept(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Row]:
    if not names:
        return {}
    process = Kept(presets.settings(**options))
    try:
        found = {name: process.ask(name) for name in names}
    finally:
        process.close()
    for name, row in found.items():
        if why := row.get("refused") or row.get("error"):
            print(f"{name}, kept memory: {why}", file=sys.stderr)
    return {name: row for name, row in found.items() if "ratio" in row}


def main(arguments: Sequence[str]) -> None:
    """The process: options and ids in, a row a line out."""
    settings = presets.settings(**json.loads(arguments[0]))
    session = Session(settings, alone=True)
    for name in arguments[1:]:
        try:
            row = session.row(suites.find(name, settings))[0]
        except Exception as problem:  # the others are still to be measured
            print(f"{name}: {problem}", file=sys.stderr)
            continue
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
