"""Mean angular error of surface normals."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.linalg import vector_norm

from tiger_fast.metrics._common import Metric, at_target_size, check_logits, check_map


class NormalsAngularError(Metric):
    """Mean over all valid pixels of the angle between prediction and target, in degrees.

    update: logits and target (B,3,h,w) and (B,3,H,W), both normalised here; a target that is the zero vector or not finite is
    not valid. The angle is 2 atan2(|p - g|, |p + g|), exact near 0 and 180 where an arc cosine is not.

    A prediction that is not finite counts as 180 degrees, and one of length 0 comes out as 90.
    """

    name = "mErr"
    higher_is_better = False
    is_differentiable = False
    full_state_update = False

    degrees: Tensor
    valid: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("degrees", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("valid", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        check_logits(logits, channels=3)
        check_map(target, logits)
        p, g = F.normalize(at_target_size(logits, target), dim=1), F.normalize(target.float(), dim=1)
        angle = torch.rad2deg(2 * torch.atan2(vector_norm(p - g, dim=1), vector_norm(p + g, dim=1)))
        valid = target.isfinite().all(1) & (target != 0).any(1)
        self.degrees += angle.nan_to_num(nan=180.0)[valid].double().sum()
        self.valid += valid.sum()

    def compute(self) -> Tensor:
        return (self.degrees / self.valid).float()
