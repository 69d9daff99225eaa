"""A run that is killed at any moment and started again ends as one that was left alone, bit for bit.

Three moments here; fifty with --slow (`make resume-check`). Each is a run of its own: killed once, its files checked,
started again with the same command, and compared with the uninterrupted run in weights, optimiser, scores and logs.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_run import tiny_config

from tiger_fast.models.checkpoint import read_checkpoint

SERVER = Path(__file__).with_name("tiny_run.py")
# Seconds added to every sync in the runs that are killed while they write: the window to hit.
SLOW_SYNC = 0.1


class Server:
    """Starts runs in forked processes; see tiny_run.serve."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER), "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._process.stdout.readline() == "ready\n"

    def run(self, config: Path, kill: Callable[[int], None] | None = None, slow: float = 0.0) -> int:
        """`fit --config config`; `kill` gets the process id while it runs. Returns the exit status."""
        log = config.with_suffix(".log")
        order = {"arguments": ["fit", "--config", str(config)], "log": str(log), "slow": slow}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        process = int(self._process.stdout.readline())
        if kill is not None:
            kill(process)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """No more runs."""
        self._process.stdin.close()
        self._process.wait(30)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


class Reference:
    """The uninterrupted run: its folder and its seconds."""

    def __init__(self, server: Server, folder: Path) -> None:
        config = write_config(folder)
        started = time.monotonic()
        assert server.run(config) == 0, config.with_suffix(".log").read_text()
        self.seconds = time.monotonic() - started
        self.folder = folder


@pytest.fixture(scope="module")
def reference(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(server, tmp_path_factory.mktemp("reference") / "run")


def write_config(folder: Path, **trainer: Any) -> Path:
    config = folder.with_name(f"{folder.name}.yaml")
    config.write_text(yaml.safe_dump(tiny_config(folder, **trainer)))
    return config


def end(process: int) -> None:
    """SIGKILL, unless the run has ended by itself."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def after(seconds: float) -> Callable[[int], None]:
    """Kill that many seconds after the start."""

    def kill(process: int) -> None:
        time.sleep(seconds)
        end(process)

    return kill


def while_writing(folder: Path, number: int, delay: float) -> Callable[[int], None]:
    """Kill `delay` seconds after the temporary file of the `number`-th checkpoint appears (or what it became meanwhile)."""

    def kill(process: int) -> None:
        seen: set[str] = set()
        deadline = time.monotonic() + 120
        while len(seen) < number and time.monotonic() < deadline:
            seen |= {path.name.lstrip(".").split(".")[0] for path in (folder / "checkpoints").glob("*step-*")}
            time.sleep(0.001)
        time.sleep(delay)
        end(process)

    return kill


def assert_no_broken_checkpoint(folder: Path) -> list[int]:
    """Every checkpoint that has its name can be read as data. Returns their steps."""
    steps = []
    for path in sorted((folder / "checkpoints").glob("step-*.ckpt")):
        steps.append(torch.load(path, weights_only=True)["global_step"])
        assert path.name == f"step-{steps[-1]:08d}.ckpt"
    return steps


def assert_same_run(folder: Path, reference: Path) -> None:
    """The same checkpoints (weights, optimiser, scheduler, place in the data), the same model file, the same log."""
    names = [path.name for path in sorted((reference / "checkpoints").iterdir())]
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == names
    for name in names:
        ours, theirs = (torch.load(f / "checkpoints" / name, weights_only=True) for f in (folder, reference))
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "SceneData", "hyper_parameters", "global_step"):
            assert_equal(ours[key], theirs[key], f"{name}: {key}")
    # Not by bytes: safetensors writes its header's entries in an order of chance.
    assert_equal(*(read_checkpoint(f / "model.safetensors", "TIGER") for f in (folder, reference)), "model.safetensors")
    assert (folder / "metrics.csv").read_text() == (reference / "metrics.csv").read_text()


def assert_equal(ours: Any, theirs: Any, where: str) -> None:
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{where}[{index}]")
    else:
        assert ours == theirs, where


def kill_and_restart(server: Server, folder: Path, kill: Callable[[int], None], slow: float) -> tuple[int, list[int]]:
    """The killed run's status, and the steps of the checkpoints that it left."""
    config = write_config(folder)
    status = server.run(config, kill, slow)
    assert status in (0, -signal.SIGKILL), config.with_suffix(".log").read_text()
    left = assert_no_broken_checkpoint(folder)
    assert server.run(config) == 0, config.with_suffix(".log").read_text()
    # Temporary files of the killed writer are gone.
    assert [path.name for path in folder.rglob(".*")] == [".lock"]
    return status, left


def check_moments(server: Server, reference: Reference, base: Path, by_time: int, by_write: int, seed: int) -> None:
    """Kill `by_time` runs at times drawn over the whole run, and `by_write` while they write a checkpoint."""
    draw = random.Random(seed)
    moments = ["time"] * by_time + ["write"] * by_write
    draw.shuffle(moments)
    for number, kind in enumerate(moments, 1):
        status = 0
        for attempt in range(20):
            folder = base / f"run-{number}-{attempt}"
            if kind == "time":
                seconds = draw.uniform(0.0, reference.seconds)
                kill, slow, said = after(seconds), 0.0, f"{seconds:.2f} s after the start"
            else:
                which, delay = draw.randint(1, 5), draw.uniform(0.0, SLOW_SYNC)
                kill, slow = while_writing(folder, which, delay), SLOW_SYNC
                said = f"{1000 * delay:.0f} ms into the writing of checkpoint {which}"
            status, left = kill_and_restart(server, folder, kill, slow)
            assert_same_run(folder, reference.folder)
            if status:
                break
            # It had finished by then: another moment is drawn.
        assert status == -signal.SIGKILL, "no run could be killed before its end"
        print(f"{number:2d}. killed {said}, checkpoints then {left}: same end", flush=True)
    print(f"{len(moments)} runs killed and started again, all ended as the uninterrupted one, bit for bit")


def test_killed_runs_end_as_the_uninterrupted_one(server, reference, tmp_path):
    check_moments(server, reference, tmp_path, by_time=2, by_write=1, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_killed_runs_end_as_the_uninterrupted_one(server, reference, tmp_path):
    check_moments(server, reference, tmp_path, by_time=35, by_write=15, seed=int(os.environ.get("RESUME_SEED", "1")))


def test_a_complete_run_started_again_changes_nothing(server, reference, tmp_path):
    folder = reference.folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".ckpt", ".csv")}
    assert server.run(write_config(folder)) == 0
    assert {path: path.read_bytes() for path in before} == before


def test_killed_at_the_end_of_a_pass_and_of_the_run_by_passes(server, tmp_path):
    # Lightning restarts at the end of an epoch by other rules than within one; every step has a checkpoint here.
    def run(name: str, kill: Callable[[int], None] | None) -> Path:
        folder = tmp_path / name
        config = tiny_config(folder, max_steps=-1, max_epochs=2, check_val_every_n_epoch=1, val_check_interval=1.0)
        config["checkpoint"] = {"every_n_steps": 1}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        if kill is not None:
            assert server.run(path, kill, SLOW_SYNC / 2) == -signal.SIGKILL
        assert server.run(path) == 0, path.with_suffix(".log").read_text()
        return folder

    whole = run("whole", None)
    for number in (5, 6):
        # Dies before checkpoint 5 (or 6) has its name: goes on from the last step but one of a pass (or its end).
        assert_same_run(run(f"at-{number}", while_writing(tmp_path / f"at-{number}", number, 0.0)), whole)
