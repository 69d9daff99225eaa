"""LayerNorm of rows, and its gradient: what the kernels with a norm in them share.

    h = (x - mean) / sqrt(variance + eps)        out = h weight + bias        with g = grad weight and dx the row's gradient
    dx = (g - mean(g) - h mean(g h)) / sqrt(variance + eps)        dweight = sum of grad h,  dbias = sum of grad, over rows

The variance is a mean of centred squares. A tile (BLOCK_N, BLOCK_D) of rows is one vector of 16 bytes a thread; a row is a
tuple of tiles, the zeros behind it included, that stays in registers. A row too wide for that is gone through tile by
tile, three times in all: its moments are merged from those of its tiles (`merge`), so that they are as exact.

Sums over rows stay deterministic: each program adds up the rows that are its share, in registers or, for wide rows, in
scratch that is its own, and `column_sums` adds up the programs' sums in their order.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from tiger_fast.kernels import config
from tiger_fast.kernels.launch import kernel, launch


@triton.jit
def columns(chunk, BLOCK_D: tl.constexpr):
    """A tile's columns."""
    return chunk * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit
def of_tile(exists, column, D: tl.constexpr):
    """Which elements of a tile there are."""
    return exists[:, None] & (column < D)[None, :]


@triton.jit
def parameter(pointer, column, inside):
    """A tile's part of a dense vector of parameters as float32, the same in every row.

    Every row loads it anew, from the first cache: spreading one load over the rows would take shared memory and make
    warps that work on rows of their own wait for each other."""
    return tl.load(pointer + tl.broadcast_to(column[None, :], inside.shape), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def moments(row, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """mean and 1 / sqrt(variance + eps), both (BLOCK_N, 1), of rows held as tiles that are 0 behind the row."""
    total = row[0]
    for c in tl.static_range(1, len(row)):
        total += row[c]
    mean = (tl.sum(total, axis=1) * (1.0 / D))[:, None]
    squares = tl.zeros(row[0].shape, tl.float32)
    for c in tl.static_range(len(row)):
        centred = row[c] - mean
        if (c + 1) * BLOCK_D > D:
            centred = tl.where((columns(c, BLOCK_D) < D)[None, :], centred, 0.0)
        squares += centred * centred
    return mean, scale_of(tl.sum(squares, axis=1)[:, None], eps, D)


@triton.jit
def scale_of(squares, eps, D: tl.constexpr):
    """1 / sqrt(variance + eps) from the sum of centred squares."""
    return 1.0 / tl.sqrt(squares * (1.0 / D) + eps)


@triton.jit
def merge(mean, squares, x, chunk, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The mean and the sum of centred squares, (BLOCK_N, 1), of `chunk` tiles and of the tile x behind them."""
    before = tl.full((), 0, tl.int32) + chunk * BLOCK_D  # a tensor in the interpreter too
    size = tl.minimum(D - before, BLOCK_D).to(tl.float32)
    before = before.to(tl.float32)
    here = tl.sum(x, axis=1)[:, None] / size
    centred = tl.where((columns(chunk, BLOCK_D) < D)[None, :], x - here, 0.0)
    step = here - mean
    share = size / (before + size)
    return mean + step * share, squares + tl.sum(centred * centred, axis=1)[:, None] + step * step * before * share


@triton.jit
def put(pointer, offsets, x, inside):
    """Stores a tile in the type of the memory."""
    tl.store(pointer + offsets, x.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def slopes(x, mean, scale, grad, weight_ptr, column, inside):
    """h, grad h and g of a tile, 0 where there is none of it."""
    h = tl.where(inside, (x - mean) * scale, 0.0)
    # The choice between g and 0 keeps the product from being fused with what is taken from it: it must cancel.
    return h, h * grad, tl.where(inside, grad * parameter(weight_ptr, column, inside), 0.0)


@triton.jit
def put_normalised(
    out_ptr, base, row, mean, scale, weight_ptr, bias_ptr, exists, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Stores the norm of rows held as tiles."""
    for c in tl.static_range(len(row)):
        column = columns(c, BLOCK_D)
        inside = of_tile(exists, column, D)
        y = (row[c] - mean) * scale * parameter(weight_ptr, column, inside) + parameter(bias_ptr, column, inside)
        put(out_ptr, base + column[None, :], y, inside)


@triton.jit
def slopes_of_row(
    row,
    mean,
    scale,
    grad_ptr,
    grad_base,
    weight_ptr,
    exists,
    FOR_SCALE: tl.constexpr,
    FOR_BIAS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """h and g of rows held as tiles; what goes to the sums for the weight and the bias, none unless wanted; and the tiles of
    g and of g h added up."""
    level, along = tl.zeros(row[0].shape, tl.float32), tl.zeros(row[0].shape, tl.float32)
    hs, gs, scale_slopes, bias_slopes = (), (), (), ()
    for c in tl.static_range(len(row)):
        column = columns(c, BLOCK_D)
        inside = of_tile(exists, column, D)
        grad = tl.load(grad_ptr + grad_base + column[None, :], mask=inside, other=0.0).to(tl.float32)
        h, slope, g = slopes(row[c], mean, scale, grad, weight_ptr, column, inside)
        level += g
        along += g * h
        hs, gs = hs + (h,), gs + (g,)
        if FOR_SCALE:
            scale_slopes = scale_slopes + (slope,)
        if FOR_BIAS:
            bias_slopes = bias_slopes + (grad,)
    return hs, gs, scale_slopes, bias_slopes, level, along


@triton.jit
def level_of(tile, D: tl.constexpr):
    """The rows' mean, (BLOCK_N, 1), of what was added up in a tile."""
    return (tl.sum(tile, axis=1) * (1.0 / D))[:, None]


@triton.jit
def zeros_like_row(CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """A row of zeros."""
    row = ()
    for _ in tl.static_range(CHUNKS):
        row = row + (tl.zeros((BLOCK_N, BLOCK_D), tl.float32),)
    return row


@triton.jit
def added(sums, row):
    """The sum of two rows."""
    found = ()
    for c in tl.static_range(len(row)):
        found = found + (sums[c] + row[c],)
    return found


@triton.jit
def put_sums(pointer, sums, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores the sums over a program's rows."""
    for c in tl.static_range(len(sums)):
        column = columns(c, BLOCK_D)
        tl.store(pointer + column, tl.sum(sums[c], axis=0), mask=column < D)


@triton.jit
def add_to_sums(pointer, x, column, first, D: tl.constexpr):
    """Adds a tile's rows to sums in memory, which the first tile begins anew."""
    before = tl.load(pointer + column, mask=(column < D) & ~first, other=0.0)
    tl.store(pointer + column, before + tl.sum(x, axis=0), mask=column < D)


@kernel
def _column_sums(
    partial_ptr,
    out_ptrs,
    parts: tl.int64,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    SUMS: tl.constexpr = len(out_ptrs)
    program = tl.program_id(0)
    which = program % SUMS
    column = columns(program // SUMS, BLOCK_D)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for block in range(tl.cdiv(parts, BLOCK_N)):
        part = block * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        offsets = ((part * SUMS + which) * D)[:, None] + column[None, :]
        total += tl.load(partial_ptr + offsets, mask=of_tile(part < parts, column, D), other=0.0)
    result = tl.sum(total, axis=0)
    for s in tl.static_range(SUMS):
        if which == s:
            tl.store(out_ptrs[s] + column, result.to(out_ptrs[s].dtype.element_ty), mask=column < D)


def column_sums(partial: Tensor, outs: Sequence[Tensor]) -> None:
    """Puts the sums over the first dimension of `partial`, dense (parts, len(outs), D), into `outs`, (D) each."""
    parts, sums, width = partial.shape
    c = config.choose("column_sums", partial.device, partial.dtype, D=width)
    launch(
        _column_sums,
        sums * triton.cdiv(width, c.width),
        partial,
        tuple(outs),
        parts,
        D=width,
        BLOCK_N=c.rows,
        BLOCK_D=c.width,
        **c.options,
    )
