"""Device functions that kernels share."""

import triton
import triton.language as tl

# What an open ticket holds above its count, which has the 11 bits below.
_OPEN = tl.constexpr(0x5D9C_A673_C1E8_B7 << 8 & ~0x7FF)
_COUNT = tl.constexpr(0x7FF)


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
def row_index(row, sizes):
    """The indices of one row along the dimensions whose sizes `launch.joined` gave."""
    indices = ()
    for i in tl.static_range(len(sizes) - 1, 0, -1):
        size = stride(sizes[i], 1)
        indices = (row % size,) + indices
        row = row // size
    return (row,) + indices


@triton.jit
def rows_behind(indices, sizes, behind):
    """The indices of the rows that are `behind` (int32, 0 and up, any shape) rows behind one, without 64-bit divisions."""
    found = ()
    for i in tl.static_range(len(sizes) - 1, 0, -1):
        size = stride(sizes[i], 1)
        # Where this dimension's index begins anew; so far that it never does is 2^30 as well.
        past = behind - tl.minimum(size - indices[i], 1 << 30).to(tl.int32)
        carried = tl.where(past < 0, 0, 1 + past // tl.minimum(size, 1 << 30).to(tl.int32))
        found = (indices[i] + behind - carried * size,) + found
        behind = carried
    return (indices[0] + behind,) + found


@triton.jit
def row_offsets(indices, strides, ALIGN: tl.constexpr):
    """Offsets of rows by their indices."""
    offsets = indices[0] * stride(strides[0], ALIGN)
    for i in tl.static_range(1, len(indices)):
        offsets += indices[i] * stride(strides[i], ALIGN)
    return offsets


@triton.jit
def share_of(program, each, extra):
    """A program's share of what `divmod(count, programs)` splits: consecutive, from the first up to the second number."""
    begin = program * each + tl.minimum(program, extra)
    return begin, begin + each + (program < extra).to(tl.int32)


@triton.jit
def open_ticket(ticket_ptr):
    """Makes an int64 that may hold anything a count of programs, 0 unless another program counts already. See
    `last_to_finish`."""
    empty = tl.full((), 0, tl.int64)
    held = tl.atomic_cas(ticket_ptr, empty, empty + _OPEN, sem="relaxed")
    if (held != 0) & ((held | _COUNT) != (_OPEN | _COUNT)):
        # Where this fails, another program of this launch has opened it.
        tl.atomic_cas(ticket_ptr, held, empty + _OPEN, sem="relaxed")


@triton.jit
def last_to_finish(ticket_ptr, programs):
    """Whether all other programs of the launch, up to 1024, have come here: then their stores can be read (past the
    first cache). Each calls `open_ticket` once before.

    The ticket needs no zeroing, hence no launch of its own, and no memory that outlives the launch: it is fresh
    scratch. A pattern of 53 bits tells an open ticket from what the memory held before, and the last program wipes it.
    So launches on several streams or threads share nothing, and neither do captured graphs, whoever replays them. (A
    counter that stays, one for a stream, would be shared by all graphs that were captured on it, and would be counted
    as a leak if it were made in the pool of a graph.) Memory that holds the pattern by chance would break it: that is
    one in 2^53 for random bits, and no launch leaves it behind."""
    tl.debug_barrier()
    before = tl.atomic_add(ticket_ptr, tl.full((), 1, tl.int64), sem="acq_rel")
    last = before - _OPEN == programs - 1
    if last:
        tl.store(ticket_ptr, tl.full((), 0, tl.int64))
    return last


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
def dot_like(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b in the type of both if they share one, else in float32 by PRECISION."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b, total)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)


@triton.jit
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
