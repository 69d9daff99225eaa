"""Switches of a process that contexts set: of those that are open, in whatever threads, the one entered last counts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Switch(Generic[T]):
    """A value with a default, and what open contexts ask for instead.

    Args:
        default: the value where no context is open.
        put: called with every new value, to keep it in a plain global, which torch.compile guards on.
    """

    def __init__(self, default: T, put: Callable[[T], None]) -> None:
        self._default, self._put = default, put
        # In the order of entering; threads need not leave in that order.
        self._asked: list[tuple[object, T]] = []

    @contextmanager
    def to(self, value: T) -> Iterator[None]:
        """Within the context the value is this one, until another context is entered."""
        own = (object(), value)
        self._asked.append(own)
        self._put(value)
        try:
            yield
        finally:
            self._asked.remove(own)
            self._put(self._asked[-1][1] if self._asked else self._default)
