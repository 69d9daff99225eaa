"""Maximal F-measure of saliency."""

from __future__ import annotations

import torch
from torch import Tensor

from tiger_fast._extras import unknown
from tiger_fast.metrics._common import (
    IGNORE,
    Metric,
    at_or_above,
    at_target_size,
    check_label_range,
    check_labels,
    check_logits,
    passed_thresholds,
)

THRESHOLDS = tuple(k / 20 for k in range(1, 20))


class SaliencyMaxF(Metric):
    """max over thresholds of F = (1 + beta2) P R / (beta2 P + R), P and R pooled over all pixels. A fraction in [0, 1].

    update: logits (B,2,h,w), target (B,H,W) int64 in {0, 1} or 255 (ignored). A pixel is predicted salient if its score is at
    or above the threshold; thresholds are 0.05, 0.10 .. 0.95. F is 0 where no salient pixel was found.

    scores: "softmax", the probability of class 1; or "sigmoid_of_softmax", the sigmoid of that probability, which reproduces
    published figures of evaluations that apply both. The latter lies in [0.5, 0.731], so that only the thresholds from 0.55
    to 0.70 (probabilities from 0.20 to 0.85) can tell pixels apart.

    A score that is NaN is wrong at every threshold: a miss on a salient pixel, a false alarm on another.
    """

    name = "maxF"
    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    histogram: Tensor

    def __init__(self, beta2: float = 0.3, scores: str = "softmax") -> None:
        super().__init__()
        if scores not in ("softmax", "sigmoid_of_softmax"):
            raise unknown("scores", scores, ("softmax", "sigmoid_of_softmax"))
        if not beta2 > 0:
            raise ValueError(f"beta2 must be positive, got {beta2}")
        self.beta2 = beta2
        self.scores = scores
        self.register_buffer("thresholds", torch.tensor(THRESHOLDS, dtype=torch.float64), persistent=False)
        # Row: true class; column: number of thresholds reached.
        empty = torch.zeros(2, len(THRESHOLDS) + 1, dtype=torch.int64)
        self.add_state("histogram", empty, dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        check_logits(logits, channels=2)
        check_labels(target, logits)
        score = at_target_size(logits, target).softmax(1)[:, 1]
        if self.scores == "sigmoid_of_softmax":
            score = score.sigmoid()
        valid = target != IGNORE
        labels, score = target[valid], score[valid]
        check_label_range(labels, 2, IGNORE)
        bins = self.histogram.shape[1]
        wrong = (1 - labels) * (bins - 1)
        passed = torch.where(score.isnan(), wrong, passed_thresholds(score, self.thresholds))
        self.histogram += torch.bincount(labels * bins + passed, minlength=2 * bins).view(2, bins)

    def compute(self) -> Tensor:
        if not self.histogram.any():
            return torch.full((), torch.nan, device=self.histogram.device)
        false_alarms, hits = at_or_above(self.histogram)
        # P = hits / predicted and R = hits / salient put into F; this form has no 0 / 0 where hits is 0.
        predicted, salient = hits + false_alarms, self.histogram[1].sum()
        f = (1 + self.beta2) * hits.double() / (predicted + self.beta2 * salient).clamp_min(self.beta2)
        return f.max().float()
