"""Ours slowed on purpose, to see that the gate notices: TIGER_FAST_BENCH_SLOW=route=1.10 makes every call of ours in route's
rows a tenth longer, by doing nothing for a tenth of the time that the call took. CPU only."""

import os
import time
from collections.abc import Callable
from typing import Any

from bench.cases import OPS
from bench.models import SUBJECTS

VARIABLE = "TIGER_FAST_BENCH_SLOW"


def factor(subject: str) -> float:
    """By how much a subject is slowed in this process.

    Raises:
        ValueError: the variable does not hold SUBJECT=FACTOR, or there is no such subject.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        return 1.0
    name, _, value = text.partition("=")
    try:
        found = float(value)
    except ValueError:
        found = 0.0
    if not found >= 1:
        raise ValueError(f"{VARIABLE}={text}: wanted SUBJECT=FACTOR with a factor of at least 1, such as route=1.10")
    if name not in (known := [*OPS, *SUBJECTS]):
        raise ValueError(f"{VARIABLE}={text}: {name!r} is none of {', '.join(known)}")
    return found if name == subject else 1.0


def slow(call: Callable[[], Any], by: float, clock: Callable[[], float] = time.perf_counter) -> Callable[[], Any]:
    """The call, `by` times as long."""

    def slowed() -> Any:
        begin = clock()
        result = call()
        end = begin + by * (clock() - begin)
        while clock() < end:
            pass
        return result

    return slowed if by > 1 else call
