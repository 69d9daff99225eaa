"""The causal target (TIGER eqs. 9-10) and its alignment with the routing weights (eqs. 11-13).

    n = (delta - mean) / (deviation + eps)        p = softmax(n / tau)        2 m = p + alpha
    JSD = 1/2 sum of p log(p / m) + alpha log(alpha / m)        loss = mean of JSD over the rows that count

Backward, with log's argument held at 2^-126 so that slopes stay finite, and 0 where p = alpha = 0:

    dJSD/dalpha = 1/2 log(alpha / m)        dJSD/dp = 1/2 log(p / m)        dn = p (dp - p . dp) / tau
    ddelta = v - mean(v),  v = dn / (deviation + eps) - n mean(dn n) / deviation,  without the latter where deviation is 0

Layout: rows of M under any leading dimensions and any strides, tiles (BLOCK_R, BLOCK_M) with M padded; outputs dense.
A row's reductions stay within a few lanes. Bytes: each direction reads delta and alpha once and writes what is wanted;
where the target is held fixed the forward keeps the weights' slopes, and the backward only scales them.

One launch makes the mean: every program leaves its rows' sum and count in scratch, and the last one to finish adds them
up, always in the same order (`device.last_to_finish`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiger_fast.kernels import config
from tiger_fast.kernels.device import (
    last_to_finish,
    open_ticket,
    row_index,
    row_offsets,
    rows_behind,
    share_of,
    stride,
)
from tiger_fast.kernels.launch import alignment, joined, kernel, launch

_TINY = tl.constexpr(2.0**-126)
# Programs of the loss: the last one adds up their sums at once.
_PROGRAMS = tl.constexpr(1024)


@triton.jit
def _tile(first, index, rows, sizes, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr):
    # Rows from `first` on, which has these indices: their numbers, their indices, which exist; and experts.
    row = first + tl.arange(0, BLOCK_R)
    return row, rows_behind(index, sizes, tl.arange(0, BLOCK_R)), row < rows, tl.arange(0, BLOCK_M)


@triton.jit
def _load(pointer, strides, member_stride, indices, member, inside, ALIGN: tl.constexpr):
    # ALIGN 0: members are not next to each other.
    if ALIGN:
        offsets = row_offsets(indices, strides, ALIGN)[:, None] + member[None, :]
    else:
        offsets = row_offsets(indices, strides, 1)[:, None] + (member * stride(member_stride, 1))[None, :]
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _target(delta, member, sharpness, eps, M: tl.constexpr):
    # n, p, deviation and 1 / (deviation + eps).
    real = (member < M)[None, :]
    # Differences from the first expert's: exactly 0 where all tie, and then so are the mean's and the deviation's.
    first = tl.sum(tl.where((member == 0)[None, :], delta, 0.0), axis=1)
    delta = tl.where(real, delta - first[:, None], 0.0)
    n = tl.where(real, delta - (tl.sum(delta, axis=1) * (1.0 / M))[:, None], 0.0)
    deviation = tl.sqrt(tl.sum(n * n, axis=1) * (1.0 / M))
    scale = 1.0 / (deviation + eps)
    below = delta - tl.max(tl.where(real, delta, float("-inf")), axis=1)[:, None]
    p = tl.where(real, tl.exp(below * scale[:, None] * sharpness), 0.0)
    p = p * (1.0 / tl.sum(p, axis=1))[:, None]
    return n * scale[:, None], p, deviation, scale


@triton.jit
def _target_slope(dp, n, p, deviation, scale, member, sharpness, M: tl.constexpr):
    # ddelta from dp.
    dn = p * (dp - tl.sum(p * dp, axis=1)[:, None]) * sharpness
    flat = deviation == 0
    along = tl.sum(dn * n, axis=1) * (1.0 / M) / tl.where(flat, 1.0, deviation)
    slope = tl.where((member < M)[None, :], dn * scale[:, None] - n * tl.where(flat, 0.0, along)[:, None], 0.0)
    return slope - (tl.sum(slope, axis=1) * (1.0 / M))[:, None]


@triton.jit
def _log_ratio(a, twice):
    # log(max(a, 2^-126) / m) given 2 m: twice the divergence's derivative for a. A NaN stays.
    return tl.log(tl.where(a < _TINY, _TINY, a) * 2.0 / twice)


@triton.jit
def _term(a, ratio):
    # a log(a / m), with the derivative that _log_ratio says.
    return a * ratio + tl.where(a < _TINY, a, 0.0)


@kernel
def _causal_target(
    delta_ptr,
    delta_strides,
    member_stride: tl.int64,
    sizes,
    out_ptr,
    rows: tl.int64,
    sharpness: tl.float32,
    eps: tl.float32,
    M: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    row, indices, exists, member = _tile(first, row_index(first, sizes), rows, sizes, BLOCK_R, BLOCK_M)
    inside = exists[:, None] & (member < M)[None, :]
    delta = _load(delta_ptr, delta_strides, member_stride, indices, member, inside, ALIGN)
    _, p, _, _ = _target(delta, member, sharpness, eps, M)
    tl.store(out_ptr + row[:, None] * M + member[None, :], p, mask=inside)


@kernel
def _causal_target_backward(
    grad_ptr,
    grad_strides,
    grad_member_stride: tl.int64,
    delta_ptr,
    delta_strides,
    member_stride: tl.int64,
    sizes,
    out_ptr,
    rows: tl.int64,
    sharpness: tl.float32,
    eps: tl.float32,
    M: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    row, indices, exists, member = _tile(first, row_index(first, sizes), rows, sizes, BLOCK_R, BLOCK_M)
    inside = exists[:, None] & (member < M)[None, :]
    delta = _load(delta_ptr, delta_strides, member_stride, indices, member, inside, ALIGN)
    grad = _load(grad_ptr, grad_strides, grad_member_stride, indices, member, inside, GRAD_ALIGN)
    n, p, deviation, scale = _target(delta, member, sharpness, eps, M)
    slope = _target_slope(grad, n, p, deviation, scale, member, sharpness, M)
    tl.store(out_ptr + row[:, None] * M + member[None, :], slope.to(out_ptr.dtype.element_ty), mask=inside)


@kernel
def _alignment_loss(
    delta_ptr,
    delta_strides,
    delta_member_stride: tl.int64,
    weights_ptr,
    weights_strides,
    weights_member_stride: tl.int64,
    mask_ptr,
    mask_strides,
    sizes,
    slopes_ptr,
    sums_ptr,
    counts_ptr,
    loss_ptr,
    counted_ptr,
    rows: tl.int64,
    programs: tl.int64,
    each: tl.int64,
    extra: tl.int64,
    sharpness: tl.float32,
    eps: tl.float32,
    M: tl.constexpr,
    MASKED: tl.constexpr,
    KEEP: tl.constexpr,
    DELTA_ALIGN: tl.constexpr,
    WEIGHTS_ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    ticket_ptr = counts_ptr + programs
    open_ticket(ticket_ptr)
    sums = tl.zeros((BLOCK_R,), tl.float32)
    counts = tl.zeros((BLOCK_R,), tl.int32)
    begin, end = share_of(program, each, extra)
    index = row_index(begin * BLOCK_R, sizes)
    for tile in range(begin, end):
        row, indices, counts_here, member = _tile(tile * BLOCK_R, index, rows, sizes, BLOCK_R, BLOCK_M)
        index = rows_behind(index, sizes, tl.full((), BLOCK_R, tl.int32))
        inside = counts_here[:, None] & (member < M)[None, :]
        if MASKED:
            marks = tl.load(mask_ptr + row_offsets(indices, mask_strides, 1), mask=counts_here, other=0)
            counts_here = marks != 0
        # Rows that do not count are not even read: they may hold anything.
        reads = counts_here[:, None] & (member < M)[None, :]
        delta = _load(delta_ptr, delta_strides, delta_member_stride, indices, member, reads, DELTA_ALIGN)
        alpha = _load(weights_ptr, weights_strides, weights_member_stride, indices, member, reads, WEIGHTS_ALIGN)
        _, p, _, _ = _target(delta, member, sharpness, eps, M)
        silent = ((p == 0) & (alpha == 0)) | ~reads
        twice = tl.where(silent, 1.0, p + alpha)
        slope = _log_ratio(alpha, twice)
        terms = tl.where(silent, 0.0, _term(p, _log_ratio(p, twice)) + _term(alpha, slope))
        sums += tl.sum(terms, axis=1)
        counts += counts_here.to(tl.int32)
        if KEEP:
            offsets = row[:, None] * M + member[None, :]
            tl.store(slopes_ptr + offsets, tl.where(silent, 0.0, 0.5 * slope), mask=inside)
    tl.store(sums_ptr + program, tl.sum(sums, axis=0) * 0.5)
    tl.store(counts_ptr + program, tl.sum(counts.to(tl.int64), axis=0))
    if last_to_finish(ticket_ptr, programs):
        slot = tl.arange(0, _PROGRAMS)
        every_sum = tl.load(sums_ptr + slot, mask=slot < programs, other=0.0, cache_modifier=".cg")
        every_count = tl.load(counts_ptr + slot, mask=slot < programs, other=0, cache_modifier=".cg")
        count = tl.maximum(tl.sum(every_count, axis=0), 1)
        tl.store(loss_ptr, tl.sum(every_sum, axis=0) / count.to(tl.float32))
        tl.store(counted_ptr, count.to(tl.float64))


@kernel
def _alignment_loss_backward(
    grad_ptr,
    counted_ptr,
    delta_ptr,
    delta_strides,
    delta_member_stride: tl.int64,
    weights_ptr,
    weights_strides,
    weights_member_stride: tl.int64,
    mask_ptr,
    mask_strides,
    sizes,
    grad_delta_ptr,
    grad_weights_ptr,
    rows: tl.int64,
    sharpness: tl.float32,
    eps: tl.float32,
    M: tl.constexpr,
    MASKED: tl.constexpr,
    NEEDS: tl.constexpr,
    DELTA_ALIGN: tl.constexpr,
    WEIGHTS_ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    half = tl.load(grad_ptr) / tl.load(counted_ptr).to(tl.float32) * 0.5
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    row, indices, counts, member = _tile(first, row_index(first, sizes), rows, sizes, BLOCK_R, BLOCK_M)
    inside = counts[:, None] & (member < M)[None, :]
    if MASKED:
        counts = tl.load(mask_ptr + row_offsets(indices, mask_strides, 1), mask=counts, other=0) != 0
    reads = counts[:, None] & (member < M)[None, :]
    delta = _load(delta_ptr, delta_strides, delta_member_stride, indices, member, reads, DELTA_ALIGN)
    alpha = _load(weights_ptr, weights_strides, weights_member_stride, indices, member, reads, WEIGHTS_ALIGN)
    n, p, deviation, scale = _target(delta, member, sharpness, eps, M)
    silent = ((p == 0) & (alpha == 0)) | ~reads
    twice = tl.where(silent, 1.0, p + alpha)
    offsets = row[:, None] * M + member[None, :]
    if NEEDS & 1:
        dp = tl.where(silent, 0.0, half * _log_ratio(p, twice))
        slope = tl.where(reads, _target_slope(dp, n, p, deviation, scale, member, sharpness, M), 0.0)
        tl.store(grad_delta_ptr + offsets, slope.to(grad_delta_ptr.dtype.element_ty), mask=inside)
    if NEEDS & 2:
        slope = tl.where(silent, 0.0, half * _log_ratio(alpha, twice))
        tl.store(grad_weights_ptr + offsets, slope.to(grad_weights_ptr.dtype.element_ty), mask=inside)


@kernel
def _scaled(
    grad_ptr,
    counted_ptr,
    slopes_ptr,
    out_ptr,
    rows: tl.int64,
    M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    scale = tl.load(grad_ptr) / tl.load(counted_ptr).to(tl.float32)
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    member = tl.arange(0, BLOCK_M)
    inside = (row < rows)[:, None] & (member < M)[None, :]
    offsets = row[:, None] * M + member[None, :]
    slopes = tl.load(slopes_ptr + offsets, mask=inside, other=0.0)
    tl.store(out_ptr + offsets, (slopes * scale).to(out_ptr.dtype.element_ty), mask=inside)


def _sharpness(tau: float) -> float:
    # 1 / tau, finite in float32, so that 0 / tau stays 0.
    return min(1 / tau, 2.0**127)


def _member_stride(tensor: Tensor) -> int:
    return 2 * tensor.stride(-1) + 3  # as launch.strides has them


def _align(tensor: Tensor) -> int:
    return alignment(tensor) if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else 0


def _rows(tensor: Tensor) -> int:
    return tensor.numel() // tensor.shape[-1]


def _shape(kernel: str, delta: Tensor) -> tuple[int, dict[str, int]]:
    # The number of tiles, and the constants of a kernel.
    c = config.choose(kernel, delta.device, delta.dtype, M=delta.shape[-1])
    return triton.cdiv(_rows(delta), c.rows), {
        "M": delta.shape[-1],
        "BLOCK_R": c.rows,
        "BLOCK_M": c.width,
        **c.options,
    }


def causal_target(delta: Tensor, tau: float, eps: float) -> Tensor:
    """p (..., M): see the module."""
    blocks, shape = _shape("causal_target", delta)
    out = delta.new_empty(delta.shape, dtype=torch.float32)
    sizes, delta_strides = joined(delta.shape[:-1], delta)
    launch(
        _causal_target,
        blocks,
        delta,
        delta_strides,
        _member_stride(delta),
        sizes,
        out,
        _rows(delta),
        _sharpness(tau),
        eps,
        ALIGN=_align(delta),
        **shape,
    )
    return out


def causal_target_backward(grad: Tensor, delta: Tensor, tau: float, eps: float) -> Tensor:
    """The gradient of `delta`."""
    blocks, shape = _shape("causal_target_backward", delta)
    out = delta.new_empty(delta.shape)
    sizes, delta_strides, grad_strides = joined(delta.shape[:-1], delta, grad)
    launch(
        _causal_target_backward,
        blocks,
        grad,
        grad_strides,
        _member_stride(grad),
        delta,
        delta_strides,
        _member_stride(delta),
        sizes,
        out,
        _rows(delta),
        _sharpness(tau),
        eps,
        GRAD_ALIGN=_align(grad),
        ALIGN=_align(delta),
        **shape,
    )
    return out


def _inputs(delta: Tensor, weights: Tensor, mask: Tensor | None) -> tuple[tuple, tuple]:
    # The kernels' arguments for the inputs: pointers and strides, and the sizes of joined dimensions behind them.
    marks = delta if mask is None else mask.view(torch.uint8).expand(delta.shape[:-1])
    # Without a mask delta stands in for it: its strides take part twice, which changes nothing.
    sizes, *found = joined(delta.shape[:-1], delta, weights, marks)
    return (
        (delta, found[0], _member_stride(delta), weights, found[1], _member_stride(weights), marks, found[2], sizes),
        {"MASKED": mask is not None, "DELTA_ALIGN": _align(delta), "WEIGHTS_ALIGN": _align(weights)},
    )


def alignment_loss(
    delta: Tensor, weights: Tensor, tau: float, eps: float, mask: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the number of rows that count, at least 1, and, if `keep`, each row's slopes for the weights."""
    blocks, shape = _shape("alignment_loss", delta)
    rows = _rows(delta)
    arguments, constants = _inputs(delta, weights, mask)
    programs = max(1, min(blocks, _PROGRAMS.value))
    loss = delta.new_empty((), dtype=torch.float32)
    counted = delta.new_empty((), dtype=torch.float64)
    slopes = delta.new_empty(weights.shape if keep else (0,), dtype=torch.float32)
    sums = delta.new_empty(programs, dtype=torch.float32)
    counts = delta.new_empty(programs + 1, dtype=torch.int64)  # and the ticket
    launch(
        _alignment_loss,
        programs,
        *arguments,
        slopes if keep else loss,
        sums,
        counts,
        loss,
        counted,
        rows,
        programs,
        *divmod(blocks, programs),
        _sharpness(tau),
        eps,
        KEEP=keep,
        **constants,
        **shape,
    )
    return loss, counted, slopes


def alignment_loss_backward(
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
    """The gradients of `delta` and `weights`, those whose bit in `needs` is set."""
    grad_delta = delta.new_empty(delta.shape) if needs & 1 else None
    grad_weights = weights.new_empty(weights.shape) if needs & 2 else None
    blocks, shape = _shape("alignment_loss_backward", delta)
    if slopes is not None and needs == 2:
        launch(_scaled, blocks, grad, counted, slopes, grad_weights, _rows(delta), **shape)
        return [grad_weights]
    arguments, constants = _inputs(delta, weights, mask)
    launch(
        _alignment_loss_backward,
        blocks,
        grad,
        counted,
        *arguments,
        delta if grad_delta is None else grad_delta,
        weights if grad_weights is None else grad_weights,
        _rows(delta),
        _sharpness(tau),
        eps,
        NEEDS=needs,
        **constants,
        **shape,
    )
    return [t for t in (grad_delta, grad_weights) if t is not None]
