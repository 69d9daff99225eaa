"""Per-pixel losses of the dense tasks, and their averages over valid pixels and over tokens.

A loss maps `(logits, target)` to a `LossMap` and never divides by a count itself, so that one map serves both the
objective (`mean_over_valid`) and the counterfactual step, which wants one figure per token (`token_mean`).

All losses take logits (B,C,H,W) of any floating dtype at the target's size, compute in float32 at least, and give 0 with
zero gradient at pixels that are not valid, whatever (NaN included) the logits or the target hold there. Wrong shapes or
devices raise ValueError, wrong dtypes TypeError. Nothing here waits for the device.

In a process group of W > 1 ranks, `mean_over_valid` and `BalancedCrossEntropy` communicate: every rank has to call them,
in the same order, also where it has no valid pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = 255


class LossMap(NamedTuple):
    """Losses per pixel: values (B,H,W) float32 or float64, 0 where not valid; valid (B,H,W) bool."""

    values: Tensor
    valid: Tensor


class CrossEntropy(nn.Module):
    """Cross-entropy of logits (B,C,H,W) with target (B,H,W) int64.

    `class_weight` (C,) multiplies each pixel's loss by its class's weight; `mean_over_valid` still divides by the number of
    pixels, not by the sum of the weights. A class outside [0, C) that is not `ignore_index` makes its pixel NaN.
    """

    def __init__(self, ignore_index: int = IGNORE, class_weight: Tensor | Sequence[float] | None = None) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        # A setting, not learned state: it is not part of the state_dict.
        self.register_buffer("class_weight", _as_class_weight(class_weight), persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> LossMap:
        _check_logits(logits)
        _check_labels(target, logits)
        if self.class_weight is not None and self.class_weight.shape[0] != logits.shape[1]:
            raise ValueError(f"class_weight has {self.class_weight.shape[0]} classes, logits have {logits.shape[1]}")
        values, valid = _cross_entropy(logits, target, self.ignore_index)
        if self.class_weight is not None:
            label = target.clamp(0, logits.shape[1] - 1)
            values = values * self.class_weight.to(values)[label]
        return LossMap(values, valid)


class BalancedCrossEntropy(nn.Module):
    """Two-class cross-entropy, positives weighted by the batch's share of negatives and negatives by the rest.

    logits (B,2,H,W), target (B,H,W) int64 in {0, 1} or `ignore_index`. The share is taken over the valid pixels of the whole
    batch, that of all ranks in a process group.
    """

    def __init__(self, ignore_index: int = IGNORE) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, target: Tensor) -> LossMap:
        _check_logits(logits, channels=2)
        _check_labels(target, logits)
        values, valid = _cross_entropy(logits, target, self.ignore_index)
        negatives, total = sum_over_ranks(torch.stack([(valid & (target == 0)).sum(), valid.sum()])).to(values.dtype)
        share = negatives / total.clamp_min(1)
        return LossMap(values * torch.where(target == 1, share, 1 - share), valid)


class DepthL1(nn.Module):
    """|logits - target|, both (B,1,H,W); a target that is not positive and finite (0 = no measurement) is not valid."""

    def forward(self, logits: Tensor, target: Tensor) -> LossMap:
        _check_logits(logits, channels=1)
        _check_map(target, logits)
        valid = (target > 0) & target.isfinite()
        error = (_masked(logits, valid) - _masked(target, valid)).abs()
        return LossMap(error.squeeze(1), valid.squeeze(1))


class NormalsL1(nn.Module):
    """L1 between the L2-normalised logits and target, both (B,3,H,W), summed over the three channels.

    A target that is the zero vector or not finite is not valid.
    """

    # Shorter outputs are divided by this instead of by their length. It bounds the gradient of an output that is exactly
    # zero at 1e6 per unit of error, far from float32's overflow even after it is summed over an image.
    eps = 1e-6

    def forward(self, logits: Tensor, target: Tensor) -> LossMap:
        _check_logits(logits, channels=3)
        _check_map(target, logits)
        valid = (target.isfinite().all(1) & (target != 0).any(1)).unsqueeze(1)
        x = _masked(logits, valid)
        # Not F.normalize: torch's norm over a strided dimension was 8 % of a training step's CPU time in a profile.
        length = x.square().sum(1, keepdim=True).clamp_min(self.eps**2).sqrt()
        return LossMap((x / length - _masked(target, valid)).abs().sum(1), valid.squeeze(1))


class WeightedBCE(nn.Module):
    """Binary cross-entropy with w y on boundaries and (1 - w) (1 - y) elsewhere, w = `positive_weight`.

    logits and target (B,1,H,W), target in [0, 1]; 255 or a value that is not finite is not valid.
    """

    def __init__(self, positive_weight: float = 0.95) -> None:
        super().__init__()
        if not 0 <= positive_weight <= 1:
            raise ValueError(f"positive_weight must lie in [0, 1], got {positive_weight}")
        self.positive_weight = positive_weight

    def forward(self, logits: Tensor, target: Tensor) -> LossMap:
        _check_logits(logits, channels=1)
        _check_map(target, logits)
        valid = (target != IGNORE) & target.isfinite()
        x, y, w = _masked(logits, valid), _masked(target, valid), self.positive_weight
        values = w * y * F.softplus(-x) + (1 - w) * (1 - y) * F.softplus(x)
        return LossMap(values.masked_fill(~valid, 0).squeeze(1), valid.squeeze(1))


def mean_over_valid(loss_map: LossMap) -> Tensor:
    """Sum over valid entries divided by their number; 0 with zero gradient where there are none. Scalar.

    In a process group of W > 1 ranks: W times this rank's sum over the number on all ranks. The average over ranks, which is
    what DistributedDataParallel does to gradients, is then that of one process with the whole batch, however unevenly the
    valid pixels are spread; the mean of the returned values over ranks is likewise the loss of the whole batch.
    """
    values, valid = _check_loss_map(loss_map)
    return mean_over_ranks(values.masked_fill(~valid, 0).sum(), valid.sum())


def mean_over_ranks(total: Tensor, count: Tensor) -> Tensor:
    """world_size * total / (count over all ranks), 0 where that count is 0: see `mean_over_valid`."""
    return total * world_size() / sum_over_ranks(count).clamp_min(1)


def token_mean(loss_map: LossMap, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Mean over each token's valid pixels: (values (B,N), valid (B,N) bool), N = grid[0] * grid[1], row-major.

    A token without a valid pixel has value 0 and is not valid (it is to be left out of TIGER eqs. 9-13: a difference of 0
    would pull its routing weights to uniform). ValueError if H or W is not a multiple of the grid's.
    """
    values, valid = _check_loss_map(loss_map)
    if values.dim() != 3:
        raise ValueError(f"loss_map must be (B,H,W), got {tuple(values.shape)}")
    (batch, height, width), (rows, columns) = values.shape, grid
    if rows < 1 or columns < 1 or height % rows or width % columns:
        raise ValueError(f"grid must divide the loss map's size {height}x{width}, got {rows}x{columns}")
    blocks = (batch, rows, height // rows, columns, width // columns)
    count = valid.reshape(blocks).sum((2, 4)).flatten(1)
    total = values.masked_fill(~valid, 0).reshape(blocks).sum((2, 4)).flatten(1)
    return total / count.clamp_min(1), count > 0


def world_size() -> int:
    """Number of ranks of the default process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(counts: Tensor) -> Tensor:
    """Sum of a tensor of counts over the ranks of the default process group, without gradient.

    With one rank, or no process group, the tensor itself: no communication.
    """
    if world_size() == 1:
        return counts
    counts = counts.detach().clone()
    dist.all_reduce(counts)
    return counts


def _cross_entropy(logits: Tensor, target: Tensor, ignore_index: int) -> LossMap:
    valid = target != ignore_index
    known = (target >= 0) & (target < logits.shape[1])
    # The gather never reads out of bounds, and a wrong label shows as NaN without asking the device.
    label = target.masked_fill(~known, 0).unsqueeze(1)
    log_p = F.log_softmax(_masked(logits, valid.unsqueeze(1)), dim=1).gather(1, label).squeeze(1)
    return LossMap((-log_p).masked_fill(~known, torch.nan).masked_fill(~valid, 0), valid)


def _masked(x: Tensor, valid: Tensor) -> Tensor:
    """x in float32 at least, 0 where not valid: what stood there reaches neither the value nor the gradient."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~valid, 0)


def _as_class_weight(weight: Tensor | Sequence[float] | None) -> Tensor | None:
    if weight is None:
        return None
    weight = torch.as_tensor(weight, dtype=torch.float32).detach().clone()
    if weight.dim() != 1 or not bool((weight.isfinite() & (weight >= 0)).all()):
        raise ValueError(f"class_weight must be one finite, non-negative number per class, got {weight.tolist()}")
    return weight


def _check_logits(logits: Tensor, channels: int | None = None) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"logits must be a floating tensor, got {_kind(logits)}")
    if logits.dim() != 4 or logits.shape[1] < 1 or (channels is not None and logits.shape[1] != channels):
        raise ValueError(f"logits must be (B,{channels or 'C'},H,W), got {tuple(logits.shape)}")


def _check_labels(target: Tensor, logits: Tensor) -> None:
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        raise TypeError(f"target must be an int64 tensor, got {_kind(target)}")
    _check_match(target, logits, (logits.shape[0], *logits.shape[2:]))


def _check_map(target: Tensor, logits: Tensor) -> None:
    if not isinstance(target, Tensor) or not target.is_floating_point():
        raise TypeError(f"target must be a floating tensor, got {_kind(target)}")
    _check_match(target, logits, tuple(logits.shape))


def _check_match(target: Tensor, logits: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(target.shape) != shape:
        raise ValueError(f"target must be {shape} for logits {tuple(logits.shape)}, got {tuple(target.shape)}")
    if target.device != logits.device:
        raise ValueError(f"target is on {target.device}, logits are on {logits.device}")


def _check_loss_map(loss_map: LossMap) -> LossMap:
    values, valid = loss_map
    if not values.is_floating_point() or valid.dtype != torch.bool:
        raise TypeError(f"loss_map must hold floating values and bool valid, got {values.dtype} and {valid.dtype}")
    if values.shape != valid.shape:
        raise ValueError(f"loss_map: values are {tuple(values.shape)}, valid is {tuple(valid.shape)}")
    return LossMap(values, valid)


def _kind(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
