"""Experts mixed by competency, then LayerNorm (TAVER eqs. 2-3), in one pass.

    w_b = softmax(confidence_b + refined_b)        x = sum_k w_bk F_k        out = LayerNorm(x)

Backward, with dx the norm's (`norm`): dF_k = w_bk dx, dw_bk = sum over tokens of F_k . dx, and from there the softmax.

Layout: experts (B, N, D) with any strides but the last, confidences any, outputs dense. A program takes BLOCK_N tokens of a
sample, rows in registers; the backward's programs go on from tile to tile with their sums, and hold the experts' rows
too, where registers allow, to read them once. Bytes, in units of B N D elements: forward M read, 1 written; backward
M + 1 read, M written; beside them the tiles' M products each and each program's sums, which a second kernel adds up.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiger_fast.kernels import config
from tiger_fast.kernels.device import rows, share_of, stride
from tiger_fast.kernels.launch import alignment, dense, kernel, launch, strides
from tiger_fast.kernels.norm import (
    add_to_sums,
    added,
    column_sums,
    columns,
    level_of,
    merge,
    moments,
    of_tile,
    parameter,
    put,
    put_normalised,
    put_sums,
    scale_of,
    slopes,
    slopes_of_row,
    zeros_like_row,
)


@triton.jit
def _tokens(tile, blocks, tokens, BLOCK_N: tl.constexpr):
    # A tile's sample, tokens and which of them exist. There are never 2^31 tiles, as there are no more programs: a 64-bit
    # division is a function that is called, which costs registers everywhere around it.
    sample = (tile // blocks).to(tl.int64)
    token = (tile % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return sample, token, token < tokens


@triton.jit
def _weigh(confidence_ptr, confidence_strides, refined_ptr, refined_strides, sample, M: tl.constexpr):
    # softmax(confidence + refined) of a sample, as a tuple of scalars.
    logits = ()
    for m in tl.static_range(M):
        one = tl.load(confidence_ptr + rows(confidence_strides, sample, m, 1)).to(tl.float32)
        logits = logits + (one + tl.load(refined_ptr + rows(refined_strides, sample, m, 1)).to(tl.float32),)
    highest = logits[0]
    for m in tl.static_range(1, M):
        highest = tl.maximum(highest, logits[m])
    powers = ()
    total = highest * 0
    for m in tl.static_range(M):
        powers = powers + (tl.exp(logits[m] - highest),)
        total += powers[m]
    weights = ()
    for m in tl.static_range(M):
        weights = weights + (powers[m] / total,)
    return weights


@triton.jit
def _bases(expert_strides, sample, token, ALIGN: tl.constexpr):
    # Where the experts' rows begin: each one's, or all of them.
    bases = ()
    for m in tl.static_range(len(expert_strides)):
        bases = bases + (rows(expert_strides[m], sample, token, ALIGN)[:, None],)
    return bases


@triton.jit
def _mix(expert_ptrs, bases, weights, column, inside, HOLD: tl.constexpr):
    # A tile of x, and the experts' tiles if they are to be held.
    tiles = ()
    x = tl.zeros(inside.shape, tl.float32)
    for m in tl.static_range(len(expert_ptrs)):
        tile = tl.load(expert_ptrs[m] + bases[m % len(bases)] + column[None, :], mask=inside, other=0.0)
        x += weights[m] * tile.to(tl.float32)
        if HOLD:
            tiles = tiles + (tile,)
    return x, tiles


@kernel
def _forward(
    expert_ptrs,
    expert_strides,
    confidence_ptr,
    confidence_strides,
    refined_ptr,
    refined_strides,
    weight_ptr,
    bias_ptr,
    out_ptr,
    weights_ptr,
    tokens: tl.int64,
    blocks: tl.int32,
    eps: tl.float32,
    D: tl.constexpr,
    HELD: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    M: tl.constexpr = len(expert_ptrs)
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    sample, token, exists = _tokens(program, blocks, tokens, BLOCK_N)
    weights = _weigh(confidence_ptr, confidence_strides, refined_ptr, refined_strides, sample, M)
    if program % blocks == 0:
        for m in tl.static_range(M):
            tl.store(weights_ptr + sample * M + m, weights[m])
    bases = _bases(expert_strides, sample, token, ALIGN)
    out = (sample * tokens + token)[:, None] * D
    if HELD:
        row = ()
        for c in tl.static_range(CHUNKS):
            column = columns(c, BLOCK_D)
            x, _ = _mix(expert_ptrs, bases, weights, column, of_tile(exists, column, D), False)
            row = row + (x,)
        mean, scale = moments(row, eps, D, BLOCK_D)
        put_normalised(out_ptr, out, row, mean, scale, weight_ptr, bias_ptr, exists, D, BLOCK_D)
    else:
        mean = tl.zeros((BLOCK_N, 1), tl.float32)
        squares = tl.zeros((BLOCK_N, 1), tl.float32)
        for chunk in range(CHUNKS):
            column = columns(chunk, BLOCK_D)
            x, _ = _mix(expert_ptrs, bases, weights, column, of_tile(exists, column, D), False)
            mean, squares = merge(mean, squares, x, chunk, D, BLOCK_D)
        scale = scale_of(squares, eps, D)
        for chunk in range(CHUNKS):
            column = columns(chunk, BLOCK_D)
            inside = of_tile(exists, column, D)
            x, _ = _mix(expert_ptrs, bases, weights, column, inside, False)
            y = (x - mean) * scale * parameter(weight_ptr, column, inside) + parameter(bias_ptr, column, inside)
            put(out_ptr, out + column[None, :], y, inside)


@triton.jit
def _load_weights(weights_ptr, sample, M: tl.constexpr):
    weights = ()
    for m in tl.static_range(M):
        weights = weights + (tl.load(weights_ptr + sample * M + m),)
    return weights


@kernel
def _backward(
    grad_ptr,
    grad_strides,
    expert_ptrs,
    expert_strides,
    weights_ptr,
    weight_ptr,
    grad_expert_ptrs,
    products_ptr,
    sums_ptr,
    tokens: tl.int64,
    blocks: tl.int32,
    each: tl.int32,
    extra: tl.int32,
    eps: tl.float32,
    D: tl.constexpr,
    NEEDS: tl.constexpr,
    HELD: tl.constexpr,
    ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # NEEDS: a bit for each expert, then the mixture's weights (both confidences), the norm's weight, its bias.
    M: tl.constexpr = len(expert_ptrs)
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    FOR_WEIGHTS: tl.constexpr = (NEEDS >> M) & 1
    FOR_SCALE: tl.constexpr = (NEEDS >> (M + 1)) & 1
    FOR_BIAS: tl.constexpr = (NEEDS >> (M + 2)) & 1
    FOR_ROWS: tl.constexpr = (NEEDS & ((1 << (M + 1)) - 1)) != 0
    program = tl.program_id(0)
    begin, end = share_of(program, each, extra)
    sums_ptr += program.to(tl.int64) * (FOR_SCALE + FOR_BIAS) * D
    bias_sums_ptr = sums_ptr + FOR_SCALE * D
    scale_sums = zeros_like_row(CHUNKS if HELD and FOR_SCALE else 0, BLOCK_N, BLOCK_D)
    bias_sums = zeros_like_row(CHUNKS if HELD and FOR_BIAS else 0, BLOCK_N, BLOCK_D)
    for tile in range(begin, end):
        sample, token, exists = _tokens(tile, blocks, tokens, BLOCK_N)
        weights = _load_weights(weights_ptr, sample, M)
        bases = _bases(expert_strides, sample, token, ALIGN)
        grads = rows(grad_strides, sample, token, GRAD_ALIGN)[:, None]
        out = (sample * tokens + token)[:, None] * D
        level, along = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        if HELD:
            row, held = (), ()
            for c in tl.static_range(CHUNKS):
                column = columns(c, BLOCK_D)
                x, tiles = _mix(expert_ptrs, bases, weights, column, of_tile(exists, column, D), HELD == 2)
                row, held = row + (x,), held + tiles
            mean, scale = moments(row, eps, D, BLOCK_D)
            hs, gs, scale_slopes, bias_slopes, level, along = slopes_of_row(
                row, mean, scale, grad_ptr, grads, weight_ptr, exists, FOR_SCALE, FOR_BIAS, D, BLOCK_D
            )
            scale_sums, bias_sums = added(scale_sums, scale_slopes), added(bias_sums, bias_slopes)
            if FOR_ROWS:
                mean_g, mean_gh = level_of(level, D), level_of(along, D)
                dx = ()
                for c in tl.static_range(CHUNKS):
                    dx = dx + ((gs[c] - mean_g - hs[c] * mean_gh) * scale,)
                for m in tl.static_range(M):
                    products = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
                    for c in tl.static_range(CHUNKS):
                        column = columns(c, BLOCK_D)
                        inside = of_tile(exists, column, D)
                        if FOR_WEIGHTS:
                            if HELD == 2:
                                products += tl.where(inside, held[c * M + m].to(tl.float32) * dx[c], 0.0)
                            else:
                                offsets = bases[m % len(bases)] + column[None, :]
                                again = tl.load(expert_ptrs[m] + offsets, mask=inside, other=0.0)
                                products += tl.where(inside, again.to(tl.float32) * dx[c], 0.0)
                        if (NEEDS >> m) & 1:
                            put(grad_expert_ptrs[m], out + column[None, :], weights[m] * dx[c], inside)
                    if FOR_WEIGHTS:
                        tl.store(
                            products_ptr + (tl.full((), 0, tl.int64) + tile) * M + m,
                            tl.sum(tl.sum(products, axis=1), axis=0),
                        )
        else:
            mean = tl.zeros((BLOCK_N, 1), tl.float32)
            squares = tl.zeros((BLOCK_N, 1), tl.float32)
            for chunk in range(CHUNKS):
                column = columns(chunk, BLOCK_D)
                x, _ = _mix(expert_ptrs, bases, weights, column, of_tile(exists, column, D), False)
                mean, squares = merge(mean, squares, x, chunk, D, BLOCK_D)
            scale = scale_of(squares, eps, D)
            for chunk in range(CHUNKS):
                column = columns(chunk, BLOCK_D)
                inside = of_tile(exists, column, D)
                x, _ = _mix(expert_ptrs, bases, weights, column, inside, False)
                grad = tl.load(grad_ptr + grads + column[None, :], mask=inside, other=0.0).to(tl.float32)
                h, slope, g = slopes(x, mean, scale, grad, weight_ptr, column, inside)
                level += g
                along += g * h
                if FOR_SCALE:
                    add_to_sums(sums_ptr, slope, column, tile == begin, D)
                if FOR_BIAS:
                    add_to_sums(bias_sums_ptr, grad, column, tile == begin, D)
            if FOR_ROWS:
                mean_g, mean_gh = level_of(level, D), level_of(along, D)
                products = ()
                for _m in tl.static_range(M):
                    products = products + (tl.zeros((BLOCK_N,), tl.float32),)
                for chunk in range(CHUNKS):
                    column = columns(chunk, BLOCK_D)
                    inside = of_tile(exists, column, D)
                    x, tiles = _mix(expert_ptrs, bases, weights, column, inside, True)
                    grad = tl.load(grad_ptr + grads + column[None, :], mask=inside, other=0.0).to(tl.float32)
                    h, _, g = slopes(x, mean, scale, grad, weight_ptr, column, inside)
                    dx = (g - mean_g - h * mean_gh) * scale
                    more = ()
                    for m in tl.static_range(M):
                        more = more + (tl.sum(tl.where(inside, tiles[m].to(tl.float32) * dx, 0.0), axis=1),)
                        if (NEEDS >> m) & 1:
                            put(grad_expert_ptrs[m], out + column[None, :], weights[m] * dx, inside)
                    products = added(products, more)
                if FOR_WEIGHTS:
                    for m in tl.static_range(M):
                        tl.store(products_ptr + (tl.full((), 0, tl.int64) + tile) * M + m, tl.sum(products[m], axis=0))
            # The next tile reads the sums that this one has written.
            tl.debug_barrier()
    put_sums(sums_ptr, scale_sums, D, BLOCK_D)
    put_sums(bias_sums_ptr, bias_sums, D, BLOCK_D)


@kernel
def _confidences(
    products_ptr,
    grad_weights_ptr,
    grad_weights_strides,
    weights_ptr,
    grad_confidence_ptr,
    grad_refined_ptr,
    blocks: tl.int64,
    M: tl.constexpr,
    NEEDS: tl.constexpr,
    FROM_ROWS: tl.constexpr,
    FROM_WEIGHTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    # Through a sample's softmax. NEEDS: the confidence, the refined one.
    sample = tl.program_id(0).to(tl.int64)
    member = tl.arange(0, BLOCK_M)
    real = member < M
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if FROM_ROWS:
        for step in range(tl.cdiv(blocks, BLOCK_N)):
            block = step * BLOCK_N + tl.arange(0, BLOCK_N)
            offsets = ((sample * blocks + block) * M)[:, None] + member[None, :]
            total += tl.load(products_ptr + offsets, mask=of_tile(block < blocks, member, M), other=0.0)
    slope = tl.sum(total, axis=0)
    if FROM_WEIGHTS:
        offsets = sample * stride(grad_weights_strides[0], 1) + member * stride(grad_weights_strides[1], 1)
        slope += tl.load(grad_weights_ptr + offsets, mask=real, other=0.0)
    weights = tl.load(weights_ptr + sample * M + member, mask=real, other=0.0)
    slope = (slope - tl.sum(slope * weights, axis=0)) * weights
    if NEEDS & 1:
        put(grad_confidence_ptr, sample * M + member, slope, real)
    if NEEDS & 2:
        put(grad_refined_ptr, sample * M + member, slope, real)


def _strides(experts: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    # One for all where they agree, as they mostly do: sixteen experts' offsets are a lot of registers.
    found = tuple(map(strides, experts))
    return found[:1] if len(set(found)) == 1 else found


def competency_aggregate(
    experts: Sequence[Tensor],
    confidence: Tensor,
    refined_confidence: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Features (B, N, D) and weights (B, M): see the module."""
    experts = tuple(map(dense, experts))
    batch, tokens, width = experts[0].shape
    members = len(experts)
    out = experts[0].new_empty((batch, tokens, width))
    weights = experts[0].new_empty((batch, members), dtype=torch.float32)
    c = config.choose("competency_aggregate", out.device, out.dtype, D=width, M=members)
    blocks = max(1, triton.cdiv(tokens, c.rows))  # without tokens there are weights nevertheless
    launch(
        _forward,
        batch * blocks,
        experts,
        _strides(experts),
        confidence,
        strides(confidence),
        refined_confidence,
        strides(refined_confidence),
        dense(norm_weight),
        dense(norm_bias),
        out,
        weights,
        tokens,
        blocks,
        eps,
        D=width,
        HELD=c.held,
        ALIGN=alignment(*experts),
        BLOCK_N=c.rows,
        BLOCK_D=c.width,
        **c.options,
    )
    return out, weights


def competency_aggregate_backward(
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
    """The gradients of experts, both confidences, the norm's weight and bias, those whose bit in `needs` is set."""
    batch, tokens, width = experts[0].shape
    members = len(experts)
    parameters = (confidence, refined_confidence, norm_weight, norm_bias)
    found = [t.new_empty(t.shape) if needs >> i & 1 else None for i, t in enumerate((*experts, *parameters))]
    confidences, norms = found[members : members + 2], found[members + 2 :]
    for_confidences, for_norms = needs >> members & 3, needs >> (members + 2) & 3
    weights = weights.contiguous()
    products, blocks = weights, 0
    if grad is not None:
        grad, experts = dense(grad), tuple(map(dense, experts))
        c = config.choose("competency_aggregate_backward", grad.device, grad.dtype, D=width, M=members)
        blocks = triton.cdiv(tokens, c.rows)
        programs = min(batch * blocks, c.resident * config.MULTIPROCESSORS)
        products = weights.new_empty((batch, blocks, members)) if for_confidences else weights
        # An empty batch has sums too.
        allocate = weights.new_empty if programs else weights.new_zeros
        sums = allocate((max(1, programs), for_norms.bit_count(), width))
        launch(
            _backward,
            programs,
            grad,
            strides(grad),
            experts,
            _strides(experts),
            weights,
            dense(norm_weight),
            tuple(expert if g is None else g for expert, g in zip(experts, found[:members], strict=True)),
            products,
            sums if for_norms else weights,
            tokens,
            blocks,
            *divmod(batch * blocks, max(1, programs)),
            eps,
            D=width,
            NEEDS=needs & ((1 << members) - 1) | bool(for_confidences) << members | for_norms << (members + 1),
            HELD=c.held,
            ALIGN=alignment(*experts),
            GRAD_ALIGN=alignment(grad),
            BLOCK_N=c.rows,
            BLOCK_D=c.width,
            **c.options,
        )
        if for_norms:
            column_sums(sums, [t for t in norms if t is not None])
    if for_confidences:
        c = config.choose("competency_confidences", weights.device, weights.dtype, M=members)
        launch(
            _confidences,
            batch,
            products,
            weights if grad_weights is None else grad_weights,
            strides(weights if grad_weights is None else grad_weights),
            weights,
            *(weights if t is None else t for t in confidences),
            blocks,
            M=members,
            NEEDS=for_confidences,
            FROM_ROWS=grad is not None,
            FROM_WEIGHTS=grad_weights is not None,
            BLOCK_N=c.rows,
            BLOCK_M=c.width,
            **c.options,
        )
    return [t for t in found if t is not None]
