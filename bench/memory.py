"""`python -m bench.memory`: what each op takes from the system beyond its arguments, at the shapes in cases.py.

Each op and backend runs in a process of its own. The peak is the kernel's high-water mark of resident memory during the
call (Linux: /proc/self/status VmHWM, reset through /proc/self/clear_refs), less what was resident before; a small call
before it has loaded the libraries. It holds the results, temporaries, and whatever an allocator took and did not
use; what is still resident once the results are dropped is listed as kept.
"""

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import timing
from bench.cases import DIRECTIONS, OPS, Case, Sizes, native_ops
from tiger_fast.ops.cpu import empty_cache

MB = 1e6


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status: "VmRSS" now, "VmHWM" the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system's /proc/self/status has no {field}")


def measure(op: str, backend: str) -> dict[str, dict[str, int]]:
    """In this process: for each direction, bytes of arguments, of results, of the peak and of what was kept."""
    found = {}
    for direction in DIRECTIONS:
        case = Case(op)
        given, returned = case.tensor_bytes(direction)
        small = Case(op, replace(Sizes(), B=1, N=8))
        small.call(small.function(backend), direction)()
        call = case.call(case.function(backend), direction)
        empty_cache()
        _trim()  # what tensor_bytes, which runs the reference, has left in glibc's heap
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        results = call()
        peak = resident("VmHWM") - before
        del results
        kept = resident("VmRSS") - before
        found[direction] = {"given": given, "returned": returned, "peak": peak, "kept": kept}
    return found


def _trim() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # not glibc
        pass


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, in MB of 10^6 bytes."""
    lines = [
        "| op | direction | backend | arguments | results | peak extra | beyond results | kept |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        for direction, found in row["directions"].items():
            beyond = found["peak"] - found["returned"]
            values = (found["given"], found["returned"], found["peak"], beyond, found["kept"])
            cells = " | ".join(f"{value / MB:.1f}" for value in values)
            lines.append(f"| {row['op']} | {direction} | {row['backend']} | {cells} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--op", action="append", choices=OPS, help="this op; may be repeated (default: all)")
    parser.add_argument("--backend", choices=("reference", "cpu"), help="only this one, in this process, as JSON")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    options = parser.parse_args(arguments)
    if options.backend:
        print(json.dumps([measure(op, options.backend) for op in options.op or OPS]))
        return
    rows = []
    for op in options.op or OPS:
        for backend in ("reference", *(("cpu",) if op in native_ops() else ())):
            command = [sys.executable, "-m", "bench.memory", "--op", op, "--backend", backend]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append({"op": op, "backend": backend, "directions": json.loads(done.stdout)[0]})
            print(f"measured {op} on {backend}", file=sys.stderr, flush=True)
    facts = timing.provenance()
    if options.json:
        options.json.write_text(json.dumps({"provenance": facts, "rows": rows}, indent=1) + "\n")
    print(timing.describe(facts))
    print(table(rows))


if __name__ == "__main__":
    main()
