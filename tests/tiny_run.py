"""Runs tiger_fast's commands on a tiny model with untrained specialists: no test of the trainer needs trained weights.

`python tests/tiny_run.py fit --config ...` is `python -m tiger_fast fit --config ...` with that one difference.
`python tests/tiny_run.py serve` imports everything once and forks a process for every command that it reads, so that
a test can start, kill and restart many runs in the time that one takes to import torch and lightning.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TINY_SETTINGS = {
    "grid": [3, 4],
    "dim": 16,
    "hidden": 16,
    "rank": 2,
    "router_hidden": 8,
    "num_heads": 2,
    "decoder": [[8, 1], [8, 1]],
    "query_width": 4,
    "instructions": False,
}


def tiny_config(folder: Path | str, **trainer: Any) -> dict[str, Any]:
    """A run of 14 steps in passes of 5, with validation after steps 6 and 12 and checkpoints after 3, 6, 9, 12, 14."""
    return {
        "seed_everything": 3,
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(folder),
            "max_steps": 14,
            "check_val_every_n_epoch": None,
            "val_check_interval": 6,
            "log_every_n_steps": 2,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            **trainer,
        },
        "model": {
            "experts": ["geometry", "appearance", "boundaries"],
            # Draws two of the three experts at every step: a resumed run has to draw the same ones.
            "settings": {**TINY_SETTINGS, "counterfactual": {"sampled": 2}},
        },
        "data": {"train_size": 22, "val_size": 6, "batch_size": 4, "workers": 0},
        "checkpoint": {"every_n_steps": 3},
    }


def untrained_specialists(names: Sequence[str] | None = None) -> list[Any]:
    """The named specialists with weights from a fixed seed."""
    import torch

    from tiger_fast.experts.specialists import SPECIALISTS, build_specialist

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return [build_specialist(SPECIALISTS[name]) for name in (names or SPECIALISTS)]


def main(arguments: Sequence[str]) -> None:
    """Run one command."""
    from tiger_fast import experts
    from tiger_fast.__main__ import main as command

    experts.load_specialists = untrained_specialists
    command(arguments)


def serve() -> None:
    """Read one JSON object a line: arguments, log (a file) and slow (seconds that each sync takes longer).

    For each, fork, print the child's process id, wait for its end and print its status (negative: a signal).
    """
    import tensorboard.summary  # noqa: F401

    import tiger_fast.training.cli  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            _run_forked(order)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run_forked(order: dict[str, Any]) -> None:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if order["slow"]:
        sync = os.fsync
        os.fsync = lambda handle: (time.sleep(order["slow"]), sync(handle))
    status = 1
    try:
        main(order["arguments"])
        status = 0
    except SystemExit as error:
        print(error, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main(sys.argv[1:])
