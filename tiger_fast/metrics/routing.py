"""What routing weights say, and whether they agree with causes: shares, entropy, divergence, agreement."""

import torch
from torch import Tensor
from torchmetrics import Metric

from tiger_fast import functional
from tiger_fast._extras import require
from tiger_fast.reference import normalize_differences


def entropy(weights: Tensor) -> Tensor:
    """Entropy of routing weights in nats, (..., M) -> (...); log M where uniform, 0 where one-hot."""
    return torch.special.entr(weights.float()).sum(dim=-1)


class RoutingStatistics(Metric):
    """Routing weights of a data set, held against counterfactual differences.

    Every figure is a mean over the tokens that count: a token without a valid pixel has no loss and so no cause
    (TIGER sec. 3.5). Sums are float64, and add up over processes.

    Args:
        tasks, experts: T and M.
        tau, eps: of TIGER eqs. 9-10.
    """

    full_state_update = False
    higher_is_better = None

    def __init__(self, tasks: int, experts: int, *, tau: float = 1.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.tau, self.eps = tau, eps
        shapes = {
            "count": (tasks, 1),
            "weight": (tasks, experts),
            "entropy_sum": (tasks, 1),
            "difference": (tasks, experts),
            "normalized": (tasks, experts),
            "diverged": (),
            "uniform_diverged": (),
        }
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, weights: Tensor, delta: Tensor, valid: Tensor) -> None:
        """Add a batch: weights and delta (B, T, N, M), valid (B, T, N) bool."""

        def summed(values: Tensor) -> Tensor:
            return torch.where(valid[..., None], values, 0).double().sum(dim=(0, 2))

        self.count += valid.double().sum(dim=(0, 2))[:, None]
        self.weight += summed(weights)
        self.entropy_sum += summed(entropy(weights)[..., None])
        self.difference += summed(delta)
        self.normalized += summed(normalize_differences(delta, self.eps))
        self.diverged += self._divergence(delta, weights, valid)
        self.uniform_diverged += self._divergence(delta, torch.full_like(weights, 1 / weights.shape[-1]), valid)

    def _divergence(self, delta: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
        mean = functional.alignment_loss(delta, weights, tau=self.tau, eps=self.eps, mask=valid)
        return mean.double() * valid.sum()

    def compute(self) -> dict[str, Tensor]:
        """The figures, float64.

        - weights (T, M): mean routing weight.
        - differences (T, M): mean counterfactual difference (TIGER eq. 8).
        - normalized_differences (T, M): mean of the differences normalised over experts at each token (eq. 9).
        - entropy (T,): mean entropy of the weights, nats.
        - divergence, divergence_of_uniform: mean Jensen-Shannon divergence (eqs. 9-13) between the causal target
          and the weights, and equal weights; nats.
        - agreement: Spearman's rank correlation over task x expert between weights and normalized_differences.
        """
        stats = require("scipy.stats", extra="train")
        weights, normalized = self.weight / self.count, self.normalized / self.count
        total = self.count.sum()
        rank_correlation = stats.spearmanr(weights.flatten().cpu(), normalized.flatten().cpu()).statistic
        return {
            "weights": weights,
            "differences": self.difference / self.count,
            "normalized_differences": normalized,
            "entropy": (self.entropy_sum / self.count)[:, 0],
            "divergence": self.diverged / total,
            "divergence_of_uniform": self.uniform_diverged / total,
            "agreement": torch.tensor(rank_correlation, dtype=torch.float64),
        }
