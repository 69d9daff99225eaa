"""`python -m bench COMMAND`: what goes with `pytest bench/`, which is what measures."""

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

# Each is a module with main(arguments) -> exit code, whose docstring's first line says what it does.
COMMANDS = {
    "baseline": "bench.baseline",
    "calibrate": "bench.calibrate",
    "compare": "bench.compare",
    "grid": "bench.grid",
    "list": "bench.listing",
    "once": "bench.once",
    "page": "bench.page",
}


def main(arguments: Sequence[str]) -> int:
    """Hands the rest of the arguments to a command."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own; its --help lists them")
    given = parser.parse_args(arguments)
    return import_module(COMMANDS[given.command]).main(given.arguments)


if __name__ == "__main__":
    if sys.argv[1:2] in (["list"], ["compare"]) and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends these as it ends others
    sys.exit(main(sys.argv[1:]))
