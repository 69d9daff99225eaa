"""Rows measured again for the gate, in a process of its own: no limits and no pytest."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench import files
from bench.gate import KEPT, Again

Row = dict[str, Any]


def in_fresh_processes(options: Mapping[str, Any]) -> Again:
    """`gate.Again` with the options of the run that is judged (those of `presets.settings`)."""

    def again(wanted: Iterable[tuple[str, str]]) -> Mapping[str, Row]:
        pairs = list(wanted)
        kept = dict.fromkeys(name for name, peer in pairs if peer == KEPT)
        others = dict.fromkeys(name for name, peer in pairs if peer != KEPT)
        peers = ",".join(dict.fromkeys(["eager", *(peer for _, peer in pairs if peer != KEPT)]))
        rows = _measured({**options, "peers": peers}, list(others), False)
        for name, row in _measured({**options, "peers": "eager"}, list(kept), True).items():
            rows[name] = rows.get(name, {}) | row
        return rows

    return again


def _measured(options: Mapping[str, Any], names: Sequence[str], kept: bool) -> dict[str, Row]:
    from bench.measure import KEPT_MEMORY

    if not names:
        return {}
    environment = {**os.environ, **(KEPT_MEMORY if kept else {})}
    environment["PYTHONPATH"] = os.pathsep.join([str(files.ROOT), *sys.path])
    command = [sys.executable, "-m", "bench.again", json.dumps([dict(options), kept]), *names]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    # A line a row: what was measured before a crash counts.
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["id"]: row for row in rows}


def main(arguments: Sequence[str]) -> None:
    """The process: options and ids in, a row a line out. With kept memory a row has that and no more."""
    from bench import presets, suites
    from bench.measure import Session, answer, keep

    options, kept = json.loads(arguments[0])
    settings = presets.settings(**options)
    if kept:
        keep(settings)
    session = Session(settings, alone=True)
    for name in arguments[1:]:
        try:
            row = {"id": name, "memory": {"eager_kept": answer(name, settings)}} if kept else None
            row = row or session.row(suites.find(name, settings))[0]
        except Exception as problem:  # the others are still to be measured
            print(f"{name}: {problem}", file=sys.stderr)
            continue
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
