"""Boundary F-measure at a pixel tolerance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tiger_fast.metrics._common import (
    IGNORE,
    Metric,
    at_or_above,
    at_target_size,
    check_logits,
    check_map,
    passed_thresholds,
)

THRESHOLDS = tuple(k / 100 for k in range(1, 100))


class BoundaryF(Metric):
    """max over thresholds of F = 2 P R / (P + R), P and R pooled over the whole data set. A fraction in [0, 1].

    update: logits (B,1,h,w), target (B,1,H,W) floating, 1 on boundaries, 0 elsewhere, 255 ignored. A pixel is predicted to be
    a boundary if the sigmoid of its logit is at or above the threshold.

    P: the share of predicted pixels that have a true boundary pixel within `tolerance_px` (Euclidean, between pixel centres).
    R: the share of true boundary pixels that have a predicted pixel within `tolerance_px`.
    Ignored pixels neither count nor match. F is 0 where nothing matches.

    This is not the odsF of the boundary benchmarks. There, predictions are first thinned by non-maximum suppression, and
    pixels are then matched one to one. Here each pixel looks for its nearest counterpart, several may share one, and
    predictions are not thinned: a line widened to the tolerance on either side costs no precision, a wider one does.
    So this figure is as a rule the higher one; compare it with itself only.

    A score that is NaN is a false alarm at every threshold and finds no boundary.
    """

    name = "F"
    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    predicted: Tensor
    found: Tensor

    def __init__(self, tolerance_px: float = 2.0, thresholds: Sequence[float] = THRESHOLDS) -> None:
        super().__init__()
        if not (tolerance_px >= 0 and math.isfinite(tolerance_px)):
            raise ValueError(f"tolerance_px must be finite and not negative, got {tolerance_px}")
        edges = [0.0, *thresholds, 1.0]
        if len(edges) < 3 or any(a >= b for a, b in pairwise(edges)):
            raise ValueError(f"thresholds must increase strictly within (0, 1), got {tuple(thresholds)}")
        self.tolerance_px = tolerance_px
        self.register_buffer("thresholds", torch.tensor(edges[1:-1], dtype=torch.float64), persistent=False)
        # Histograms over the number of thresholds reached: of all pixels, those far from a boundary in row 0 and those
        # near one in row 1; and of the true boundary pixels by the best score near them.
        bins = len(edges) - 1
        self.add_state("predicted", torch.zeros(2, bins, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("found", torch.zeros(bins, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        check_logits(logits, channels=1)
        check_map(target, logits)
        _check_values(target)
        valid = (target != IGNORE).squeeze(1)
        boundary = (target == 1).squeeze(1)
        score = at_target_size(logits, target).sigmoid().squeeze(1)
        usable = valid & ~score.isnan()
        score = score.masked_fill(~usable, -torch.inf)
        near = _dilate(boundary.to(score.dtype), self.tolerance_px) > 0
        bins = self.found.numel()
        passed = passed_thresholds(score, self.thresholds).masked_fill(~usable, bins - 1)
        index = (near & usable) * bins + passed
        self.predicted += torch.bincount(index[valid], minlength=2 * bins).view(2, bins)
        best = _dilate(score, self.tolerance_px)[boundary]
        self.found += torch.bincount(passed_thresholds(best, self.thresholds), minlength=bins)

    def compute(self) -> Tensor:
        if not self.predicted.any():
            return torch.full((), torch.nan, device=self.predicted.device)
        far, near = at_or_above(self.predicted)
        precision = near.double() / (near + far).clamp_min(1)
        recall = at_or_above(self.found).double() / self.found.sum().clamp_min(1)
        total = precision + recall
        return (2 * precision * recall / total.masked_fill(total == 0, 1)).max().float()


def _dilate(x: Tensor, radius: float) -> Tensor:
    """Maximum of x (B,H,W) over the disc of that radius around each pixel; outside the image is -inf."""
    reach = int(radius)
    height, width = x.shape[1:]
    padded = F.pad(x, (reach,) * 4, value=-torch.inf)
    result = x
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            if dy * dy + dx * dx <= radius * radius:
                y0, x0 = reach + dy, reach + dx
                result = torch.maximum(result, padded[:, y0 : y0 + height, x0 : x0 + width])
    return result


def _check_values(target: Tensor) -> None:
    wrong = target[(target != 0) & (target != 1) & (target != IGNORE)]
    if wrong.numel():
        raise ValueError(f"target must hold 0, 1 or {IGNORE} (ignored), got {wrong[0].item()}")
