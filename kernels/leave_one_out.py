"""Leave-one-out mixtures (TIGER sec. 3.5), all of them from one read of the experts.

    out_tk = r_tk sum over j != k of w_tj F_j        r_tk = 1, or renormalised 1 / sum over j != k of w_tj (0 if that is 0)

and with G the gradient of out, H_tj = sum over k != j of r_tk G_tk:

    dF_j = sum_t w_tj H_tj        dw_tj = F_j . H_tj - [renormalised] sum over k != j of r_tk out_tk . G_tk

Layout: experts (B, N, D) with any strides but the last, weights (B, T, N, M) with any, out (B, T, M, N, D) dense.
A program holds a tile (BLOCK_N tokens, BLOCK_D channels) of every expert in registers and loops over the tasks; the
backward loops over tiles of channels too, as dw sums over them. Of many experts both hold a group's tiles only, and read
the others again for each task, and the backward G for each group, from a cache. Bytes, in units of B N D elements:
forward M read, T M written; backward M + T M read, M written; the weights beside them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiger_fast.kernels import config
from tiger_fast.kernels.device import rows, rows_of, stride, sum_of_others, totals_of
from tiger_fast.kernels.launch import alignment, dense, kernel, launch, power, strides


@triton.jit
def _load_weights(pointers, strides, exists, M: tl.constexpr):
    weights = ()
    for m in tl.static_range(M):
        weights = weights + (tl.load(pointers + m * stride(strides[3], 1), mask=exists, other=0.0).to(tl.float32),)
    return weights


@triton.jit
def _load_tile(expert_ptrs, expert_strides, m: tl.constexpr, sample, token, column, inside, ALIGN: tl.constexpr):
    offsets = rows(expert_strides[m], sample, token, ALIGN)[:, None] + column[None, :]
    return tl.load(expert_ptrs[m] + offsets, mask=inside, other=0.0)


@triton.jit
def _load_tiles(expert_ptrs, expert_strides, sample, token, column, inside, ALIGN: tl.constexpr):
    tiles = ()
    for m in tl.static_range(len(expert_ptrs)):
        tiles = tiles + (_load_tile(expert_ptrs, expert_strides, m, sample, token, column, inside, ALIGN),)
    return tiles


@triton.jit
def _scale(weights, k: tl.constexpr):
    # r_k, renormalised.
    total = tl.zeros_like(weights[k])
    for j in tl.static_range(len(weights)):
        if j != k:
            total += weights[j]
    return tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))


@kernel
def _forward(
    expert_ptrs,
    expert_strides,
    weights_ptr,
    weights_strides,
    out_ptr,
    tokens: tl.int64,
    tasks: tl.int64,
    D: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    M: tl.constexpr = len(expert_ptrs)
    program = tl.program_id(0).to(tl.int64)
    column = (program % tl.cdiv(D, BLOCK_D)) * BLOCK_D + tl.arange(0, BLOCK_D)
    sample, token, exists = rows_of(program // tl.cdiv(D, BLOCK_D), tokens, BLOCK_N)
    inside = exists[:, None] & (column < D)[None, :]
    if M <= GROUP:
        tiles = _load_tiles(expert_ptrs, expert_strides, sample, token, column, inside, ALIGN)
    for task in range(tasks):
        base = rows(weights_strides, sample, task, 1) + token * stride(weights_strides[2], 1)
        weights = _load_weights(weights_ptr + base, weights_strides, exists, M)
        if M > GROUP:
            tiles = _load_tiles(expert_ptrs, expert_strides, sample, token, column, inside, ALIGN)
        totals = totals_of(tiles, weights, GROUP)
        for k in tl.static_range(M):
            if M > GROUP and k % GROUP == 0:
                # Of several groups' tiles only those of one are held, and come from a cache again for the next.
                tl.debug_barrier()
                tiles = _load_tiles(expert_ptrs, expert_strides, sample, token, column, inside, ALIGN)
            left = sum_of_others(tiles, weights, k, GROUP, totals)
            if RENORMALIZE:
                # An expert of weight 0 may be infinite: what no weight counts is 0, not NaN.
                scale = _scale(weights, k)[:, None]
                left = tl.where(scale == 0, 0.0, left * scale)
            row = ((sample * tasks + task) * M + k) * tokens + token
            tl.store(out_ptr + row[:, None] * D + column[None, :], left.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _of_group(
    grad_ptr,
    grad_strides,
    expert_ptrs,
    expert_strides,
    weights_ptr,
    weights_strides,
    grad_expert_ptrs,
    grad_weights_ptr,
    scales_ptr,
    features_ptr,
    scaled_ptr,
    sample,
    token,
    exists,
    tokens,
    tasks,
    FIRST: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    NEEDS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    # Writes dF_j of the experts from FIRST on and, for their weights, F_j . H_tj and r_tj out_tj . G_tj.
    M: tl.constexpr = len(expert_ptrs)
    SIZE: tl.constexpr = min(GROUP, M - FIRST)
    FOR_WEIGHTS: tl.constexpr = (NEEDS >> M) & 1
    # Of all experts in one tensor: rows are spread over as many threads as a tile's, so that each thread would hold as
    # many of one expert's T numbers.
    place = tl.arange(0, BLOCK_T * BLOCK_J)
    features = tl.zeros((BLOCK_N, BLOCK_T * BLOCK_J), tl.float32)
    scaled = tl.zeros((BLOCK_N, BLOCK_T * BLOCK_J), tl.float32)
    for chunk in range((D + BLOCK_D - 1) // BLOCK_D):
        column = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = exists[:, None] & (column < D)[None, :]
        totals = ()
        if FOR_WEIGHTS and M <= GROUP:
            tiles = _load_tiles(expert_ptrs, expert_strides, sample, token, column, inside, ALIGN)
        for _ in tl.static_range(SIZE):
            totals = totals + (tl.zeros((BLOCK_N, BLOCK_D), tl.float32),)
        for task in tl.range(0, tasks, disable_licm=True):
            weights_base = weights_ptr + rows(weights_strides, sample, task, 1) + token * stride(weights_strides[2], 1)
            scales_base = scales_ptr + ((sample * tasks + task) * tokens + token) * M
            weights, scales, grads = (), (), ()
            if M > GROUP:
                tiles = ()
            passed_of_others = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            left_of_others = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            for k in tl.static_range(M):
                if RENORMALIZE and M > GROUP and k % GROUP == 0:
                    # Tiles of several groups are loaded for each task, from a cache: all M would fill the registers. Without
                    # barriers the compiler loads them before the loop, and all G of a task before it uses the first.
                    tl.debug_barrier()
                first = rows(grad_strides, sample, task, GRAD_ALIGN) + k * stride(grad_strides[2], GRAD_ALIGN)
                offsets = first + token[:, None] * stride(grad_strides[3], GRAD_ALIGN) + column[None, :]
                grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0)
                weight_at = weights_base + k * stride(weights_strides[3], 1)
                if k >= FIRST and k < FIRST + SIZE:
                    grads = grads + (grad,)
                    weights = weights + (tl.load(weight_at, mask=exists, other=0.0).to(tl.float32),)
                    if FOR_WEIGHTS and M > GROUP:
                        tile = _load_tile(expert_ptrs, expert_strides, k, sample, token, column, inside, ALIGN)
                        tiles = tiles + (tile,)
                    if RENORMALIZE:
                        scales = scales + (tl.load(scales_base + k, mask=exists, other=0.0),)
                elif RENORMALIZE:
                    scale = tl.load(scales_base + k, mask=exists, other=0.0)
                    passed_of_others += scale[:, None] * grad.to(tl.float32)
                    if FOR_WEIGHTS:
                        other = _load_tile(expert_ptrs, expert_strides, k, sample, token, column, inside, ALIGN)
                        weight = tl.load(weight_at, mask=exists, other=0.0).to(tl.float32)
                        left_of_others += weight[:, None] * other.to(tl.float32)
                else:
                    passed_of_others += grad.to(tl.float32)
            new_totals = ()
            for j in tl.static_range(SIZE):
                passed = passed_of_others
                for k in tl.static_range(SIZE):
                    if k != j:
                        if RENORMALIZE:
                            passed += scales[k][:, None] * grads[k].to(tl.float32)
                        else:
                            passed += grads[k].to(tl.float32)
                new_totals = new_totals + (totals[j] + weights[j][:, None] * passed,)
                if FOR_WEIGHTS:
                    dot = tl.sum(tiles[j].to(tl.float32) * passed, axis=1)
                    here = (place == task * BLOCK_J + j)[None, :]
                    features += tl.where(here, dot[:, None], 0.0)
                    if RENORMALIZE:
                        left = left_of_others
                        for i in tl.static_range(SIZE):
                            if i != j:
                                left += weights[i][:, None] * tiles[i].to(tl.float32)
                        dot = tl.sum(left * grads[j].to(tl.float32), axis=1)
                        dot = tl.where(scales[j] == 0, 0.0, dot * scales[j] * scales[j])
                        scaled += tl.where(here, dot[:, None], 0.0)
            totals = new_totals
        for j in tl.static_range(SIZE):
            if (NEEDS >> (FIRST + j)) & 1:
                to = grad_expert_ptrs[FIRST + j] + (sample * tokens + token)[:, None] * D + column[None, :]
                tl.store(to, totals[j].to(to.dtype.element_ty), mask=inside)
    if FOR_WEIGHTS:
        place_task, member = place // BLOCK_J, FIRST + place % BLOCK_J
        to = ((sample * tasks + place_task)[None, :] * tokens + token[:, None]) * M + member[None, :]
        in_group = exists[:, None] & ((place_task < tasks) & (member < FIRST + SIZE))[None, :]
        if RENORMALIZE:
            tl.store(features_ptr + to, features, mask=in_group)
            tl.store(scaled_ptr + to, scaled, mask=in_group)
        else:
            tl.store(grad_weights_ptr + to, features.to(grad_weights_ptr.dtype.element_ty), mask=in_group)


@kernel
def _backward(
    grad_ptr,
    grad_strides,
    expert_ptrs,
    expert_strides,
    weights_ptr,
    weights_strides,
    grad_expert_ptrs,
    grad_weights_ptr,
    scales_ptr,
    features_ptr,
    scaled_ptr,
    tokens: tl.int64,
    tasks: tl.int64,
    D: tl.constexpr,
    NEEDS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    GROUP: tl.constexpr,
):
    M: tl.constexpr = len(expert_ptrs)
    FOR_WEIGHTS: tl.constexpr = (NEEDS >> M) & 1
    sample, token, exists = rows_of(tl.program_id(0).to(tl.int64), tokens, BLOCK_N)
    if RENORMALIZE:
        for task in range(tasks):
            base = rows(weights_strides, sample, task, 1) + token * stride(weights_strides[2], 1)
            weights = _load_weights(weights_ptr + base, weights_strides, exists, M)
            for k in tl.static_range(M):
                scale_row = ((sample * tasks + task) * tokens + token) * M
                tl.store(scales_ptr + scale_row + k, _scale(weights, k), mask=exists)
        tl.debug_barrier()  # they are read by other threads
    for group in tl.static_range((M + GROUP - 1) // GROUP):
        _of_group(
            grad_ptr,
            grad_strides,
            expert_ptrs,
            expert_strides,
            weights_ptr,
            weights_strides,
            grad_expert_ptrs,
            grad_weights_ptr,
            scales_ptr,
            features_ptr,
            scaled_ptr,
            sample,
            token,
            exists,
            tokens,
            tasks,
            group * GROUP,
            GROUP,
            D,
            NEEDS,
            RENORMALIZE,
            ALIGN,
            GRAD_ALIGN,
            BLOCK_N,
            BLOCK_D,
            BLOCK_T,
            BLOCK_J,
        )
    if FOR_WEIGHTS and RENORMALIZE:
        tl.debug_barrier()
        every_task = tl.arange(0, BLOCK_T)
        in_tasks = exists[:, None] & (every_task < tasks)[None, :]
        weight_rows = ((sample * tasks + every_task)[None, :] * tokens + token[:, None]) * M
        for j in range(M):
            result = tl.load(features_ptr + weight_rows + j, mask=in_tasks, other=0.0)
            for k in range(M):
                other = tl.load(scaled_ptr + weight_rows + k, mask=in_tasks, other=0.0)
                result -= tl.where(j == k, 0.0, other)
            tl.store(grad_weights_ptr + weight_rows + j, result.to(grad_weights_ptr.dtype.element_ty), mask=in_tasks)


def leave_one_out(experts: Sequence[Tensor], weights: Tensor, renormalize: bool) -> Tensor:
    """(B, T, M, N, D): see the module."""
    experts = tuple(map(dense, experts))
    batch, tasks, tokens, members = weights.shape
    width = experts[0].shape[-1]
    out = experts[0].new_empty((batch, tasks, members, tokens, width))
    c = config.choose("leave_one_out", weights.device, out.dtype, D=width, M=members)
    programs = batch * triton.cdiv(tokens, c.rows) * triton.cdiv(width, c.width) if out.numel() else 0
    launch(
        _forward,
        programs,
        experts,
        tuple(map(strides, experts)),
        weights,
        strides(weights),
        out,
        tokens,
        tasks,
        D=width,
        RENORMALIZE=renormalize,
        ALIGN=alignment(*experts),
        BLOCK_N=c.rows,
        BLOCK_D=c.width,
        GROUP=c.experts,
        **c.options,
    )
    return out


def leave_one_out_backward(
    grad: Tensor, experts: Sequence[Tensor], weights: Tensor, renormalize: bool, needs: int
) -> list[Tensor]:
    """The gradients of `experts` and `weights`, those whose bit in `needs` is set."""
    grad, experts = dense(grad), tuple(map(dense, experts))
    batch, tasks, tokens, members = weights.shape
    width = experts[0].shape[-1]
    found = [experts[0].new_empty(e.shape) if needs >> i & 1 else None for i, e in enumerate(experts)]
    grad_weights = weights.new_empty(weights.shape) if needs >> members & 1 else None
    # Renormalised, r and the two parts of dw.
    kept = weights.new_empty((3, *weights.shape), dtype=torch.float32) if renormalize else None
    facts = {"D": width, "M": members, "T": power(tasks), "RENORMALIZE": renormalize}
    c = config.choose("leave_one_out_backward", weights.device, grad.dtype, **facts)
    launch(
        _backward,
        batch * triton.cdiv(tokens, c.rows),
        grad,
        strides(grad),
        experts,
        tuple(map(strides, experts)),
        weights,
        strides(weights),
        tuple(experts[i] if g is None else g for i, g in enumerate(found)),
        weights if grad_weights is None else grad_weights,
        *(weights if kept is None else kept).expand(3, *weights.shape).unbind(),
        tokens,
        tasks,
        D=width,
        NEEDS=needs,
        RENORMALIZE=renormalize,
        ALIGN=alignment(*experts),
        GRAD_ALIGN=alignment(grad),
        BLOCK_N=c.rows,
        BLOCK_D=c.width,
        BLOCK_T=power(tasks),
        BLOCK_J=power(c.experts),
        GROUP=c.experts,
        **c.options,
    )
    return [t for t in (*found, grad_weights) if t is not None]
