"""Attention among experts before routing and among tasks after it (TIGER sec. 3.4)."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from tiger_fast import functional
from tiger_fast._extras import require, unknown

SCOPES = ("token", "global")


class _Interaction(nn.Module):
    """x + W_o attention(LN(x)) over the G members of a group."""

    def __init__(
        self, dim: int, num_heads: int, *, scope: str = "token", attention: str = "sdpa", backend: str | None = None
    ) -> None:
        super().__init__()
        if scope not in SCOPES:
            raise unknown("scope", scope, SCOPES)
        if attention not in ATTENTIONS:
            raise unknown("attention", attention, ATTENTIONS)
        if scope == "global":
            ATTENTIONS[attention]()  # a package that is missing is missed here and not in the first forward
        elif attention != "sdpa":
            raise ValueError(f"attention={attention!r} is a choice for scope='global', and scope is {scope!r}")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim = {dim}, got {num_heads}")
        self.num_heads, self.scope, self.attention, self.backend = num_heads, scope, attention, backend
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
            mixed = _global_attention(qkv, self.num_heads, ATTENTIONS[self.attention]())
        return members + self.out(mixed)

    def extra_repr(self) -> str:
        attention = f", attention={self.attention!r}" if self.scope == "global" else ""
        return f"num_heads={self.num_heads}, scope={self.scope!r}{attention}"


def _sdpa() -> Callable:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return attend


# By name, what gives attention of q, k, v (B, tokens, heads, D / heads), scaled by 1 / sqrt(D / heads). Packages are
# imported when they are asked for.
ATTENTIONS: dict[str, Callable[[], Callable]] = {
    "sdpa": _sdpa,
    "flash": lambda: require("flash_attn", "attention").flash_attn_func,
    "xformers": lambda: require("xformers.ops", "attention").memory_efficient_attention,
}


def _global_attention(qkv: Tensor, num_heads: int, attend: Callable) -> Tensor:
    # Every token of every member attends to every token of every member.
    batch, members, tokens, width = qkv.shape
    q, k, v = qkv.reshape(batch, members * tokens, 3, num_heads, width // 3 // num_heads).unbind(2)
    return attend(q, k, v).reshape(batch, members, tokens, width // 3)


class ExpertInteraction(_Interaction):
    """Pre-norm multi-head attention with residual among the M experts, before routing (TIGER sec. 3.4).

    Args:
        dim: D.
        num_heads: divides D.
        scope: "token", experts attend to each other at every token on its own; "global", all tokens of all experts.
        attention: what computes the "global" scope: "sdpa", PyTorch's; "flash", the package flash-attn (float16 and
            bfloat16 on CUDA); "xformers". The last two raise ImportError where they are not installed, and ValueError for the
            "token" scope, whose attention is this library's own.
        backend: forced for the "token" scope; None chooses by device.

    Maps (B, M, N, D) to (B, M, N, D).
    """


class TaskInteraction(_Interaction):
    """Pre-norm multi-head attention with residual among the T tasks' routed tokens (TIGER sec. 3.4).

    Arguments as `ExpertInteraction`; maps (B, T, N, D) to (B, T, N, D).
    """
