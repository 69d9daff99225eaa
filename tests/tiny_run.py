"""Runs a tiger_fast command with untrained specialists, so that no test of the trainer depends on trained weights.

python tests/tiny_run.py fit --config ... is `python -m tiger_fast fit --config ...` with that one difference.
"""

import sys
from collections.abc import Sequence

import torch

from tiger_fast import experts


def untrained_specialists(names: Sequence[str] | None = None) -> list[experts.Expert]:
    """The named specialists with weights from a fixed seed."""
    entries = [experts.SPECIALISTS[name] for name in (names or experts.SPECIALISTS)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return [experts.specialists.build_specialist(entry) for entry in entries]


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    from tiger_fast.__main__ import main as command

    experts.load_specialists = untrained_specialists
    command(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
