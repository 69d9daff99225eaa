"""The competency-weighted mixture with its LayerNorm (TAVER eqs. 2-3): schema, shapes and gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tiger_fast.ops.library import NAMESPACE, define, kernels, mask, spread, wanted
from tiger_fast.reference import accumulator


def _fake(
    experts: Sequence[Tensor],
    confidence: Tensor,
    refined_confidence: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    first = experts[0]
    return first.new_empty(first.shape), first.new_empty(confidence.shape, dtype=accumulator(first.dtype))


def _backward_fake(
    grad: Tensor | None,
    grad_weights: Tensor | None,
    experts: Sequence[Tensor],
    confidence: Tensor,
    refined_confidence: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weights: Tensor,
    needs: int,
) -> list[Tensor]:
    return wanted(needs, *experts, confidence, refined_confidence, norm_weight, norm_bias)


_INPUTS = (
    "Tensor[] experts, Tensor confidence, Tensor refined_confidence, Tensor norm_weight, Tensor norm_bias, float eps"
)
define(f"competency_aggregate({_INPUTS}) -> (Tensor, Tensor)", _fake)
define(
    f"competency_aggregate_backward(Tensor? grad, Tensor? grad_weights, {_INPUTS}, Tensor weights, int needs) "
    "-> Tensor[]",
    _backward_fake,
)


class _CompetencyAggregate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, namespace: str, eps: float, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.namespace = namespace
        ctx.eps = eps
        *experts, confidence, refined_confidence, norm_weight, norm_bias = inputs
        features, weights = kernels(namespace).competency_aggregate(
            experts, confidence, refined_confidence, norm_weight, norm_bias, eps
        )
        ctx.save_for_backward(*inputs, weights)
        if not any(ctx.needs_input_grad[-4:-2]):
            ctx.mark_non_differentiable(weights)  # they depend on the confidences alone
        return features, weights

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_weights: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[2:])
        if grad is None:
            through = [False] * (len(needs) - 4) + [grad_weights is not None] * 2 + [False] * 2
            needs = [a and b for a, b in zip(needs, through, strict=True)]
        if not any(needs):
            return (None,) * (2 + len(needs))
        *experts, confidence, refined_confidence, norm_weight, norm_bias, weights = ctx.saved_tensors
        parameters = (confidence, refined_confidence, norm_weight, norm_bias)
        found = kernels(ctx.namespace).competency_aggregate_backward(
            grad, grad_weights, experts, *parameters, ctx.eps, weights, mask(needs)
        )
        return None, None, *spread(needs, found)


def competency_aggregate(
    experts: Sequence[Tensor],
    confidence: Tensor,
    refined_confidence: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    namespace: str = NAMESPACE,
) -> tuple[Tensor, Tensor]:
    """`tiger_fast.functional.competency_aggregate` by a compiled kernel; arguments as in `tiger_fast.reference`."""
    return _CompetencyAggregate.apply(namespace, eps, *experts, confidence, refined_confidence, norm_weight, norm_bias)
