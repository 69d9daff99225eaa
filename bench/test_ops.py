"""Every function of the contract, forward and forward + backward."""

from collections.abc import Callable

from bench.suites import Benchmark

SUITE = "ops"


def test_op(spec: Benchmark, measure: Callable[[Benchmark], None]) -> None:
    measure(spec)
