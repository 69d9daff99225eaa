"""Attention among experts before routing and among tasks after it (TIGER sec. 3.4)."""

import torch.nn.functional as F
from torch import Tensor, nn

from tiger_fast import functional
from tiger_fast._extras import unknown

SCOPES = ("token", "global")


class _Interaction(nn.Module):
    """x + W_o attention(LN(x)) over the G members of a group."""

    def __init__(self, dim: int, num_heads: int, *, scope: str = "token", backend: str | None = None) -> None:
        super().__init__()
        if scope not in SCOPES:
            raise unknown("scope", scope, SCOPES)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim = {dim}, got {num_heads}")
        self.num_heads, self.scope, self.backend = num_heads, scope, backend
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        # The block starts as the identity: routing first sees the experts as they are.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, members: Tensor) -> Tensor:
        """Let the members of the group exchange cues: (B, G, N, D) -> (B, G, N, D)."""
        qkv = self.qkv(self.norm(members))
        if self.scope == "token":
            mixed = functional.group_attention_packed(qkv, self.num_heads, backend=self.backend)
        else:
            mixed = _global_attention(qkv, self.num_heads)
        return members + self.out(mixed)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, scope={self.scope!r}"


def _global_attention(qkv: Tensor, num_heads: int) -> Tensor:
    # Every token of every member attends to every token of every member.
    batch, members, tokens, width = qkv.shape
    heads = qkv.reshape(batch, members * tokens, 3, num_heads, width // 3 // num_heads)
    q, k, v = heads.permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v)
    return mixed.transpose(1, 2).reshape(batch, members, tokens, width // 3)


class ExpertInteraction(_Interaction):
    """Pre-norm multi-head attention with residual among the M experts, before routing (TIGER sec. 3.4).

    Args:
        dim: D.
        num_heads: divides D.
        scope: "token", experts attend to each other at every token on its own; "global", all tokens of all experts.
        backend: forced for the "token" scope; None chooses by device.

    Maps (B, M, N, D) to (B, M, N, D).
    """


class TaskInteraction(_Interaction):
    """Pre-norm multi-head attention with residual among the T tasks' routed tokens (TIGER sec. 3.4).

    Arguments as `ExpertInteraction`; maps (B, T, N, D) to (B, T, N, D).
    """
