"""Optional dependencies and unknown names: one place for the two errors that tell a user what to do next."""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: the module's import name.
        extra: the extra of tiger_fast that installs it.

    Raises:
        ImportError: if it is not installed; the message names the pip command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A dependency of the module that is missing is that module's problem; say which one it was.
        raise ImportError(f'this part of tiger_fast needs {error.name!r}: pip install "tiger_fast[{extra}]"') from error


def unknown(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """A ValueError for a name that does not exist, with the nearest one that does."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {name!r}{hint} (known: {', '.join(known)})")
