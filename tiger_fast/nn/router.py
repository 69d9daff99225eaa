"""The routing module: task-conditioned low-rank queries, softmax over experts, mixture (TIGER sec. 3.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tiger_fast import _checks as check
from tiger_fast import functional
from tiger_fast._extras import unknown
from tiger_fast.functional import Routed
from tiger_fast.ops import BACKENDS


class Router(nn.Module):
    """Mixes M experts' tokens for T tasks, a softmax over experts at every token (TIGER eqs. 4-7).

    Drop it between frozen experts projected to one width and the decoder of a trainer you already have.

    Initialisation. With unit-variance queries and experts, the base term and the low-rank term each give logits of
    standard deviation about 0.1: weights are near uniform, so that no expert starts ahead, but differ from expert
    to expert and token to token, so that nothing is tied. g starts at 1 plus a small function of the task, not at 0:
    U diag(g) V^T then carries gradient to U, V and g for every task from the first step. h starts at 0 by its last
    layer's weights, so its first layer gets its first gradient at the second step.

    Args:
        dim: D, the width of query and experts.
        num_experts: M, at most 16.
        task_dim: E, the width of the task representation.
        rank: R, of the low-rank modulation, at most 256.
        hidden: units of the two-layer MLPs g and h; None: dim.
        backend: forced for this module; None chooses by device. It does not enter the state_dict.

    Raises:
        ValueError: for sizes outside the limits.
    """

    LOGIT_STD = 0.1

    def __init__(
        self,
        dim: int,
        num_experts: int,
        task_dim: int,
        rank: int = 32,
        hidden: int | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, most in (
            ("dim", dim, None),
            ("num_experts", num_experts, check.MAX_EXPERTS),
            ("task_dim", task_dim, None),
            ("rank", rank, check.MAX_RANK),
            ("hidden", dim if hidden is None else hidden, None),
        ):
            if value < 1 or (most is not None and value > most):
                raise ValueError(f"{name} must be {'at least 1' if most is None else f'from 1 to {most}'}, got {value}")
        if backend is not None and backend not in BACKENDS:
            raise unknown("backend", backend, BACKENDS)
        self.dim, self.num_experts, self.task_dim, self.backend = dim, num_experts, task_dim, backend
        self.base_weight = nn.Parameter(torch.empty(dim, dim))
        self.base_bias = nn.Parameter(torch.zeros(dim))
        self.u = nn.Parameter(torch.empty(dim, rank))
        self.v = nn.Parameter(torch.empty(dim, rank))
        self.g = _mlp(task_dim, hidden or dim, rank)
        self.h = _mlp(task_dim, hidden or dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters afresh; see the class for why they are what they are."""
        dim, rank = self.u.shape
        # base . F / sqrt(D) has variance D * std^2 for unit-variance inputs.
        nn.init.normal_(self.base_weight, std=self.LOGIT_STD / dim**0.5)
        nn.init.zeros_(self.base_bias)
        # z = q U has unit variance; sum over r of z_r u_r, over sqrt(D), has variance R * std_v^2.
        nn.init.normal_(self.u, std=dim**-0.5)
        nn.init.normal_(self.v, std=self.LOGIT_STD / rank**0.5)
        for mlp in (self.g, self.h):
            mlp[0].reset_parameters()
        nn.init.normal_(self.g[2].weight, std=0.1 / self.g[2].in_features ** 0.5)
        nn.init.ones_(self.g[2].bias)
        nn.init.zeros_(self.h[2].weight)
        nn.init.zeros_(self.h[2].bias)

    def forward(self, query: Tensor, experts: Sequence[Tensor] | Tensor, task: Tensor) -> Routed:
        """Route every token.

        Args:
            query: (B, N, D).
            experts: M tensors (B, N, D), or (B, M, N, D).
            task: the task representation of eq. 3, (T, E), or (B, T, E) per sample.

        Returns:
            Routed: tokens (B, T, N, D) and weights (B, T, N, M).

        Raises:
            ValueError, TypeError: as `tiger_fast.functional.route`; also for another number of experts than M.
        """
        members = _members(experts)
        if members not in (None, self.num_experts):
            raise ValueError(f"experts: this Router mixes {self.num_experts}, got {members}")
        if check.tensor("task", task).dim() not in (2, 3) or task.shape[-1] != self.task_dim:
            raise ValueError(f"task must be (T, {self.task_dim}) or (B, T, {self.task_dim}), got {tuple(task.shape)}")
        check.beside("task", task, self.base_weight, tuple(task.shape))
        return self.mix(query, experts, task)

    def mix(self, query: Tensor, experts: Sequence[Tensor] | Tensor, task: Tensor) -> Routed:
        """`forward` for whatever experts are present: no parameter depends on their number, and one may be absent."""
        return functional.route(
            query,
            experts,
            self.base_weight,
            self.base_bias,
            self.u,
            self.v,
            self.g(task),
            self.h(task),
            backend=self.backend,
        )

    def route_maps(self, query: Tensor, experts: Sequence[Tensor], task: Tensor) -> Routed:
        """`forward` for feature maps.

        Args:
            query: (B, D, H, W).
            experts: M maps (B, D, H, W).
            task: (T, E) or (B, T, E).

        Returns:
            Routed: tokens (B, T, D, H, W) and weights (B, T, M, H, W).
        """
        if query.dim() != 4:
            raise ValueError(f"query must be a map (B, D, H, W), got {tuple(query.shape)}")
        if isinstance(experts, Tensor):
            raise TypeError("experts must be a sequence of maps (B, D, H, W), got one tensor")
        for index, expert in enumerate(experts):
            if expert.shape != query.shape:
                raise ValueError(f"experts[{index}] must be {tuple(query.shape)}, got {tuple(expert.shape)}")
        grid = query.shape[-2:]
        tokens, weights = self(_to_tokens(query), [_to_tokens(expert) for expert in experts], task)
        return Routed(tokens.transpose(2, 3).unflatten(3, grid), weights.transpose(2, 3).unflatten(3, grid))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, task_dim={self.task_dim}, rank={self.u.shape[1]}"


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


def _members(experts: Sequence[Tensor] | Tensor) -> int | None:
    # None for what is neither a sequence nor (B, M, N, D): `route` refuses it and says why.
    if isinstance(experts, Tensor):
        return experts.shape[1] if experts.dim() == 4 else None
    return len(experts) if isinstance(experts, Sequence) else None


def _to_tokens(feature_map: Tensor) -> Tensor:
    return feature_map.flatten(2).transpose(1, 2)
