"""The Router, the TIGER head, and a training step without and with the counterfactual loss, in each of its modes."""

from collections.abc import Callable

from bench.suites import Benchmark

SUITE = "models"


def test_model(spec: Benchmark, measure: Callable[[Benchmark], None]) -> None:
    measure(spec)
