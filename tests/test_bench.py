"""The timing core of bench/, on a clock of its own: nothing here is timed."""

import itertools
import math
import random
import sys
import weakref
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/ is not installed

from bench import grid, ratios, timing
from bench.cases import BOTH, DIRECTIONS, OPS, Case, Sizes, footprint, peers
from bench.timing import Plan

SMALL = Sizes(B=2, N=6, D=24, M=3, T=2, R=4, C=5, G=3, heads=4)


class Clock:
    """Time that passes only when a call made by `takes` spends it, with the same bursts of noise for all."""

    def __init__(self, noise: float = 0.0) -> None:
        self.now, self.draws, self.noise = 0.0, random.Random(0), noise
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def takes(self, name: str, seconds: float, result=None):
        def call():
            self.order.append(name)
            # Now and then three times as long, as on a machine that others use too.
            burst = 2 * (self.draws.random() < 0.1)
            self.now += seconds * (1 + self.noise * self.draws.uniform(-1, 1) + burst * bool(self.noise))
            return result

        return call


def compare(clock: Clock, calls: dict, plan: Plan | None = None) -> timing.Row:
    plan = plan or Plan(warmup=0.01, seconds=0.3)
    return timing.compare(calls, ours="ours", reference="eager", tolerance=1e-4, plan=plan, clock=clock)


@pytest.mark.parametrize("factor", [0.9, 1.1, 4.0])
def test_known_factor_lies_within_the_stated_noise(factor):
    one = torch.ones(3)
    clock = Clock(noise=0.05)
    row = compare(clock, {"ours": clock.takes("ours", 1e-3, one), "eager": clock.takes("eager", factor * 1e-3, one)})
    found = row.ratios["eager"]
    assert found.certain and found.low <= factor <= found.high
    assert abs(found.value / factor - 1) < 0.02 and found.high / found.low < 1.06


def test_equal_callables_are_rarely_told_apart():
    apart = 0
    for seed in range(40):
        clock = Clock(noise=0.1)
        clock.draws.seed(seed)
        row = compare(clock, {name: clock.takes(name, 1e-3, torch.ones(1)) for name in ("ours", "eager")})
        apart += not row.ratios["eager"].low <= 1 <= row.ratios["eager"].high
    assert apart <= 6  # of 40 intervals of 95 %: 2 expected, 7 and more in 0.5 % of all runs


def test_disagreement_gives_no_ratio_and_no_timing():
    good, bad = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.001])
    clock = Clock()
    peer = {"ours": clock.takes("ours", 1.0, good), "eager": clock.takes("eager", 1.0, good)}
    row = compare(clock, {**peer, "wrong": clock.takes("wrong", 1.0, bad)})
    assert set(row.ratios) == {"eager"} and "DISAGREES" in row.refused["wrong"] and clock.order.count("wrong") == 1
    row = compare(clock, {"ours": clock.takes("ours", 1.0, bad), "eager": clock.takes("eager", 1.0, good)})
    assert not row.ratios and not row.timings and "DISAGREES" in row.refused["ours"]


def test_peer_that_raises_is_one_line_and_the_rest_goes_on():
    def fails():
        raise RuntimeError("no such kernel\nand more")

    clock = Clock()
    good = {name: clock.takes(name, 1.0, torch.ones(1)) for name in ("ours", "eager")}
    row = compare(clock, {**good, "broken": fails})
    assert row.refused == {"broken": "raised RuntimeError: no such kernel"} and row.ratios["eager"].value == 1


@pytest.mark.parametrize(
    "other",
    [
        torch.tensor([1.0, math.nan]),
        torch.ones(2, 1),
        torch.ones(2, dtype=torch.float64),
        (torch.ones(2), torch.ones(2)),
    ],
    ids=["nan", "shape", "type", "structure"],
)
def test_error_of_what_cannot_be_compared_is_infinite(other):
    assert timing.error(other, torch.ones(2)) == math.inf
    assert timing.error(torch.ones(2), other) == math.inf


def test_error_sees_one_wrong_value_beside_large_ones_of_another_tensor():
    expected = (torch.full((3,), 1e6), torch.tensor([1e-3, 2e-3]))
    assert timing.error((expected[0], torch.tensor([1e-3, 1e-3])), expected) == pytest.approx(0.5)


def test_every_callable_follows_every_other():
    clock = Clock()
    timing.interleave(
        {name: clock.takes(name, 1.0) for name in "abc"}, Plan(warmup=0, seconds=0, least=40), clock=clock
    )
    assert set(itertools.pairwise(clock.order)) >= set(itertools.permutations("abc", 2))


def test_short_calls_are_repeated_until_the_clock_can_tell():
    clock = Clock()
    found = timing.interleave({"short": clock.takes("short", 1e-6)}, Plan(warmup=0, seconds=0, least=6), clock=clock)
    assert found["short"].calls == pytest.approx(timing.SAMPLE_SECONDS / 1e-6, rel=0.02)
    assert found["short"].median == pytest.approx(1e-6)


def test_outputs_are_dropped_before_the_next_call():
    alive: list[weakref.ref] = []

    def call():
        assert not any(reference() is not None for reference in alive)
        result = torch.ones(2)
        alive.append(weakref.ref(result))
        return result

    timing.interleave({"one": call}, Plan(warmup=0, seconds=0, least=6), clock=Clock())
    assert len(alive) > 6


def test_median_interval_is_the_binomial_one():
    assert timing.median_interval(range(5)) == (0, 4, False)
    assert timing.median_interval(range(6)) == (0, 5, True)
    assert timing.median_interval(reversed(range(20))) == (5, 14, True)  # ranks 6 and 15, of the tables


def test_peers_compute_what_the_reference_computes():
    for op, direction in itertools.product(OPS, DIRECTIONS):
        case = Case(op, SMALL)
        expected = case.call(case.function("reference"), direction)()
        for name, function in peers(case, compiled=False).items():
            assert timing.error(case.call(function, direction)(), expected) < 1e-5, (op, direction, name)


def test_footprint_counts_without_allocating_what_a_case_holds():
    for op, direction in itertools.product(OPS, DIRECTIONS):
        assert footprint(op, SMALL, direction) == sum(Case(op, SMALL).tensor_bytes(direction)), op
    assert footprint("leave_one_out", Sizes(N=2**24), BOTH) > 10**12


def test_costs_of_the_design_shape_are_the_designs():
    # The traffic in units of B N D; the small tensors (weights, a head) are under a tenth of a unit.
    units = {"leave_one_out": (24, 28), "counterfactual_losses": (4, 8), "group_attention": (16, 28)}
    for op, (forward, backward) in units.items():
        case = Case(op)
        unit = 4 * case.sizes.B * case.sizes.N * case.sizes.D
        first, both = (case.cost(direction).bytes / unit for direction in DIRECTIONS)
        assert first == pytest.approx(forward, abs=0.1) and both - first == pytest.approx(backward, abs=0.1), op


def test_grid_has_the_cells_that_are_asked_for_and_none_twice():
    for op in set(OPS) - {"confidence_loss", "improvement_loss"}:
        found = grid.cells(op)
        assert len({str(cell) for cell in found}) == len(found) >= 60
        tokens = [sizes.B * sizes.N for sizes, _ in found]
        assert (min(tokens), max(tokens)) == (1, 65536)
        for name, low, high in (("D", 8, 1536), ("M", 1, 8), ("T", 1, 8)):
            values = [getattr(sizes, name) for sizes, _ in found]
            assert (min(values), max(values)) == (low, high)


def test_target_of_attention_is_the_better_of_its_eager_peers():
    row = {
        "op": "group_attention",
        "direction": "forward",
        "ratios": {"eager": {"value": 12.0}, "sdpa": {"value": 9.0}, "compile": {"value": 7.0}},
    }
    assert ratios.against_targets(row) == [("eager", 10.0, 9.0), ("compile", 6.5, 7.0)]
