"""What the metrics share: the base class, argument checks, resizing, and counting scores above thresholds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tiger_fast._extras import require

Metric = require("torchmetrics", extra="train").Metric

IGNORE = 255


def at_target_size(logits: Tensor, target: Tensor) -> Tensor:
    """logits (B,C,h,w) in float32 at least, resized bilinearly (align_corners=False) to target (...,H,W) where they differ."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    size = target.shape[-2:]
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def check_logits(logits: Tensor, channels: int) -> None:
    """Refuses what is not a floating tensor (B,channels,h,w)."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"logits must be a floating tensor, got {_kind(logits)}")
    if logits.dim() != 4 or logits.shape[1] != channels:
        raise ValueError(f"logits must be (B,{channels},h,w), got {tuple(logits.shape)}")


def check_labels(target: Tensor, logits: Tensor) -> None:
    """Refuses what is not an int64 target (B,H,W) beside the logits."""
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        raise TypeError(f"target must be an int64 tensor, got {_kind(target)}")
    if target.dim() != 3 or target.shape[0] != logits.shape[0]:
        raise ValueError(f"target must be ({logits.shape[0]},H,W), got {tuple(target.shape)}")
    _check_device(target, logits)


def check_map(target: Tensor, logits: Tensor) -> None:
    """Refuses what is not a floating target (B,C,H,W) beside the logits."""
    if not isinstance(target, Tensor) or not target.is_floating_point():
        raise TypeError(f"target must be a floating tensor, got {_kind(target)}")
    if target.dim() != 4 or target.shape[:2] != logits.shape[:2]:
        raise ValueError(f"target must be ({logits.shape[0]},{logits.shape[1]},H,W), got {tuple(target.shape)}")
    _check_device(target, logits)


def check_label_range(labels: Tensor, classes: int, ignore_index: int) -> None:
    """Refuses labels (already without the ignored ones) outside [0, classes)."""
    wrong = labels[(labels < 0) | (labels >= classes)]
    if wrong.numel():
        raise ValueError(f"target must hold 0..{classes - 1} or {ignore_index} (ignored), got {wrong[0].item()}")


def passed_thresholds(scores: Tensor, thresholds: Tensor) -> Tensor:
    """For each score, how many of the K increasing thresholds are at or below it: int64 in 0..K."""
    return torch.bucketize(scores, thresholds.to(scores.dtype), right=True)


def at_or_above(histogram: Tensor) -> Tensor:
    """From a histogram (...,K+1) of `passed_thresholds`, how many scores reach each of the K thresholds: (...,K)."""
    return histogram.flip(-1).cumsum(-1).flip(-1)[..., 1:]


def _check_device(target: Tensor, logits: Tensor) -> None:
    if target.device != logits.device:
        raise ValueError(f"target is on {target.device}, logits are on {logits.device}")


def _kind(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
