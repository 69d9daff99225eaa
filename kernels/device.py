"""Device functions that kernels share."""

import triton
import triton.language as tl


@triton.jit
def stride(encoded, ALIGN: tl.constexpr):
    """A stride out of a tuple made by `launch.strides`, known to be a multiple of ALIGN (`launch.alignment`)."""
    return tl.multiple_of((encoded.to(tl.int64) - 3) >> 1, ALIGN)


@triton.jit
def rows(strides, first, second, ALIGN: tl.constexpr):
    """Offsets along a tensor's first two dimensions."""
    return first * stride(strides[0], ALIGN) + second * stride(strides[1], ALIGN)


@triton.jit
def rows_of(program, tokens, BLOCK_N: tl.constexpr):
    """The sample, the tokens (BLOCK_N) and which of them exist, for a program of a grid of samples x blocks of tokens."""
    blocks = tl.cdiv(tokens, BLOCK_N)
    sample = program // blocks
    token = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    return sample, token, token < tokens


@triton.jit
def sum_of_others(tiles, factors, k: tl.constexpr, GROUP: tl.constexpr, totals):
    """sum over j != k of factors[j] tiles[j], by addition alone: what is left out never enters.

    tiles: a tuple of (rows, width); factors: a tuple of (rows), float32. `totals` are the sums over groups of GROUP
    consecutive ones (`totals_of`), so that the cost of all k grows with M (GROUP + M / GROUP) and not with M^2."""
    result = tl.zeros(tiles[k].shape, tl.float32)
    for g in tl.static_range(len(totals)):
        if g != k // GROUP:
            result += totals[g]
    for j in tl.static_range(len(tiles)):
        if j // GROUP == k // GROUP and j != k:
            result += factors[j][:, None] * tiles[j].to(tl.float32)
    return result


@triton.jit
def totals_of(tiles, factors, GROUP: tl.constexpr):
    """The sums of factors[j] tiles[j] over groups of GROUP consecutive j; none where there is one group."""
    totals = ()
    if len(tiles) > GROUP:
        for g in tl.static_range((len(tiles) + GROUP - 1) // GROUP):
            total = tl.zeros(tiles[0].shape, tl.float32)
            for j in tl.static_range(len(tiles)):
                if j // GROUP == g:
                    total += factors[j][:, None] * tiles[j].to(tl.float32)
            totals = totals + (total,)
    return totals


@triton.jit
def softmax_of(logits):
    """The softmax over a tuple of tensors, element by element."""
    largest = logits[0]
    for k in tl.static_range(1, len(logits)):
        largest = tl.maximum(largest, logits[k])
    terms = ()
    total = tl.zeros(logits[0].shape, tl.float32)
    for k in tl.static_range(len(logits)):
        term = tl.exp(logits[k] - largest)
        total += term
        terms = terms + (term,)
    result = ()
    for k in tl.static_range(len(logits)):
        result = result + (terms[k] / total,)
    return result


@triton.jit
def dot_wide(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b for `a` of the activation type and `b` float32, with little of b's precision lost.

    bfloat16: b is the sum of two bfloat16 numbers, to 2^-17. float16: both as tf32, whose exponents hold what float16's
    do not. float32: by PRECISION."""
    if a.dtype == tl.bfloat16:
        high = b.to(tl.bfloat16)
        total = tl.dot(a, high, total)
        return tl.dot(a, (b - high.to(tl.float32)).to(tl.bfloat16), total)
    return tl.dot(a.to(tl.float32), b, total, input_precision=PRECISION)


@triton.jit
def dot_like(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b in the type of both if they share one, else in float32 by PRECISION."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b, total)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)


def counted_tokens(
    target_ptr,
    target_strides,
    valid_ptr,
    valid_strides,
    ignore_index,
    sample,
    token,
    exists,
    LABELS: tl.constexpr,
):
    """Which of the tokens count, and their labels (zeros unless LABELS: the target is then no class).

    A token counts if it exists, is `valid` (None: all are) and is not labelled `ignore_index`."""
    counted = exists
    label = tl.zeros(token.shape, tl.int64)
    if valid_ptr is not None:
        counted = counted & (tl.load(valid_ptr + rows(valid_strides, sample, token, 1), mask=exists, other=0) != 0)
    if LABELS:
        label = tl.load(target_ptr + rows(target_strides, sample, token, 1), mask=exists, other=0).to(tl.int64)
        counted = counted & (label != ignore_index)
    return counted, label
