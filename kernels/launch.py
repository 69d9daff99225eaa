"""How kernels are declared and launched, and what every launcher needs to know of its tensors."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret


def _mend_interpreter() -> None:
    import numpy as np
    from triton.runtime import interpreter

    # A scalar is an array of one element in the interpreter of Triton 3.6, and numpy 2.4 takes none as a loop's bound.
    patch = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched

    # bfloat16 is held as uint16 there, and numpy multiplies the integers. Its bits are the upper ones of a float32.
    dot = interpreter.InterpreterBuilder.create_dot

    def widened(operand: object) -> object:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        data = (operand.data.astype("uint32") << 16).view("float32")
        return interpreter.TensorHandle(data, tl.float32)

    # It cuts float32 to bfloat16 off, where devices round to nearest even.
    trunc = interpreter.InterpreterBuilder.create_fp_trunc

    def rounded(self: object, source: object, to: object) -> object:
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return trunc(self, source, to)
        bits = source.data.view("uint32")
        up = ((bits >> 16 & 1) + 0x7FFF) * ~np.isnan(source.data)
        quiet = np.isnan(source.data) * np.uint32(0x400000)
        return interpreter.TensorHandle(((bits + up.astype("uint32") | quiet) >> 16).astype("uint16"), tl.bfloat16)

    interpreter.InterpreterBuilder.create_fp_trunc = rounded
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)


if INTERPRETED:
    _mend_interpreter()


def kernel(function: Callable) -> Callable:
    """`triton.jit` that specialises on pointers alone: sizes and strides, and so B and N, compile nothing new.

    Pointers are named *_ptr, or *_ptrs for a tuple of them. Every other argument is a tl.constexpr, a size
    annotated tl.int64, a float annotated tl.float32 (a Python float must not become a float64), or a tuple of strides
    made by `strides` (or of such tuples)."""
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


def input_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 as IEEE says, unless torch's own setting allows TF32. Other types ignore it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
