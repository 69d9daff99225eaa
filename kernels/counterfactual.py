"""Counterfactual losses of a linear head (TIGER eq. 8), in full and without each expert.

    P_k = F_k W^T      y = sum over k of w_k P_k + b      y_k the same without k      a loss of y and of each y_k

What is left out is never subtracted: an inf or a NaN of expert k must not reach what leaves k out. The backward, with
the logits' gradients G_0 (of y) and G_k, is

    H_k = G_0 + sum over j != k of G_j      dP_k = w_k H_k      dw_k = P_k . H_k      db = sum of G_0 + sum of G_k

and then dF_k = dP_k W and dW = sum of dP_k^T F_k (`counterfactual_head`).

Layout: experts (B, N, D), projections (B, M, N, C), target (B, N, C) with any strides but the last; weights, labels and
`valid` with any. Tokens that do not count are neither read nor heard of: their losses and gradients are 0. Two forwards:

- In one kernel, where M accumulators of a few tokens by all classes fit a program's registers: M x C to 512, with C rounded
  up to a power of two (`config.counterfactual`). F is read once, the products run on tensor cores with a tile of the head
  shared by the M experts, and logits and losses are made of the accumulators.
- By the library otherwise: P in the activation type, for some tokens at a time so that it takes at most _SCRATCH bytes,
  then the kernel for projections, which sweeps over tiles of classes once. A sweep with the products inside would read the
  experts again for each tile of classes: 16 times for 1000 classes in tiles of 64, and from L2 at best.

Bytes, in units of B N D elements, with c = C / D, beside 16-bit experts (kept projections are float32, so twice as wide):

    forward, in one kernel     M read                          2 M c written if P is kept
    forward, by the library    M + M c read                    M c written
    backward, P kept           M (F, for dW) + 4 M c read      M (dF) + M c (dP) written
    backward, P made again     2 M + 3 M c read                M + 2 M c written

In float32, where 2 M c is M c. Weights, targets and losses beside them.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor

from tiger_fast.kernels import config
from tiger_fast.kernels.counterfactual_head import Head
from tiger_fast.kernels.counterfactual_tokens import from_experts, from_projections, gradients
from tiger_fast.kernels.launch import alignment, dense, launch, strides
from tiger_fast.kernels.token_losses import CROSS_ENTROPY

# Bytes of projections, or of their gradients, that the library's products take at a time.
_SCRATCH = 128 << 20


def _optional(tensor: Tensor | None) -> tuple[Tensor | None, tuple[int, ...] | None]:
    return (tensor, None if tensor is None else strides(tensor))


class _Labels:
    """What the tokens are compared with, and which of them count: the same arguments for every kernel."""

    def __init__(self, target: Tensor, loss: int, valid: Tensor | None, ignore_index: int) -> None:
        self.target = target if loss == CROSS_ENTROPY.value else dense(target)
        self.loss, self.ignore_index = loss, ignore_index
        self.valid = None if valid is None else valid.view(torch.uint8)

    @property
    def arguments(self) -> tuple:
        """Pointers and strides."""
        return (*_optional(self.target), *_optional(self.valid))

    @property
    def alignment(self) -> int:
        return 1 if self.loss == CROSS_ENTROPY.value else alignment(self.target)


def _parts(batch: int, tokens: int, row_bytes: int) -> Iterator[tuple[slice, slice]]:
    # Samples and tokens of which projections take at most _SCRATCH bytes: some samples, or some tokens of one.
    most = max(1, _SCRATCH // max(1, row_bytes))
    if most >= tokens:
        for first in range(0, batch, max(1, most // max(1, tokens))):
            yield slice(first, min(batch, first + max(1, most // max(1, tokens)))), slice(0, tokens)
    else:
        for sample in range(batch):
            for first in range(0, tokens, most):
                yield slice(sample, sample + 1), slice(first, min(tokens, first + most))


def _whole(weights: Tensor) -> tuple[slice, slice]:
    return slice(0, weights.shape[0]), slice(0, weights.shape[1])


def _padded(classes: int, dtype: torch.dtype) -> int:
    # Rows of 16 bytes, which the library's products and wide loads ask for.
    return triton.cdiv(classes * dtype.itemsize, 16) * 16 // dtype.itemsize


def _project(experts: Sequence[Tensor], head: Tensor, samples: slice, tokens: slice) -> Tensor:
    """Projections (B, M, N, C) of some tokens by the library, in the activation type, in rows of `_padded` classes."""
    parts = [e[samples, tokens] for e in experts]
    batch, count, width = parts[0].shape
    classes = head.shape[0]
    found = head.new_empty((len(parts), batch, count, _padded(classes, head.dtype)))
    for part, out in zip(parts, found[..., :classes], strict=True):
        if batch == 1 or part.stride(0) == count * part.stride(1):
            rows = part.as_strided((batch * count, width), (part.stride(1), part.stride(2)))
            torch.mm(rows, head.T, out=out.as_strided((batch * count, classes), out.stride()[1:]))
        else:
            torch.bmm(part, head.T.expand(batch, -1, -1), out=out)
    return found.transpose(0, 1)


def _losses(
    projections: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    labels: _Labels,
    samples: slice,
    span: slice,
    full: Tensor,
    without: Tensor,
    classes: int,
) -> None:
    # The losses of some tokens from their projections, whose rows may be longer than the classes.
    batch, members, tokens, row = projections.shape
    align = alignment(projections)
    c = config.choose(
        "counterfactual_from_projections", weights.device, projections.dtype, M=members, C=classes, ALIGN=align
    )
    launch(
        from_projections,
        batch * triton.cdiv(tokens, c.rows),
        projections,
        strides(projections),
        weights,
        strides(weights),
        bias,
        *labels.arguments,
        full,
        strides(full),
        without,
        strides(without),
        tokens,
        samples.start,
        span.start,
        labels.ignore_index,
        M=members,
        C=classes,
        ROW=row,
        LOSS=labels.loss,
        ALIGN=align,
        TARGET_ALIGN=labels.alignment,
        BLOCK_N=c.rows,
        BLOCK_C=c.width,
        **c.options,
    )


def _outputs(weights: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, members = weights.shape
    full = torch.empty((batch, tokens), dtype=torch.float32, device=weights.device)
    return full, full.new_empty((batch, members, tokens))


def counterfactual_losses(
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
    """Losses (B, N) and (B, M, N), and P (B, N, M, C) in float32 if `keep`: see the module."""
    experts = tuple(map(dense, experts))
    batch, tokens, width = experts[0].shape
    members, classes = len(experts), head_weight.shape[0]
    head = head_weight.to(experts[0].dtype).contiguous()
    bias = None if head_bias is None else head_bias.contiguous()
    labels = _Labels(target, loss, valid, ignore_index)
    full, without = _outputs(weights)
    kept = full.new_empty((batch, tokens, members, classes) if keep else (0,))
    c = config.choose("counterfactual", weights.device, head.dtype, D=width, M=members, C=classes)
    if not c.classes:
        for part in _parts(batch, tokens, members * _padded(classes, head.dtype) * head.element_size()):
            projections = _project(experts, head, *part)
            _losses(projections, weights, bias, labels, *part, full, without, classes)
            if keep:
                kept[part].copy_(projections[..., :classes].transpose(1, 2))
        return full, without, kept
    launch(
        from_experts,
        batch * triton.cdiv(tokens, c.rows),
        experts,
        tuple(map(strides, experts)),
        head,
        weights,
        strides(weights),
        bias,
        *labels.arguments,
        kept if keep else None,
        full,
        strides(full),
        without,
        strides(without),
        tokens,
        ignore_index,
        D=width,
        C=classes,
        LOSS=loss,
        PRECISION=config.precision(head),
        ALIGN=alignment(*experts),
        TARGET_ALIGN=labels.alignment,
        BLOCK_N=c.rows,
        BLOCK_C=c.classes,
        BLOCK_D=c.width,
        **c.options,
    )
    return full, without, kept


def counterfactual_losses_from_projections(
    projections: Tensor,
    weights: Tensor,
    head_bias: Tensor | None,
    target: Tensor,
    loss: int,
    valid: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Losses (B, N) and (B, M, N): see the module."""
    full, without = _outputs(weights)
    bias = None if head_bias is None else head_bias.contiguous()
    labels = _Labels(target, loss, valid, ignore_index)
    projections = dense(projections)
    _losses(projections, weights, bias, labels, *_whole(weights), full, without, projections.shape[-1])
    return full, without


def _differentiate(
    grad_full: Tensor | None,
    grad_without: Tensor | None,
    projections: Tensor,
    whole: bool,
    weights: Tensor,
    bias: Tensor | None,
    labels: _Labels,
    samples: slice,
    span: slice,
    grad_projections: Tensor | None,
    grad_weights: Tensor | None,
    for_bias: bool,
    grad_target: Tensor | None,
    classes: int,
) -> Tensor | None:
    # The gradients of some tokens' projections (B, N, M, C), weights and targets; returns the bias's, if it is wanted.
    # Projections are of these tokens, or of all if `whole`. Rows of them and their gradients may be longer than the classes.
    members, row = projections.shape[1], projections.shape[-1]
    tokens = span.stop - span.start
    align = alignment(projections)
    c = config.choose("counterfactual_gradients", weights.device, projections.dtype, M=members, C=classes, ALIGN=align)
    programs = (samples.stop - samples.start) * triton.cdiv(tokens, c.rows)
    bias_sums = weights.new_empty((programs, classes), dtype=torch.float32) if for_bias else None
    launch(
        gradients,
        programs,
        projections,
        strides(projections),
        weights,
        strides(weights),
        bias,
        *labels.arguments,
        *_optional(grad_full),
        *_optional(grad_without),
        grad_projections,
        strides(projections if grad_projections is None else grad_projections),
        *_optional(grad_weights),
        bias_sums,
        *_optional(grad_target),
        tokens,
        samples.start,
        span.start,
        labels.ignore_index,
        M=members,
        C=classes,
        ROW=row,
        GRAD_ROW=row if grad_projections is None else grad_projections.shape[-1],
        LOSS=labels.loss,
        WHOLE=whole,
        ALIGN=align,
        TARGET_ALIGN=labels.alignment,
        GRAD_ALIGN=1 if grad_projections is None else alignment(grad_projections),
        BLOCK_N=c.rows,
        BLOCK_C=c.width,
        **c.options,
    )
    return None if bias_sums is None else bias_sums.sum(dim=0)


def counterfactual_losses_backward(
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
    """The gradients of experts, weights, head_weight, head_bias and target, those whose bit in `needs` is set."""
    experts = tuple(map(dense, experts))
    batch, tokens, _ = experts[0].shape
    members, classes = len(experts), head_weight.shape[0]
    for_weights, for_head, for_bias, for_target = (needs >> members + i & 1 for i in range(4))
    head = head_weight.to(experts[0].dtype).contiguous()
    bias = None if head_bias is None else head_bias.contiguous()
    labels = _Labels(target, loss, valid, ignore_index)
    grad_experts = tuple(e.new_empty(e.shape) if needs >> i & 1 else None for i, e in enumerate(experts))
    grad_weights = weights.new_empty(weights.shape) if for_weights else None
    grad_bias = head_bias.new_zeros(head_bias.shape, dtype=torch.float32) if for_bias else None
    grad_target = target.new_empty(target.shape) if for_target else None
    padded = _padded(classes, head.dtype)
    through = any(g is not None for g in grad_experts) or for_head
    products = Head(experts, head, grad_experts, bool(for_head))
    for part in _parts(batch, tokens, members * padded * head.element_size()):
        if kept is not None:
            projections = kept.transpose(1, 2)
        else:
            projections = _project(experts, head, *part)
        grad_projections = None
        if through:
            shape = (members, *(s.stop - s.start for s in part), padded)
            grad_projections = head.new_empty(shape).permute(1, 2, 0, 3)
        found = _differentiate(
            grad_full,
            grad_without,
            projections,
            kept is not None,
            weights,
            bias,
            labels,
            *part,
            grad_projections,
            grad_weights,
            bool(for_bias),
            grad_target,
            classes,
        )
        if grad_bias is not None:
            grad_bias += found
        if through:
            products.add(grad_projections, labels.loss == CROSS_ENTROPY.value, labels.arguments, ignore_index, *part)
    grad_head = products.total().to(head_weight.dtype) if for_head else None
    grad_bias = None if grad_bias is None else grad_bias.to(head_bias.dtype)
    return [g for g in (*grad_experts, grad_weights, grad_head, grad_bias, grad_target) if g is not None]


def counterfactual_losses_from_projections_backward(
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
    """The gradients of projections, weights, head_bias and target, those whose bit in `needs` is set."""
    projections = dense(projections)
    for_projections, for_weights, for_bias, for_target = (needs >> i & 1 for i in range(4))
    grad_projections = projections.new_empty(projections.shape) if for_projections else None
    grad_weights = weights.new_empty(weights.shape) if for_weights else None
    grad_target = target.new_empty(target.shape) if for_target else None
    grad_bias = _differentiate(
        grad_full,
        grad_without,
        projections,
        False,
        weights,
        None if head_bias is None else head_bias.contiguous(),
        _Labels(target, loss, valid, ignore_index),
        *_whole(weights),
        None if grad_projections is None else grad_projections.transpose(1, 2),
        grad_weights,
        bool(for_bias),
        grad_target,
        projections.shape[-1],
    )
    grad_bias = None if grad_bias is None else grad_bias.to(head_bias.dtype)
    return [g for g in (grad_projections, grad_weights, grad_bias, grad_target) if g is not None]
