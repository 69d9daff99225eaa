"""`python -m bench COMMAND`: list, once and the others in COMMANDS; `pytest bench/` is what measures."""

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
    if arguments and arguments[0] in COMMANDS:
        return import_module(COMMANDS[arguments[0]]).main(arguments[1:])
    print(f"usage: python -m bench COMMAND ..., one of: {', '.join(COMMANDS)}", file=sys.stderr)
    return 64


if __name__ == "__main__":
    if sys.argv[1:2] in (["list"], ["compare"]) and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends these as it ends others
    sys.exit(main(sys.argv[1:]))
