"""Counterfactual losses of a linear head (TIGER eq. 8), from experts or from their projections: schemas, shapes, gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tiger_fast.ops.library import NAMESPACE, define, kernels, mask, spread, wanted
from tiger_fast.reference import TOKEN_LOSSES, accumulator

# The compiled library knows a loss by its place in this order.
_LOSSES = {name: place for place, name in enumerate(TOKEN_LOSSES)}

_REST = "Tensor target, int loss, Tensor? valid, int ignore_index"
_FROM_EXPERTS = f"Tensor[] experts, Tensor weights, Tensor head_weight, Tensor? head_bias, {_REST}"
_FROM_PROJECTIONS = f"Tensor projections, Tensor weights, Tensor? head_bias, {_REST}"


def _fake_losses(weights: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, members = weights.shape
    dtype = accumulator(activation.dtype)
    return weights.new_empty((batch, tokens), dtype=dtype), weights.new_empty((batch, members, tokens), dtype=dtype)


def _fake(
    experts: Sequence[Tensor],
    weights: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    loss: int,
    valid: Tensor | None,
    ignore_index: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    full, without = _fake_losses(weights, experts[0])
    kept = full.new_empty((*weights.shape, head_weight.shape[0]) if keep else (0,))
    return full, without, kept


def _backward_fake(
    grad_full: Tensor | None,
    grad_without: Tensor | None,
    kept: Tensor | None,
    experts: Sequence[Tensor],
    weights: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    loss: int,
    valid: Tensor | None,
    ignore_index: int,
    needs: int,
) -> list[Tensor]:
    return wanted(needs, *experts, weights, head_weight, head_bias, target)


def _projections_fake(projections: Tensor, weights: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _fake_losses(weights, projections)


def _projections_backward_fake(
    grad_full: Tensor | None,
    grad_without: Tensor | None,
    projections: Tensor,
    weights: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    loss: int,
    valid: Tensor | None,
    ignore_index: int,
    needs: int,
) -> list[Tensor]:
    return wanted(needs, projections, weights, head_bias, target)


_GRADS = "Tensor? grad_full, Tensor? grad_without"
define(f"counterfactual_losses({_FROM_EXPERTS}, bool keep) -> (Tensor, Tensor, Tensor)", _fake)
define(
    f"counterfactual_losses_backward({_GRADS}, Tensor? kept, {_FROM_EXPERTS}, int needs) -> Tensor[]", _backward_fake
)
define(f"counterfactual_losses_from_projections({_FROM_PROJECTIONS}) -> (Tensor, Tensor)", _projections_fake)
define(
    f"counterfactual_losses_from_projections_backward({_GRADS}, {_FROM_PROJECTIONS}, int needs) -> Tensor[]",
    _projections_backward_fake,
)


class _FromExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        namespace: str,
        keep: bool,
        loss: int,
        ignore_index: int,
        valid: Tensor | None,
        weights: Tensor,
        head_weight: Tensor,
        *rest: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        head_bias, target, *experts = rest  # named, they would be what leave_one_out.py says of its own
        ctx.set_materialize_grads(False)
        ctx.namespace = namespace
        ctx.loss, ctx.ignore_index = loss, ignore_index
        full, without, kept = kernels(namespace).counterfactual_losses(
            experts, weights, head_weight, head_bias, target, loss, valid, ignore_index, keep
        )
        ctx.save_for_backward(kept if keep else None, valid, weights, head_weight, head_bias, target, *experts)
        return full, without

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_full: Tensor | None, grad_without: Tensor | None) -> tuple[Tensor | None, ...]:
        *_, for_weights, for_head, for_bias, for_target = ctx.needs_input_grad[:9]
        for_experts = ctx.needs_input_grad[9:]
        if grad_full is None and grad_without is None:
            return (None,) * (9 + len(for_experts))
        kept, valid, weights, head_weight, head_bias, target, *experts = ctx.saved_tensors
        needs = (*for_experts, for_weights, for_head, for_bias, for_target)
        found = kernels(ctx.namespace).counterfactual_losses_backward(
            grad_full,
            grad_without,
            kept,
            experts,
            weights,
            head_weight,
            head_bias,
            target,
            ctx.loss,
            valid,
            ctx.ignore_index,
            mask(needs),
        )
        *grad_experts, grad_weights, grad_head, grad_bias, grad_target = spread(needs, found)
        return None, None, None, None, None, grad_weights, grad_head, grad_bias, grad_target, *grad_experts


class _FromProjections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        namespace: str,
        loss: int,
        ignore_index: int,
        valid: Tensor | None,
        projections: Tensor,
        weights: Tensor,
        head_bias: Tensor | None,
        target: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.namespace = namespace
        ctx.loss, ctx.ignore_index = loss, ignore_index
        ctx.save_for_backward(valid, projections, weights, head_bias, target)
        return kernels(namespace).counterfactual_losses_from_projections(
            projections, weights, head_bias, target, loss, valid, ignore_index
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_full: Tensor | None, grad_without: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_full is None and grad_without is None:
            return (None,) * 8
        valid, projections, weights, head_bias, target = ctx.saved_tensors
        needs = ctx.needs_input_grad[4:]
        found = kernels(ctx.namespace).counterfactual_losses_from_projections_backward(
            grad_full,
            grad_without,
            projections,
            weights,
            head_bias,
            target,
            ctx.loss,
            valid,
            ctx.ignore_index,
            mask(needs),
        )
        return None, None, None, None, *spread(needs, found)


def counterfactual_losses(
    experts: Sequence[Tensor],
    weights: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    loss: str,
    valid: Tensor | None,
    ignore_index: int,
    namespace: str = NAMESPACE,
) -> tuple[Tensor, Tensor]:
    """`tiger_fast.functional.counterfactual_losses` by a compiled kernel; arguments as in `tiger_fast.reference`."""
    differentiable = (*experts, weights, head_weight, head_bias, target)
    wants = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    # The projections spare the backward a product; they may not take more memory than one tensor of features.
    row = len(experts) * head_weight.shape[0] * accumulator(experts[0].dtype).itemsize
    keep = wants and row <= experts[0].shape[-1] * experts[0].element_size()
    return _FromExperts.apply(
        namespace, keep, _LOSSES[loss], ignore_index, valid, weights, head_weight, head_bias, target, *experts
    )


def counterfactual_losses_from_projections(
    projections: Tensor,
    weights: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    loss: str,
    valid: Tensor | None,
    ignore_index: int,
    namespace: str = NAMESPACE,
) -> tuple[Tensor, Tensor]:
    """`counterfactual_losses` from projections, likewise."""
    return _FromProjections.apply(
        namespace, _LOSSES[loss], ignore_index, valid, projections, weights, head_bias, target
    )
