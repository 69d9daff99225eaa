"""TAVER's adapter (sec. 3.1): LayerNorm, a linear and a GELU branch added, LayerNorm.

    y = LayerNorm(x)      s = y L^T + l + GELU(y G^T + g)      out = LayerNorm(s)      GELU(a) = a Phi(a), the exact one

The products are the library's; the kernels here are what stands around them, with the rows' sums in float32. Backward,
with ds the norm's (`norm`): d(y L^T) = ds, d(y G^T) = ds (Phi(a) + a phi(a)), beside each other in one buffer, so that
dy = [d(y L^T) | d(y G^T)] [L; G] is one product; then the first norm's.

Layout: x and the output's gradient (..., C) and (..., D) with any leading strides; all between them dense rows. A tile is
BLOCK_N rows, held in registers; the backwards' programs go on from tile to tile with their sums of rows. Bytes, in units
of rows x D elements, C = D: forward 1 read, 1 written (y), products 2 read, 2 written, 2 read, 1 written: 9; backward,
where y and y L^T are made again, 19, of which the products move 9.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiger_fast.kernels import config
from tiger_fast.kernels.device import row_index, row_offsets, rows_behind, share_of, stride
from tiger_fast.kernels.launch import alignment, dense, joined, kernel, launch, strides
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
def _rows(first, index, sizes, row_strides, rows, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr):
    # A tile's rows, which exist, and where they begin, (BLOCK_N, 1), in a tensor of `launch.joined` dimensions.
    behind = tl.arange(0, BLOCK_N)
    row = first + behind
    return row, row < rows, row_offsets(rows_behind(index, sizes, behind), row_strides, ALIGN)[:, None]


@triton.jit
def _get(pointer, offsets, column, inside):
    return tl.load(pointer + offsets + column[None, :], mask=inside, other=0.0).to(tl.float32)


@kernel
def _in_forward(
    x_ptr,
    x_strides,
    sizes,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows: tl.int64,
    eps: tl.float32,
    D: tl.constexpr,
    HELD: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    row, exists, x_base = _rows(first, row_index(first, sizes), sizes, x_strides, rows, ALIGN, BLOCK_N)
    out = row[:, None] * D
    if HELD:
        held = ()
        for c in tl.static_range(CHUNKS):
            column = columns(c, BLOCK_D)
            held = held + (_get(x_ptr, x_base, column, of_tile(exists, column, D)),)
        mean, scale = moments(held, eps, D, BLOCK_D)
        put_normalised(out_ptr, out, held, mean, scale, weight_ptr, bias_ptr, exists, D, BLOCK_D)
    else:
        mean = tl.zeros((BLOCK_N, 1), tl.float32)
        squares = tl.zeros((BLOCK_N, 1), tl.float32)
        for chunk in range(CHUNKS):
            column = columns(chunk, BLOCK_D)
            x = _get(x_ptr, x_base, column, of_tile(exists, column, D))
            mean, squares = merge(mean, squares, x, chunk, D, BLOCK_D)
        scale = scale_of(squares, eps, D)
        for chunk in range(CHUNKS):
            column = columns(chunk, BLOCK_D)
            inside = of_tile(exists, column, D)
            x = _get(x_ptr, x_base, column, inside)
            y = (x - mean) * scale * parameter(weight_ptr, column, inside) + parameter(bias_ptr, column, inside)
            put(out_ptr, out + column[None, :], y, inside)


@kernel
def _in_backward(
    grad_ptr,
    x_ptr,
    x_strides,
    sizes,
    weight_ptr,
    grad_x_ptr,
    sums_ptr,
    rows: tl.int64,
    each: tl.int32,
    extra: tl.int32,
    eps: tl.float32,
    D: tl.constexpr,
    NEEDS: tl.constexpr,
    HELD: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # NEEDS: x, the norm's weight, its bias.
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    FOR_X: tl.constexpr = NEEDS & 1
    FOR_SCALE: tl.constexpr = (NEEDS >> 1) & 1
    FOR_BIAS: tl.constexpr = (NEEDS >> 2) & 1
    program = tl.program_id(0)
    begin, end = share_of(program, each, extra)
    sums_ptr += program.to(tl.int64) * (FOR_SCALE + FOR_BIAS) * D
    bias_sums_ptr = sums_ptr + FOR_SCALE * D
    scale_sums = zeros_like_row(CHUNKS if HELD and FOR_SCALE else 0, BLOCK_N, BLOCK_D)
    bias_sums = zeros_like_row(CHUNKS if HELD and FOR_BIAS else 0, BLOCK_N, BLOCK_D)
    first = begin.to(tl.int64) * BLOCK_N
    index = row_index(first, sizes)
    for tile in range(begin, end):
        row, exists, x_base = _rows(first, index, sizes, x_strides, rows, ALIGN, BLOCK_N)
        out = row[:, None] * D
        level, along = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        if HELD:
            held = ()
            for c in tl.static_range(CHUNKS):
                column = columns(c, BLOCK_D)
                held = held + (_get(x_ptr, x_base, column, of_tile(exists, column, D)),)
            mean, scale = moments(held, eps, D, BLOCK_D)
            hs, gs, scale_slopes, bias_slopes, level, along = slopes_of_row(
                held, mean, scale, grad_ptr, out, weight_ptr, exists, FOR_SCALE, FOR_BIAS, D, BLOCK_D
            )
            scale_sums, bias_sums = added(scale_sums, scale_slopes), added(bias_sums, bias_slopes)
            if FOR_X:
                mean_g, mean_gh = level_of(level, D), level_of(along, D)
                for c in tl.static_range(CHUNKS):
                    column = columns(c, BLOCK_D)
                    dx = (gs[c] - mean_g - hs[c] * mean_gh) * scale
                    put(grad_x_ptr, out + column[None, :], dx, of_tile(exists, column, D))
        else:
            mean = tl.zeros((BLOCK_N, 1), tl.float32)
            squares = tl.zeros((BLOCK_N, 1), tl.float32)
            for chunk in range(CHUNKS):
                column = columns(chunk, BLOCK_D)
                x = _get(x_ptr, x_base, column, of_tile(exists, column, D))
                mean, squares = merge(mean, squares, x, chunk, D, BLOCK_D)
            scale = scale_of(squares, eps, D)
            for chunk in range(CHUNKS):
                column = columns(chunk, BLOCK_D)
                inside = of_tile(exists, column, D)
                grad = _get(grad_ptr, out, column, inside)
                x = _get(x_ptr, x_base, column, inside)
                h, slope, g = slopes(x, mean, scale, grad, weight_ptr, column, inside)
                level += g
                along += g * h
                if FOR_SCALE:
                    add_to_sums(sums_ptr, slope, column, tile == begin, D)
                if FOR_BIAS:
                    add_to_sums(bias_sums_ptr, grad, column, tile == begin, D)
            if FOR_X:
                mean_g, mean_gh = level_of(level, D), level_of(along, D)
                for chunk in range(CHUNKS):
                    column = columns(chunk, BLOCK_D)
                    inside = of_tile(exists, column, D)
                    grad = _get(grad_ptr, out, column, inside)
                    x = _get(x_ptr, x_base, column, inside)
                    h, _, g = slopes(x, mean, scale, grad, weight_ptr, column, inside)
                    put(grad_x_ptr, out + column[None, :], (g - mean_g - h * mean_gh) * scale, inside)
            # The next tile reads the sums that this one has written.
            tl.debug_barrier()
        first += BLOCK_N
        index = rows_behind(index, sizes, tl.full((), BLOCK_N, tl.int32))
    put_sums(sums_ptr, scale_sums, D, BLOCK_D)
    put_sums(bias_sums_ptr, bias_sums, D, BLOCK_D)


@triton.jit
def _open(gate):
    # Phi(gate).
    return 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)


@triton.jit
def _add_up(linear_ptr, linear_base, gate_ptr, gate_base, linear_bias_ptr, gate_bias_ptr, column, inside):
    # A tile of s, and of what d(y G^T) is to ds.
    linear = _get(linear_ptr, linear_base, column, inside) + parameter(linear_bias_ptr, column, inside)
    gate = _get(gate_ptr, gate_base, column, inside) + parameter(gate_bias_ptr, column, inside)
    phi = _open(gate)
    return linear + gate * phi, phi + gate * tl.exp(gate * gate * -0.5) * 0.3989422804014327


@kernel
def _out_forward(
    linear_ptr,
    gate_ptr,
    linear_bias_ptr,
    gate_bias_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows: tl.int64,
    eps: tl.float32,
    D: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < rows
    base = row[:, None] * D
    if HELD:
        held = ()
        for c in tl.static_range(CHUNKS):
            column = columns(c, BLOCK_D)
            inside = of_tile(exists, column, D)
            s, _ = _add_up(linear_ptr, base, gate_ptr, base, linear_bias_ptr, gate_bias_ptr, column, inside)
            held = held + (s,)
        mean, scale = moments(held, eps, D, BLOCK_D)
        put_normalised(out_ptr, base, held, mean, scale, weight_ptr, bias_ptr, exists, D, BLOCK_D)
    else:
        mean = tl.zeros((BLOCK_N, 1), tl.float32)
        squares = tl.zeros((BLOCK_N, 1), tl.float32)
        for chunk in range(CHUNKS):
            column = columns(chunk, BLOCK_D)
            inside = of_tile(exists, column, D)
            s, _ = _add_up(linear_ptr, base, gate_ptr, base, linear_bias_ptr, gate_bias_ptr, column, inside)
            mean, squares = merge(mean, squares, s, chunk, D, BLOCK_D)
        scale = scale_of(squares, eps, D)
        for chunk in range(CHUNKS):
            column = columns(chunk, BLOCK_D)
            inside = of_tile(exists, column, D)
            s, _ = _add_up(linear_ptr, base, gate_ptr, base, linear_bias_ptr, gate_bias_ptr, column, inside)
            y = (s - mean) * scale * parameter(weight_ptr, column, inside) + parameter(bias_ptr, column, inside)
            put(out_ptr, base + column[None, :], y, inside)


@kernel
def _out_backward(
    grad_ptr,
    grad_strides,
    sizes,
    linear_ptr,
    linear_strides,
    gate_ptr,
    linear_bias_ptr,
    gate_bias_ptr,
    weight_ptr,
    into_gate_ptr,
    sums_ptr,
    rows: tl.int64,
    each: tl.int32,
    extra: tl.int32,
    eps: tl.float32,
    D: tl.constexpr,
    NEEDS: tl.constexpr,
    HELD: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # NEEDS: d(y L^T), which takes y L^T's place tile by tile, d(y G^T), in the same buffer; the biases l and g, the norm's
    # weight and bias, whose sums lie behind each other in this order.
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    INTO_LINEAR: tl.constexpr = NEEDS & 1
    INTO_GATE: tl.constexpr = (NEEDS >> 1) & 1
    FOR_LINEAR: tl.constexpr = (NEEDS >> 2) & 1
    FOR_GATE: tl.constexpr = (NEEDS >> 3) & 1
    FOR_SCALE: tl.constexpr = (NEEDS >> 4) & 1
    FOR_BIAS: tl.constexpr = (NEEDS >> 5) & 1
    FOR_ROWS: tl.constexpr = (NEEDS & 15) != 0
    OPEN: tl.constexpr = INTO_GATE or FOR_GATE
    program = tl.program_id(0)
    begin, end = share_of(program, each, extra)
    linear_sums_ptr = sums_ptr + program.to(tl.int64) * (FOR_LINEAR + FOR_GATE + FOR_SCALE + FOR_BIAS) * D
    gate_sums_ptr = linear_sums_ptr + FOR_LINEAR * D
    scale_sums_ptr = gate_sums_ptr + FOR_GATE * D
    bias_sums_ptr = scale_sums_ptr + FOR_SCALE * D
    linear_sums = zeros_like_row(CHUNKS if HELD and FOR_LINEAR else 0, BLOCK_N, BLOCK_D)
    gate_sums = zeros_like_row(CHUNKS if HELD and FOR_GATE else 0, BLOCK_N, BLOCK_D)
    scale_sums = zeros_like_row(CHUNKS if HELD and FOR_SCALE else 0, BLOCK_N, BLOCK_D)
    bias_sums = zeros_like_row(CHUNKS if HELD and FOR_BIAS else 0, BLOCK_N, BLOCK_D)
    first = begin.to(tl.int64) * BLOCK_N
    index = row_index(first, sizes)
    for tile in range(begin, end):
        row, exists, grad_base = _rows(first, index, sizes, grad_strides, rows, GRAD_ALIGN, BLOCK_N)
        gate_base = row[:, None] * D
        base = row[:, None] * stride(linear_strides[0], ALIGN)
        level, along = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        if HELD:
            held, opens = (), ()
            for c in tl.static_range(CHUNKS):
                column = columns(c, BLOCK_D)
                inside = of_tile(exists, column, D)
                s, opened = _add_up(
                    linear_ptr, base, gate_ptr, gate_base, linear_bias_ptr, gate_bias_ptr, column, inside
                )
                held = held + (s,)
                if OPEN:
                    opens = opens + (opened,)
            mean, scale = moments(held, eps, D, BLOCK_D)
            hs, gs, scale_slopes, bias_slopes, level, along = slopes_of_row(
                held, mean, scale, grad_ptr, grad_base, weight_ptr, exists, FOR_SCALE, FOR_BIAS, D, BLOCK_D
            )
            scale_sums, bias_sums = added(scale_sums, scale_slopes), added(bias_sums, bias_slopes)
            if FOR_ROWS:
                mean_g, mean_gh = level_of(level, D), level_of(along, D)
                linear_slopes, gate_slopes = (), ()
                for c in tl.static_range(CHUNKS):
                    column = columns(c, BLOCK_D)
                    inside = of_tile(exists, column, D)
                    ds = tl.where(inside, (gs[c] - mean_g - hs[c] * mean_gh) * scale, 0.0)
                    if INTO_LINEAR:
                        put(linear_ptr, base + column[None, :], ds, inside)
                    if FOR_LINEAR:
                        linear_slopes = linear_slopes + (ds,)
                    if OPEN:
                        through = tl.where(inside, ds * opens[c], 0.0)
                        if INTO_GATE:
                            put(into_gate_ptr, base + column[None, :], through, inside)
                        if FOR_GATE:
                            gate_slopes = gate_slopes + (through,)
                linear_sums, gate_sums = added(linear_sums, linear_slopes), added(gate_sums, gate_slopes)
        else:
            mean = tl.zeros((BLOCK_N, 1), tl.float32)
            squares = tl.zeros((BLOCK_N, 1), tl.float32)
            for chunk in range(CHUNKS):
                column = columns(chunk, BLOCK_D)
                inside = of_tile(exists, column, D)
                s, _ = _add_up(linear_ptr, base, gate_ptr, gate_base, linear_bias_ptr, gate_bias_ptr, column, inside)
                mean, squares = merge(mean, squares, s, chunk, D, BLOCK_D)
            scale = scale_of(squares, eps, D)
            for chunk in range(CHUNKS):
                column = columns(chunk, BLOCK_D)
                inside = of_tile(exists, column, D)
                s, _ = _add_up(linear_ptr, base, gate_ptr, gate_base, linear_bias_ptr, gate_bias_ptr, column, inside)
                grad = _get(grad_ptr, grad_base, column, inside)
                h, slope, g = slopes(s, mean, scale, grad, weight_ptr, column, inside)
                level += g
                along += g * h
                if FOR_SCALE:
                    add_to_sums(scale_sums_ptr, slope, column, tile == begin, D)
                if FOR_BIAS:
                    add_to_sums(bias_sums_ptr, grad, column, tile == begin, D)
            if FOR_ROWS:
                mean_g, mean_gh = level_of(level, D), level_of(along, D)
                for chunk in range(CHUNKS):
                    column = columns(chunk, BLOCK_D)
                    inside = of_tile(exists, column, D)
                    s, opened = _add_up(
                        linear_ptr, base, gate_ptr, gate_base, linear_bias_ptr, gate_bias_ptr, column, inside
                    )
                    grad = _get(grad_ptr, grad_base, column, inside)
                    h, _, g = slopes(s, mean, scale, grad, weight_ptr, column, inside)
                    ds = tl.where(inside, (g - mean_g - h * mean_gh) * scale, 0.0)
                    through = tl.where(inside, ds * opened, 0.0)
                    # All of the tile is read before any of it is written.
                    tl.debug_barrier()
                    if INTO_LINEAR:
                        put(linear_ptr, base + column[None, :], ds, inside)
                    if INTO_GATE:
                        put(into_gate_ptr, base + column[None, :], through, inside)
                    if FOR_LINEAR:
                        add_to_sums(linear_sums_ptr, ds, column, tile == begin, D)
                    if FOR_GATE:
                        add_to_sums(gate_sums_ptr, through, column, tile == begin, D)
            # The next tile reads the sums that this one has written.
            tl.debug_barrier()
        first += BLOCK_N
        index = rows_behind(index, sizes, tl.full((), BLOCK_N, tl.int32))
    put_sums(linear_sums_ptr, linear_sums, D, BLOCK_D)
    put_sums(gate_sums_ptr, gate_sums, D, BLOCK_D)
    put_sums(scale_sums_ptr, scale_sums, D, BLOCK_D)
    put_sums(bias_sums_ptr, bias_sums, D, BLOCK_D)


def _shape(name: str, like: Tensor, width: int) -> tuple[config.Config, dict[str, int]]:
    # A kernel's configuration, and the constants that are every kernel's.
    c = config.choose(name, like.device, like.dtype, D=width)
    return c, {
        "D": width,
        "HELD": c.held,
        "BLOCK_N": c.rows,
        "BLOCK_D": c.width,
        **c.options,
    }


def _count(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _normalized(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    # LayerNorm(x), (rows, C).
    rows, width = _count(x), x.shape[-1]
    out = x.new_empty((rows, width))
    sizes, x_strides = joined(x.shape[:-1], x)
    c, shape = _shape("adapter_in_forward", x, width)
    launch(
        _in_forward,
        triton.cdiv(rows, c.rows),
        x,
        x_strides,
        sizes,
        dense(weight),
        dense(bias),
        out,
        rows,
        eps,
        ALIGN=alignment(x),
        **shape,
    )
    return out


def _sums(c: config.Config, like: Tensor, rows: int, outs: list[Tensor]) -> tuple[int, Tensor | None]:
    # How many programs share the rows, and memory for their sums.
    programs = min(triton.cdiv(rows, c.rows), c.resident * config.MULTIPROCESSORS)
    if not outs:
        return programs, None
    allocate = like.new_empty if programs else like.new_zeros  # without rows there are sums too
    return programs, allocate((max(1, programs), len(outs), outs[0].shape[0]), dtype=torch.float32)


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
) -> tuple[Tensor, Tensor]:
    """The output (..., D), and y G^T (rows, D), which the backward wants: see the module."""
    x = dense(x)
    rows, width = _count(x), linear_weight.shape[0]
    out = x.new_empty((*x.shape[:-1], width))
    linear, gate = x.new_empty((rows, width)), x.new_empty((rows, width))
    y = _normalized(x, norm_in_weight, norm_in_bias, eps)
    torch.mm(y, linear_weight.to(x.dtype).t(), out=linear)
    torch.mm(y, gate_weight.to(x.dtype).t(), out=gate)
    c, shape = _shape("adapter_out_forward", x, width)
    launch(
        _out_forward,
        triton.cdiv(rows, c.rows),
        linear,
        gate,
        *map(dense, (linear_bias, gate_bias, norm_out_weight, norm_out_bias)),
        out,
        rows,
        eps,
        **shape,
    )
    return out, gate


def adapter_backward(
    grad: Tensor,
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
    gate: Tensor,
    needs: int,
) -> list[Tensor]:
    """The gradients of all arguments of `adapter` but eps, those whose bit in `needs` is set."""
    x, grad = dense(x), dense(grad)
    rows, channels, width = _count(x), x.shape[-1], linear_weight.shape[0]
    inputs = (x, norm_in_weight, norm_in_bias, linear_weight, linear_bias, gate_weight, gate_bias)
    inputs += (norm_out_weight, norm_out_bias)
    found: list[Tensor | None] = [None] * len(inputs)
    for i in (0, 1, 2, 4, 6, 7, 8):  # products make the others
        if needs >> i & 1:
            found[i] = inputs[i].new_empty(inputs[i].shape)
    into_y = needs & 7
    into_linear, into_gate = into_y or needs >> 3 & 1, into_y or needs >> 5 & 1

    y = _normalized(x, norm_in_weight, norm_in_bias, eps)
    # d(y L^T), as which y L^T begins, and d(y G^T)
    products = x.new_empty((rows, 2 * width if into_gate else width))
    linear = products[:, :width]
    torch.mm(y, linear_weight.to(x.dtype).t(), out=linear)
    c, shape = _shape("adapter_out_backward", x, width)
    sizes, grad_strides = joined(grad.shape[:-1], grad)
    outs = [found[i] for i in (4, 6, 7, 8) if found[i] is not None]
    programs, sums = _sums(c, x, rows, outs)
    launch(
        _out_backward,
        programs,
        grad,
        grad_strides,
        sizes,
        linear,
        strides(linear),
        gate,
        *map(dense, (linear_bias, gate_bias, norm_out_weight)),
        products[:, width:] if into_gate else products,
        gate if sums is None else sums,
        rows,
        *divmod(triton.cdiv(rows, c.rows), max(1, programs)),
        eps,
        NEEDS=bool(into_linear) | bool(into_gate) << 1 | (needs >> 4 & 1) << 2 | (needs >> 6 & 7) << 3,
        GRAD_ALIGN=alignment(grad),
        ALIGN=alignment(products),
        **shape,
    )
    if sums is not None:
        column_sums(sums, outs)

    for i, product in ((3, linear), (5, products[:, width:])):
        if needs >> i & 1:
            found[i] = torch.mm(product.t(), y, out=x.new_empty((width, channels))).to(inputs[i].dtype)
    if into_y:
        both = x.new_empty((2 * width, channels))
        both[:width].copy_(linear_weight)
        both[width:].copy_(gate_weight)
        grad_y = torch.mm(products, both, out=y)  # y has done its work
        c, shape = _shape("adapter_in_backward", x, channels)
        sizes, x_strides = joined(x.shape[:-1], x)
        outs = [t for t in found[1:3] if t is not None]
        programs, sums = _sums(c, x, rows, outs)
        launch(
            _in_backward,
            programs,
            grad_y,
            x,
            x_strides,
            sizes,
            dense(norm_in_weight),
            x if found[0] is None else found[0],
            y if sums is None else sums,
            rows,
            *divmod(triton.cdiv(rows, c.rows), max(1, programs)),
            eps,
            NEEDS=into_y,
            ALIGN=alignment(x),
            **shape,
        )
        if sums is not None:
            column_sums(sums, outs)
    return [t for t in found if t is not None]
