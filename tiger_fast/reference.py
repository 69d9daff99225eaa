"""Every equation of the contract in plain PyTorch: the oracle of the tests, the fallback and the eager baseline.

Arguments are taken as checked (tiger_fast.functional does that). B batch, T tasks, M experts, N tokens, D width,
R rank, G group members, C classes. Products run in the activation type; softmaxes, losses and routing weights in
`accumulator(dtype)`, which is float32, or float64 for float64.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# JSD's gradient is 1/2 log(alpha / m); alpha is held at the smallest normal float32 so that it stays finite.
TINY = 2.0**-126


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type of sums, routing weights and losses beside activations of type `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _common(*tensors: Tensor) -> torch.dtype:
    # float64 if any of them is, for float64 may stand beside float32.
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def route(
    query: Tensor,
    experts: Sequence[Tensor],
    base_weight: Tensor,
    base_bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> tuple[Tensor, Tensor]:
    """TIGER eqs. 4-7: the per-task low-rank query, softmax over experts at every token, weighted mixture."""
    dtype, acc = query.dtype, accumulator(query.dtype)
    features = torch.stack(tuple(experts), dim=1)  # (B, M, N, D)
    # Scaled before the products rather than after: a float16 logit may pass 65504 on the way.
    scaled = query / math.sqrt(query.shape[-1])
    z = scaled @ u.to(dtype)
    low_rank = (z[:, None] * _per_sample(scale).to(dtype)) @ v.to(dtype).T  # (B, T, N, D)
    bias = _per_sample(shift).to(acc)  # (B or 1, T, 1, D)
    if base_bias is not None:
        bias = bias + base_bias.to(acc)
    # The bias is a sum, so float32: beside bfloat16 products the addition promotes.
    task_query = (scaled @ base_weight.to(dtype))[:, None] + low_rank + bias / math.sqrt(query.shape[-1])
    logits = torch.einsum("btnd,bmnd->btnm", task_query.to(dtype), features)
    weights = logits.to(acc).softmax(dim=-1).contiguous()
    return torch.einsum("btnm,bmnd->btnd", weights.to(dtype), features).contiguous(), weights


def leave_one_out(experts: Sequence[Tensor], weights: Tensor, renormalize: bool) -> Tensor:
    """TIGER sec. 3.5: for every k the mixture of the other experts, (B, T, M, N, D)."""
    dtype, acc = experts[0].dtype, accumulator(experts[0].dtype)
    weights = weights.to(acc)
    features = torch.stack(tuple(experts), dim=1)
    outputs = []
    for others in _others(len(experts), features.device):
        rest = weights.index_select(-1, others)
        if renormalize:
            total = rest.sum(dim=-1, keepdim=True)
            empty = total == 0
            rest = torch.where(empty, 0, rest / torch.where(empty, 1, total))
        outputs.append(torch.einsum("btnj,bjnd->btnd", rest.to(dtype), features.index_select(1, others)))
    return torch.stack(outputs, dim=2)


def counterfactual_losses(
    experts: Sequence[Tensor],
    weights: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    loss: str,
    valid: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """TIGER eq. 8 for a linear head: each token's loss in full, and with each expert left out of the mixture."""
    features = torch.stack(tuple(experts), dim=1)
    counted = _counted(target, loss, valid, ignore_index)
    if counted is not None:
        # The head's gradient sums over tokens: what stands in a token that does not count must not reach it.
        features = torch.where(counted[:, None, :, None], features, 0)
    projections = features @ head_weight.to(features.dtype).T
    return counterfactual_losses_from_projections(projections, weights, head_bias, target, loss, valid, ignore_index)


def counterfactual_losses_from_projections(
    projections: Tensor,
    weights: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    loss: str,
    valid: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """TIGER eq. 8 from P_k = F_k W^T (B, M, N, C): the left-out logits are sums over the other experts' P."""
    acc = accumulator(projections.dtype)
    members = projections.shape[1]
    counted = _counted(target, loss, valid, ignore_index)
    if counted is not None:
        # Both factors and the target: 0 * NaN would carry a token that does not count into the others' gradients.
        projections = torch.where(counted[:, None, :, None], projections, 0)
        weights = torch.where(counted[..., None], weights, 0)
        target = torch.where(counted if target.dim() == 2 else counted[..., None], target, 0)
    weighted = weights.to(acc).transpose(1, 2)[..., None] * projections.to(acc)  # (B, M, N, C)
    logits = [weighted.sum(dim=1)]
    for others in _others(members, projections.device):
        logits.append(weighted.index_select(1, others).sum(dim=1))
    stacked = torch.stack(logits, dim=1)  # (B, 1 + M, N, C)
    if head_bias is not None:
        stacked = stacked + head_bias.to(acc)
    losses = TOKEN_LOSSES[loss](stacked, target[:, None])
    if counted is not None:
        losses = torch.where(counted[:, None], losses, 0)
    # Copies, because outputs share no memory with each other; they are small.
    dense = torch.contiguous_format
    return losses[:, 0].clone(memory_format=dense), losses[:, 1:].clone(memory_format=dense)


def _counted(target: Tensor, loss: str, valid: Tensor | None, ignore_index: int) -> Tensor | None:
    """The tokens (B, N) that count; None where all do."""
    if loss != "cross_entropy":
        return valid
    labelled = target.to(torch.int64) != ignore_index  # an int32 comparison would wrap a wider ignore_index
    return labelled if valid is None else valid & labelled


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    classes = logits.shape[-1]
    outside = (target < 0) | (target >= classes)
    index = torch.where(outside, 0, target).to(torch.int64).expand(logits.shape[:-1])
    picked = logits.gather(-1, index[..., None])[..., 0]
    # A class that does not exist makes its token's loss and gradient NaN: loud, and no read out of bounds.
    return (logits.logsumexp(dim=-1) - picked) * torch.where(outside, math.nan, 1.0).to(logits.dtype)


def _l1(logits: Tensor, target: Tensor) -> Tensor:
    return (logits - target.to(logits.dtype)).abs().mean(dim=-1)


def _mse(logits: Tensor, target: Tensor) -> Tensor:
    return (logits - target.to(logits.dtype)).square().mean(dim=-1)


def _bce(logits: Tensor, target: Tensor) -> Tensor:
    target = target.to(logits.dtype).expand_as(logits)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=-1)


def _cosine(logits: Tensor, target: Tensor) -> Tensor:
    target = target.to(logits.dtype)
    norms = torch.linalg.vector_norm(logits, dim=-1) * torch.linalg.vector_norm(target, dim=-1)
    return 1 - (logits * target).sum(dim=-1) / norms.clamp(min=1e-8)


TOKEN_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": _cross_entropy,
    "l1": _l1,
    "mse": _mse,
    "bce": _bce,
    "cosine": _cosine,
}


def normalize_differences(delta: Tensor, eps: float = 1e-6) -> Tensor:
    """TIGER eq. 9: differences normalised over experts at each token, (..., M) -> (..., M)."""
    delta = delta.to(accumulator(delta.dtype))
    centred = delta - delta.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    flat = variance == 0
    # sqrt has no derivative at 0; where all experts tie the deviation is 0 and so is its derivative.
    deviation = torch.where(flat, 0, torch.where(flat, 1, variance).sqrt())
    return centred / (deviation + eps)


def causal_target(delta: Tensor, tau: float, eps: float) -> Tensor:
    """TIGER eq. 10: a softmax over experts, at temperature tau, of the normalised differences."""
    return (normalize_differences(delta, eps) / tau).softmax(dim=-1).contiguous()


def alignment_loss(
    delta: Tensor, weights: Tensor, tau: float, eps: float, detach_target: bool, mask: Tensor | None
) -> Tensor:
    """TIGER eqs. 9-13: mean Jensen-Shannon divergence between the causal target and the routing weights."""
    acc = _common(delta, weights)
    if detach_target:
        delta = delta.detach()
    delta, weights = delta.to(acc), weights.to(acc)
    if mask is not None:
        mask = mask.expand(delta.shape[:-1])
        delta = torch.where(mask[..., None], delta, 0)
        weights = torch.where(mask[..., None], weights, 1 / delta.shape[-1])
    rows = jensen_shannon(causal_target(delta, tau, eps), weights)
    if mask is None:
        return rows.sum() / max(rows.numel(), 1)
    return torch.where(mask, rows, 0).sum() / mask.sum().clamp(min=1)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """TIGER eq. 12, a row each: 1/2 KL(p || m) + 1/2 KL(q || m) with m = (p + q) / 2, in nats, (..., M) -> (...)."""
    absent = (p == 0) & (q == 0)
    # 2 m rather than m, which rounds to 0 where p = 0 and q is the smallest subnormal.
    double = torch.where(absent, 1, p + q)
    return torch.where(absent, 0, _relative(p, double) + _relative(q, double)).sum(dim=-1) / 2


def _relative(a: Tensor, double: Tensor) -> Tensor:
    # a log(a / m), given 2 m; a difference of logarithms, for a quotient's derivative overflows where m is subnormal.
    # Below TINY the floor cuts a's own derivative, 1, out of the product rule: put it back, so that the gradient is
    # log(max(a, TINY) / m) everywhere. The value changes by less than TINY. (where rather than clamp, whose derivative at
    # the floor itself is not the same in every torch.)
    below = a < TINY
    return a * ((2 * torch.where(below, TINY, a)).log() - double.log()) + torch.where(below, a, 0)


def group_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """TIGER sec. 3.4 at every token on its own: the G members attend to each other, (B, G, N, D)."""
    batch, members, tokens, width = q.shape
    heads = (batch, members, tokens, num_heads, width // num_heads)
    # Scaled before the product rather than after: a float16 score may pass 65504 on the way.
    q, k, v = (q / math.sqrt(heads[-1])).reshape(heads), k.reshape(heads), v.reshape(heads)
    scores = torch.einsum("bgnhd,bknhd->bnhgk", q, k).to(accumulator(q.dtype))
    mixed = torch.einsum("bnhgk,bknhd->bgnhd", scores.softmax(dim=-1).to(q.dtype), v)
    return mixed.reshape(batch, members, tokens, width).contiguous()


def group_attention_packed(qkv: Tensor, num_heads: int) -> Tensor:
    """`group_attention` of the three thirds of one (B, G, N, 3 D) tensor."""
    return group_attention(*qkv.chunk(3, dim=-1), num_heads)


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
) -> Tensor:
    """TAVER sec. 3.1: LayerNorm, a linear and a GELU branch added, LayerNorm."""
    dtype = x.dtype
    x = _layer_norm(x, norm_in_weight, norm_in_bias, eps)
    linear = F.linear(x, linear_weight.to(dtype), linear_bias.to(dtype))
    gate = F.gelu(F.linear(x, gate_weight.to(dtype), gate_bias.to(dtype)))
    return _layer_norm(linear + gate, norm_out_weight, norm_out_bias, eps)


def competency_aggregate(
    experts: Sequence[Tensor],
    confidence: Tensor,
    refined_confidence: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """TAVER eqs. 2-3: softmax over experts of the summed confidences, weighted sum, LayerNorm."""
    dtype, acc = experts[0].dtype, accumulator(experts[0].dtype)
    weights = (confidence.to(acc) + refined_confidence.to(acc)).softmax(dim=-1).contiguous()
    mixed = torch.einsum("bm,bmnd->bnd", weights.to(dtype), torch.stack(tuple(experts), dim=1))
    return _layer_norm(mixed, norm_weight, norm_bias, eps), weights


def confidence_loss(
    confidence: Tensor, task_loss: Tensor, refined_confidence: Tensor, refined_task_loss: Tensor, eps: float
) -> Tensor:
    """TAVER eqs. 4-5: confidence times task loss plus -log confidence, over experts before and after refinement."""
    acc = _common(confidence, task_loss, refined_confidence, refined_task_loss)

    def one(c: Tensor, loss: Tensor) -> Tensor:
        return (c.to(acc) * loss.to(acc) - (c.to(acc) + eps).log()) / 2

    both = one(confidence, task_loss) + one(refined_confidence, refined_task_loss)
    return both.sum() / max(2 * both.numel(), 1)


def improvement_loss(confidence: Tensor, refined_confidence: Tensor, eps: float) -> Tensor:
    """TAVER eqs. 6-7: log of confidence before over confidence after refinement."""
    acc = _common(confidence, refined_confidence)
    ratio = (confidence.to(acc) / (refined_confidence.to(acc) + eps)).log()
    return ratio.sum() / max(ratio.numel(), 1)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight.to(x.dtype), bias.to(x.dtype), eps)


def _per_sample(modulation: Tensor) -> Tensor:
    # (T, X) shared or (B, T, X) per sample -> (1 or B, T, 1, X), ready to broadcast over tokens.
    return (modulation if modulation.dim() == 3 else modulation[None])[:, :, None]


def _others(members: int, device: torch.device) -> list[Tensor]:
    # Index tensors rather than a product with a mask: 0 * inf would let a left-out expert's inf back in.
    everyone = torch.arange(members, device=device)
    return [torch.cat((everyone[:k], everyone[k + 1 :])) for k in range(members)]
