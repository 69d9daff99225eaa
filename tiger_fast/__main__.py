"""`python -m tiger_fast COMMAND`: the commands, each imported only when it is called."""

import sys
from collections.abc import Sequence
from importlib import import_module

from tiger_fast._extras import unknown

# command: (module with `main`, whether `main` takes the command's own name too, what it does)
COMMANDS = {
    "fit": ("tiger_fast.training.cli", True, "train a model; the same command again continues"),
    "validate": ("tiger_fast.training.cli", True, "score the newest checkpoint of a run on held-out scenes"),
    "predict": ("tiger_fast.training.cli", True, "write predictions and routing weights of held-out scenes"),
    "demo": ("tiger_fast.training.demo", False, "train TIGER and its controls on embedded scenes, and report"),
    "infer": ("tiger_fast.training.infer", False, "predict and explain one photograph"),
}


def usage() -> str:
    """The commands and what they do."""
    lines = [f"  {name:<10} {text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m tiger_fast COMMAND [options]",
            "",
            *lines,
            "",
            "python -m tiger_fast COMMAND --help lists a command's options.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: the command and its options; None: the command line's.

    Raises:
        SystemExit: for no command or an unknown one, and as the command does.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        raise SystemExit(0 if arguments else 2)
    command = arguments[0]
    if command not in COMMANDS:
        raise SystemExit(f"error: {unknown('command', command, COMMANDS)}")
    home, with_name, _ = COMMANDS[command]
    try:
        import_module(home).main(arguments if with_name else arguments[1:])
    except ImportError as error:  # an extra that is not installed, which the message names
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
