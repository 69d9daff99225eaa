"""Argument checks of the functional contract, and its autocast rule. They read metadata only: never a value."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral, Real

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The device on which shapes are inferred raises when asked for its autocast state. By name, because torch 2.11 cannot
# trace torch.amp.is_autocast_available.
_WITHOUT_AUTOCAST = ("meta",)
# The contract's limits: M, T, R and G.
MAX_EXPERTS, MAX_TASKS, MAX_RANK, MAX_GROUP = 16, 32, 256, 32


def tensor(name: str, value: object) -> Tensor:
    """`value`, if it is a tensor; else TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    return value


def floating(name: str, value: object) -> Tensor:
    """`value`, if it is a tensor of one of the floating types of the contract; else TypeError."""
    if tensor(name, value).dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    return value


def activation(name: str, value: object, layout: str) -> Tensor:
    """`value`, if it is floating and has the dimensions that `layout` names ("B N D")."""
    axes = layout.split()
    if floating(name, value).dim() != len(axes):
        raise ValueError(f"{name} must be ({', '.join(axes)}), got {tuple(value.shape)}")
    return value


def shape(name: str, value: Tensor, expected: tuple[int | str, ...]) -> None:
    """ValueError unless the shape is `expected`; a string stands for any size."""
    if value.shape == expected:
        return
    fits = value.dim() == len(expected) and all(
        isinstance(want, str) or have == want for have, want in zip(value.shape, expected, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must be ({', '.join(map(str, expected))}), got {tuple(value.shape)}")


def device(name: str, value: Tensor, expected: torch.device, other: str) -> None:
    """ValueError unless `value` is on the device of the argument called `other`."""
    if value.device != expected:
        raise ValueError(f"{name} is on {value.device}, {other} is on {expected}; all arguments must share a device")


def computing_type(value: Tensor) -> torch.dtype:
    """The type that an activation has once autocast's rule is applied: float64 stays, others go to autocast's."""
    kind = value.device.type
    if value.dtype == torch.float64 or kind in _WITHOUT_AUTOCAST or not torch.is_autocast_enabled(kind):
        return value.dtype
    return torch.get_autocast_dtype(kind)


def same_type(name: str, value: Tensor, like: Tensor, other: str) -> None:
    """TypeError unless `value` has the activation type of `like` (after autocast's rule)."""
    if value.dtype != like.dtype and computing_type(value) != computing_type(like):
        raise TypeError(f"{name} is {value.dtype}, {other} is {like.dtype}; activations must share a type")


def experts(value: Sequence[Tensor] | Tensor, like: Tensor | None = None, other: str = "experts[0]") -> list[Tensor]:
    """The experts as a list of M tensors (B, N, D) that share shape, type and device, with `like` too if given."""
    if isinstance(value, Tensor):
        if value.dim() != 4:
            raise ValueError(f"experts as one tensor must be (B, M, N, D), got {tuple(value.shape)}")
        # Refused before unbind, which would make thousands of views of a (B, N, M, D) tensor.
        between("M of experts", value.shape[1], MAX_EXPERTS)
        members = list(value.unbind(1))
    elif isinstance(value, Sequence):
        members = list(value)
        between("M of experts", len(members), MAX_EXPERTS)
    else:
        raise TypeError(f"experts must be a sequence of tensors or one tensor, got {type(value).__name__}")
    like = activation("experts[0]", members[0], "B N D") if like is None else like
    expected, place = tuple(like.shape), like.device
    for index, member in enumerate(members):
        name = f"experts[{index}]"
        shape(name, activation(name, member, "B N D"), expected)
        same_type(name, member, like, other)
        device(name, member, place, other)
    return members


def beside(name: str, value: object, like: Tensor, expected: tuple[int | str, ...]) -> None:
    """A floating tensor of shape `expected` on `like`'s device, of `like`'s type or float32."""
    floating(name, value)
    shape(name, value, expected)
    if value.dtype not in (like.dtype, torch.float32) and value.dtype != computing_type(like):
        raise TypeError(f"{name} must be {like.dtype} (the activation type) or torch.float32, got {value.dtype}")
    device(name, value, like.device, "the activation")


def parameter(
    name: str, value: object, like: Tensor, expected: tuple[int | str, ...], *, optional: bool = False
) -> None:
    """`beside`, for a parameter that may be None if `optional`."""
    if value is None and optional:
        return
    beside(name, value, like, expected)


def modulation(name: str, value: object, query: Tensor, width: int) -> None:
    """(T, width) or (B, T, width), a parameter beside `query`."""
    per_sample = tensor(name, value).dim() == 3
    beside(name, value, query, (query.shape[0], "T", width) if per_sample else ("T", width))


def integers(name: str, value: object, expected: tuple[int, ...], place: torch.device) -> None:
    """An int64 or int32 tensor of shape `expected`."""
    if tensor(name, value).dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {value.dtype}")
    shape(name, value, expected)
    device(name, value, place, "the activation")


def boolean(
    name: str, value: object, expected: tuple[int, ...], place: torch.device, *, optional: bool = False
) -> None:
    """A bool tensor of shape `expected`, or None if `optional`."""
    if value is None and optional:
        return
    if tensor(name, value).dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {value.dtype}")
    shape(name, value, expected)
    device(name, value, place, "the activation")


def broadcastable_mask(name: str, value: object, expected: torch.Size, place: torch.device) -> None:
    """A bool tensor that broadcasts to `expected`, and does not enlarge it."""
    if tensor(name, value).dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {value.dtype}")
    sizes = tuple(value.shape)
    aligned = zip(reversed(sizes), reversed(expected), strict=False)
    if len(sizes) > len(expected) or any(have not in (1, want) for have, want in aligned):
        raise ValueError(f"{name} must broadcast to {tuple(expected)}, got {sizes}")
    device(name, value, place, "delta")


def companion(name: str, value: object, like: Tensor, other: str) -> None:
    """A floating tensor of `like`'s shape and device; the two share a type, or one of them is float32."""
    shape(name, floating(name, value), tuple(like.shape))
    if value.dtype != like.dtype and torch.float32 not in (value.dtype, like.dtype):
        raise TypeError(f"{name} is {value.dtype}, {other} is {like.dtype}; they must share a type or one be float32")
    device(name, value, like.device, other)


def last(name: str, value: Tensor) -> int:
    """The size of the last dimension; ValueError for a scalar."""
    if value.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension, got a scalar")
    return value.shape[-1]


def positive(name: str, size: int) -> int:
    """`size`, if at least 1."""
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    return size


def between(name: str, size: int, most: int) -> int:
    """`size`, if within the contract's limit 1 <= size <= most."""
    if not 1 <= size <= most:
        raise ValueError(f"{name} must be between 1 and {most}, got {size}")
    return size


def heads(num_heads: int, width: int) -> None:
    """ValueError unless `num_heads` is a positive divisor of `width`."""
    integer("num_heads", num_heads)
    if num_heads < 1 or width < 1 or width % num_heads:
        raise ValueError(f"num_heads must divide D = {width}, got {num_heads}")


def integer(name: str, value: object) -> None:
    """TypeError unless `value` is an int."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def flag(name: str, value: object) -> None:
    """TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def number(name: str, value: object) -> None:
    """TypeError unless `value` is a Python number (a tensor would be a wait for the device)."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def temperature(tau: float, deviation_eps: float) -> None:
    """Raises unless tau > 0 and eps >= 0."""
    number("tau", tau)
    if not tau > 0:
        raise ValueError(f"tau must be > 0, got {tau}")
    eps(deviation_eps)


def eps(value: float) -> None:
    """Raises unless eps >= 0."""
    number("eps", value)
    if not value >= 0:
        raise ValueError(f"eps must be >= 0, got {value}")


@contextmanager
def autocast(like: Tensor) -> Iterator[Callable[..., list[Tensor]]]:
    """Within: autocast is off, and the yielded function casts activations to `like`'s `computing_type`."""

    def cast(*tensors: Tensor) -> list[Tensor]:
        return [t if t.dtype == dtype else t.to(dtype) for t in tensors]

    dtype = computing_type(like)
    with no_autocast(like):
        yield cast


def no_autocast(like: Tensor) -> AbstractContextManager:
    """Within: autocast is off, so that what is written as float32 is float32."""
    kind = like.device.type
    # What is traced may run under autocast later.
    on = kind not in _WITHOUT_AUTOCAST and (torch.is_autocast_enabled(kind) or torch.compiler.is_compiling())
    return torch.autocast(kind, enabled=False) if on else nullcontext()
