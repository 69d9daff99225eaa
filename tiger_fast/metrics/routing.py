"""What routing weights say, and whether they agree with causes: shares, entropy, divergence, agreement."""

import torch
from torch import Tensor

from tiger_fast import functional
from tiger_fast._extras import require
from tiger_fast.reference import normalize_differences


class RoutingStatistics:
    """Routing weights and counterfactual differences of a data set, batch by batch, held against each other.

    Every figure is a mean over the tokens that count (TIGER sec. 3.5: a token without a valid pixel has no loss and
    so no cause). Sums are float64.

    Args:
        tau, eps: of TIGER eqs. 9-10.
    """

    def __init__(self, tau: float = 1.0, eps: float = 1e-6) -> None:
        self.tau, self.eps = tau, eps
        self._sums: dict[str, Tensor] = {}

    def update(self, weights: Tensor, delta: Tensor, valid: Tensor) -> None:
        """Add a batch: weights and delta (B, T, N, M), valid (B, T, N) bool."""
        counted = valid[..., None]
        uniform = torch.full_like(weights, 1 / weights.shape[-1])
        rows = {
            "count": valid[..., None],
            "weight": weights,
            "entropy": torch.special.entr(weights).sum(dim=-1, keepdim=True),
            "difference": delta,
            "normalized": normalize_differences(delta, self.eps),
        }
        for name, values in rows.items():
            self._add(name, torch.where(counted, values, 0).double().sum(dim=(0, 2)))  # (T, M) or (T, 1)
        for name, compared in (("divergence", weights), ("divergence_of_uniform", uniform)):
            mean = functional.alignment_loss(delta, compared, tau=self.tau, eps=self.eps, mask=valid)
            self._add(name, mean.double() * valid.sum())

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _mean(self, name: str) -> Tensor:
        if not self._sums:
            raise ValueError("no batch has been added")
        return self._sums[name] / self._sums["count"]

    def weights(self) -> Tensor:
        """Mean routing weight, (T, M) float64."""
        return self._mean("weight")

    def differences(self) -> Tensor:
        """Mean counterfactual difference (TIGER eq. 8), (T, M) float64."""
        return self._mean("difference")

    def normalized_differences(self) -> Tensor:
        """Mean of the differences normalised over experts at each token (TIGER eq. 9), (T, M) float64."""
        return self._mean("normalized")

    def entropy(self) -> float:
        """Mean entropy of the weights in nats, over all tasks and tokens; log M if uniform."""
        return float(self._sums["entropy"].sum() / self._sums["count"].sum())

    def divergence(self, *, of_uniform: bool = False) -> float:
        """Mean Jensen-Shannon divergence between causal target and weights (TIGER eqs. 9-13), or uniform weights."""
        name = "divergence_of_uniform" if of_uniform else "divergence"
        return float(self._sums[name] / self._sums["count"].sum())

    def agreement(self) -> float:
        """Spearman's rank correlation over task x expert between mean weight and mean normalised difference."""
        stats = require("scipy.stats", extra="train")
        return float(stats.spearmanr(self.weights().flatten(), self.normalized_differences().flatten()).statistic)
