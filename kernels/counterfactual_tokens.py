"""The kernels of `counterfactual` at its tokens: projections, logits, losses, and the logits' gradients.

A launch may be of a part of the tokens, from `first_sample` and `first_token` on. Projections and their gradients are then
of the part (but projections of all tokens if WHOLE), and all other tensors of all tokens: a pointer to within them would be
aligned or not as B and N have it, and a kernel is compiled for its pointers' alignment.
"""

import triton
import triton.language as tl

from tiger_fast.kernels.device import counted_tokens, rows, rows_of, stride, sum_of_others, totals_of
from tiger_fast.kernels.launch import kernel
from tiger_fast.kernels.token_losses import COSINE, CROSS_ENTROPY, begin, finish, gradient, update

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
def from_experts(
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
def from_projections(
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
    first_sample: tl.int64,
    first_token: tl.int64,
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
    part_sample, part_token, exists = rows_of(tl.program_id(0).to(tl.int64), tokens, BLOCK_N)
    sample, token = first_sample + part_sample, first_token + part_token
    counted, label = counted_tokens(
        target_ptr, target_strides, valid_ptr, valid_strides, ignore_index, sample, token, exists, LOSS == CROSS_ENTROPY
    )
    weights = _weights(weights_ptr, weights_strides, sample, token, counted, M)
    states = _begin_all(M, BLOCK_N, LOSS)
    for chunk in range(tl.cdiv(C, BLOCK_C)):
        column = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = counted[:, None] & (column < C)[None, :]
        tiles = _projections(
            projections_ptr, projections_strides, part_sample, part_token, column, counted, M, C, ROW, ALIGN
        )
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
def gradients(
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
    first_sample: tl.int64,
    first_token: tl.int64,
    ignore_index: tl.int64,
    M: tl.constexpr,
    C: tl.constexpr,
    ROW: tl.constexpr,
    GRAD_ROW: tl.constexpr,
    LOSS: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGN: tl.constexpr,
    TARGET_ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    part_sample, part_token, exists = rows_of(program, tokens, BLOCK_N)
    sample, token = first_sample + part_sample, first_token + part_token
    if WHOLE:
        of_sample, of_token = sample, token
    else:
        of_sample, of_token = part_sample, part_token
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
            tiles = _projections(
                projections_ptr, projections_strides, of_sample, of_token, column, counted, M, C, ROW, ALIGN
            )
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
        tiles = _projections(
            projections_ptr, projections_strides, of_sample, of_token, column, counted, M, C, ROW, ALIGN
        )
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
        offsets = rows(grad_projections_strides, part_sample, part_token, GRAD_ALIGN)[:, None] + column[None, :]
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
