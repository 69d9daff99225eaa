"""The losses of a token's logits and their gradients, for tiles (BLOCK_N tokens, BLOCK_C classes) of any number of classes.

A loss is a state of three numbers a token that `update` takes from one tile of classes to the next:

    cross_entropy   the largest logit, sum of exp(y - it), the label's own logit        (an online logsumexp)
    l1, mse, bce    the sum over classes, -, -
    cosine          |y|^2, y . t, |t|^2

`finish` makes the loss of it, `gradient` the loss's gradient with respect to a tile of logits and of targets. Numbers in
what lies outside the classes are taken as they are (a -inf or a NaN among the classes is the token's own).
"""

import triton
import triton.language as tl

# In the order of tiger_fast.reference.TOKEN_LOSSES.
CROSS_ENTROPY = tl.constexpr(0)
L1 = tl.constexpr(1)
MSE = tl.constexpr(2)
BCE = tl.constexpr(3)
COSINE = tl.constexpr(4)


@triton.jit
def _finite(x):
    # What exponents are taken relative to; an infinite one gives inf or NaN by itself.
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _log1p(e):
    # log(1 + e), exact where e is tiny.
    u = 1.0 + e
    return tl.log(u) + (e - (u - 1.0)) / u


@triton.jit
def _divisor(norms):
    return tl.where(norms < 1e-8, 1e-8, norms)


@triton.jit
def begin(BLOCK_N: tl.constexpr, LOSS: tl.constexpr):
    """The state before the first tile."""
    zeros = tl.zeros((BLOCK_N,), tl.float32)
    first = zeros
    if LOSS == CROSS_ENTROPY:
        first = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    return (first, zeros, zeros)


@triton.jit
def update(state, logits, target, label, column, inside, LOSS: tl.constexpr):
    """The state after one more tile. `target` is a tile, `label` the tokens' class; each loss uses one of them."""
    first, second, third = state
    if LOSS == CROSS_ENTROPY:
        logits = tl.where(inside, logits, float("-inf"))
        top = tl.maximum(first, tl.max(logits, axis=1))
        shift = _finite(top)
        # No sum yet means no largest logit yet: 0 exp(0 - shift) might be 0 inf.
        second = tl.where(second == 0, 0.0, second * tl.exp(_finite(first) - shift))
        second += tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        third += tl.sum(tl.where(column[None, :] == label[:, None], logits, 0.0), axis=1)
        first = top
    elif LOSS == L1:
        first += tl.sum(tl.where(inside, tl.abs(logits - target), 0.0), axis=1)
    elif LOSS == MSE:
        first += tl.sum(tl.where(inside, (logits - target) * (logits - target), 0.0), axis=1)
    elif LOSS == BCE:
        # A NaN may be lost in a comparison; it stays in the product.
        each = tl.where(logits < 0, 0.0, logits) - logits * target + _log1p(tl.exp(-tl.abs(logits)))
        first += tl.sum(tl.where(inside, each, 0.0), axis=1)
    else:
        first += tl.sum(tl.where(inside, logits * logits, 0.0), axis=1)
        second += tl.sum(tl.where(inside, logits * target, 0.0), axis=1)
        third += tl.sum(tl.where(inside, target * target, 0.0), axis=1)
    return (first, second, third)


@triton.jit
def finish(state, label, LOSS: tl.constexpr, C: tl.constexpr):
    """The losses (BLOCK_N)."""
    first, second, third = state
    if LOSS == CROSS_ENTROPY:
        # A class that does not exist makes its token's loss NaN.
        loss = tl.where((label >= 0) & (label < C), (_finite(first) - third) + tl.log(second), float("nan"))
    elif LOSS == COSINE:
        loss = 1.0 - second / _divisor(tl.sqrt_rn(first) * tl.sqrt_rn(third))
    else:
        loss = first / C
    return loss


@triton.jit
def gradient(state, grad, logits, target, label, column, LOSS: tl.constexpr, C: tl.constexpr):
    """The gradients of the logits and of the target, tiles, where `grad` (BLOCK_N) is that of the loss."""
    first, second, third = state
    if LOSS == CROSS_ENTROPY:
        scale = tl.where((label >= 0) & (label < C), grad / second, float("nan"))
        result = scale[:, None] * tl.exp(logits - _finite(first)[:, None])
        result -= tl.where(column[None, :] == label[:, None], grad[:, None], 0.0)
        of_target = result
    elif LOSS == COSINE:
        norms = tl.sqrt_rn(first) * tl.sqrt_rn(third)
        # The norms' own derivatives, but where the divisor is held, or a norm is 0.
        level = tl.where(norms < 1e-8, 0.0, second / _divisor(norms))
        along_logits = tl.where(level == 0, 0.0, grad * level / first)[:, None]
        along_target = tl.where(level == 0, 0.0, grad * level / third)[:, None]
        scale = (-grad / _divisor(norms))[:, None]
        result = scale * target + along_logits * logits
        of_target = scale * logits + along_target * target
    else:
        share = (grad / C)[:, None]
        if LOSS == L1:
            difference = logits - target
            result = tl.where(difference > 0, share, 0.0) - tl.where(difference < 0, share, 0.0)
            of_target = -result
        elif LOSS == MSE:
            result = 2 * share * (logits - target)
            of_target = -result
        else:
            e = tl.exp(-tl.abs(logits))
            result = share * (tl.where(logits < 0, e, 1.0) / (1.0 + e) - target)
            of_target = -share * logits
    return result, of_target
