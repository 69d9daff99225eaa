"""Task-conditioned routing (TIGER eqs. 4-7): schema, shapes and gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tiger_fast.ops.library import NAMESPACE, define, kernels, mask, spread, wanted
from tiger_fast.reference import accumulator

_PARAMETERS = "Tensor base_weight, Tensor? base_bias, Tensor u, Tensor v, Tensor scale, Tensor shift"


def _fake(
    query: Tensor,
    experts: Sequence[Tensor],
    base_weight: Tensor,
    base_bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> tuple[Tensor, ...]:
    batch, tokens, width = query.shape
    tasks = scale.shape[-2]
    return (
        query.new_empty((batch, tasks, tokens, width)),
        query.new_empty((batch, tasks, tokens, len(experts)), dtype=accumulator(query.dtype)),
        query.new_empty((batch, tokens, width)),
        query.new_empty((batch, tokens, u.shape[1])),
    )


def _backward_fake(
    grad_tokens: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    experts: Sequence[Tensor],
    base_weight: Tensor,
    base_bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    scale: Tensor,
    shift: Tensor,
    weights: Tensor,
    base: Tensor,
    z: Tensor,
    needs: int,
) -> list[Tensor]:
    return wanted(needs, query, base_weight, base_bias, u, v, scale, shift, *experts)


# Beside the mixtures and the weights the forward op returns query @ base_weight and query @ u, both over sqrt(D), which
# the backward op wants back.
define(f"route(Tensor query, Tensor[] experts, {_PARAMETERS}) -> (Tensor, Tensor, Tensor, Tensor)", _fake)
define(
    f"route_backward(Tensor? grad_tokens, Tensor? grad_weights, Tensor query, Tensor[] experts, {_PARAMETERS}, "
    "Tensor weights, Tensor base, Tensor z, int needs) -> Tensor[]",
    _backward_fake,
)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, namespace: str, query: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.namespace = namespace
        *parameters, experts = *rest[:6], rest[6:]
        tokens, weights, base, z = kernels(namespace).route(query, experts, *parameters)
        ctx.save_for_backward(weights, base, z, query, *rest)
        return tokens, weights

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_tokens: Tensor | None, grad_weights: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        if grad_tokens is None and grad_weights is None:
            return (None,) * (1 + len(needs))
        weights, base, z, query, *rest = ctx.saved_tensors
        found = kernels(ctx.namespace).route_backward(
            grad_tokens, grad_weights, query, rest[6:], *rest[:6], weights, base, z, mask(needs)
        )
        return None, *spread(needs, found)


def route(
    query: Tensor,
    experts: Sequence[Tensor],
    base_weight: Tensor,
    base_bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    scale: Tensor,
    shift: Tensor,
    namespace: str = NAMESPACE,
) -> tuple[Tensor, Tensor]:
    """`tiger_fast.functional.route` by a compiled kernel; arguments as in `tiger_fast.reference`."""
    return _Route.apply(namespace, query, base_weight, base_bias, u, v, scale, shift, *experts)
