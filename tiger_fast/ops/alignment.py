"""The causal target and its alignment loss (TIGER eqs. 9-13): schemas, shapes and gradients."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tiger_fast.ops.library import NAMESPACE, define, kernels, spread, wanted
from tiger_fast.ops.library import mask as bits
from tiger_fast.reference import accumulator


def _target_fake(delta: Tensor, tau: float, eps: float) -> Tensor:
    return delta.new_empty(delta.shape, dtype=accumulator(delta.dtype))


def _target_backward_fake(grad: Tensor, delta: Tensor, tau: float, eps: float) -> Tensor:
    return delta.new_empty(delta.shape)


def _loss_fake(
    delta: Tensor, weights: Tensor, tau: float, eps: float, mask: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator(torch.promote_types(delta.dtype, weights.dtype))
    slopes = delta.new_empty(weights.shape if keep else (0,), dtype=dtype)
    return delta.new_empty((), dtype=dtype), delta.new_empty((), dtype=torch.float64), slopes


def _loss_backward_fake(
    grad: Tensor,
    delta: Tensor,
    weights: Tensor,
    tau: float,
    eps: float,
    mask: Tensor | None,
    counted: Tensor,
    slopes: Tensor | None,
    needs: int,
) -> list[Tensor]:
    return wanted(needs, delta, weights)


define("causal_target(Tensor delta, float tau, float eps) -> Tensor", _target_fake)
define("causal_target_backward(Tensor grad, Tensor delta, float tau, float eps) -> Tensor", _target_backward_fake)
define(
    "alignment_loss(Tensor delta, Tensor weights, float tau, float eps, Tensor? mask, bool keep) "
    "-> (Tensor, Tensor, Tensor)",
    _loss_fake,
)
define(
    "alignment_loss_backward(Tensor grad, Tensor delta, Tensor weights, float tau, float eps, Tensor? mask, "
    "Tensor counted, Tensor? slopes, int needs) -> Tensor[]",
    _loss_backward_fake,
)


class _CausalTarget(torch.autograd.Function):
    @staticmethod
    def forward(ctx, namespace: str, delta: Tensor, tau: float, eps: float) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.namespace = namespace
        ctx.settings = tau, eps
        ctx.save_for_backward(delta)
        return kernels(namespace).causal_target(delta, tau, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        (delta,) = ctx.saved_tensors
        return None, kernels(ctx.namespace).causal_target_backward(grad, delta, *ctx.settings), None, None


class _AlignmentLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, namespace: str, delta: Tensor, weights: Tensor, tau: float, eps: float, mask: Tensor | None, keep: bool
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.namespace = namespace
        ctx.settings = tau, eps
        loss, counted, slopes = kernels(namespace).alignment_loss(delta, weights, tau, eps, mask, keep)
        ctx.save_for_backward(delta, weights, mask, counted, slopes if keep else None)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        delta, weights, mask, counted, slopes = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:3]
        found = kernels(ctx.namespace).alignment_loss_backward(
            grad, delta, weights, *ctx.settings, mask, counted, slopes, bits(needs)
        )
        return None, *spread(needs, found), None, None, None, None


def causal_target(delta: Tensor, tau: float, eps: float, namespace: str = NAMESPACE) -> Tensor:
    """`tiger_fast.functional.causal_target` by a compiled kernel; arguments as in `tiger_fast.reference`."""
    return _CausalTarget.apply(namespace, delta, tau, eps)


def alignment_loss(
    delta: Tensor,
    weights: Tensor,
    tau: float,
    eps: float,
    detach_target: bool,
    mask: Tensor | None,
    namespace: str = NAMESPACE,
) -> Tensor:
    """`tiger_fast.functional.alignment_loss` by a compiled kernel; arguments as in `tiger_fast.reference`."""
    if detach_target:
        delta = delta.detach()
    # With the target held fixed, the usual case, the forward has the gradient at hand, and it is as small as the weights.
    keep = torch.is_grad_enabled() and weights.requires_grad and not delta.requires_grad
    return _AlignmentLoss.apply(namespace, delta, weights, tau, eps, mask, keep)
