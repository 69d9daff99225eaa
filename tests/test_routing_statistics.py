"""The routing figures of the demo and the trainer, against values worked out by hand."""

import math

import pytest
import torch

from tiger_fast.metrics import RoutingStatistics

# One image, two tasks, two tokens, two experts. For M = 2 the normalised differences of eq. 9 are +1 and -1 (up to eps).
WEIGHTS = torch.tensor([[[[0.75, 0.25], [0.25, 0.75]], [[1.0, 0.0], [0.5, 0.5]]]])
DELTA = torch.tensor([[[[3.0, 1.0], [2.0, 6.0]], [[5.0, 1.0], [7.0, 9.0]]]])
VALID = torch.tensor([[[True, True], [True, False]]])


def divergence(p, q):
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]

    def relative(x):
        return sum(a * math.log(a / m) for a, m in zip(x, middle, strict=True) if a > 0)

    return (relative(p) + relative(q)) / 2


@pytest.fixture
def figures():
    statistics = RoutingStatistics(2, 2, eps=0.0)
    statistics.update(WEIGHTS, DELTA, VALID)
    return statistics.compute()


def test_means_are_over_the_tokens_that_count(figures):
    torch.testing.assert_close(figures["weights"], torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(figures["differences"], torch.tensor([[2.5, 3.5], [5.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(
        figures["normalized_differences"], torch.tensor([[0.0, 0.0], [1.0, -1.0]], dtype=torch.float64)
    )


def test_entropy_is_in_nats(figures):
    quarter = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    torch.testing.assert_close(figures["entropy"], torch.tensor([quarter, 0.0], dtype=torch.float64))


def test_divergence_is_that_of_equation_12(figures):
    high, low = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))  # softmax of (1, -1)
    rows = [
        divergence((high, low), (0.75, 0.25)),
        divergence((low, high), (0.25, 0.75)),
        divergence((high, low), (1, 0)),
    ]
    assert float(figures["divergence"]) == pytest.approx(sum(rows) / 3, rel=1e-6)
    assert float(figures["divergence_of_uniform"]) == pytest.approx(divergence((high, low), (0.5, 0.5)), rel=1e-6)


def test_agreement_is_a_rank_correlation_over_tasks_and_experts(figures):
    # weights .5 .5 1 0 and differences 0 0 1 -1 rank alike
    assert float(figures["agreement"]) == pytest.approx(1.0)


def test_a_token_that_does_not_count_changes_nothing(figures):
    statistics = RoutingStatistics(2, 2, eps=0.0)
    delta = DELTA.clone()
    delta[0, 1, 1] = math.nan
    statistics.update(WEIGHTS, delta, VALID)
    for name, value in statistics.compute().items():
        torch.testing.assert_close(value, figures[name], msg=name)


def test_batches_in_pieces_are_one_batch():
    weights, delta = torch.rand(4, 2, 3, 3).softmax(-1), torch.randn(4, 2, 3, 3)
    valid = torch.rand(4, 2, 3) > 0.3
    whole, parts = RoutingStatistics(2, 3), RoutingStatistics(2, 3)
    whole.update(weights, delta, valid)
    for piece in (slice(0, 1), slice(1, 4)):
        parts.update(weights[piece], delta[piece], valid[piece])
    for name, value in whole.compute().items():
        torch.testing.assert_close(parts.compute()[name], value, rtol=1e-6, atol=1e-7, msg=name)
