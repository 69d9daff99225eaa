"""How cost grows with the sizes, and the counterfactual pass with the number of experts."""

from collections.abc import Callable

from bench.suites import Benchmark

SUITE = "scaling"


def test_scale(spec: Benchmark, measure: Callable[[Benchmark], None]) -> None:
    measure(spec)
