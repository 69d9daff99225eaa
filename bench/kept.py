"""Eager against ours in processes in which glibc keeps all memory: what is left of a ratio without the page faults of fresh
outputs, which the backend's kept buffers do not have either.

A row's rounds are taken in several processes, one after the other, since where code and memory lie moves a ratio by more than
anything that the rounds of one process see. Each is forked from another parent, which has imported everything and computed
nothing: so a row finds the same heap whatever was measured before it, and what differs from one start of Python to the next
is in how much the processes differ. (From one parent, its addresses would be in all of them, and only in those.)
"""

import contextlib
import json
import math
import multiprocessing
import os
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from multiprocessing.connection import Connection, wait
from typing import Any, TextIO

import torch

from bench import presets, slowed, suites, timing
from bench.presets import Settings
from bench.timing import Timing

Row = dict[str, Any]

# Processes for each row; its seconds and its rounds are divided among them.
PROCESSES = 4
SIDES = ("ours", "eager")
# What all parents take that have imported everything, beyond the pages that they share.
PARENTS_BYTES = PROCESSES * 256 * 2**20
# One that says nothing for so long, and 20 times the seconds of a measurement, is ended.
STUCK_SECONDS = 600.0
# An environment in which glibc serves every block from one heap that it grows 256 MB at a time, never returns, and puts
# on huge pages (torch's own switch asks for them too, for what it allocates): eager PyTorch with nothing left to gain
# from memory. Found by trying: each variable alone left eager up to three times slower.
ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_TOP_PAD_": str(256 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_MMAP_THRESHOLD_": str(2**40),
    "THP_MEM_ALLOC_ENABLE": "1",
}


class Refused(RuntimeError):
    """Ours is not what it should be there."""


class Kept:
    """The parents, begun once for many rows. They import for some seconds and then wait while they are not asked. Where one
    has ended, others are begun for the next row; not where it ended before it had imported everything.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._why: str | None = None  # there is no use in beginning others
        self._begin()

    def _begin(self) -> None:
        command = [sys.executable, "-m", "bench.kept", json.dumps(self._settings.options() | {"peers": "eager"})]
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(timing.ROOT), *sys.path])}
        self._said = [tempfile.TemporaryFile("w+") for _ in range(PROCESSES)]  # what each writes to stderr
        self._parents = [
            subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
            for said in self._said
        ]
        self._importing = list(self._parents)
        self._ready = 0  # how many have imported everything

    def wait(self) -> None:
        """Until they have imported everything: nothing is to be timed beside that."""
        while self._importing:
            parent = self._importing.pop()
            if select.select([parent.stdout], [], [], STUCK_SECONDS)[0]:
                self._ready += bool(parent.stdout.readline())
            else:
                parent.kill()

    def ask(self, name: str) -> Row:
        """What `answer` says of a benchmark; {"refused": why} where ours disagrees, {"error": why} where nothing is said."""
        if self._why is not None:
            return {"error": self._why}
        if not self._parents:
            self._begin()
        self.wait()
        found = []
        # Outputs are compared in the first alone: all run the same code.
        for i, parent in enumerate(self._parents):
            try:
                print(json.dumps([name, i == 0]), file=parent.stdin, flush=True)
                said = json.loads(parent.stdout.readline())
            except (OSError, ValueError):
                return {"error": self._lost(i)}
            if "error" in said or "refused" in said:
                return said
            found.append({side: Timing(tuple(said[side]["samples"]), said[side]["calls"]) for side in SIDES})
        return answer(found) | {"threads": said["threads"]}

    def _lost(self, i: int) -> str:
        parent = self._parents[i]
        self._end()
        why = f"a process that measures it has ended ({parent.returncode})"
        # One that was killed had nothing to say of it.
        why += self._last_words(i) if parent.returncode > 0 else ""
        self.close()
        if self._ready < PROCESSES:
            self._why = why
        return why

    def close(self) -> None:
        """Ends them, if they have not ended."""
        self._end()
        for said in self._said:
            said.close()
        self._parents, self._said = [], []

    def _end(self) -> None:
        for parent in self._parents:
            with contextlib.suppress(BrokenPipeError):
                parent.stdin.close()
        for parent in self._parents:
            parent.wait()
            parent.stdout.close()

    def _last_words(self, i: int) -> str:
        self._said[i].seek(0)
        lines = self._said[i].read().split("\n")
        return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")


def answer(found: Sequence[dict[str, Timing]]) -> Row:
    """Eager's summary over the rounds of all processes; beside it `ours`; `processes`, the ratio to ours in each, lower
    quartile over lower quartile; and their geometric mean, with a 95 % interval from how much they differ (Student's t)."""
    every = {
        name: Timing(tuple(sample for one in found for sample in one[name].samples), found[0][name].calls)
        for name in SIDES
    }
    logs = [math.log(one["eager"].quartiles[0] / one["ours"].quartiles[0]) for one in found]
    middle, count = statistics.mean(logs), len(logs)
    half = timing.student(0.975, count - 1) * statistics.stdev(logs) / math.sqrt(count)
    ratio = timing.Ratio(*(math.exp(value) for value in (middle, middle - half, middle + half)), certain=True)
    return every["eager"].summary() | {
        "ratio": asdict(ratio),
        "ours": every["ours"].summary(),
        "processes": [math.exp(value) for value in logs],
    }


def _forked(name: str, settings: Settings, threads: int, checks: bool, asker: TextIO) -> dict[str, Timing]:
    # In a process of its own; what is raised there is raised here. Nobody asks again before there is an answer, so what
    # can be read of the asker is its end.
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(send, name, settings, threads, checks))
    process.start()
    send.close()
    try:
        if receive not in wait([receive, asker], STUCK_SECONDS + 20 * settings.seconds):
            process.kill()
        found = receive.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"a process that measures it has ended ({process.exitcode})") from None
    process.join()
    if isinstance(found, RuntimeError):
        raise found
    return found


def _child(send: Connection, name: str, settings: Settings, threads: int, checks: bool) -> None:
    try:
        torch.set_num_threads(threads)
        benchmark = suites.find(name, settings)
        built = benchmark.build(settings)
        ours = built.calls["ours"] = slowed.slow(built.calls["ours"], slowed.factor(benchmark.subject))
        whole = benchmark.plan(settings)
        plan = replace(
            whole,
            warmup=whole.warmup / PROCESSES,
            seconds=whole.seconds / PROCESSES,
            least=math.ceil(whole.least / PROCESSES),
        )
        found = timing.interleave({"ours": ours, "eager": built.calls["eager"]}, plan)
        # Afterwards, so that what a comparison leaves in the heap is in no time.
        refused = built.check()[1] if checks else {}
        send.send(Refused(f"ours {refused['ours']}") if "ours" in refused else found)
    except Exception as problem:
        send.send(RuntimeError(timing.raised(problem)))


def serve(arguments: Sequence[str]) -> None:
    """A parent behind `Kept`: a line when it is ready; then [id, whether to compare outputs] a line in, samples a line out."""
    settings = presets.settings(**json.loads(arguments[0]))
    threads = settings.preset.kept_threads or torch.get_num_threads()
    # A pool of threads does not outlive a fork, so none is begun here. What is imported at first use is imported now.
    torch.set_num_threads(1)
    small = presets.settings("smoke", device=settings.device, peers="eager")
    for name in ("route/forward", "step/none"):
        suites.find(name, small).build(small)
    print("ready", flush=True)
    for line in sys.stdin:
        name, checks = json.loads(line)
        try:
            found: Row = {
                side: asdict(one) for side, one in _forked(name, settings, threads, checks, sys.stdin).items()
            }
            found["threads"] = threads
        except RuntimeError as problem:
            found = {"refused" if isinstance(problem, Refused) else "error": str(problem)}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1:])
