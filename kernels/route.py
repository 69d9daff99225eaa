"""Task-conditioned routing, forward (TIGER eqs. 4-7), for all tasks from one pass over the experts.

With base = q W0 / sqrt(D), z = q U / sqrt(D), u_k = V^T F_k and c_t = (b0 + h_t) / sqrt(D), no query of a task is formed:

    s_tk = base . F_k + sum_r z_r g_tr u_kr + c_t . F_k        w_t = softmax over k of s_t        f_t = sum_k w_tk F_k

The last two terms of s are one product, with the factors [V | c] (D, W) made beforehand by `_factors`, and one small one:

    P_k = F_k [V | c]        X = [z | 1]        s_k = base . F_k + (X o P_k) [g | I]^T

so the wide products do not grow with the number of tasks: a further one costs M (R + D) multiply-adds a token. Beside
16-bit activations c has two columns a task, c rounded and the rest, so that it counts to 16 bits or more.

Two designs, chosen by `config.route`:
- product, then fused: base and z come from the library's matrix product. In units of B N D elements: 2 + M read (q, base,
  experts), 1 + T written.
- one pass: base is made a tile at a time from q and W0, and used while it is on chip: 1 + M read, T written, and 1 more
  for the backward. W0 is read once a program, from L2, so it is for programs of many tokens.

Layout: query (B, N, D), experts M x (B, N, D), tokens (B, T, N, D), weights (B, T, N, M). A program takes BLOCK_N tokens
of a sample and sweeps the channels twice: once for the logits, which stay in registers for all tasks and experts, and,
when the weights are in their output, once for the mixtures, each tile of the experts serving all tasks. The second sweep
is to find the experts in L2: a program's are BLOCK_N M D elements, which the first sweep asks the cache to keep.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiger_fast.kernels import config
from tiger_fast.kernels.device import dot_like, rows, rows_of, softmax_of, stride
from tiger_fast.kernels.launch import alignment, dense, kernel, launch, power, strides


@kernel
def _factors(
    v_ptr,
    shift_ptr,
    shift_strides,
    bias_ptr,
    factors_ptr,
    tasks: tl.int64,
    factor: tl.float32,
    D: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample = program // tl.cdiv(D, BLOCK_D)
    channel = (program % tl.cdiv(D, BLOCK_D)) * BLOCK_D + tl.arange(0, BLOCK_D)
    column = tl.arange(0, W)
    exists = (channel < D)[:, None]
    in_v = exists & (column < R)[None, :]
    v = tl.load(v_ptr + channel[:, None] * R + column[None, :], mask=in_v, other=0.0).to(tl.float32)
    task = (column - R) % tasks
    in_shift = exists & ((column >= R) & (column < R + 2 * tasks))[None, :]
    offsets = rows(shift_strides, sample, task, 1)[None, :] + channel[:, None]
    shift = tl.load(shift_ptr + offsets, mask=in_shift, other=0.0).to(tl.float32)
    if BIAS:
        shift += tl.load(bias_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)[:, None]
    shift *= factor
    dtype = factors_ptr.dtype.element_ty
    # What rounding took away stands in the second T columns: nothing, for float32.
    shift = tl.where((column < R + tasks)[None, :], shift, shift - shift.to(dtype).to(tl.float32))
    result = tl.where(in_v, v, tl.where(in_shift, shift, 0.0))
    to = (sample * D + channel)[:, None] * W + column[None, :]
    tl.store(factors_ptr + to, result.to(dtype), mask=exists)


@triton.jit
def load_x(z_ptr, row, exists, column, R: tl.constexpr):
    """Columns of X = [z | 1], (BLOCK_N, BLOCK_W), in float32."""
    inside = exists[:, None] & (column < R)[None, :]
    z = tl.load(z_ptr + row[:, None] * R + column[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.where((column < R)[None, :], z, 1.0)


@triton.jit
def load_scale(scale_ptr, scale_strides, sample, t, column, tasks, R: tl.constexpr):
    """Columns of a task's row of [g | I], (BLOCK_W), in float32; I has two columns for every task."""
    scale = tl.load(scale_ptr + rows(scale_strides, sample, t, 1) + column, mask=column < R, other=0.0).to(tl.float32)
    return tl.where((column - R == t) | (column - R == t + tasks), 1.0, scale)


@triton.jit
def _make_base(
    query_ptr,
    query_rows,
    weight_ptr,
    exists,
    column,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # A tile (BLOCK_N, BLOCK_C) of query @ weight, weight (D, COLUMNS).
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for chunk in tl.range((D + BLOCK_D - 1) // BLOCK_D, disable_licm=True):
        inner = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        in_query = exists[:, None] & (inner < D)[None, :]
        query = tl.load(query_ptr + query_rows[:, None] + inner[None, :], mask=in_query, other=0.0)
        in_weight = (inner < D)[:, None] & (column < COLUMNS)[None, :]
        weight = tl.load(weight_ptr + inner[:, None] * COLUMNS + column[None, :], mask=in_weight, other=0.0)
        total = dot_like(query, weight, total, PRECISION)
    return total


@triton.jit
def load_expert(expert_ptrs, expert_strides, m: tl.constexpr, sample, token, column, inside, ALIGN: tl.constexpr):
    """A tile of an expert that this program reads again: the cache is asked to keep it."""
    offsets = rows(expert_strides[m], sample, token, ALIGN)[:, None] + column[None, :]
    return tl.load(expert_ptrs[m] + offsets, mask=inside, other=0.0, eviction_policy="evict_last")


@triton.jit
def _load_factors(factors_ptr, column, factor_column, D: tl.constexpr, W: tl.constexpr):
    tile = factors_ptr + column[:, None] * W + factor_column[None, :]
    return tl.load(tile, mask=(column < D)[:, None], other=0.0)


@triton.jit
def products_of(
    expert_ptrs,
    expert_strides,
    factors_ptr,
    sample,
    token,
    exists,
    factor_column,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Columns of P_k, (BLOCK_N, BLOCK_W), of experts FIRST to FIRST + SIZE, from one sweep over the channels."""
    products = ()
    for _ in tl.static_range(SIZE):
        products = products + (tl.zeros((BLOCK_N, BLOCK_W), tl.float32),)
    for chunk in tl.range((D + BLOCK_D - 1) // BLOCK_D, disable_licm=True):
        column = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = exists[:, None] & (column < D)[None, :]
        factors = _load_factors(factors_ptr, column, factor_column, D, W)
        more = ()
        for i in tl.static_range(SIZE):
            expert = load_expert(expert_ptrs, expert_strides, FIRST + i, sample, token, column, inside, ALIGN)
            more = more + (dot_like(expert, factors, products[i], PRECISION),)
        products = more
    return products


@triton.jit
def _products_and_base(
    query_ptr,
    query_rows,
    expert_ptrs,
    expert_strides,
    base_weight_ptr,
    factors_ptr,
    base_ptr,
    sample,
    token,
    exists,
    row,
    factor,
    factor_column,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    ONE_PASS: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # base . F_k, (BLOCK_N), and what `products_of` gives, from the same sweep.
    dots, products = (), ()
    for _ in tl.static_range(SIZE):
        dots = dots + (tl.zeros((BLOCK_N,), tl.float32),)
        products = products + (tl.zeros((BLOCK_N, BLOCK_W), tl.float32),)
    for chunk in tl.range((D + BLOCK_D - 1) // BLOCK_D, disable_licm=True):
        column = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = exists[:, None] & (column < D)[None, :]
        base_tile = base_ptr + row[:, None] * D + column[None, :]
        if ONE_PASS:
            base = _make_base(
                query_ptr, query_rows, base_weight_ptr, exists, column, D, D, PRECISION, BLOCK_N, BLOCK_D, BLOCK_D
            )
            base = (base * factor).to(base_ptr.dtype.element_ty)
            tl.store(base_tile, base, mask=inside)
        else:
            base = tl.load(base_tile, mask=inside, other=0.0)
        factors = _load_factors(factors_ptr, column, factor_column, D, W)
        new_dots, new_products = (), ()
        for i in tl.static_range(SIZE):
            expert = load_expert(expert_ptrs, expert_strides, FIRST + i, sample, token, column, inside, ALIGN)
            new_dots = new_dots + (dots[i] + tl.sum(base.to(tl.float32) * expert.to(tl.float32), axis=1),)
            new_products = new_products + (dot_like(expert, factors, products[i], PRECISION),)
        dots, products = new_dots, new_products
    return dots, products


@triton.jit
def _add_logits(
    logits, x, products, scale_ptr, scale_strides, sample, column, tasks, R: tl.constexpr, BLOCK_T: tl.constexpr
):
    # logits, a tuple of (BLOCK_N, BLOCK_T), and what these columns of P add to them. Not by tl.dot: without matrix
    # instructions for float32 its operands would fill the registers, and this is W / D of the mixtures' work.
    task = tl.arange(0, BLOCK_T)
    scaled = ()
    for i in tl.static_range(len(logits)):
        scaled = scaled + (x * products[i],)
    for t in tl.range(0, tasks, disable_licm=True):
        scale = load_scale(scale_ptr, scale_strides, sample, t, column, tasks, R)
        more = ()
        for i in tl.static_range(len(logits)):
            added = tl.sum(scaled[i] * scale[None, :], axis=1)
            more = more + (logits[i] + tl.where((task == t)[None, :], added[:, None], 0.0),)
        logits = more
    return logits


@kernel
def _forward(
    query_ptr,
    query_strides,
    expert_ptrs,
    expert_strides,
    base_weight_ptr,
    u_ptr,
    scale_ptr,
    scale_strides,
    factors_ptr,
    factors_strides,
    tokens_ptr,
    weights_ptr,
    base_ptr,
    z_ptr,
    tokens: tl.int64,
    tasks: tl.int64,
    factor: tl.float32,
    D: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    ONE_PASS: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    GROUP: tl.constexpr,
):
    M: tl.constexpr = len(expert_ptrs)
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    sample, token, exists = rows_of(tl.program_id(0).to(tl.int64), tokens, BLOCK_N)
    row = sample * tokens + token
    task = tl.arange(0, BLOCK_T)
    factors_ptr += sample * stride(factors_strides[0], 16)

    query_rows = rows(query_strides, sample, token, ALIGN)
    if ONE_PASS:
        rank = tl.arange(0, BLOCK_R)
        z_tile = _make_base(query_ptr, query_rows, u_ptr, exists, rank, D, R, PRECISION, BLOCK_N, BLOCK_D, BLOCK_R)
        in_z = exists[:, None] & (rank < R)[None, :]
        tl.store(z_ptr + row[:, None] * R + rank[None, :], (z_tile * factor).to(z_ptr.dtype.element_ty), mask=in_z)
        tl.debug_barrier()  # it is read again below, by other threads
    in_weights = exists[:, None] & (task < tasks)[None, :]
    weight_rows = ((sample * tasks + task)[None, :] * tokens + token[:, None]) * M
    logits = ()
    for group in tl.static_range((M + GROUP - 1) // GROUP):
        factor_column = tl.arange(0, BLOCK_W)
        x = load_x(z_ptr, row, exists, factor_column, R)
        dots, products = _products_and_base(
            query_ptr,
            query_rows,
            expert_ptrs,
            expert_strides,
            base_weight_ptr,
            factors_ptr,
            base_ptr,
            sample,
            token,
            exists,
            row,
            factor,
            factor_column,
            group * GROUP,
            min(GROUP, M - group * GROUP),
            D,
            W,
            ONE_PASS,
            ALIGN,
            PRECISION,
            BLOCK_N,
            BLOCK_D,
            BLOCK_W,
        )
        some = ()
        for i in tl.static_range(len(dots)):
            some = some + (tl.zeros((BLOCK_N, BLOCK_T), tl.float32) + dots[i][:, None],)
        some = _add_logits(some, x, products, scale_ptr, scale_strides, sample, factor_column, tasks, R, BLOCK_T)
        for block in range(1, W // BLOCK_W):
            factor_column = block * BLOCK_W + tl.arange(0, BLOCK_W)
            x = load_x(z_ptr, row, exists, factor_column, R)
            products = products_of(
                expert_ptrs,
                expert_strides,
                factors_ptr,
                sample,
                token,
                exists,
                factor_column,
                group * GROUP,
                min(GROUP, M - group * GROUP),
                D,
                W,
                ALIGN,
                PRECISION,
                BLOCK_N,
                BLOCK_D,
                BLOCK_W,
            )
            some = _add_logits(some, x, products, scale_ptr, scale_strides, sample, factor_column, tasks, R, BLOCK_T)
        if M <= GROUP:
            logits = some
        else:
            # More would not fit in registers: they wait in the weights' place.
            for i in tl.static_range(len(some)):
                tl.store(weights_ptr + weight_rows + group * GROUP + i, some[i], mask=in_weights)
    if M <= GROUP:
        weights = softmax_of(logits)
        for m in tl.static_range(M):
            tl.store(weights_ptr + weight_rows + m, weights[m], mask=in_weights)
    else:
        tl.debug_barrier()
        largest = tl.full((BLOCK_N, BLOCK_T), float("-inf"), tl.float32)
        for member in range(M):
            largest = tl.maximum(largest, tl.load(weights_ptr + weight_rows + member, mask=in_weights, other=0.0))
        total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        for member in range(M):
            total += tl.exp(tl.load(weights_ptr + weight_rows + member, mask=in_weights, other=0.0) - largest)
        for member in range(M):
            weight = tl.exp(tl.load(weights_ptr + weight_rows + member, mask=in_weights, other=0.0) - largest) / total
            tl.debug_barrier()  # all threads that hold a copy have read it
            tl.store(weights_ptr + weight_rows + member, weight, mask=in_weights)
    # What follows reads the weights in another arrangement over threads than the one they were written in.
    tl.debug_barrier()

    for chunk in range(CHUNKS):
        column = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = exists[:, None] & (column < D)[None, :]
        tiles = ()
        for m in tl.static_range(M):
            offsets = rows(expert_strides[m], sample, token, ALIGN)[:, None] + column[None, :]
            tile = tl.load(expert_ptrs[m] + offsets, mask=inside, other=0.0, eviction_policy="evict_first")
            tiles = tiles + (tile,)
        for t in tl.range(0, tasks, disable_licm=True):
            mixed = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            weight_row = ((sample * tasks + t) * tokens + token) * M
            for m in tl.static_range(M):
                share = tl.load(weights_ptr + weight_row + m, mask=exists, other=0.0)
                mixed += share[:, None] * tiles[m].to(tl.float32)
            to = ((sample * tasks + t) * tokens + token)[:, None] * D + column[None, :]
            tl.store(tokens_ptr + to, mixed.to(tokens_ptr.dtype.element_ty), mask=inside, eviction_policy="evict_first")


def per_sample(modulation: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """(T, X) or (B, T, X), and strides over (B, T, X), 0 over B where it is shared."""
    modulation = dense(modulation)
    return modulation, strides(modulation if modulation.dim() == 3 else modulation.expand(2, -1, -1))


def make_factors(
    v: Tensor, shift: Tensor, base_bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, tuple[int, ...]]:
    """[V | c] as (1 or B, D, W), W a power of two, and its strides, 0 over B where it is shared."""
    width, rank = v.shape
    tasks, samples = shift.shape[-2], shift.shape[0] if shift.dim() == 3 else 1
    shift, shift_strides = per_sample(shift)
    factors = v.new_empty((samples, width, max(16, power(rank + 2 * tasks))), dtype=dtype)
    block = max(1, 4096 // factors.shape[-1])
    launch(
        _factors,
        samples * triton.cdiv(width, block),
        v.contiguous(),
        shift,
        shift_strides,
        shift if base_bias is None else base_bias.contiguous(),
        factors,
        tasks,
        1 / math.sqrt(width),
        D=width,
        R=rank,
        W=factors.shape[-1],
        BIAS=base_bias is not None,
        BLOCK_D=block,
        num_warps=4,
    )
    return factors, strides(factors if shift.dim() == 3 else factors.expand(2, -1, -1))


def route(
    query: Tensor,
    experts: Sequence[Tensor],
    base_weight: Tensor,
    base_bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens (B, T, N, D), weights (B, T, N, M), and q W0 / sqrt(D) and q U / sqrt(D): see the module."""
    batch, tokens, width = query.shape
    dtype, members, tasks, rank = query.dtype, len(experts), scale.shape[-2], u.shape[1]
    query, experts = dense(query), tuple(map(dense, experts))
    base_weight, u = (p.to(dtype).contiguous() for p in (base_weight, u))
    scale, scale_strides = per_sample(scale)
    mixtures = query.new_empty((batch, tasks, tokens, width))
    weights = query.new_empty((batch, tasks, tokens, members), dtype=torch.float32)
    base = query.new_empty((batch, tokens, width))
    z = query.new_empty((batch, tokens, rank))
    if not base.numel():
        return mixtures, weights, base, z
    factors, factors_strides = make_factors(v, shift, base_bias, dtype)
    factor = 1 / math.sqrt(width)
    c = config.choose("route", query.device, dtype, D=width, M=members, T=power(tasks), W=factors.shape[-1])
    one_pass = c.one_pass and c.experts >= members
    if not one_pass:
        flat = query.reshape(batch * tokens, width)
        for product, factor_of in ((base.view(-1, width), base_weight), (z.view(-1, rank), u)):
            torch.addmm(product, flat, factor_of, beta=0, alpha=factor, out=product)
    launch(
        _forward,
        batch * triton.cdiv(tokens, c.rows),
        query,
        strides(query),
        experts,
        tuple(map(strides, experts)),
        base_weight,
        u,
        scale,
        scale_strides,
        factors,
        factors_strides,
        mixtures,
        weights,
        base,
        z,
        tokens,
        tasks,
        factor,
        D=width,
        R=rank,
        W=factors.shape[-1],
        ONE_PASS=one_pass,
        ALIGN=alignment(query, *experts),
        PRECISION=config.precision(query),
        BLOCK_N=c.rows,
        BLOCK_D=c.width,
        BLOCK_R=max(16, power(rank)),
        BLOCK_T=max(16, power(tasks)),
        BLOCK_W=min(c.columns, factors.shape[-1]),
        GROUP=c.experts,
        **c.options,
    )
    return mixtures, weights, base, z
