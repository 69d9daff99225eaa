"""The functional contract: every function checks its arguments, applies its autocast rule and calls a backend.

B batch, T tasks, M experts, N tokens, D width, R rank, G group members, C classes. `experts` is a sequence of M
tensors (B, N, D) or one tensor (B, M, N, D). Activations (query, experts, q, k, v, x, projections) share one type:
float32, bfloat16, float16, or float64 where the backend has it. Parameters, routing weights, targets of a regression,
confidences and losses have that type or float32. Routing weights and losses come back in float32 (float64 beside
float64). Limits: 1 <= M <= 16, 1 <= T <= 32, 1 <= R <= 256, 1 <= G <= 32.

Every function takes `backend=`: None chooses by device, "reference", "cpu" and "triton" force one. Wrong shapes,
devices and values raise ValueError, wrong types TypeError, before any memory is touched; the message names the
argument, what came and what was expected.

Autocast: products (`route`, `leave_one_out`, `counterfactual_losses`, `group_attention`, `group_attention_packed`,
`adapter`, `competency_aggregate`) run with their activations in the autocast type; the losses and `causal_target` are
float32 whatever the autocast type. float64 is never cast down.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from tiger_fast import _checks as check
from tiger_fast._extras import unknown
from tiger_fast.ops import select
from tiger_fast.reference import TOKEN_LOSSES

__all__ = [
    "adapter",
    "alignment_loss",
    "causal_target",
    "competency_aggregate",
    "confidence_loss",
    "counterfactual_losses",
    "counterfactual_losses_from_projections",
    "group_attention",
    "group_attention_packed",
    "improvement_loss",
    "leave_one_out",
    "route",
]


class Routed(NamedTuple):
    """What `route` returns: the mixtures, tokens (B, T, N, D), and the weights (B, T, N, M) over experts."""

    tokens: Tensor
    weights: Tensor


class CounterfactualLosses(NamedTuple):
    """Per-token losses of a linear head: full (B, N), and without (B, M, N) with each expert left out."""

    full: Tensor
    without: Tensor


class Aggregated(NamedTuple):
    """What `competency_aggregate` returns: features (B, N, D) and the weights (B, M) over experts."""

    features: Tensor
    weights: Tensor


def route(
    query: Tensor,
    experts: Sequence[Tensor] | Tensor,
    base_weight: Tensor,
    base_bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    backend: str | None = None,
) -> Routed:
    """Task-conditioned routing at every token (TIGER eqs. 4-7).

    q(t) = q (W0 + U diag(scale_t) V^T) + b0 + shift_t; weights = softmax over experts of q(t) . F_k / sqrt(D);
    tokens = sum over experts of weights times F_k.

    Args:
        query: (B, N, D).
        experts: M tensors (B, N, D), or (B, M, N, D).
        base_weight: W0, (D, D), used as query @ base_weight.
        base_bias: b0, (D), or None.
        u: (D, R).
        v: (D, R).
        scale: g(t), (T, R), or (B, T, R) per sample.
        shift: h(t), (T, D), or (B, T, D) per sample.
        backend: see the module.

    Returns:
        Routed: tokens (B, T, N, D) in the activation type, weights (B, T, N, M) in float32 (float64 for float64).
    """
    query = check.activation("query", query, "B N D")
    members = check.experts(experts, query, "query")
    width = query.shape[-1]
    check.positive("D of query", width)
    check.parameter("base_weight", base_weight, query, (width, width))
    check.parameter("base_bias", base_bias, query, (width,), optional=True)
    check.parameter("u", u, query, (width, "R"))
    rank = check.between("R of u", u.shape[1], check.MAX_RANK)
    check.parameter("v", v, query, (width, rank))
    check.modulation("scale", scale, query, rank)
    tasks = check.between("T of scale", scale.shape[-2], check.MAX_TASKS)
    check.modulation("shift", shift, query, width)
    if shift.shape[-2] != tasks:
        raise ValueError(f"shift must have scale's T = {tasks} tasks, got {shift.shape[-2]}")
    implementation = select("route", backend, query)
    with check.autocast(query) as cast:
        query, *members = cast(query, *members)
        return Routed(*implementation(query, members, base_weight, base_bias, u, v, scale, shift))


def leave_one_out(
    experts: Sequence[Tensor] | Tensor, weights: Tensor, *, renormalize: bool = False, backend: str | None = None
) -> Tensor:
    """The mixture at every token without each expert in turn (TIGER sec. 3.5).

    out_k = sum over j != k of weights_j F_j, divided by the sum of the others' weights if `renormalize` (0 where
    that sum is 0). A single expert leaves zeros.

    Args:
        experts: M tensors (B, N, D), or (B, M, N, D).
        weights: (B, T, N, M), any values.
        renormalize: divide by what the others' weights add up to.
        backend: see the module.

    Returns:
        (B, T, M, N, D) in the activation type.
    """
    members = check.experts(experts)
    batch, tokens, _ = members[0].shape
    check.beside("weights", weights, members[0], (batch, "T", tokens, len(members)))
    check.between("T of weights", weights.shape[1], check.MAX_TASKS)
    check.flag("renormalize", renormalize)
    implementation = select("leave_one_out", backend, members[0])
    with check.autocast(members[0]) as cast:
        return implementation(cast(*members), weights, renormalize)


def counterfactual_losses(
    experts: Sequence[Tensor] | Tensor,
    weights: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    *,
    loss: str,
    valid: Tensor | None = None,
    ignore_index: int = 255,
    backend: str | None = None,
) -> CounterfactualLosses:
    """Each token's loss of a linear head on the mixture, in full and without each expert (TIGER eq. 8).

    Args:
        experts: M tensors (B, N, D), or (B, M, N, D).
        weights: (B, N, M), the routing weights of one task.
        head_weight: (C, D).
        head_bias: (C), or None.
        target: for "cross_entropy" classes (B, N), int64 or int32; else (B, N, C).
        loss: "cross_entropy", or, as a mean over C, "l1", "mse", "bce" (with logits), or "cosine"
            (1 - y.t / max(|y||t|, 1e-8)).
        valid: (B, N) bool; a token that is not valid has loss 0 and gradient 0, whatever stands in it.
        ignore_index: for "cross_entropy", the class of tokens that count as not valid. Another class outside
            [0, C) makes its token's loss and gradient NaN.
        backend: see the module.

    Returns:
        CounterfactualLosses: full (B, N) and without (B, M, N), float32 (float64 for float64), not divided by a count.
    """
    members = check.experts(experts)
    batch, tokens, width = members[0].shape
    check.parameter("head_weight", head_weight, members[0], ("C", width))
    sizes = batch, len(members), tokens, head_weight.shape[0]
    _check_losses(members[0], sizes, weights, head_bias, target, loss, valid, ignore_index)
    implementation = select("counterfactual_losses", backend, members[0])
    with check.autocast(members[0]) as cast:
        arguments = (cast(*members), weights, head_weight, head_bias, target, loss, valid, ignore_index)
        return CounterfactualLosses(*implementation(*arguments))


def counterfactual_losses_from_projections(
    projections: Tensor,
    weights: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    *,
    loss: str,
    valid: Tensor | None = None,
    ignore_index: int = 255,
    backend: str | None = None,
) -> CounterfactualLosses:
    """`counterfactual_losses` from projections (B, M, N, C) = experts @ head_weight.T, which one product can make
    for several heads at once (slices of it along C are taken as they are). TIGER eq. 8."""
    projections = check.activation("projections", projections, "B M N C")
    check.between("M of projections", projections.shape[1], check.MAX_EXPERTS)
    _check_losses(projections, tuple(projections.shape), weights, head_bias, target, loss, valid, ignore_index)
    implementation = select("counterfactual_losses_from_projections", backend, projections)
    with check.no_autocast(weights):
        return CounterfactualLosses(*implementation(projections, weights, head_bias, target, loss, valid, ignore_index))


def _check_losses(
    like: Tensor,
    sizes: tuple[int, int, int, int],
    weights: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    loss: str,
    valid: Tensor | None,
    ignore_index: int,
) -> None:
    # The arguments that both forms share.
    batch, members, tokens, classes = sizes
    if not isinstance(loss, str):
        raise TypeError(f"loss must be a string, got {type(loss).__name__}")
    if loss not in TOKEN_LOSSES:
        raise unknown("loss", loss, TOKEN_LOSSES)
    check.integer("ignore_index", ignore_index)
    check.positive("C (the classes)", classes)
    check.beside("weights", weights, like, (batch, tokens, members))
    check.parameter("head_bias", head_bias, like, (classes,), optional=True)
    if loss == "cross_entropy":
        check.integers("target", target, (batch, tokens), like.device)
    else:
        check.beside("target", target, like, (batch, tokens, classes))
    check.boolean("valid", valid, (batch, tokens), like.device, optional=True)


def causal_target(delta: Tensor, *, tau: float = 1.0, eps: float = 1e-6, backend: str | None = None) -> Tensor:
    """The causal importance distribution over experts (TIGER eqs. 9-10).

    Args:
        delta: counterfactual differences of the loss, (..., M).
        tau: temperature, > 0.
        eps: added to the standard deviation (the population's, with derivative 0 where it is 0).
        backend: see the module.

    Returns:
        p (..., M), float32 (float64 for float64).
    """
    check.floating("delta", delta)
    check.between("M of delta", check.last("delta", delta), check.MAX_EXPERTS)
    check.temperature(tau, eps)
    implementation = select("causal_target", backend, delta)
    with check.no_autocast(delta):
        return implementation(delta, float(tau), float(eps))


def alignment_loss(
    delta: Tensor,
    weights: Tensor,
    *,
    tau: float = 1.0,
    eps: float = 1e-6,
    detach_target: bool = True,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean Jensen-Shannon divergence between causal target and routing weights (TIGER eqs. 9-13), in nats.

    Args:
        delta: counterfactual differences, (..., M); gets no gradient if `detach_target`.
        weights: routing weights, (..., M), rows adding up to 1.
        tau, eps: as in `causal_target`.
        detach_target: hold the target fixed, so that the routing follows the causes and not the other way round.
        mask: bool, broadcastable to delta.shape[:-1]; True rows are counted, and if none is the loss and its
            gradient are 0.
        backend: see the module.

    Returns:
        A scalar, float32 (float64 if either argument is).
    """
    check.floating("delta", delta)
    check.between("M of delta", check.last("delta", delta), check.MAX_EXPERTS)
    check.companion("weights", weights, delta, "delta")
    check.temperature(tau, eps)
    check.flag("detach_target", detach_target)
    if mask is not None:
        check.broadcastable_mask("mask", mask, delta.shape[:-1], delta.device)
    implementation = select("alignment_loss", backend, delta, weights)
    with check.no_autocast(delta):
        return implementation(delta, weights, float(tau), float(eps), detach_target, mask)


def group_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, *, backend: str | None = None) -> Tensor:
    """Multi-head attention among the G members of a group, at every token on its own (TIGER sec. 3.4).

    Args:
        q, k, v: (B, G, N, D). Head h owns channels [h D / num_heads, (h + 1) D / num_heads).
        num_heads: divides D.
        backend: see the module.

    Returns:
        (B, G, N, D).
    """
    q = check.activation("q", q, "B G N D")
    for name, other in (("k", k), ("v", v)):
        check.shape(name, check.activation(name, other, "B G N D"), tuple(q.shape))
        check.same_type(name, other, q, "q")
        check.device(name, other, q.device, "q")
    check.between("G of q", q.shape[1], check.MAX_GROUP)
    check.heads(num_heads, q.shape[-1])
    implementation = select("group_attention", backend, q)
    with check.autocast(q) as cast:
        return implementation(*cast(q, k, v), num_heads)


def group_attention_packed(qkv: Tensor, num_heads: int, *, backend: str | None = None) -> Tensor:
    """`group_attention` of one tensor (B, G, N, 3 D) that holds q, k and v side by side; its gradient is packed too.
    TIGER sec. 3.4."""
    qkv = check.activation("qkv", qkv, "B G N 3D")
    check.between("G of qkv", qkv.shape[1], check.MAX_GROUP)
    if qkv.shape[-1] % 3:
        raise ValueError(f"qkv's last dimension must be 3 D, got {qkv.shape[-1]}")
    check.heads(num_heads, qkv.shape[-1] // 3)
    implementation = select("group_attention_packed", backend, qkv)
    with check.autocast(qkv) as cast:
        return implementation(*cast(qkv), num_heads)


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
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """TAVER's adapter (TAVER sec. 3.1): LN(linear(y) + GELU(gate(y))) with y = LN(x), the exact GELU.

    Args:
        x: (..., C).
        norm_in_weight, norm_in_bias: (C).
        linear_weight, gate_weight: (D, C).
        linear_bias, gate_bias, norm_out_weight, norm_out_bias: (D).
        eps: of both norms.
        backend: see the module.

    Returns:
        (..., D).
    """
    check.floating("x", x)
    channels = check.positive("C of x", check.last("x", x))
    check.parameter("linear_weight", linear_weight, x, ("D", channels))
    width = check.positive("D of linear_weight", linear_weight.shape[0])
    check.parameter("gate_weight", gate_weight, x, (width, channels))
    for name, value, size in (
        ("norm_in_weight", norm_in_weight, channels),
        ("norm_in_bias", norm_in_bias, channels),
        ("linear_bias", linear_bias, width),
        ("gate_bias", gate_bias, width),
        ("norm_out_weight", norm_out_weight, width),
        ("norm_out_bias", norm_out_bias, width),
    ):
        check.parameter(name, value, x, (size,))
    check.eps(eps)
    implementation = select("adapter", backend, x)
    with check.autocast(x) as cast:
        (x,) = cast(x)
        parameters = (norm_in_weight, norm_in_bias, linear_weight, linear_bias, gate_weight, gate_bias)
        return implementation(x, *parameters, norm_out_weight, norm_out_bias, float(eps))


def competency_aggregate(
    experts: Sequence[Tensor] | Tensor,
    confidence: Tensor,
    refined_confidence: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Aggregated:
    """Refined experts mixed by their confidences before and after interaction, then LayerNorm (TAVER eqs. 2-3).

    Args:
        experts: the refined features, M tensors (B, N, D), or (B, M, N, D).
        confidence, refined_confidence: (B, M), in (0, 1).
        norm_weight, norm_bias: (D).
        eps: of the norm.
        backend: see the module.

    Returns:
        Aggregated: features (B, N, D) in the activation type, weights (B, M) in float32 (float64 for float64).
    """
    members = check.experts(experts)
    batch, _, width = members[0].shape
    check.positive("D of experts", width)
    check.beside("confidence", confidence, members[0], (batch, len(members)))
    check.beside("refined_confidence", refined_confidence, members[0], (batch, len(members)))
    check.parameter("norm_weight", norm_weight, members[0], (width,))
    check.parameter("norm_bias", norm_bias, members[0], (width,))
    check.eps(eps)
    implementation = select("competency_aggregate", backend, members[0])
    with check.autocast(members[0]) as cast:
        arguments = (confidence, refined_confidence, norm_weight, norm_bias, float(eps))
        return Aggregated(*implementation(cast(*members), *arguments))


def confidence_loss(
    confidence: Tensor,
    task_loss: Tensor,
    refined_confidence: Tensor,
    refined_task_loss: Tensor,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Uncertainty-guided confidence loss (TAVER eqs. 4-5): 1/2 (c L + log(1 / (c + eps))), the mean over experts,
    before and after refinement, and the batch.

    Args:
        confidence, refined_confidence: (B, M), in (0, 1).
        task_loss, refined_task_loss: (B, M), of each expert's own prediction.
        eps: inside the logarithm.
        backend: see the module.

    Returns:
        A scalar, float32 (float64 if any argument is).
    """
    values = (confidence, task_loss, refined_confidence, refined_task_loss)
    _check_competency(("confidence", "task_loss", "refined_confidence", "refined_task_loss"), values, eps)
    implementation = select("confidence_loss", backend, *values)
    with check.no_autocast(confidence):
        return implementation(*values, float(eps))


def improvement_loss(
    confidence: Tensor, refined_confidence: Tensor, *, eps: float = 1e-6, backend: str | None = None
) -> Tensor:
    """Confidence improvement loss (TAVER eqs. 6-7): log(c / (refined c + eps)), the mean over experts and the batch.

    Args:
        confidence, refined_confidence: (B, M), in (0, 1).
        eps: added to the refined confidence.
        backend: see the module.

    Returns:
        A scalar, float32 (float64 if any argument is).
    """
    _check_competency(("confidence", "refined_confidence"), (confidence, refined_confidence), eps)
    implementation = select("improvement_loss", backend, confidence, refined_confidence)
    with check.no_autocast(confidence):
        return implementation(confidence, refined_confidence, float(eps))


def _check_competency(names: tuple[str, ...], values: tuple[Tensor, ...], eps: float) -> None:
    first = values[0]
    check.floating(names[0], first)
    if first.dim() != 2:
        raise ValueError(f"{names[0]} must be (B, M), got {tuple(first.shape)}")
    check.between(f"M of {names[0]}", first.shape[1], check.MAX_EXPERTS)
    for name, value in zip(names[1:], values[1:], strict=True):
        check.companion(name, value, first, names[0])
    check.eps(eps)
