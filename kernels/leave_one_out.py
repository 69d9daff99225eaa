"""Leave-one-out mixtures (TIGER sec. 3.5), all of them from one read of the experts.

    out_tk = r_tk sum over j != k of w_tj F_j        r_tk = 1, or renormalised 1 / sum over j != k of w_tj (0 if that is 0)

and with G the gradient of out, H_tj = sum over k != j of r_tk G_tk:

    dF_j = sum_t w_tj H_tj        dw_tj = F_j . H_tj - [renormalised] sum over k != j of r_tk out_tk . G_tk

Layout: experts (B, N, D) with any strides but the last, weights (B, T, N, M) with any, out (B, T, M, N, D) dense.
A program holds a tile (BLOCK_N tokens, BLOCK_D channels) of every expert in registers and loops over the tasks; the
backward loops over tiles of channels too, as dw sums over them, and takes experts in groups: with more than one group it
reads G again for each, from a cache. Bytes, in units of B N D elements: forward M read, T M
written; backward M + T M read, M written; the weights beside them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiger_fast.kernels import config
from tiger_fast.kernels.device import rows, rows_of, stride, sum_of_others, totals_of
from tiger_fast.kernels.launch import alignment, dense, kernel, launch, power, strides

_GROUP = tl.constexpr(8)


@triton.jit
def _load_weights(pointers, strides, exists, M: tl.constexpr):
    weights = ()
    for m in tl.static_range(M):
        weights = weights + (tl.load(pointers + m * stride(strides[3], 1), mask=exists, other=0.0).to(tl.float32),)
    return weights


@triton.jit
def _scale(weights, k: tl.constexpr, RENORMALIZE: tl.constexpr):
    # r_k: 1, or over the others' sum.
    total = tl.zeros_like(weights[k])
    for j in tl.static_range(len(weights)):
        if j != k:
            total += weights[j]
    if RENORMALIZE:
        return tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))
    return tl.full(total.shape, 1.0, tl.float32)


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
):
    M: tl.constexpr = len(expert_ptrs)
    program = tl.program_id(0).to(tl.int64)
    column = (program % tl.cdiv(D, BLOCK_D)) * BLOCK_D + tl.arange(0, BLOCK_D)
    sample, token, exists = rows_of(program // tl.cdiv(D, BLOCK_D), tokens, BLOCK_N)
    inside = exists[:, None] & (column < D)[None, :]
    tiles = ()
    for m in tl.static_range(M):
        offsets = rows(expert_strides[m], sample, token, ALIGN)[:, None] + column[None, :]
        tiles = tiles + (tl.load(expert_ptrs[m] + offsets, mask=inside, other=0.0),)
    for task in range(tasks):
        base = rows(weights_strides, sample, task, 1) + token * stride(weights_strides[2], 1)
        weights = _load_weights(weights_ptr + base, weights_strides, exists, M)
        totals = totals_of(tiles, weights, _GROUP)
        for k in tl.static_range(M):
            left = sum_of_others(tiles, weights, k, _GROUP, totals)
            if RENORMALIZE:
                # An expert of weight 0 may be infinite: what no weight counts is 0, not NaN.
                scale = _scale(weights, k, RENORMALIZE)[:, None]
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
    sample,
    token,
    exists,
    tokens,
    tasks,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    NEEDS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # Writes dF_j of the experts from FIRST on and returns, for each, F_j . H_tj and r_tj out_tj . G_tj: (BLOCK_N, BLOCK_T).
    M: tl.constexpr = len(expert_ptrs)
    FOR_WEIGHTS: tl.constexpr = (NEEDS >> M) & 1
    every_task = tl.arange(0, BLOCK_T)
    features, scaled = (), ()
    for _ in tl.static_range(SIZE):
        features = features + (tl.zeros((BLOCK_N, BLOCK_T), tl.float32),)
        scaled = scaled + (tl.zeros((BLOCK_N, BLOCK_T), tl.float32),)
    for chunk in range((D + BLOCK_D - 1) // BLOCK_D):
        column = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = exists[:, None] & (column < D)[None, :]
        tiles, totals = (), ()
        for m in tl.static_range(M):
            if FOR_WEIGHTS and (RENORMALIZE or (m >= FIRST and m < FIRST + SIZE)):
                offsets = rows(expert_strides[m], sample, token, ALIGN)[:, None] + column[None, :]
                tiles = tiles + (tl.load(expert_ptrs[m] + offsets, mask=inside, other=0.0),)
        OWN: tl.constexpr = FIRST if RENORMALIZE else 0  # where this group's tiles begin
        for _ in tl.static_range(SIZE):
            totals = totals + (tl.zeros((BLOCK_N, BLOCK_D), tl.float32),)
        for task in range(tasks):
            base = rows(weights_strides, sample, task, 1) + token * stride(weights_strides[2], 1)
            weights = _load_weights(weights_ptr + base, weights_strides, exists, M)
            grads = ()
            grads_of_others = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            mixed_others = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            for k in tl.static_range(M):
                first = rows(grad_strides, sample, task, GRAD_ALIGN) + k * stride(grad_strides[2], GRAD_ALIGN)
                offsets = first + token[:, None] * stride(grad_strides[3], GRAD_ALIGN) + column[None, :]
                grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0)
                if k >= FIRST and k < FIRST + SIZE:
                    grads = grads + (grad,)
                else:
                    grads_of_others += _scale(weights, k, RENORMALIZE)[:, None] * grad.to(tl.float32)
                    if FOR_WEIGHTS and RENORMALIZE:
                        mixed_others += weights[k][:, None] * tiles[k].to(tl.float32)
            new_totals, new_features, new_scaled = (), (), ()
            for j in tl.static_range(SIZE):
                passed = grads_of_others
                for k in tl.static_range(SIZE):
                    if k != j:
                        passed += _scale(weights, FIRST + k, RENORMALIZE)[:, None] * grads[k].to(tl.float32)
                new_totals = new_totals + (totals[j] + weights[FIRST + j][:, None] * passed,)
                if FOR_WEIGHTS:
                    dot = tl.sum(tiles[OWN + j].to(tl.float32) * passed, axis=1)
                    here = (every_task == task)[None, :]
                    new_features = new_features + (features[j] + tl.where(here, dot[:, None], 0.0),)
                    if RENORMALIZE:
                        left = mixed_others
                        for i in tl.static_range(SIZE):
                            if i != j:
                                left += weights[FIRST + i][:, None] * tiles[FIRST + i].to(tl.float32)
                        scale = _scale(weights, FIRST + j, RENORMALIZE)
                        dot = tl.sum(left * grads[j].to(tl.float32), axis=1)
                        dot = tl.where(scale == 0, 0.0, dot * scale * scale)
                        new_scaled = new_scaled + (scaled[j] + tl.where(here, dot[:, None], 0.0),)
            totals = new_totals
            if FOR_WEIGHTS:
                features = new_features
                if RENORMALIZE:
                    scaled = new_scaled
        for j in tl.static_range(SIZE):
            if (NEEDS >> (FIRST + j)) & 1:
                to = grad_expert_ptrs[FIRST + j] + (sample * tokens + token)[:, None] * D + column[None, :]
                tl.store(to, totals[j].to(to.dtype.element_ty), mask=inside)
    return features, scaled


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
    GROUP: tl.constexpr,
):
    M: tl.constexpr = len(expert_ptrs)
    FOR_WEIGHTS: tl.constexpr = (NEEDS >> M) & 1
    sample, token, exists = rows_of(tl.program_id(0).to(tl.int64), tokens, BLOCK_N)
    every_task = tl.arange(0, BLOCK_T)
    in_tasks = exists[:, None] & (every_task < tasks)[None, :]
    weight_rows = ((sample * tasks + every_task)[None, :] * tokens + token[:, None]) * M
    for group in tl.static_range((M + GROUP - 1) // GROUP):
        features, scaled = _of_group(
            grad_ptr,
            grad_strides,
            expert_ptrs,
            expert_strides,
            weights_ptr,
            weights_strides,
            grad_expert_ptrs,
            sample,
            token,
            exists,
            tokens,
            tasks,
            group * GROUP,
            min(GROUP, M - group * GROUP),
            D,
            NEEDS,
            RENORMALIZE,
            ALIGN,
            GRAD_ALIGN,
            BLOCK_N,
            BLOCK_D,
            BLOCK_T,
        )
        for j in tl.static_range(len(features)):
            to = weight_rows + group * GROUP + j
            if FOR_WEIGHTS and RENORMALIZE:
                tl.store(features_ptr + to, features[j], mask=in_tasks)
                tl.store(scaled_ptr + to, scaled[j], mask=in_tasks)
            elif FOR_WEIGHTS:
                tl.store(grad_weights_ptr + to, features[j].to(grad_weights_ptr.dtype.element_ty), mask=in_tasks)
    if FOR_WEIGHTS and RENORMALIZE:
        tl.debug_barrier()
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
        num_warps=c.num_warps,
        num_stages=c.num_stages,
        **(config.unspilled(weights.device) if members > 8 else {}),
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
    parted = grad_weights is not None and renormalize
    kept = weights.new_empty((2, *weights.shape), dtype=torch.float32) if parted else None
    c = config.choose("leave_one_out_backward", weights.device, grad.dtype, D=width, M=members, T=power(tasks))
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
        *(weights if kept is None else kept).expand(2, *weights.shape).unbind(),
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
        GROUP=c.group,
        num_warps=c.num_warps,
        num_stages=c.num_stages,
        **(config.unspilled(weights.device) if members > 8 else {}),
    )
    return [t for t in (*found, grad_weights) if t is not None]
