"""Counterfactual losses of a linear head (TIGER eq. 8), in full and without each expert.

    P_k = F_k W^T      y = sum over k of w_k P_k + b      y_k the same without k      a loss of y and of each y_k

What is left out is never subtracted: an inf or a NaN of expert k must not reach what leaves k out. The backward, with
the logits' gradients G_0 (of y) and G_k, is

    H_k = G_0 + sum over j != k of G_j      dP_k = w_k H_k      dw_k = P_k . H_k      db = sum of G_0 + sum of G_k

and then dF_k = dP_k W and dW = sum of dP_k^T F_k (`counterfactual_head`).

Layout: experts (B, N, D), projections (B, M, N, C), target (B, N, C) with any strides but the last; weights, labels and
`valid` with any. Tokens that do not count are neither read nor heard of: their losses and gradients are 0. Two forwards:

- In one kernel, where the M accumulators (64 tokens, all classes) fit a program's registers: M x C to 512, C rounded up to
  a power of two. F is read once, the products run on tensor cores with the head's tile shared by the M experts, and
  logits and losses are made of the accumulators.
- By the library otherwise: P in the activation type, some tokens at a time so that it takes at most _SCRATCH bytes, then
  the kernel for projections, which sweeps over tiles of classes once. Sweeping with the products inside would read the
  experts again for each tile of classes, and with M x 64 x 64 logits on chip does some 50 operations a byte that it reads
  from L2, under half of what the library's tiles do.

Bytes, in units of B N D elements, with c = C / D: forward in one kernel M read, + 2 M c written if P is kept (float32
beside 16-bit experts; 4 bytes against 2); by the library M + M c read, M c written. Backward with P kept: M (dF) + M c
written, M (F, for dW) + 2 M c + M c read; else M + M c read and M c written in front of it, for P once more.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiger_fast.kernels import config
from tiger_fast.kernels.counterfactual_head import Head
from tiger_fast.kernels.device import counted_tokens, rows, rows_of, stride, sum_of_others, totals_of
from tiger_fast.kernels.launch import alignment, dense, input_precision, kernel, launch, strides
from tiger_fast.kernels.token_losses import COSINE, CROSS_ENTROPY, begin, finish, gradient, update

# Bytes of projections, or of their gradients, that the library's products take at a time.
_SCRATCH = 128 << 20

_GROUP = tl.constexpr(4)


@triton.jit
def _weights(pointer, strides, sample, token, counted, M: tl.constexpr):
    pointers = pointer + rows(strides, sample, token, 1)
    found = ()
    for m in tl.static_range(M):
        found = found + (tl.load(pointers + m * stride(strides[2], 1), mask=counted, other=0.0).to(tl.float32),)
    return found


@triton.jit
def _logits(tiles, weights, bias, totals, i: tl.constexpr):
    # Of all experts for i = 0, else of all but expert i - 1.
    if i > 0:
        total = sum_of_others(tiles, weights, i - 1, _GROUP, totals)
    else:
        total = tl.zeros(tiles[0].shape, tl.float32)
        if len(totals) > 0:
            for g in tl.static_range(len(totals)):
                total += totals[g]
        else:
            for m in tl.static_range(len(tiles)):
                total += weights[m][:, None] * tiles[m]
    return total + bias[None, :]


@triton.jit
def _bias(pointer, column, C: tl.constexpr):
    if pointer is not None:
        bias = tl.load(pointer + column, mask=column < C, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros(column.shape, tl.float32)
    return bias


@triton.jit
def _targets(pointer, strides, sample, token, column, inside, LOSS: tl.constexpr, ALIGN: tl.constexpr):
    if LOSS == CROSS_ENTROPY:
        target = tl.zeros(inside.shape, tl.float32)  # its label is a number, not a tile
    else:
        offsets = rows(strides, sample, token, ALIGN)[:, None] + column[None, :]
        target = tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)
    return target


@triton.jit
def _projections(
    pointer,
    strides,
    sample,
    token,
    column,
    counted,
    M: tl.constexpr,
    C: tl.constexpr,
    ROW: tl.constexpr,
    ALIGN: tl.constexpr,
):
    offsets = (sample * stride(strides[0], ALIGN) + token * stride(strides[2], ALIGN))[:, None] + column[None, :]
    tiles = ()
    for m in tl.static_range(M):
        pointers = pointer + m * stride(strides[1], ALIGN) + offsets
        # Rows that are longer than the classes are read in whole vectors; anything may stand behind the classes.
        tile = tl.load(pointers, mask=counted[:, None] & (column < ROW)[None, :], other=0.0).to(tl.float32)
        if ROW != C:
            tile = tl.where((column < C)[None, :], tile, 0.0)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _begin_all(M: tl.constexpr, BLOCK_N: tl.constexpr, LOSS: tl.constexpr):
    states = ()
    for _ in tl.static_range(M + 1):
        states = states + (begin(BLOCK_N, LOSS),)
    return states


@triton.jit
def _update_all(states, tiles, weights, bias, target, label, column, inside, LOSS: tl.constexpr):
    totals = totals_of(tiles, weights, _GROUP)
    found = ()
    for i in tl.static_range(len(states)):
        logits = _logits(tiles, weights, bias, totals, i)
        found = found + (update(states[i], logits, target, label, column, inside, LOSS),)
    return found


@triton.jit
def _store_losses(
    states,
    label,
    counted,
    exists,
    sample,
    token,
    full_ptr,
    full_strides,
    without_ptr,
    without_strides,
    LOSS: tl.constexpr,
    C: tl.constexpr,
):
    for i in tl.static_range(len(states)):
        loss = tl.where(counted, finish(states[i], label, LOSS, C), 0.0)
        if i == 0:
            tl.store(full_ptr + rows(full_strides, sample, token, 1), loss, mask=exists)
        else:
            offsets = sample * stride(without_strides[0], 1) + token * stride(without_strides[2], 1)
            tl.store(without_ptr + (i - 1) * stride(without_strides[1], 1) + offsets, loss, mask=exists)


@kernel
def _from_experts(
    expert_ptrs,
    expert_strides,
    head_ptr,
    weights_ptr,
    weights_strides,
    bias_ptr,
    target_ptr,
    target_strides,
    valid_ptr,
    valid_strides,
    kept_ptr,
    full_ptr,
    full_strides,
    without_ptr,
    without_strides,
    tokens: tl.int64,
    ignore_index: tl.int64,
    D: tl.constexpr,
    C: tl.constexpr,
    LOSS: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    TARGET_ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    M: tl.constexpr = len(expert_ptrs)
    sample, token, exists = rows_of(tl.program_id(0).to(tl.int64), tokens, BLOCK_N)
    counted, label = counted_tokens(
        target_ptr, target_strides, valid_ptr, valid_strides, ignore_index, sample, token, exists, LOSS == CROSS_ENTROPY
    )
    classes = tl.arange(0, BLOCK_C)
    starts, tiles = (), ()
    for m in tl.static_range(M):
        starts = starts + (rows(expert_strides[m], sample, token, ALIGN),)
        tiles = tiles + (tl.zeros((BLOCK_N, BLOCK_C), tl.float32),)
    for chunk in range(tl.cdiv(D, BLOCK_D)):
        column = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = (column < D)[None, :]
        head = tl.load(
            head_ptr + classes[:, None] * D + column[None, :], mask=(classes < C)[:, None] & inside, other=0.0
        )
        head = tl.trans(head)
        summed = ()
        for m in tl.static_range(M):
            features = tl.load(
                expert_ptrs[m] + starts[m][:, None] + column[None, :], mask=counted[:, None] & inside, other=0.0
            )
            summed = summed + (tl.dot(features, head, tiles[m], input_precision=PRECISION),)
        tiles = summed
    inside = counted[:, None] & (classes < C)[None, :]
    if kept_ptr is not None:
        offsets = (sample * tokens + token)[:, None] * (M * C) + classes[None, :]
        for m in tl.static_range(M):
            tl.store(kept_ptr + m * C + offsets, tiles[m], mask=exists[:, None] & (classes < C)[None, :])
    weights = _weights(weights_ptr, weights_strides, sample, token, counted, M)
    bias = _bias(bias_ptr, classes, C)
    target = _targets(target_ptr, target_strides, sample, token, classes, inside, LOSS, TARGET_ALIGN)
    states = _begin_all(M, BLOCK_N, LOSS)
    states = _update_all(states, tiles, weights, bias, target, label, classes, inside, LOSS)
    _store_losses(
        states, label, counted, exists, sample, token, full_ptr, full_strides, without_ptr, without_strides, LOSS, C
    )


@kernel
def _from_projections(
    projections_ptr,
    projections_strides,
    weights_ptr,
    weights_strides,
    bias_ptr,
    target_ptr,
    target_strides,
    valid_ptr,
    valid_strides,
    full_ptr,
    full_strides,
    without_ptr,
    without_strides,
    tokens: tl.int64,
    ignore_index: tl.int64,
    M: tl.constexpr,
    C: tl.constexpr,
    ROW: tl.constexpr,
    LOSS: tl.constexpr,
    ALIGN: tl.constexpr,
    TARGET_ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample, token, exists = rows_of(tl.program_id(0).to(tl.int64), tokens, BLOCK_N)
    counted, label = counted_tokens(
        target_ptr, target_strides, valid_ptr, valid_strides, ignore_index, sample, token, exists, LOSS == CROSS_ENTROPY
    )
    weights = _weights(weights_ptr, weights_strides, sample, token, counted, M)
    states = _begin_all(M, BLOCK_N, LOSS)
    for chunk in range(tl.cdiv(C, BLOCK_C)):
        column = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = counted[:, None] & (column < C)[None, :]
        tiles = _projections(projections_ptr, projections_strides, sample, token, column, counted, M, C, ROW, ALIGN)
        target = _targets(target_ptr, target_strides, sample, token, column, inside, LOSS, TARGET_ALIGN)
        bias = _bias(bias_ptr, column, C)
        states = _update_all(states, tiles, weights, bias, target, label, column, inside, LOSS)
    _store_losses(
        states, label, counted, exists, sample, token, full_ptr, full_strides, without_ptr, without_strides, LOSS, C
    )


@triton.jit
def _grads(full_ptr, full_strides, without_ptr, without_strides, sample, token, counted, M: tl.constexpr):
    # Of the losses; zeros where there is none.
    found = ()
    for i in tl.static_range(M + 1):
        grad = tl.zeros(token.shape, tl.float32)
        if i == 0 and full_ptr is not None:
            grad = tl.load(full_ptr + rows(full_strides, sample, token, 1), mask=counted, other=0.0).to(tl.float32)
        if i > 0 and without_ptr is not None:
            offsets = sample * stride(without_strides[0], 1) + token * stride(without_strides[2], 1)
            offsets += (i - 1) * stride(without_strides[1], 1)
            grad = tl.load(without_ptr + offsets, mask=counted, other=0.0).to(tl.float32)
        found = found + (grad,)
    return found


@kernel
def _gradients(
    projections_ptr,
    projections_strides,
    weights_ptr,
    weights_strides,
    bias_ptr,
    target_ptr,
    target_strides,
    valid_ptr,
    valid_strides,
    grad_full_ptr,
    grad_full_strides,
    grad_without_ptr,
    grad_without_strides,
    grad_projections_ptr,
    grad_projections_strides,
    grad_weights_ptr,
    grad_weights_strides,
    bias_sums_ptr,
    grad_target_ptr,
    grad_target_strides,
    tokens: tl.int64,
    ignore_index: tl.int64,
    M: tl.constexpr,
    C: tl.constexpr,
    ROW: tl.constexpr,
    GRAD_ROW: tl.constexpr,
    LOSS: tl.constexpr,
    ALIGN: tl.constexpr,
    TARGET_ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample, token, exists = rows_of(program, tokens, BLOCK_N)
    counted, label = counted_tokens(
        target_ptr, target_strides, valid_ptr, valid_strides, ignore_index, sample, token, exists, LOSS == CROSS_ENTROPY
    )
    weights = _weights(weights_ptr, weights_strides, sample, token, counted, M)
    grads = _grads(grad_full_ptr, grad_full_strides, grad_without_ptr, grad_without_strides, sample, token, counted, M)
    states = _begin_all(M, BLOCK_N, LOSS)
    if LOSS == CROSS_ENTROPY or LOSS == COSINE:
        # These need all of a token's logits first. The second sweep finds its tiles in a cache.
        for chunk in range(tl.cdiv(C, BLOCK_C)):
            column = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
            inside = counted[:, None] & (column < C)[None, :]
            tiles = _projections(projections_ptr, projections_strides, sample, token, column, counted, M, C, ROW, ALIGN)
            target = _targets(target_ptr, target_strides, sample, token, column, inside, LOSS, TARGET_ALIGN)
            bias = _bias(bias_ptr, column, C)
            states = _update_all(states, tiles, weights, bias, target, label, column, inside, LOSS)
    dots, ones = (), ()
    for _ in tl.static_range(M):
        dots = dots + (tl.zeros((BLOCK_N,), tl.float32),)
        ones = ones + (tl.full((BLOCK_N,), 1.0, tl.float32),)
    for chunk in range(tl.cdiv(C, BLOCK_C)):
        column = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = counted[:, None] & (column < C)[None, :]
        tiles = _projections(projections_ptr, projections_strides, sample, token, column, counted, M, C, ROW, ALIGN)
        target = _targets(target_ptr, target_strides, sample, token, column, inside, LOSS, TARGET_ALIGN)
        bias = _bias(bias_ptr, column, C)
        totals = totals_of(tiles, weights, _GROUP)
        of_full = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        of_target = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        of_logits = ()
        for i in tl.static_range(M + 1):
            one = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
            if (i == 0 and grad_full_ptr is not None) or (i > 0 and grad_without_ptr is not None):
                logits = _logits(tiles, weights, bias, totals, i)
                one, to_target = gradient(states[i], grads[i], logits, target, label, column, LOSS, C)
                one = tl.where(inside, one, 0.0)
                of_target += to_target
            if i == 0:
                of_full = one
            else:
                of_logits = of_logits + (one,)
        totals = totals_of(of_logits, ones, _GROUP)
        if bias_sums_ptr is not None:
            total = of_full
            for m in tl.static_range(M):
                total += of_logits[m]
            tl.store(bias_sums_ptr + program * C + column, tl.sum(total, axis=0), mask=column < C)
        offsets = rows(grad_projections_strides, sample, token, GRAD_ALIGN)[:, None] + column[None, :]
        existing = exists[:, None] & (column < C)[None, :]
        summed = ()
        for m in tl.static_range(M):
            passed = of_full + sum_of_others(of_logits, ones, m, _GROUP, totals)
            summed = summed + (dots[m] + tl.sum(tiles[m] * passed, axis=1),)
            if grad_projections_ptr is not None:
                # 0 for a token that does not count, whose weight is held at 0.
                result = (weights[m][:, None] * passed).to(grad_projections_ptr.dtype.element_ty)
                member = m * stride(grad_projections_strides[2], GRAD_ALIGN)
                # The rest of a longer row gets zeros.
                tl.store(
                    grad_projections_ptr + member + offsets, result, mask=exists[:, None] & (column < GRAD_ROW)[None, :]
                )
        dots = summed
        if grad_target_ptr is not None:
            to = grad_target_ptr + rows(grad_target_strides, sample, token, 1)[:, None] + column[None, :]
            tl.store(to, tl.where(inside, of_target, 0.0).to(grad_target_ptr.dtype.element_ty), mask=existing)
    if grad_weights_ptr is not None:
        to = grad_weights_ptr + rows(grad_weights_strides, sample, token, 1)
        for m in tl.static_range(M):
            tl.store(to + m, dots[m].to(grad_weights_ptr.dtype.element_ty), mask=exists)


# --- launchers ------------------------------------------------------------------------------------------------------


def _optional(tensor: Tensor | None) -> tuple[Tensor | None, tuple[int, ...] | None]:
    return (tensor, None if tensor is None else strides(tensor))


class _Labels:
    """What the tokens are compared with, and which of them count: the same arguments for every kernel."""

    def __init__(self, target: Tensor, loss: int, valid: Tensor | None, ignore_index: int) -> None:
        self.target = target if loss == CROSS_ENTROPY.value else dense(target)
        self.loss, self.ignore_index = loss, ignore_index
        self.valid = None if valid is None else valid.view(torch.uint8)

    def part(self, samples: slice, tokens: slice) -> tuple:
        """Pointers and strides for some of the tokens."""
        valid = None if self.valid is None else self.valid[samples, tokens]
        return (*_optional(self.target[samples, tokens]), *_optional(valid))

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
        _from_projections,
        batch * triton.cdiv(tokens, c.rows),
        projections,
        strides(projections),
        weights[samples, span],
        strides(weights),
        bias,
        *labels.part(samples, span),
        full[samples, span],
        strides(full),
        without[samples, :, span],
        strides(without),
        tokens,
        labels.ignore_index,
        M=members,
        C=classes,
        ROW=row,
        LOSS=labels.loss,
        ALIGN=align,
        TARGET_ALIGN=labels.alignment,
        BLOCK_N=c.rows,
        BLOCK_C=c.width,
        num_warps=c.num_warps,
        num_stages=c.num_stages,
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
    if not c.group:
        for part in _parts(batch, tokens, members * _padded(classes, head.dtype) * head.element_size()):
            projections = _project(experts, head, *part)
            _losses(projections, weights, bias, labels, *part, full, without, classes)
            if keep:
                kept[part].copy_(projections[..., :classes].transpose(1, 2))
        return full, without, kept
    launch(
        _from_experts,
        batch * triton.cdiv(tokens, c.rows),
        experts,
        tuple(map(strides, experts)),
        head,
        weights,
        strides(weights),
        bias,
        *labels.part(slice(None), slice(None)),
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
        PRECISION=input_precision(head.dtype),
        ALIGN=alignment(*experts),
        TARGET_ALIGN=labels.alignment,
        BLOCK_N=c.rows,
        BLOCK_C=c.group,
        BLOCK_D=c.width,
        num_warps=c.num_warps,
        num_stages=c.num_stages,
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
    _losses(projections, weights, bias, labels, slice(None), slice(None), full, without, projections.shape[-1])
    return full, without


def _differentiate(
    grad_full: Tensor | None,
    grad_without: Tensor | None,
    projections: Tensor,
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
    # Rows of projections and their gradients may be longer than the classes.
    batch, members, tokens, row = projections.shape
    align = alignment(projections)
    c = config.choose("counterfactual_gradients", weights.device, projections.dtype, M=members, C=classes, ALIGN=align)
    programs = batch * triton.cdiv(tokens, c.rows)
    bias_sums = weights.new_empty((programs, classes), dtype=torch.float32) if for_bias else None
    launch(
        _gradients,
        programs,
        projections,
        strides(projections),
        weights[samples, span],
        strides(weights),
        bias,
        *labels.part(samples, span),
        *_optional(None if grad_full is None else grad_full[samples, span]),
        *_optional(None if grad_without is None else grad_without[samples, :, span]),
        grad_projections,
        strides(projections if grad_projections is None else grad_projections),
        *_optional(None if grad_weights is None else grad_weights[samples, span]),
        bias_sums,
        *_optional(None if grad_target is None else grad_target[samples, span]),
        tokens,
        labels.ignore_index,
        M=members,
        C=classes,
        ROW=row,
        GRAD_ROW=row if grad_projections is None else grad_projections.shape[-1],
        LOSS=labels.loss,
        ALIGN=align,
        TARGET_ALIGN=labels.alignment,
        GRAD_ALIGN=1 if grad_projections is None else alignment(grad_projections),
        BLOCK_N=c.rows,
        BLOCK_C=c.width,
        num_warps=c.num_warps,
        num_stages=c.num_stages,
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
            projections = kept[part].transpose(1, 2)
        else:
            projections = _project(experts, head, *part)
        grad_projections = None
        if through:
            count, _, span, _ = projections.shape
            grad_projections = head.new_empty((members, count, span, padded)).permute(1, 2, 0, 3)
        found = _differentiate(
            grad_full,
            grad_without,
            projections,
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
            products.add(grad_projections, labels.loss == CROSS_ENTROPY.value, labels.part(*part), ignore_index, *part)
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
        weights,
        None if head_bias is None else head_bias.contiguous(),
        _Labels(target, loss, valid, ignore_index),
        slice(None),
        slice(None),
        None if grad_projections is None else grad_projections.transpose(1, 2),
        grad_weights,
        bool(for_bias),
        grad_target,
        projections.shape[-1],
    )
    grad_bias = None if grad_bias is None else grad_bias.to(head_bias.dtype)
    return [g for g in (grad_projections, grad_weights, grad_bias, grad_target) if g is not None]
