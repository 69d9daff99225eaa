"""Task-conditioned routing, backward (TIGER eqs. 4-7). Names as in `route`, whose forward keeps base and z.

With df and the gradient of the weights given, ds the gradient of the logits, X = [z | 1] and Y_k = X o (ds_k [g | I]):

    dw_tk = df_t . F_k + given        ds_tk = w_tk (dw_tk - sum_j w_tj dw_tj)        a_k = sum_t ds_tk
    dF_k = sum_t w_tk df_t + a_k base + Y_k [V | c]^T        dbase = sum_k a_k F_k
    d[V | c] = sum_n sum_k F_k^T Y_k                         P_k = F_k [V | c]
    dz = sum_k P_k o (ds_k g)                                dg_t = sum_n z o sum_k ds_tk P_k

and, by the library's products, dq = (dbase W0^T + dz U^T) / sqrt(D), d[W0 | U] = q^T [dbase | dz] / sqrt(D). No per-task query
is formed. Sums over tokens are of parts that programs write and a second step adds in one order: no atomics.

Bytes, in units of B N D elements: `_gradients` reads 1 + M + T (base, experts, df) and writes M + 1; it sweeps the
channels three times, the second and third of which are to find experts and df in L2. `_factor_gradients` reads M. Y, which
goes between them, is W / D of M. The library's products read 3 and write 1.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiger_fast.kernels import config
from tiger_fast.kernels.device import dot_like, rows, rows_of, stride
from tiger_fast.kernels.launch import alignment, dense, kernel, launch, power, strides
from tiger_fast.kernels.route import load_expert, load_scale, load_x, make_factors, per_sample, products_of


@triton.jit
def _load_grad(grad_ptr, grad_strides, sample, task, token, column, inside, ALIGN: tl.constexpr):
    first = rows(grad_strides, sample, task, ALIGN)
    offsets = first + token[:, None] * stride(grad_strides[2], ALIGN) + column[None, :]
    return tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _through_tokens(
    grad_ptr,
    grad_strides,
    expert_ptrs,
    expert_strides,
    sample,
    token,
    exists,
    tasks,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # df_t . F_k, (BLOCK_N, BLOCK_T), of experts FIRST to FIRST + SIZE.
    task = tl.arange(0, BLOCK_T)
    dots = ()
    for _ in tl.static_range(SIZE):
        dots = dots + (tl.zeros((BLOCK_N, BLOCK_T), tl.float32),)
    for chunk in tl.range((D + BLOCK_D - 1) // BLOCK_D, disable_licm=True):
        column = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = exists[:, None] & (column < D)[None, :]
        tiles = ()
        for i in tl.static_range(SIZE):
            tile = load_expert(expert_ptrs, expert_strides, FIRST + i, sample, token, column, inside, ALIGN)
            tiles = tiles + (tile,)
        for t in tl.range(0, tasks, disable_licm=True):
            grad = _load_grad(grad_ptr, grad_strides, sample, t, token, column, inside, GRAD_ALIGN)
            added = ()
            for i in tl.static_range(SIZE):
                dot = tl.sum(grad * tiles[i].to(tl.float32), axis=1)
                added = added + (dots[i] + tl.where((task == t)[None, :], dot[:, None], 0.0),)
            dots = added
    return dots


@triton.jit
def _write_grad_base(
    grad_base_ptr,
    expert_ptrs,
    expert_strides,
    logits_ptr,
    logit_rows,
    in_tasks,
    sample,
    token,
    exists,
    row,
    tasks,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    M: tl.constexpr = len(expert_ptrs)
    sums = ()
    for m in tl.static_range(M):
        sums = sums + (tl.sum(tl.load(logits_ptr + logit_rows + m * tasks, mask=in_tasks, other=0.0), axis=1),)
    for chunk in tl.range((D + BLOCK_D - 1) // BLOCK_D, disable_licm=True):
        column = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = exists[:, None] & (column < D)[None, :]
        total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for m in tl.static_range(M):
            expert = load_expert(expert_ptrs, expert_strides, m, sample, token, column, inside, ALIGN)
            total += sums[m][:, None] * expert.to(tl.float32)
        to = grad_base_ptr + row[:, None] * D + column[None, :]
        tl.store(to, total.to(to.dtype.element_ty), mask=inside)


@triton.jit
def _write_grad_experts(
    grad_expert_ptrs,
    grad_ptr,
    grad_strides,
    weights_ptr,
    base_ptr,
    factors_ptr,
    y_ptr,
    logits_ptr,
    logit_rows,
    in_tasks,
    sample,
    token,
    exists,
    row,
    tokens,
    tasks,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    NEEDS: tl.constexpr,
    THROUGH_TOKENS: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    sums = ()
    for i in tl.static_range(SIZE):
        logit_tile = logits_ptr + logit_rows + (FIRST + i) * tasks
        sums = sums + (tl.sum(tl.load(logit_tile, mask=in_tasks, other=0.0), axis=1),)
    for chunk in tl.range((D + BLOCK_D - 1) // BLOCK_D, disable_licm=True):
        column = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = exists[:, None] & (column < D)[None, :]
        at = row[:, None] * D + column[None, :]
        base = tl.load(base_ptr + at, mask=inside, other=0.0).to(tl.float32)
        totals = ()
        for i in tl.static_range(SIZE):
            totals = totals + (sums[i][:, None] * base,)
        if THROUGH_TOKENS:
            for t in tl.range(0, tasks, disable_licm=True):
                grad = _load_grad(grad_ptr, grad_strides, sample, t, token, column, inside, GRAD_ALIGN)
                weight_row = ((sample * tasks + t) * tokens + token) * M + FIRST
                added = ()
                for i in tl.static_range(SIZE):
                    weight = tl.load(weights_ptr + weight_row + i, mask=exists, other=0.0)
                    added = added + (totals[i] + weight[:, None] * grad,)
                totals = added
        for block in range(W // BLOCK_W):
            factor_column = block * BLOCK_W + tl.arange(0, BLOCK_W)
            factors_tile = factors_ptr + column[None, :] * W + factor_column[:, None]
            factors = tl.load(factors_tile, mask=(column < D)[None, :], other=0.0)
            more = ()
            for i in tl.static_range(SIZE):
                y_tile = y_ptr + (row[:, None] * M + FIRST + i) * W + factor_column[None, :]
                y = tl.load(y_tile, mask=exists[:, None], other=0.0)
                more = more + (dot_like(y, factors, totals[i], PRECISION),)
            totals = more
        for i in tl.static_range(SIZE):
            if (NEEDS >> (FIRST + i)) & 1:
                to = grad_expert_ptrs[FIRST + i] + at
                tl.store(to, totals[i].to(to.dtype.element_ty), mask=inside)


@kernel
def _gradients(
    grad_tokens_ptr,
    grad_tokens_strides,
    grad_weights_ptr,
    grad_weights_strides,
    expert_ptrs,
    expert_strides,
    factors_ptr,
    factors_strides,
    scale_ptr,
    scale_strides,
    weights_ptr,
    base_ptr,
    z_ptr,
    grad_expert_ptrs,
    grad_base_ptr,
    grad_z_ptr,
    grad_scale_ptr,
    y_ptr,
    logits_ptr,
    tokens: tl.int64,
    tasks: tl.int64,
    D: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    THROUGH_TOKENS: tl.constexpr,
    THROUGH_WEIGHTS: tl.constexpr,
    FOR_EXPERTS: tl.constexpr,
    FOR_BASE: tl.constexpr,
    FOR_Z: tl.constexpr,
    FOR_SCALE: tl.constexpr,
    KEEP_Y: tl.constexpr,
    ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    GROUP: tl.constexpr,
):
    # What one step hands to the next, gradients of logits (B, N, M, T) and Y, goes through memory that only this program
    # touches, a tile at a time: in registers, in the arrangements of every step, it would fill them. Experts are taken
    # GROUP at a time for the same reason.
    M: tl.constexpr = len(expert_ptrs)
    GROUPS: tl.constexpr = (M + GROUP - 1) // GROUP
    program = tl.program_id(0).to(tl.int64)
    sample, token, exists = rows_of(program, tokens, BLOCK_N)
    row = sample * tokens + token
    task = tl.arange(0, BLOCK_T)
    factors_ptr += sample * stride(factors_strides[0], 16)
    in_tasks = exists[:, None] & (task < tasks)[None, :]
    logit_rows = (row * M)[:, None] * tasks + task[None, :]

    for group in tl.static_range(GROUPS):
        if THROUGH_TOKENS:
            dots = _through_tokens(
                grad_tokens_ptr,
                grad_tokens_strides,
                expert_ptrs,
                expert_strides,
                sample,
                token,
                exists,
                tasks,
                group * GROUP,
                min(GROUP, M - group * GROUP),
                D,
                ALIGN,
                GRAD_ALIGN,
                BLOCK_N,
                BLOCK_D,
                BLOCK_T,
            )
        for i in tl.static_range(min(GROUP, M - group * GROUP)):
            grad = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
            if THROUGH_TOKENS:
                grad += dots[i]
            if THROUGH_WEIGHTS:
                offsets = rows(grad_weights_strides, sample, task, 1)[None, :]
                offsets += token[:, None] * stride(grad_weights_strides[2], 1)
                offsets += (group * GROUP + i) * stride(grad_weights_strides[3], 1)
                grad += tl.load(grad_weights_ptr + offsets, mask=in_tasks, other=0.0).to(tl.float32)
            tl.store(logits_ptr + logit_rows + (group * GROUP + i) * tasks, grad, mask=in_tasks)
    tl.debug_barrier()
    weight_rows = ((sample * tasks + task)[None, :] * tokens + token[:, None]) * M
    mean = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for member in range(M):
        grad = tl.load(logits_ptr + logit_rows + member * tasks, mask=in_tasks, other=0.0)
        mean += tl.load(weights_ptr + weight_rows + member, mask=in_tasks, other=0.0) * grad
    for member in range(M):
        grad = tl.load(logits_ptr + logit_rows + member * tasks, mask=in_tasks, other=0.0)
        logit = tl.load(weights_ptr + weight_rows + member, mask=in_tasks, other=0.0) * (grad - mean)
        tl.debug_barrier()  # all threads that hold a copy have read it
        tl.store(logits_ptr + logit_rows + member * tasks, logit, mask=in_tasks)
    tl.debug_barrier()

    if KEEP_Y or FOR_EXPERTS:
        for block in range(W // BLOCK_W):
            column = block * BLOCK_W + tl.arange(0, BLOCK_W)
            x = load_x(z_ptr, row, exists, column, R)
            for member in range(M):
                y = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
                for t in tl.range(0, tasks, disable_licm=True):
                    logit = tl.load(logits_ptr + (row * M + member) * tasks + t, mask=exists, other=0.0)
                    y += logit[:, None] * load_scale(scale_ptr, scale_strides, sample, t, column, tasks, R)[None, :]
                to = y_ptr + (row[:, None] * M + member) * W + column[None, :]
                tl.store(to, (x * y).to(y_ptr.dtype.element_ty), mask=exists[:, None])

    if FOR_Z or FOR_SCALE:
        for block in range((R + BLOCK_W - 1) // BLOCK_W):
            column = block * BLOCK_W + tl.arange(0, BLOCK_W)
            x = load_x(z_ptr, row, exists, column, R)
            grad_z = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
            for group in tl.static_range(GROUPS):
                products = products_of(
                    expert_ptrs,
                    expert_strides,
                    factors_ptr,
                    sample,
                    token,
                    exists,
                    column,
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
                for t in tl.range(0, tasks, disable_licm=True):
                    mixed = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
                    for i in tl.static_range(len(products)):
                        logit_tile = logits_ptr + (row * M + group * GROUP + i) * tasks + t
                        mixed += tl.load(logit_tile, mask=exists, other=0.0)[:, None] * products[i]
                    if FOR_Z:
                        grad_z += mixed * load_scale(scale_ptr, scale_strides, sample, t, column, tasks, R)[None, :]
                    if FOR_SCALE:
                        # Each group of experts adds to a part of its own.
                        part = (program * GROUPS + group) * tasks + t
                        grad_scale = tl.sum(x * mixed, axis=0)
                        tl.store(grad_scale_ptr + part * R + column, grad_scale, mask=column < R)
            if FOR_Z:
                in_z = exists[:, None] & (column < R)[None, :]
                to = grad_z_ptr + row[:, None] * R + column[None, :]
                tl.store(to, grad_z.to(grad_z_ptr.dtype.element_ty), mask=in_z)

    if FOR_BASE:
        _write_grad_base(
            grad_base_ptr,
            expert_ptrs,
            expert_strides,
            logits_ptr,
            logit_rows,
            in_tasks,
            sample,
            token,
            exists,
            row,
            tasks,
            D,
            ALIGN,
            BLOCK_N,
            BLOCK_D,
        )
    if FOR_EXPERTS:
        tl.debug_barrier()  # Y is read again below, by other threads
        for group in tl.static_range(GROUPS):
            _write_grad_experts(
                grad_expert_ptrs,
                grad_tokens_ptr,
                grad_tokens_strides,
                weights_ptr,
                base_ptr,
                factors_ptr,
                y_ptr,
                logits_ptr,
                logit_rows,
                in_tasks,
                sample,
                token,
                exists,
                row,
                tokens,
                tasks,
                group * GROUP,
                min(GROUP, M - group * GROUP),
                M,
                D,
                W,
                FOR_EXPERTS,
                THROUGH_TOKENS,
                GRAD_ALIGN,
                PRECISION,
                BLOCK_D,
                BLOCK_W,
            )


@kernel
def _factor_gradients(
    expert_ptrs,
    expert_strides,
    y_ptr,
    parts_ptr,
    tokens: tl.int64,
    blocks: tl.int64,
    splits: tl.int64,
    D: tl.constexpr,
    W: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    GROUP: tl.constexpr,
):
    # A tile of d[V | c] summed over a share of `blocks` blocks of tokens, which are one sample's or all samples': parts
    # (B or 1, splits, D, W).
    M: tl.constexpr = len(expert_ptrs)
    BLOCKS: tl.constexpr = W // BLOCK_W
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0).to(tl.int64)
    column = (program // BLOCKS % CHUNKS) * BLOCK_D + tl.arange(0, BLOCK_D)
    factor_column = (program % BLOCKS) * BLOCK_W + tl.arange(0, BLOCK_W)
    part = program // (BLOCKS * CHUNKS)
    of_sample = tl.cdiv(tokens, BLOCK_N)
    share = tl.cdiv(blocks, splits)
    before = (part // splits) * blocks
    start = before + (part % splits) * share
    end = tl.minimum(start + share, before + blocks)
    total = tl.zeros((BLOCK_D, BLOCK_W), tl.float32)
    for group in tl.static_range((M + GROUP - 1) // GROUP):
        sample, first = start // of_sample, start % of_sample * BLOCK_N
        for _ in range(start, end):
            token = first + tl.arange(0, BLOCK_N)
            exists = token < tokens
            inside = exists[:, None] & (column < D)[None, :]
            for m in tl.static_range(group * GROUP, min(group * GROUP + GROUP, M)):
                offsets = rows(expert_strides[m], sample, token, ALIGN)[:, None] + column[None, :]
                expert = tl.load(expert_ptrs[m] + offsets, mask=inside, other=0.0)
                y_tile = y_ptr + ((sample * tokens + token)[:, None] * M + m) * W + factor_column[None, :]
                y = tl.load(y_tile, mask=exists[:, None], other=0.0)
                total = dot_like(tl.trans(expert), y, total, PRECISION)
            # The next block, without a division.
            first += BLOCK_N
            sample += (first >= tokens).to(tl.int64)
            first = tl.where(first < tokens, first, 0)
    to = (part * D + column)[:, None] * W + factor_column[None, :]
    tl.store(parts_ptr + to, total, mask=(column < D)[:, None])


def route_backward(
    grad_tokens: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    experts: Sequence[Tensor],
    base_weight: Tensor,
    base_bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    scale: Tensor,
    shift: Tensor,
    weights: Tensor,
    base: Tensor,
    z: Tensor,
    needs: int,
) -> list[Tensor]:
    """The gradients whose bit in `needs` is set, of query, base_weight, base_bias, u, v, scale, shift, *experts."""
    batch, tokens, width = query.shape
    dtype, members, tasks, rank = query.dtype, len(experts), scale.shape[-2], u.shape[1]
    for_query, for_weight, for_bias, for_u, for_v, for_scale, for_shift = (needs >> i & 1 for i in range(7))
    for_experts = needs >> 7
    likes = (query, base_weight, base_bias, u, v, scale, shift, *experts)
    if not query.numel():
        return [like.new_zeros(like.shape) for i, like in enumerate(likes) if needs >> i & 1]
    experts = tuple(map(dense, experts))
    grad_tokens = None if grad_tokens is None else dense(grad_tokens)
    per_task_scale, scale_strides = per_sample(scale)
    factors, factors_strides = make_factors(v, shift, base_bias, dtype)
    columns = factors.shape[-1]
    for_factors = bool(for_v or for_shift or for_bias)
    grad_experts = [query.new_empty(query.shape) if for_experts >> i & 1 else None for i in range(members)]
    grad_base = torch.empty_like(base) if for_query or for_weight else None
    grad_z = torch.empty_like(z) if for_query or for_u else None
    c = config.choose("route_backward", query.device, dtype, D=width, M=members, T=power(tasks), W=columns)
    blocks = triton.cdiv(tokens, c.rows)
    groups = triton.cdiv(members, c.experts)
    scale_parts = query.new_empty((batch, blocks * groups, tasks, rank), dtype=torch.float32) if for_scale else None
    y = None
    if for_factors or for_experts:
        # float16 cannot hold small gradients, and these are not what a loss is scaled for.
        y = query.new_empty(
            (batch, tokens, members, columns), dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        )
    launch(
        _gradients,
        batch * blocks,
        base if grad_tokens is None else grad_tokens,
        (0,) if grad_tokens is None else strides(grad_tokens),
        weights if grad_weights is None else grad_weights,
        (0,) if grad_weights is None else strides(grad_weights),
        experts,
        tuple(map(strides, experts)),
        factors,
        factors_strides,
        per_task_scale,
        scale_strides,
        weights,
        base,
        z,
        tuple(experts[i] if g is None else g for i, g in enumerate(grad_experts)),
        base if grad_base is None else grad_base,
        z if grad_z is None else grad_z,
        weights if scale_parts is None else scale_parts,
        base if y is None else y,
        query.new_empty((batch, tokens, members, tasks), dtype=torch.float32),
        tokens,
        tasks,
        D=width,
        R=rank,
        W=columns,
        THROUGH_TOKENS=grad_tokens is not None,
        THROUGH_WEIGHTS=grad_weights is not None,
        FOR_EXPERTS=for_experts,
        FOR_BASE=grad_base is not None,
        FOR_Z=grad_z is not None,
        FOR_SCALE=bool(for_scale),
        KEEP_Y=for_factors,
        ALIGN=alignment(*experts),
        GRAD_ALIGN=1 if grad_tokens is None else alignment(grad_tokens),
        PRECISION=config.precision(query),
        BLOCK_N=c.rows,
        BLOCK_D=c.width,
        BLOCK_T=max(16, power(tasks)),
        BLOCK_W=min(c.columns, columns),
        GROUP=c.experts,
        **c.options,
    )
    factor = 1 / math.sqrt(width)
    found: dict[int, Tensor] = {7 + i: g for i, g in enumerate(grad_experts) if g is not None}
    flat = query.reshape(batch * tokens, width)
    if for_query:
        narrow = torch.mm(grad_z.view(-1, rank), u.to(dtype).T)
        wide = torch.addmm(narrow, grad_base.view(-1, width), base_weight.to(dtype).T, beta=factor, alpha=factor)
        found[0] = wide.view(query.shape)
    if for_weight:
        found[1] = _product(flat, grad_base.view(-1, width), factor, base_weight.dtype)
    if for_u:
        found[3] = _product(flat, grad_z.view(-1, rank), factor, u.dtype)
    if for_factors:
        by_sample = bool(for_shift) and shift.dim() == 3
        parts = _sum_over_tokens(experts, y, columns, config.precision(query), by_sample)
        if for_v:
            found[4] = parts[..., :rank].sum((0, 1)).to(v.dtype)
        if for_shift or for_bias:
            grad_shift = parts[..., rank : rank + tasks].sum(1).transpose(1, 2) * factor  # (B or 1, T, D)
            if for_bias:
                found[2] = grad_shift.sum((0, 1)).to(base_bias.dtype)
            if for_shift:
                found[6] = (grad_shift if by_sample else grad_shift[0]).to(shift.dtype).contiguous()
    if for_scale:
        found[5] = scale_parts.sum(1 if scale.dim() == 3 else (0, 1)).to(scale.dtype)
    return [found[i] for i in sorted(found)]


def _product(a: Tensor, b: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    # factor a^T b.
    total = a.new_empty((a.shape[1], b.shape[1]))
    return torch.addmm(total, a.T, b, beta=0, alpha=factor).to(dtype)


def _sum_over_tokens(experts: tuple[Tensor, ...], y: Tensor, columns: int, products: str, by_sample: bool) -> Tensor:
    # Parts (B or 1, splits, D, W) of d[V | c] = sum over tokens and experts of F^T Y.
    batch, tokens, width = experts[0].shape
    c = config.choose("route_factor_gradients", y.device, experts[0].dtype, D=width, M=len(experts), W=columns)
    block_w = min(c.columns, columns)
    tiles = triton.cdiv(width, c.width) * (columns // block_w)
    sums, blocks = batch, triton.cdiv(tokens, c.rows)
    if not by_sample:
        sums, blocks = 1, batch * blocks  # so that parts are as many as programs are of use, whatever B is
    splits = max(1, min(triton.cdiv(8 * config.MULTIPROCESSORS, sums * tiles), triton.cdiv(blocks, 4)))
    parts = y.new_empty((sums, splits, width, columns), dtype=torch.float32)
    launch(
        _factor_gradients,
        sums * splits * tiles,
        experts,
        tuple(map(strides, experts)),
        y,
        parts,
        tokens,
        blocks,
        splits,
        D=width,
        W=columns,
        ALIGN=alignment(*experts),
        PRECISION=products,
        BLOCK_N=c.rows,
        BLOCK_D=c.width,
        BLOCK_W=block_w,
        GROUP=c.experts,
        **c.options,
    )
    return parts
