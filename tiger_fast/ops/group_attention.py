"""Group attention (TIGER sec. 3.4), of q, k, v apart and of one packed tensor: schemas, shapes and gradients."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tiger_fast.ops.library import NAMESPACE, define, kernels, mask, spread, wanted


def _fake(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    return q.new_empty(q.shape)


def _backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, num_heads: int, needs: int) -> list[Tensor]:
    return wanted(needs, q, k, v)


def _packed_fake(qkv: Tensor, num_heads: int) -> Tensor:
    return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))


def _packed_backward_fake(grad: Tensor, qkv: Tensor, num_heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


define("group_attention(Tensor q, Tensor k, Tensor v, int num_heads) -> Tensor", _fake)
define(
    "group_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, int num_heads, int needs) -> Tensor[]",
    _backward_fake,
)
define("group_attention_packed(Tensor qkv, int num_heads) -> Tensor", _packed_fake)
define("group_attention_packed_backward(Tensor grad, Tensor qkv, int num_heads) -> Tensor", _packed_backward_fake)


class _GroupAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, namespace: str, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.namespace = namespace
        ctx.num_heads = num_heads
        ctx.save_for_backward(q, k, v)
        return kernels(namespace).group_attention(q, k, v, num_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        needs = ctx.needs_input_grad[1:4]
        found = kernels(ctx.namespace).group_attention_backward(grad, *ctx.saved_tensors, ctx.num_heads, mask(needs))
        return None, *spread(needs, found), None


class _GroupAttentionPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, namespace: str, qkv: Tensor, num_heads: int) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.namespace = namespace
        ctx.num_heads = num_heads
        ctx.save_for_backward(qkv)
        return kernels(namespace).group_attention_packed(qkv, num_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None) -> tuple[None, Tensor | None, None]:
        if grad is None:
            return None, None, None
        (qkv,) = ctx.saved_tensors
        return None, kernels(ctx.namespace).group_attention_packed_backward(grad, qkv, ctx.num_heads), None


def group_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, namespace: str = NAMESPACE) -> Tensor:
    """`tiger_fast.functional.group_attention` by a compiled kernel; arguments as in `tiger_fast.reference`."""
    return _GroupAttention.apply(namespace, q, k, v, num_heads)


def group_attention_packed(qkv: Tensor, num_heads: int, namespace: str = NAMESPACE) -> Tensor:
    """`tiger_fast.functional.group_attention_packed` by a compiled kernel; arguments as in `tiger_fast.reference`."""
    return _GroupAttentionPacked.apply(namespace, qkv, num_heads)
