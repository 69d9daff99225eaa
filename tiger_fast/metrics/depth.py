"""Root mean square error of depth."""

from __future__ import annotations

import torch
from torch import Tensor

from tiger_fast.metrics._common import Metric, at_target_size, check_logits, check_map


class DepthRMSE(Metric):
    """sqrt(sum of squared errors / number of valid pixels) over the whole data set, in metres.

    update: logits (B,1,h,w) and target (B,1,H,W) in metres; predictions below 0 count as 0; valid where
    0 < target < `max_depth`.

    A prediction that is not finite counts with the largest error that one within [0, max_depth] could have made at its pixel.
    """

    name = "RMSE"
    higher_is_better = False
    is_differentiable = False
    full_state_update = False

    squared_error: Tensor
    valid: Tensor

    def __init__(self, max_depth: float = 80.0) -> None:
        super().__init__()
        if not max_depth > 0:
            raise ValueError(f"max_depth must be positive, got {max_depth}")
        self.max_depth = max_depth
        self.add_state("squared_error", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("valid", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        check_logits(logits, channels=1)
        check_map(target, logits)
        depth = at_target_size(logits, target)
        valid = (target > 0) & (target < self.max_depth)
        worst = torch.maximum(target, self.max_depth - target)
        error = torch.where(depth.isfinite(), depth.clamp_min(0) - target, worst)
        self.squared_error += error[valid].double().square().sum()
        self.valid += valid.sum()

    def compute(self) -> Tensor:
        return (self.squared_error / self.valid).sqrt().float()
