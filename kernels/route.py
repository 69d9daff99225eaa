"""Task-conditioned routing, forward (TIGER eqs. 4-7), for all tasks from one pass over the experts.

With base = q W0 / sqrt(D), z = q U / sqrt(D), u_k = V^T F_k and c_t = (b0 + h_t) / sqrt(D), no query of a task is formed:

    s_tk = base . F_k + sum_r z_r g_tr u_kr + c_t . F_k        w_t = softmax over k of s_t        f_t = sum_k w_tk F_k

so the wide products, q [W0 | U] and F [V | c], do not grow with the number of tasks: a further one costs M (R + D)
multiply-adds a token.

Two designs, chosen by `config.route`:
- product, then fused: base and z come from the library's matrix product. In units of B N D elements: 2 + M read (q, base,
  experts), 1 + T written.
- one pass: base is made a tile at a time from q and W0, and used while it is on chip: 1 + M read, T written, and 1 more
  where the backward is to have base. W0 is read once a program, from L2; worth it where programs take many tokens.

Layout: query (B, N, D), experts M x (B, N, D), tokens (B, T, N, D), weights (B, T, N, M). A program takes BLOCK_N tokens
of a sample and sweeps the channels twice: once for the logits, which stay in registers for all tasks and experts, and,
when the weights are in their output, once for the mixtures, each tile of the experts serving all tasks. The second sweep
finds the experts in L2: a program's are BLOCK_N M D elements, which the first sweep asks the cache to keep.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiger_fast.kernels import config
from tiger_fast.kernels.device import dot_like, dot_wide, rows, rows_of, softmax_of
from tiger_fast.kernels.launch import alignment, dense, kernel, launch, power, precision, strides


@triton.jit
def shift_tile(
    shift_ptr,
    shift_strides,
    bias_ptr,
    sample,
    task,
    column,
    factor,
    T: tl.constexpr,
    D: tl.constexpr,
    BIAS: tl.constexpr,
):
    """c_t for all tasks: (BLOCK_T, BLOCK_D) in float32; 0 beyond the tasks and channels that exist."""
    inside = (task < T)[:, None] & (column < D)[None, :]
    offsets = rows(shift_strides, sample, task, 1)[:, None] + column[None, :]
    shift = tl.load(shift_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)
        shift = tl.where(inside, shift + bias[None, :], 0.0)
    return shift * factor


@triton.jit
def _logits(
    query_ptr,
    query_rows,
    expert_ptrs,
    expert_strides,
    base_weight_ptr,
    v_ptr,
    shift_ptr,
    shift_strides,
    bias_ptr,
    base_ptr,
    z,
    scale,
    sample,
    token,
    exists,
    row,
    factor,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BIAS: tl.constexpr,
    ONE_PASS: tl.constexpr,
    KEEP: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # The logits (BLOCK_N, BLOCK_T) of experts FIRST to FIRST + SIZE, a tuple, from one sweep over the channels.
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    dtype = expert_ptrs[0].dtype.element_ty
    rank = tl.arange(0, BLOCK_R)
    task = tl.arange(0, BLOCK_T)
    dots, lows, adds = (), (), ()
    for _ in tl.static_range(SIZE):
        dots = dots + (tl.zeros((BLOCK_N,), tl.float32),)
        lows = lows + (tl.zeros((BLOCK_N, BLOCK_R), tl.float32),)
        adds = adds + (tl.zeros((BLOCK_N, BLOCK_T), tl.float32),)
    for chunk in range(CHUNKS):
        column = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = exists[:, None] & (column < D)[None, :]
        if ONE_PASS:
            base = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            for step in range(CHUNKS):
                inner = step * BLOCK_D + tl.arange(0, BLOCK_D)
                in_query = exists[:, None] & (inner < D)[None, :]
                query = tl.load(query_ptr + query_rows[:, None] + inner[None, :], mask=in_query, other=0.0)
                in_weight = (inner < D)[:, None] & (column < D)[None, :]
                weight_tile = base_weight_ptr + inner[:, None] * D + column[None, :]
                base = dot_like(query, tl.load(weight_tile, mask=in_weight, other=0.0), base, PRECISION)
            base = (base * factor).to(dtype)
            if KEEP:
                tl.store(base_ptr + row[:, None] * D + column[None, :], base, mask=inside)
        else:
            base = tl.load(base_ptr + row[:, None] * D + column[None, :], mask=inside, other=0.0)
        in_v = (column < D)[:, None] & (rank < R)[None, :]
        v = tl.load(v_ptr + column[:, None] * R + rank[None, :], mask=in_v, other=0.0)
        shift = tl.trans(shift_tile(shift_ptr, shift_strides, bias_ptr, sample, task, column, factor, T, D, BIAS))
        new_dots, new_lows, new_adds = (), (), ()
        for i in tl.static_range(SIZE):
            offsets = rows(expert_strides[FIRST + i], sample, token, ALIGN)[:, None] + column[None, :]
            expert = tl.load(expert_ptrs[FIRST + i] + offsets, mask=inside, other=0.0, eviction_policy="evict_last")
            new_dots = new_dots + (dots[i] + tl.sum(base.to(tl.float32) * expert.to(tl.float32), axis=1),)
            new_lows = new_lows + (dot_like(expert, v, lows[i], PRECISION),)
            new_adds = new_adds + (dot_wide(expert, shift, adds[i], PRECISION),)
        dots, lows, adds = new_dots, new_lows, new_adds
    logits = ()
    for i in tl.static_range(SIZE):
        logit = tl.dot(z * lows[i], scale, adds[i], input_precision=PRECISION) + dots[i][:, None]
        logits = logits + (logit,)
    return logits


@kernel
def _forward(
    query_ptr,
    query_strides,
    expert_ptrs,
    expert_strides,
    base_weight_ptr,
    u_ptr,
    v_ptr,
    scale_ptr,
    scale_strides,
    shift_ptr,
    shift_strides,
    bias_ptr,
    tokens_ptr,
    weights_ptr,
    base_ptr,
    z_ptr,
    tokens: tl.int64,
    factor: tl.float32,
    T: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BIAS: tl.constexpr,
    ONE_PASS: tl.constexpr,
    KEEP: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
):
    M: tl.constexpr = len(expert_ptrs)
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    dtype = expert_ptrs[0].dtype.element_ty
    sample, token, exists = rows_of(tl.program_id(0).to(tl.int64), tokens, BLOCK_N)
    row = sample * tokens + token
    rank = tl.arange(0, BLOCK_R)
    task = tl.arange(0, BLOCK_T)

    query_rows = rows(query_strides, sample, token, ALIGN)
    in_z = exists[:, None] & (rank < R)[None, :]
    if ONE_PASS:
        low = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for chunk in range(CHUNKS):
            column = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
            inside = exists[:, None] & (column < D)[None, :]
            query = tl.load(query_ptr + query_rows[:, None] + column[None, :], mask=inside, other=0.0)
            in_u = (column < D)[:, None] & (rank < R)[None, :]
            u = tl.load(u_ptr + column[:, None] * R + rank[None, :], mask=in_u, other=0.0)
            low = dot_like(query, u, low, PRECISION)
        z = (low * factor).to(dtype)
        if KEEP:
            tl.store(z_ptr + row[:, None] * R + rank[None, :], z, mask=in_z)
    else:
        z = tl.load(z_ptr + row[:, None] * R + rank[None, :], mask=in_z, other=0.0)
    z = z.to(tl.float32)
    in_scale = (rank < R)[:, None] & (task < T)[None, :]
    scale_rows = rows(scale_strides, sample, task, 1)
    scale = tl.load(scale_ptr + scale_rows[None, :] + rank[:, None], mask=in_scale, other=0.0).to(tl.float32)

    logits = ()
    for group in tl.static_range((M + GROUP - 1) // GROUP):
        logits = logits + _logits(
            query_ptr,
            query_rows,
            expert_ptrs,
            expert_strides,
            base_weight_ptr,
            v_ptr,
            shift_ptr,
            shift_strides,
            bias_ptr,
            base_ptr,
            z,
            scale,
            sample,
            token,
            exists,
            row,
            factor,
            group * GROUP,
            min(GROUP, M - group * GROUP),
            T,
            D,
            R,
            BIAS,
            ONE_PASS,
            KEEP,
            ALIGN,
            PRECISION,
            BLOCK_N,
            BLOCK_D,
            BLOCK_R,
            BLOCK_T,
        )
    weights = softmax_of(logits)
    in_weights = exists[:, None] & (task < T)[None, :]
    weight_rows = ((sample * T + task)[None, :] * tokens + token[:, None]) * M
    for m in tl.static_range(M):
        tl.store(weights_ptr + weight_rows + m, weights[m], mask=in_weights)
    # What follows reads the weights in another arrangement over threads than the one they were written in.
    tl.debug_barrier()

    for chunk in range(CHUNKS):
        column = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = exists[:, None] & (column < D)[None, :]
        tiles = ()
        for m in tl.static_range(M):
            offsets = rows(expert_strides[m], sample, token, ALIGN)[:, None] + column[None, :]
            tiles = tiles + (tl.load(expert_ptrs[m] + offsets, mask=inside, other=0.0, eviction_policy="evict_first"),)
        for t in range(T):
            mixed = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            weight_row = ((sample * T + t) * tokens + token) * M
            for m in tl.static_range(M):
                weight = tl.load(weights_ptr + weight_row + m, mask=exists, other=0.0)
                mixed += weight[:, None] * tiles[m].to(tl.float32)
            offsets = ((sample * T + t) * tokens + token)[:, None] * D + column[None, :]
            tl.store(tokens_ptr + offsets, mixed.to(dtype), mask=inside, eviction_policy="evict_first")


def per_sample(modulation: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """(T, X) or (B, T, X), and strides over (B, T, X), 0 over B where it is shared."""
    modulation = dense(modulation)
    return modulation, strides(modulation if modulation.dim() == 3 else modulation.expand(2, -1, -1))


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
    base_weight, u, v = (p.to(dtype).contiguous() for p in (base_weight, u, v))
    scale, scale_strides = per_sample(scale)
    shift, shift_strides = per_sample(shift)
    mixtures = query.new_empty((batch, tasks, tokens, width))
    weights = query.new_empty((batch, tasks, tokens, members), dtype=torch.float32)
    base = query.new_empty((batch, tokens, width))
    z = query.new_empty((batch, tokens, rank))
    factor = 1 / math.sqrt(width)
    c = config.choose("route", query.device, dtype, D=width, M=members, T=power(tasks), R=power(rank))
    one_pass = c.group >= members and c.one_pass
    if not one_pass:
        rows = query.reshape(batch * tokens, width)
        for product, factors in ((base, base_weight), (z, u)):
            flat = product.view(batch * tokens, -1)
            torch.addmm(flat, rows, factors, beta=0, alpha=factor, out=flat)
    launch(
        _forward,
        batch * triton.cdiv(tokens, c.rows),
        query,
        strides(query),
        experts,
        tuple(map(strides, experts)),
        base_weight,
        u,
        v,
        scale,
        scale_strides,
        shift,
        shift_strides,
        u if base_bias is None else base_bias.contiguous(),
        mixtures,
        weights,
        base,
        z,
        tokens,
        factor,
        T=tasks,
        D=width,
        R=rank,
        BIAS=base_bias is not None,
        ONE_PASS=one_pass,
        KEEP=True,
        ALIGN=alignment(query, *experts),
        PRECISION=precision(dtype),
        BLOCK_N=c.rows,
        BLOCK_D=c.width,
        BLOCK_R=max(16, power(rank)),
        BLOCK_T=max(16, power(tasks)),
        GROUP=c.group,
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    return mixtures, weights, base, z
