"""How kernels are declared and launched, and what every launcher needs to know of its tensors."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret


def _mend_interpreter() -> None:
    """Faults of the interpreter in Triton 3.6; the last is one in 3.9."""
    import numpy as np
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    patch, dot, truncate = interpreter._patch_lang_tensor, builder.create_dot, builder.create_fp_trunc

    # A scalar is an array of one element, which numpy 2.4 no longer takes as a loop's bound.
    def patched(tensor: type, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    # bfloat16 is held as uint16, the upper bits of a float32, and products multiply the integers.
    def widened(tile: object) -> object:
        if tile.dtype.scalar != tl.bfloat16 or tile.data.dtype != np.uint16:
            return tile
        return handle((tile.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    # float32 is cut off to bfloat16, where devices round to the nearest even.
    def rounded(self: object, source: object, to: object) -> object:
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return truncate(self, source, to)
        bits, nan = source.data.view(np.uint32), np.isnan(source.data)
        nearest = bits + np.where(nan, 0, 0x7FFF + (bits >> 16 & 1)).astype(np.uint32)
        return handle(((nearest | np.where(nan, np.uint32(0x400000), 0)) >> 16).astype(np.uint16), tl.bfloat16)

    # What comes of a tile's mask and a scalar's comparison is int32, which 3.9 takes for no mask.
    def load(self: object, pointers: object, mask: object, *rest: object) -> object:
        return masked_load(self, pointers, handle(mask.data.astype(bool), tl.int1), *rest)

    def store(self: object, pointers: object, value: object, mask: object, *rest: object) -> object:
        return masked_store(self, pointers, value, handle(mask.data.astype(bool), tl.int1), *rest)

    masked_load, masked_store = builder.create_masked_load, builder.create_masked_store
    builder.create_masked_load, builder.create_masked_store = load, store
    interpreter._patch_lang_tensor = patched
    builder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    builder.create_fp_trunc = rounded


if INTERPRETED:
    _mend_interpreter()


def kernel(function: Callable) -> Callable:
    """`triton.jit` that specialises on pointers alone: sizes and strides, and so B and N, compile nothing new.

    Pointers are named *_ptr, or *_ptrs for a tuple of them. Every other argument is a tl.constexpr, a size
    annotated tl.int64 (tl.int32 where it counts programs), a float annotated tl.float32 (a Python float must not
    become a float64), or a tuple of strides made by `strides` (or of such tuples)."""
    plain = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation is not tl.constexpr and not name.endswith(("_ptr", "_ptrs"))
    ]
    return triton.jit(do_not_specialize=plain)(function)


@dataclass(frozen=True)
class Launch:
    """A launch as it was asked for: what a recorder gets in place of its running."""

    kernel: Callable
    programs: int
    arguments: tuple
    constants: dict


_recorder: Callable[[Launch], None] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within the context launches are listed and not made: on meta tensors launchers then tell what they would run."""
    global _recorder
    launches: list[Launch] = []
    previous, _recorder = _recorder, launches.append
    try:
        yield launches
    finally:
        _recorder = previous


def launch(kernel: Callable, programs: int, *arguments: object, **constants: object) -> None:
    """Runs `programs` programs of a kernel on the device and current stream of its first tensor; none for 0."""
    if _recorder is not None:
        _recorder(Launch(kernel, programs, arguments, constants))
        return
    if not programs:
        return
    device = next(a[0] if isinstance(a, tuple) else a for a in arguments if isinstance(a, (Tensor, tuple))).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, **constants)
    else:
        kernel[(programs,)](*arguments, **constants)


def strides(tensor: Tensor) -> tuple[int, ...]:
    """A tensor's strides for `device.stride`: as odd numbers from 3 on.

    Triton specialises integers inside a tuple on being 1 and on being multiples of 16, whatever `kernel` says, and these
    are neither."""
    return tuple(2 * stride + 3 for stride in tensor.stride())


def joined(sizes: Sequence[int], *tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    """The leading dimensions of rows, in as few dimensions as all of `tensors` allow: their sizes for
    `device.row_index`, and each tensor's strides along them for `device.row_offsets`, all in the form of `strides`.

    A tensor may have one dimension more than `sizes`, the row itself."""
    found: list[tuple[int, ...]] = []  # (size, stride of each tensor) of each dimension
    for i, size in enumerate(sizes):
        here = (size, *(tensor.stride(i) for tensor in tensors))
        if size == 1:
            continue
        if found and all(outer == inner * size for outer, inner in zip(found[-1][1:], here[1:], strict=True)):
            here = (found.pop()[0] * size, *here[1:])
        found.append(here)
    if not found or 0 in sizes:
        found = [(1,) * (1 + len(tensors))]
    return tuple(tuple(2 * number + 3 for number in numbers) for numbers in zip(*found, strict=True))


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it if its last stride is not 1."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def alignment(*tensors: Tensor) -> int:
    """The number of elements, a power of two of at most 16 bytes, to whose multiple every row of the tensors begins.

    Kernels take it as ALIGN, and tell the compiler that strides are its multiples; loads are as wide."""
    size = max(tensor.element_size() for tensor in tensors)
    found = 16
    for tensor in tensors:
        for stride in tensor.stride()[:-1]:
            found |= stride * tensor.element_size()  # bits below the lowest set one are zeros in every stride
    return max(1, (found & -found) // size)


def power(size: int) -> int:
    """The next power of two from `size` on."""
    return 1 << max(0, size - 1).bit_length()
