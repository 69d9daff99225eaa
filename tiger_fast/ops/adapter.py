"""TAVER's adapter (sec. 3.1): schema, shapes and gradient."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tiger_fast.ops.library import NAMESPACE, define, kernels, mask, spread, wanted


def _fake(
    x: Tensor,
    norm_in_weight: Tensor,
    norm_in_bias: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    norm_out_weight: Tensor,
    norm_out_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    width = linear_weight.shape[0]
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return x.new_empty((*x.shape[:-1], width)), x.new_empty((rows, width))


def _backward_fake(grad: Tensor, *rest: Tensor | float | int) -> list[Tensor]:
    *inputs, _eps, _gate, needs = rest
    return wanted(needs, *inputs)


_INPUTS = (
    "Tensor x, Tensor norm_in_weight, Tensor norm_in_bias, Tensor linear_weight, Tensor linear_bias, "
    "Tensor gate_weight, Tensor gate_bias, Tensor norm_out_weight, Tensor norm_out_bias, float eps"
)
define(f"adapter({_INPUTS}) -> (Tensor, Tensor)", _fake)
define(f"adapter_backward(Tensor grad, {_INPUTS}, Tensor gate, int needs) -> Tensor[]", _backward_fake)


class _Adapter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, namespace: str, eps: float, *inputs: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.namespace = namespace
        ctx.eps = eps
        out, gate = kernels(namespace).adapter(*inputs, eps)
        ctx.save_for_backward(*inputs, gate)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2:]
        if grad is None:
            return (None,) * (2 + len(needs))
        *inputs, gate = ctx.saved_tensors
        found = kernels(ctx.namespace).adapter_backward(grad, *inputs, ctx.eps, gate, mask(needs))
        return None, None, *spread(needs, found)


def adapter(
    x: Tensor,
    norm_in_weight: Tensor,
    norm_in_bias: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    norm_out_weight: Tensor,
    norm_out_bias: Tensor,
    eps: float,
    namespace: str = NAMESPACE,
) -> Tensor:
    """`tiger_fast.functional.adapter` by compiled kernels; arguments as in `tiger_fast.reference`."""
    parameters = (norm_in_weight, norm_in_bias, linear_weight, linear_bias, gate_weight, gate_bias)
    return _Adapter.apply(namespace, eps, x, *parameters, norm_out_weight, norm_out_bias)
