"""Leave-one-out mixtures (TIGER sec. 3.5): schema, shapes and gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tiger_fast.ops.library import NAMESPACE, define, kernels, mask, spread, wanted


def _fake(experts: Sequence[Tensor], weights: Tensor, renormalize: bool) -> Tensor:
    batch, tasks, tokens, members = weights.shape
    return experts[0].new_empty((batch, tasks, members, tokens, experts[0].shape[-1]))


def _backward_fake(
    grad: Tensor, experts: Sequence[Tensor], weights: Tensor, renormalize: bool, needs: int
) -> list[Tensor]:
    return wanted(needs, *experts, weights)


define("leave_one_out(Tensor[] experts, Tensor weights, bool renormalize) -> Tensor", _fake)
define(
    "leave_one_out_backward(Tensor grad, Tensor[] experts, Tensor weights, bool renormalize, int needs) -> Tensor[]",
    _backward_fake,
)


class _LeaveOneOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, namespace: str, *rest: bool | Tensor) -> Tensor:
        # Dynamo leaves out ctx where there are as many arguments without it as parameters with it: with renormalize and
        # weights named there would be for two experts.
        renormalize, weights, *experts = rest
        ctx.set_materialize_grads(False)
        ctx.namespace = namespace
        ctx.renormalize = renormalize
        ctx.save_for_backward(weights, *experts)
        return kernels(namespace).leave_one_out(experts, weights, renormalize)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        _, _, for_weights, *for_experts = ctx.needs_input_grad
        if grad is None:
            return (None,) * (3 + len(for_experts))
        weights, *experts = ctx.saved_tensors
        needs = (*for_experts, for_weights)
        found = kernels(ctx.namespace).leave_one_out_backward(grad, experts, weights, ctx.renormalize, mask(needs))
        *grad_experts, grad_weights = spread(needs, found)
        return None, None, grad_weights, *grad_experts


def leave_one_out(experts: Sequence[Tensor], weights: Tensor, renormalize: bool, namespace: str = NAMESPACE) -> Tensor:
    """`tiger_fast.functional.leave_one_out` by a compiled kernel; arguments as in `tiger_fast.reference`."""
    return _LeaveOneOut.apply(namespace, renormalize, weights, *experts)
