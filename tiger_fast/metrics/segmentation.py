"""Mean intersection over union of semantic segmentation."""

from __future__ import annotations

import torch
from torch import Tensor

from tiger_fast._extras import unknown
from tiger_fast.metrics._common import (
    IGNORE,
    Metric,
    at_target_size,
    check_label_range,
    check_labels,
    check_logits,
)


class SegmentationIoU(Metric):
    """Macro mean over classes of tp / (tp + fp + fn), counted over the whole data set. A fraction in [0, 1].

    update: logits (B,num_classes,h,w), target (B,H,W) int64 in 0..num_classes-1 or `ignore_index`.

    absent: what a class that occurs neither in the targets nor in the predictions does to the mean: "zero" counts it as 0
    (the benchmarks' protocol), "skip" leaves it out.
    include_background: False leaves class 0 out of the mean; its pixels still count against the other classes.

    A pixel with a NaN among its logits is predicted as no class: a miss for its true class, a false alarm for none.
    """

    name = "mIoU"
    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    tp: Tensor
    fp: Tensor
    fn: Tensor

    def __init__(
        self, num_classes: int, ignore_index: int = IGNORE, absent: str = "zero", include_background: bool = True
    ) -> None:
        super().__init__()
        if absent not in ("zero", "skip"):
            raise unknown("absent", absent, ("zero", "skip"))
        if num_classes < (1 if include_background else 2):
            raise ValueError(f"num_classes must leave at least one class to score, got {num_classes}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.absent = absent
        self.include_background = include_background
        for state in ("tp", "fp", "fn"):
            self.add_state(state, torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        check_logits(logits, self.num_classes)
        check_labels(target, logits)
        best, predicted = at_target_size(logits, target).max(1)
        predicted = predicted.masked_fill(best.isnan(), self.num_classes)
        valid = target != self.ignore_index
        labels = target[valid]
        check_label_range(labels, self.num_classes, self.ignore_index)
        # Rows are true classes, columns predicted ones, the last column is "no class".
        shape = (self.num_classes, self.num_classes + 1)
        confusion = torch.bincount(labels * shape[1] + predicted[valid], minlength=shape[0] * shape[1]).view(shape)
        tp = confusion.diagonal()
        self.tp += tp
        self.fp += confusion[:, :-1].sum(0) - tp
        self.fn += confusion.sum(1) - tp

    def compute(self) -> Tensor:
        if not (self.tp + self.fn).any():
            return torch.full((), torch.nan, device=self.tp.device)
        union = self.tp + self.fp + self.fn
        iou = self.tp.double() / union.clamp_min(1)
        counted = torch.ones_like(union, dtype=torch.bool) if self.absent == "zero" else union > 0
        if not self.include_background:
            counted[0] = False
        return iou[counted].mean().float()
