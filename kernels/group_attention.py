"""Group attention (TIGER sec. 3.4): at every token on its own, the G members attend to each other.

For each head, with scale = 1 / sqrt(head size):

    P = softmax over j of (scale q_i) . k_j      out_i = sum over j of P_ij v_j
    dP_ij = dout_i . v_j                         dS_ij = P_ij (dP_ij - sum over l of P_il dP_il)
    dq_i = scale sum over j of dS_ij k_j         dk_j = scale sum over i of dS_ij q_i         dv_j = sum over i of P_ij dout_i

Layout: q, k, v, dout (B, G, N, D) with any strides but the last, out dense; the gradients are dense, or lie in one tensor as
q, k and v do when they came packed. A row of a tile is one head of one token, and the rows of a sample are counted through its
tokens x heads, so that neighbours are contiguous in memory however many heads there are. Bytes, in units of B N D elements:
forward 3G read, G written; backward 4G read, 3G written, P being computed again rather than saved.

There are two ways, and `config` chooses by G:

- by elements: a tile (rows, channels) for each member, all G x G scores unrolled, sums over channels within a warp. No
  padding of G, no shared memory, products in float32. For small groups.
- by products: a tile (rows, members padded to 16 or 32, channels), and tl.dot batched over rows, or plain where a tile has
  one row, so that several warps share it. A padded member's weight is exactly 0, and its rows are not stored. Heads wider
  than a tile take it in steps: the forward still reads everything once; the backward reads q, k and dout again, from a
  cache if it holds them.
"""

import math
from collections.abc import Callable, Sequence

import triton
import triton.language as tl
from torch import Tensor

from tiger_fast.kernels import config
from tiger_fast.kernels.device import rows, stride
from tiger_fast.kernels.launch import alignment, dense, kernel, launch, strides


@triton.jit
def _place(tokens, HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK_R: tl.constexpr):
    """Where a program of a grid of samples x blocks of tokens x heads is: its sample, and for each row (BLOCK_R) its token,
    its head's first channel, and whether it exists."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(tokens * HEADS, BLOCK_R)
    first = (program % blocks) * BLOCK_R
    # A division in 64 bits for the program, and one by a constant in 32 bits for each row.
    row = (first % HEADS).to(tl.int32) + tl.arange(0, BLOCK_R)
    token = first // HEADS + row // HEADS
    return program // blocks, token, (row % HEADS) * HEAD, token < tokens


@triton.jit
def _columns(first, exists, column, HEAD: tl.constexpr):
    """The channels of each row's columns, and which of these exist: (BLOCK_R, columns) both."""
    return first[:, None] + column[None, :], exists[:, None] & (column < HEAD)[None, :]


@triton.jit
def _softmax(scores):
    # Over a tuple. NaN where a score is NaN or +inf, or where all are -inf.
    top = scores[0]
    for j in tl.static_range(1, len(scores)):
        top = tl.maximum(top, scores[j])
    exponentials = ()
    total = tl.zeros_like(top)
    for j in tl.static_range(len(scores)):
        exponentials = exponentials + (tl.exp(scores[j] - top),)
        total += exponentials[j]
    return _scaled(exponentials, 1.0 / total)


@triton.jit
def _scaled(numbers, factor):
    result = ()
    for j in tl.static_range(len(numbers)):
        result = result + (numbers[j] * factor,)
    return result


@triton.jit
def _dots(row, tiles):
    # row . tiles[j] over the channels, for every j.
    result = ()
    for j in tl.static_range(len(tiles)):
        result = result + (tl.sum(row * tiles[j].to(tl.float32), axis=1),)
    return result


@triton.jit
def _mix(factors, tiles):
    # sum over j of factors[j] tiles[j]
    result = tl.zeros(tiles[0].shape, tl.float32)
    for j in tl.static_range(len(tiles)):
        result += factors[j][:, None] * tiles[j].to(tl.float32)
    return result


@triton.jit
def _plus(totals, factors, row):
    # totals[j] + factors[j] row, for every j.
    result = ()
    for j in tl.static_range(len(totals)):
        result = result + (totals[j] + factors[j][:, None] * row,)
    return result


@triton.jit
def _offsets(strides, sample, member, token, channel, ALIGN: tl.constexpr):
    row = token * stride(strides[2], ALIGN)
    return rows(strides, sample, member, ALIGN) + (row[:, None] + channel)


@triton.jit
def _load(ptr, strides, sample, token, channel, inside, G: tl.constexpr, ALIGN: tl.constexpr):
    tiles = ()
    for g in tl.static_range(G):
        offsets = _offsets(strides, sample, g, token, channel, ALIGN)
        tiles = tiles + (tl.load(ptr + offsets, mask=inside, other=0.0),)
    return tiles


@triton.jit
def _store(ptr, strides, sample, member, token, channel, inside, tile, ALIGN: tl.constexpr):
    offsets = _offsets(strides, sample, member, token, channel, ALIGN)
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=inside)


@kernel
def _forward_by_elements(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    tokens: tl.int64,
    scale: tl.float32,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample, token, first, exists = _place(tokens, HEADS, HEAD, BLOCK_R)
    channel, inside = _columns(first, exists, tl.arange(0, BLOCK_D), HEAD)
    # Everything is asked for before anything is computed: a store in between would hold later loads back.
    queries = _load(q_ptr, q_strides, sample, token, channel, inside, G, ALIGN)
    keys = _load(k_ptr, k_strides, sample, token, channel, inside, G, ALIGN)
    values = _load(v_ptr, v_strides, sample, token, channel, inside, G, ALIGN)
    for i in tl.static_range(G):
        weights = _softmax(_dots(queries[i].to(tl.float32) * scale, keys))
        _store(out_ptr, out_strides, sample, i, token, channel, inside, _mix(weights, values), ALIGN)


@kernel
def _backward_by_elements(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    grad_q_strides,
    grad_k_strides,
    grad_v_strides,
    tokens: tl.int64,
    scale: tl.float32,
    NEEDS: tl.constexpr,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample, token, first, exists = _place(tokens, HEADS, HEAD, BLOCK_R)
    channel, inside = _columns(first, exists, tl.arange(0, BLOCK_D), HEAD)
    queries = _load(q_ptr, q_strides, sample, token, channel, inside, G, ALIGN)
    keys = _load(k_ptr, k_strides, sample, token, channel, inside, G, ALIGN)
    grads = _load(grad_ptr, grad_strides, sample, token, channel, inside, G, ALIGN)
    if NEEDS & 3:
        values = _load(v_ptr, v_strides, sample, token, channel, inside, G, ALIGN)
    grad_keys, grad_values = (), ()
    for _ in tl.static_range(G):
        grad_keys = grad_keys + (tl.zeros(inside.shape, tl.float32),)
        grad_values = grad_values + (tl.zeros(inside.shape, tl.float32),)
    for i in tl.static_range(G):
        query = queries[i].to(tl.float32) * scale
        grad = grads[i].to(tl.float32)
        weights = _softmax(_dots(query, keys))
        if NEEDS & 4:
            grad_values = _plus(grad_values, weights, grad)
        if NEEDS & 3:
            through = _dots(grad, values)
            level = tl.zeros_like(through[0])
            for j in tl.static_range(G):
                level += weights[j] * through[j]
            slopes = ()
            for j in tl.static_range(G):
                slopes = slopes + (weights[j] * (through[j] - level),)
            if NEEDS & 2:
                grad_keys = _plus(grad_keys, slopes, query)
            if NEEDS & 1:
                grad_query = _mix(_scaled(slopes, scale), keys)
                _store(grad_q_ptr, grad_q_strides, sample, i, token, channel, inside, grad_query, ALIGN)
    for j in tl.static_range(G):
        if NEEDS & 2:
            _store(grad_k_ptr, grad_k_strides, sample, j, token, channel, inside, grad_keys[j], ALIGN)
        if NEEDS & 4:
            _store(grad_v_ptr, grad_v_strides, sample, j, token, channel, inside, grad_values[j], ALIGN)


@triton.jit
def _places_of_group(
    strides, place, step, G: tl.constexpr, HEAD: tl.constexpr, ALIGN: tl.constexpr, SHAPE: tl.constexpr
):
    # Offsets and masks (members, rows, channels): lanes are dealt from the last on, and rows are contiguous in memory.
    sample, token, first, exists = place
    member = tl.arange(0, SHAPE[0])
    channel, inside = _columns(first, exists, step * SHAPE[2] + tl.arange(0, SHAPE[2]), HEAD)
    row = token[:, None] * stride(strides[2], ALIGN) + channel
    offsets = rows(strides, sample, member, ALIGN)[:, None, None] + row[None, :, :]
    return offsets, inside[None, :, :] & (member < G)[:, None, None]


@triton.jit
def _load_group(
    ptr, strides, place, step, G: tl.constexpr, HEAD: tl.constexpr, ALIGN: tl.constexpr, SHAPE: tl.constexpr
):
    """A step's tile (rows, members, channels) for tl.dot; (members, channels) where there is one row."""
    offsets, inside = _places_of_group(strides, place, step, G, HEAD, ALIGN, SHAPE)
    tile = tl.load(ptr + offsets, mask=inside, other=0.0)
    if SHAPE[1] == 1:
        tile = tl.reshape(tile, (SHAPE[0], SHAPE[2]))
    else:
        tile = tl.permute(tile, (1, 0, 2))
    return tile


@triton.jit
def _store_group(
    ptr, strides, place, step, tile, G: tl.constexpr, HEAD: tl.constexpr, ALIGN: tl.constexpr, SHAPE: tl.constexpr
):
    offsets, inside = _places_of_group(strides, place, step, G, HEAD, ALIGN, SHAPE)
    tile = tile.to(ptr.dtype.element_ty)
    if SHAPE[1] == 1:
        tile = tl.reshape(tile, SHAPE)
    else:
        tile = tl.permute(tile, (1, 0, 2))
    tl.store(ptr + offsets, tile, mask=inside)


@triton.jit
def _transposed(tile):
    if len(tile.shape) == 2:
        result = tl.permute(tile, (1, 0))
    else:
        result = tl.permute(tile, (0, 2, 1))
    return result


@triton.jit
def _no_scores(SHAPE: tl.constexpr):
    if SHAPE[1] == 1:
        result = tl.zeros((SHAPE[0], SHAPE[0]), tl.float32)
    else:
        result = tl.zeros((SHAPE[1], SHAPE[0], SHAPE[0]), tl.float32)
    return result


@triton.jit
def _weights(scores, G: tl.constexpr):
    """The softmax over exactly G members. A padded one weighs 0, and gives 0 to everyone, whatever the scores are."""
    LAST: tl.constexpr = len(scores.shape) - 1
    exists = tl.arange(0, scores.shape[LAST]) < G
    row_exists, column_exists = exists[:, None], exists[None, :]
    if LAST == 2:
        row_exists, column_exists = row_exists[None, :, :], column_exists[None, :, :]
    scores = tl.where(column_exists, scores, float("-inf"))
    exponentials = tl.exp(scores - tl.max(scores, axis=LAST, keep_dims=True))
    weights = exponentials * (1.0 / tl.sum(exponentials, axis=LAST, keep_dims=True))
    return tl.where(row_exists & column_exists, weights, 0.0)


@kernel
def _forward_by_products(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    tokens: tl.int64,
    scale: tl.float32,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    STEPS: tl.constexpr = (HEAD + BLOCK_D - 1) // BLOCK_D
    SHAPE: tl.constexpr = (BLOCK_G, BLOCK_R, BLOCK_D)
    place = _place(tokens, HEADS, HEAD, BLOCK_R)
    scores = _no_scores(SHAPE)
    if STEPS == 1:
        query = _load_group(q_ptr, q_strides, place, 0, G, HEAD, ALIGN, SHAPE)
        key = _load_group(k_ptr, k_strides, place, 0, G, HEAD, ALIGN, SHAPE)
        value = _load_group(v_ptr, v_strides, place, 0, G, HEAD, ALIGN, SHAPE)
        scores = tl.dot(query, _transposed(key), scores, input_precision=PRECISION)
    else:
        for step in range(STEPS):
            query = _load_group(q_ptr, q_strides, place, step, G, HEAD, ALIGN, SHAPE)
            key = _load_group(k_ptr, k_strides, place, step, G, HEAD, ALIGN, SHAPE)
            scores = tl.dot(query, _transposed(key), scores, input_precision=PRECISION)
    weights = _weights(scores * scale, G).to(q_ptr.dtype.element_ty)
    if STEPS == 1:
        out = tl.dot(weights, value, input_precision=PRECISION)
        _store_group(out_ptr, out_strides, place, 0, out, G, HEAD, ALIGN, SHAPE)
    else:
        for step in range(STEPS):
            value = _load_group(v_ptr, v_strides, place, step, G, HEAD, ALIGN, SHAPE)
            out = tl.dot(weights, value, input_precision=PRECISION)
            _store_group(out_ptr, out_strides, place, step, out, G, HEAD, ALIGN, SHAPE)


@kernel
def _backward_by_products(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    grad_q_strides,
    grad_k_strides,
    grad_v_strides,
    tokens: tl.int64,
    scale: tl.float32,
    NEEDS: tl.constexpr,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    STEPS: tl.constexpr = (HEAD + BLOCK_D - 1) // BLOCK_D
    SHAPE: tl.constexpr = (BLOCK_G, BLOCK_R, BLOCK_D)
    place = _place(tokens, HEADS, HEAD, BLOCK_R)
    scores, through = _no_scores(SHAPE), _no_scores(SHAPE)
    if STEPS == 1:
        query = _load_group(q_ptr, q_strides, place, 0, G, HEAD, ALIGN, SHAPE)
        key = _load_group(k_ptr, k_strides, place, 0, G, HEAD, ALIGN, SHAPE)
        grad = _load_group(grad_ptr, grad_strides, place, 0, G, HEAD, ALIGN, SHAPE)
        scores = tl.dot(query, _transposed(key), scores, input_precision=PRECISION)
        if NEEDS & 3:
            value = _load_group(v_ptr, v_strides, place, 0, G, HEAD, ALIGN, SHAPE)
            through = tl.dot(grad, _transposed(value), through, input_precision=PRECISION)
    else:
        for step in range(STEPS):
            query = _load_group(q_ptr, q_strides, place, step, G, HEAD, ALIGN, SHAPE)
            key = _load_group(k_ptr, k_strides, place, step, G, HEAD, ALIGN, SHAPE)
            scores = tl.dot(query, _transposed(key), scores, input_precision=PRECISION)
            if NEEDS & 3:
                grad = _load_group(grad_ptr, grad_strides, place, step, G, HEAD, ALIGN, SHAPE)
                value = _load_group(v_ptr, v_strides, place, step, G, HEAD, ALIGN, SHAPE)
                through = tl.dot(grad, _transposed(value), through, input_precision=PRECISION)
    weights = _weights(scores * scale, G)
    slopes = weights * (through - tl.sum(weights * through, axis=len(scores.shape) - 1, keep_dims=True))
    weights = _transposed(weights.to(q_ptr.dtype.element_ty))
    slopes = slopes.to(q_ptr.dtype.element_ty)
    if STEPS == 1:
        if NEEDS & 4:
            result = tl.dot(weights, grad, input_precision=PRECISION)
            _store_group(grad_v_ptr, grad_v_strides, place, 0, result, G, HEAD, ALIGN, SHAPE)
        if NEEDS & 2:
            result = tl.dot(_transposed(slopes), query, input_precision=PRECISION) * scale
            _store_group(grad_k_ptr, grad_k_strides, place, 0, result, G, HEAD, ALIGN, SHAPE)
        if NEEDS & 1:
            result = tl.dot(slopes, key, input_precision=PRECISION) * scale
            _store_group(grad_q_ptr, grad_q_strides, place, 0, result, G, HEAD, ALIGN, SHAPE)
    else:
        for step in range(STEPS):
            if NEEDS & 4:
                grad = _load_group(grad_ptr, grad_strides, place, step, G, HEAD, ALIGN, SHAPE)
                result = tl.dot(weights, grad, input_precision=PRECISION)
                _store_group(grad_v_ptr, grad_v_strides, place, step, result, G, HEAD, ALIGN, SHAPE)
            if NEEDS & 2:
                query = _load_group(q_ptr, q_strides, place, step, G, HEAD, ALIGN, SHAPE)
                result = tl.dot(_transposed(slopes), query, input_precision=PRECISION) * scale
                _store_group(grad_k_ptr, grad_k_strides, place, step, result, G, HEAD, ALIGN, SHAPE)
            if NEEDS & 1:
                key = _load_group(k_ptr, k_strides, place, step, G, HEAD, ALIGN, SHAPE)
                result = tl.dot(slopes, key, input_precision=PRECISION) * scale
                _store_group(grad_q_ptr, grad_q_strides, place, step, result, G, HEAD, ALIGN, SHAPE)


def _launch(
    name: str,
    by_elements: Callable,
    by_products: Callable,
    tensors: tuple[Tensor, ...],
    num_heads: int,
    **constants: object,
) -> None:
    # All tensors are (B, G, N, D).
    batch, members, tokens, width = tensors[0].shape
    head, align, dtype = width // num_heads, alignment(*tensors), tensors[0].dtype
    c = config.choose(name, tensors[0].device, dtype, G=members, head=head, vector=math.gcd(head, align))
    if c.members:
        constants |= {"PRECISION": config.precision(tensors[0]), "BLOCK_G": c.members}
    launch(
        by_products if c.members else by_elements,
        batch * triton.cdiv(tokens * num_heads, c.rows),
        *tensors,
        *map(strides, tensors),
        tokens,
        head**-0.5,
        G=members,
        HEADS=num_heads,
        HEAD=head,
        ALIGN=align,
        BLOCK_R=c.rows,
        BLOCK_D=c.width,
        **c.options,
        **constants,
    )


def _run(q: Tensor, k: Tensor, v: Tensor, out: Tensor, num_heads: int) -> None:
    _launch("group_attention", _forward_by_elements, _forward_by_products, (q, k, v, out), num_heads)


def _run_backward(inputs: tuple[Tensor, ...], found: Sequence[Tensor | None], num_heads: int, needs: int) -> None:
    # Where a gradient is not wanted nothing is written; the kernel still takes a pointer.
    found = (inputs[0] if gradient is None else gradient for gradient in found)
    kernels = _backward_by_elements, _backward_by_products
    _launch("group_attention_backward", *kernels, (*inputs, *found), num_heads, NEEDS=needs)


def group_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """(B, G, N, D): see the module."""
    out = q.new_empty(q.shape)
    _run(dense(q), dense(k), dense(v), out, num_heads)
    return out


def group_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, num_heads: int, needs: int) -> list[Tensor]:
    """The gradients of `q`, `k` and `v`, those whose bit in `needs` is set."""
    found = [t.new_empty(t.shape) if needs >> i & 1 else None for i, t in enumerate((q, k, v))]
    if needs & 7:
        _run_backward(tuple(map(dense, (grad, q, k, v))), found, num_heads, needs & 7)
    return [t for t in found if t is not None]


def group_attention_packed(qkv: Tensor, num_heads: int) -> Tensor:
    """(B, G, N, D) of the three thirds of one (B, G, N, 3 D) tensor."""
    out = qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))
    _run(*dense(qkv).chunk(3, dim=-1), out, num_heads)
    return out


def group_attention_packed_backward(grad: Tensor, qkv: Tensor, num_heads: int) -> Tensor:
    """The gradient of `qkv`, dense, as one tensor."""
    found = qkv.new_empty(qkv.shape)
    _run_backward((dense(grad), *dense(qkv).chunk(3, dim=-1)), found.chunk(3, dim=-1), num_heads, 7)
    return found
