"""Leave-one-out mixtures (TIGER sec. 3.5), all of them from one read of the experts.

    out_tk = r_tk sum over j != k of w_tj F_j        r_tk = 1, or renormalised 1 / sum over j != k of w_tj (0 if that is 0)

and with G the gradient of out, H_tj = sum over k != j of r_tk G_tk:

    dF_j = sum_t w_tj H_tj        dw_tj = F_j . H_tj - [renormalised] sum over k != j of r_tk out_tk . G_tk

Layout: experts (B, N, D) with any strides but the last, weights (B, T, N, M) with any, out (B, T, M, N, D) dense.
A program holds a tile (BLOCK_N tokens, BLOCK_D channels) of every expert in registers and loops over the tasks; the
backward loops over tiles of channels too, as dw sums over them. Bytes, in units of B N D elements: forward M read, T M
written; backward M + T M read, M written; the weights beside them.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from tiger_fast.kernels import config
from tiger_fast.kernels.device import rows, rows_of, stride, sum_of_others, totals_of
from tiger_fast.kernels.launch import alignment, dense, kernel, launch, power, strides

_GROUP = tl.constexpr(4)


@triton.jit
def _load_weights(pointers, strides, exists, M: tl.constexpr):
    weights = ()
    for m in tl.static_range(M):
        weights = weights + (tl.load(pointers + m * stride(strides[3], 1), mask=exists, other=0.0).to(tl.float32),)
    return weights


@triton.jit
def _scales(weights, RENORMALIZE: tl.constexpr):
    # r_k: 1, or over the others' sum.
    result = ()
    for k in tl.static_range(len(weights)):
        total = tl.zeros_like(weights[k])
        for j in tl.static_range(len(weights)):
            if j != k:
                total += weights[j]
        if RENORMALIZE:
            result = result + (tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total)),)
        else:
            result = result + (tl.full(total.shape, 1.0, tl.float32),)
    return result


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
        scales = _scales(weights, RENORMALIZE)
        totals = totals_of(tiles, weights, _GROUP)
        for k in tl.static_range(M):
            left = sum_of_others(tiles, weights, k, _GROUP, totals)
            if RENORMALIZE:
                # An expert of weight 0 may be infinite: what no weight counts is 0, not NaN.
                left = tl.where(scales[k][:, None] == 0, 0.0, left * scales[k][:, None])
            row = ((sample * tasks + task) * M + k) * tokens + token
            tl.store(out_ptr + row[:, None] * D + column[None, :], left.to(out_ptr.dtype.element_ty), mask=inside)


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
):
    M: tl.constexpr = len(expert_ptrs)
    FOR_WEIGHTS: tl.constexpr = (NEEDS >> M) & 1
    sample, token, exists = rows_of(tl.program_id(0).to(tl.int64), tokens, BLOCK_N)
    every_task = tl.arange(0, BLOCK_T)
    through_features, through_scale = (), ()
    for _ in tl.static_range(M):
        through_features = through_features + (tl.zeros((BLOCK_N, BLOCK_T), tl.float32),)
        through_scale = through_scale + (tl.zeros((BLOCK_N, BLOCK_T), tl.float32),)
    for chunk in range(tl.cdiv(D, BLOCK_D)):
        column = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = exists[:, None] & (column < D)[None, :]
        tiles, grads = (), ()
        for m in tl.static_range(M):
            if FOR_WEIGHTS:
                offsets = rows(expert_strides[m], sample, token, ALIGN)[:, None] + column[None, :]
                tiles = tiles + (tl.load(expert_ptrs[m] + offsets, mask=inside, other=0.0),)
            grads = grads + (tl.zeros((BLOCK_N, BLOCK_D), tl.float32),)
        for task in range(tasks):
            base = rows(weights_strides, sample, task, 1) + token * stride(weights_strides[2], 1)
            weights = _load_weights(weights_ptr + base, weights_strides, exists, M)
            scales = _scales(weights, RENORMALIZE)
            cotangents = ()
            for k in tl.static_range(M):
                first = rows(grad_strides, sample, task, GRAD_ALIGN) + k * stride(grad_strides[2], GRAD_ALIGN)
                offsets = first + token[:, None] * stride(grad_strides[3], GRAD_ALIGN) + column[None, :]
                cotangents = cotangents + (tl.load(grad_ptr + offsets, mask=inside, other=0.0),)
            totals = totals_of(cotangents, scales, _GROUP)
            kept, kept_features, kept_scale = (), (), ()
            for j in tl.static_range(M):
                passed = sum_of_others(cotangents, scales, j, _GROUP, totals)
                kept = kept + (grads[j] + weights[j][:, None] * passed,)
                if FOR_WEIGHTS:
                    dot = tl.sum(tiles[j].to(tl.float32) * passed, axis=1)
                    here = tl.where((every_task == task)[None, :], dot[:, None], 0.0)
                    kept_features = kept_features + (through_features[j] + here,)
            grads = kept
            if FOR_WEIGHTS:
                through_features = kept_features
                if RENORMALIZE:
                    totals = totals_of(tiles, weights, _GROUP)
                    for k in tl.static_range(M):
                        left = sum_of_others(tiles, weights, k, _GROUP, totals)
                        dot = tl.sum(left * cotangents[k].to(tl.float32), axis=1)
                        dot = tl.where(scales[k] == 0, 0.0, dot * scales[k] * scales[k])
                        here = tl.where((every_task == task)[None, :], dot[:, None], 0.0)
                        kept_scale = kept_scale + (through_scale[k] + here,)
                    through_scale = kept_scale
        for m in tl.static_range(M):
            if (NEEDS >> m) & 1:
                offsets = (sample * tokens + token)[:, None] * D + column[None, :]
                tl.store(grad_expert_ptrs[m] + offsets, grads[m].to(grad_expert_ptrs[m].dtype.element_ty), mask=inside)
    if FOR_WEIGHTS:
        inside = exists[:, None] & (every_task < tasks)[None, :]
        offsets = ((sample * tasks + every_task)[None, :] * tokens + token[:, None]) * M
        for j in tl.static_range(M):
            result = through_features[j]
            for k in tl.static_range(M):
                if RENORMALIZE and k != j:
                    result -= through_scale[k]
            tl.store(grad_weights_ptr + offsets + j, result.to(grad_weights_ptr.dtype.element_ty), mask=inside)


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
        tokens,
        tasks,
        D=width,
        NEEDS=needs,
        RENORMALIZE=renormalize,
        ALIGN=alignment(*experts),
        GRAD_ALIGN=alignment(grad),
        BLOCK_N=c.rows,
        BLOCK_D=c.width,
        BLOCK_T=c.group,
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    return [t for t in (*found, grad_weights) if t is not None]
