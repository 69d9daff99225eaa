"""The two products through the head in the backward of `counterfactual`, given the projections' gradients dP.

    dF_k = dP_k W                dW = sum over k and tokens of dP_k^T F_k

Layout: dP (B, N, M, C) with any strides but the last, in rows of ROW classes with zeros behind the last; W (C, D) and the
gradients dF dense, F as it comes. Tokens that do not count have no part in either, whatever stands in their features. dW is
a sum over tokens: programs each sum up a share of them, in a fixed order, and torch.sum adds the shares. Bytes, in units of
B N D elements, with c = C / D: dF reads M c and writes M; dW reads M + M c (what its programs of the same tokens read
alike comes from L2).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiger_fast.kernels import config
from tiger_fast.kernels.device import counted_tokens, rows, rows_of, stride
from tiger_fast.kernels.launch import alignment, kernel, launch, strides


@triton.jit
def _tile(pointer, row_offsets, column, row_mask, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    # Rows of SIZE elements; no mask along them where tiles are whole.
    mask = row_mask[:, None]
    if SIZE % BLOCK:
        mask = mask & (column < SIZE)[None, :]
    return tl.load(pointer + row_offsets[:, None] + column[None, :], mask=mask, other=0.0)


@kernel
def _features(
    grad_ptr,
    grad_strides,
    head_ptr,
    target_ptr,
    target_strides,
    valid_ptr,
    valid_strides,
    out_ptrs,
    out_strides,
    tokens: tl.int64,
    first_sample: tl.int64,
    first_token: tl.int64,
    ignore_index: tl.int64,
    D: tl.constexpr,
    C: tl.constexpr,
    ROW: tl.constexpr,
    NEEDS: tl.constexpr,
    LABELS: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    M: tl.constexpr = len(out_ptrs)
    program = tl.program_id(0).to(tl.int64)
    # Programs of the same tokens follow each other, so that dP comes from memory once.
    column = (program % tl.cdiv(D, BLOCK_D)).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    part_sample, part_token, exists = rows_of(program // tl.cdiv(D, BLOCK_D), tokens, BLOCK_N)
    sample, token = first_sample + part_sample, first_token + part_token
    counted, _ = counted_tokens(
        target_ptr, target_strides, valid_ptr, valid_strides, ignore_index, sample, token, exists, LABELS
    )
    inside = exists[:, None] & (column < D)[None, :]
    row = rows(grad_strides, part_sample, part_token, ALIGN)
    classes = tl.arange(0, BLOCK_C)
    if C <= BLOCK_C:
        shared = _tile(head_ptr, classes * D, column, classes < C, D, BLOCK_D)
    for m in tl.static_range(M):
        if (NEEDS >> m) & 1:
            start = row + m * stride(grad_strides[2], ALIGN)
            if C <= BLOCK_C:
                grad = _tile(grad_ptr, start, classes, counted, ROW, BLOCK_C)
                result = tl.dot(grad, shared, input_precision=PRECISION)
            else:
                result = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
                for chunk in range(tl.cdiv(C, BLOCK_C)):
                    c = chunk * BLOCK_C + classes
                    grad = _tile(grad_ptr, start, c, counted, ROW, BLOCK_C)
                    head = _tile(head_ptr, c.to(tl.int64) * D, column, c < C, D, BLOCK_D)
                    result = tl.dot(grad, head, result, input_precision=PRECISION)
            # 0 for a token that does not count even where the head is infinite.
            result = tl.where(counted[:, None], result, 0.0).to(out_ptrs[m].dtype.element_ty)
            to = out_ptrs[m] + rows(out_strides, sample, token, OUT_ALIGN)[:, None] + column[None, :]
            tl.store(to, result, mask=inside)


@kernel
def _head(
    expert_ptrs,
    expert_strides,
    grad_ptr,
    grad_strides,
    target_ptr,
    target_strides,
    valid_ptr,
    valid_strides,
    sums_ptr,
    samples: tl.int64,
    tokens: tl.int64,
    first_sample: tl.int64,
    first_token: tl.int64,
    ignore_index: tl.int64,
    splits: tl.int64,
    more: tl.int64,
    D: tl.constexpr,
    C: tl.constexpr,
    ROW: tl.constexpr,
    LABELS: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    M: tl.constexpr = len(expert_ptrs)
    program = tl.program_id(0).to(tl.int64)
    # Programs of the same tokens follow each other, so that dP comes from memory once.
    tile = program % (tl.cdiv(D, BLOCK_D) * tl.cdiv(C, BLOCK_C))
    split = program // (tl.cdiv(D, BLOCK_D) * tl.cdiv(C, BLOCK_C))
    column = (tile % tl.cdiv(D, BLOCK_D)).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    classes = (tile // tl.cdiv(D, BLOCK_D)).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    blocks = samples * tl.cdiv(tokens, BLOCK_N)
    share = tl.cdiv(blocks, splits)
    # As (D, C), for the channels fill a matrix instruction's rows however few the classes are.
    total = tl.zeros((BLOCK_D, BLOCK_C), tl.float32)
    first, last = split * share, tl.minimum(split * share + share, blocks)
    for m in tl.static_range(M):
        part_sample, part_token, exists = rows_of(first, tokens, BLOCK_N)
        counted, _ = counted_tokens(
            target_ptr,
            target_strides,
            valid_ptr,
            valid_strides,
            ignore_index,
            first_sample + part_sample,
            first_token + part_token,
            exists & (first < last),
            LABELS,
        )
        for block in range(first, last):
            part_sample, part_token, _ = rows_of(block, tokens, BLOCK_N)
            row = rows(grad_strides, part_sample, part_token, GRAD_ALIGN) + m * stride(grad_strides[2], GRAD_ALIGN)
            grad = _tile(grad_ptr, row, classes, counted, ROW, BLOCK_C)
            row = rows(expert_strides[m], first_sample + part_sample, first_token + part_token, ALIGN)
            features = _tile(expert_ptrs[m], row, column, counted, D, BLOCK_D)
            total = tl.dot(tl.trans(features), grad, total, input_precision=PRECISION)
            # Which tokens of the next block count: known before its tiles are asked for, which do not wait for it then.
            part_sample, part_token, exists = rows_of(block + 1, tokens, BLOCK_N)
            counted, _ = counted_tokens(
                target_ptr,
                target_strides,
                valid_ptr,
                valid_strides,
                ignore_index,
                first_sample + part_sample,
                first_token + part_token,
                exists & (block + 1 < last),
                LABELS,
            )
    offsets = (split * C + classes[None, :]) * D + column[:, None]
    inside = (column < D)[:, None] & (classes < C)[None, :]
    if more:
        total += tl.load(sums_ptr + offsets, mask=inside, other=0.0)
    tl.store(sums_ptr + offsets, total, mask=inside)


class Head:
    """The gradients of the features, into `grad_experts` where they are not None, and the head's if it is wanted."""

    def __init__(
        self, experts: Sequence[Tensor], head: Tensor, grad_experts: Sequence[Tensor | None], for_head: bool
    ) -> None:
        self.experts, self.head, self.grad_experts = tuple(experts), head, tuple(grad_experts)
        self.facts = {"D": head.shape[1], "C": head.shape[0]}
        self.sums: Tensor | None = None
        if for_head:
            c = config.choose("counterfactual_head", head.device, head.dtype, **self.facts)
            batch, tokens, width = experts[0].shape
            tiles = triton.cdiv(width, c.width) * triton.cdiv(head.shape[0], c.classes)
            splits = max(1, min(2 * config.MULTIPROCESSORS // tiles, batch * triton.cdiv(tokens, 4 * c.rows)))
            self.sums = head.new_empty((splits, *head.shape), dtype=torch.float32)
        self.started = False

    def add(
        self, grad: Tensor, with_labels: bool, labels: tuple, ignore_index: int, samples: slice, tokens: slice
    ) -> None:
        """Of some tokens, given their dP (B, N, M, ROW), and the labels of all."""
        if not grad.numel():
            return  # a program would divide by the number of tokens' blocks
        constants = {
            "D": self.head.shape[1],
            "C": self.head.shape[0],
            "ROW": grad.shape[-1],
            "LABELS": with_labels,
            "PRECISION": config.precision(self.head),
        }
        if any(out is not None for out in self.grad_experts):
            self._features(grad, labels, ignore_index, samples, tokens, constants)
        if self.sums is not None:
            self._head(grad, labels, ignore_index, samples, tokens, constants)

    def _features(
        self, grad: Tensor, labels: tuple, ignore_index: int, samples: slice, tokens: slice, constants: dict
    ) -> None:
        c = config.choose("counterfactual_features", grad.device, grad.dtype, **self.facts)
        batch, count, _, _ = grad.shape
        like = next(out for out in self.grad_experts if out is not None)
        launch(
            _features,
            batch * triton.cdiv(count, c.rows) * triton.cdiv(self.head.shape[1], c.width),
            grad,
            strides(grad),
            self.head,
            *labels,
            tuple(like if out is None else out for out in self.grad_experts),
            strides(like),
            count,
            samples.start,
            tokens.start,
            ignore_index,
            NEEDS=sum(1 << i for i, out in enumerate(self.grad_experts) if out is not None),
            ALIGN=alignment(grad),
            OUT_ALIGN=alignment(like),
            BLOCK_N=c.rows,
            BLOCK_C=c.classes,
            BLOCK_D=c.width,
            **c.options,
            **constants,
        )

    def _head(
        self, grad: Tensor, labels: tuple, ignore_index: int, samples: slice, tokens: slice, constants: dict
    ) -> None:
        c = config.choose("counterfactual_head", grad.device, grad.dtype, **self.facts)
        batch, count, _, _ = grad.shape
        splits, classes, width = self.sums.shape
        launch(
            _head,
            splits * triton.cdiv(width, c.width) * triton.cdiv(classes, c.classes),
            self.experts,
            tuple(map(strides, self.experts)),
            grad,
            strides(grad),
            *labels,
            self.sums,
            batch,
            count,
            samples.start,
            tokens.start,
            ignore_index,
            splits,
            int(self.started),
            ALIGN=alignment(*self.experts),
            GRAD_ALIGN=alignment(grad),
            BLOCK_N=c.rows,
            BLOCK_C=c.classes,
            BLOCK_D=c.width,
            **c.options,
            **constants,
        )
        self.started = True

    def total(self) -> Tensor:
        """The head's gradient, (C, D) in float32."""
        return self.sums.sum(dim=0) if self.started else self.sums.new_zeros(self.head.shape)
