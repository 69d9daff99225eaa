"""The torch.library namespace `tiger_fast`, and what the ops' autograd.Functions share.

Schemas and shape functions are defined here in Python, so they exist whether or not a compiled backend does; a backend
adds its kernels to them under its dispatch key: CPU for csrc/, CUDA for kernels/. Triton's interpreter runs the latter
on CPU tensors, whose key is taken, so where it is on, every op has a twin in a namespace of its own.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import wraps

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

NAMESPACE = "tiger_fast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

# What `define` was called with, by the op's name.
DEFINED: dict[str, tuple[str, Callable]] = {}


def define(schema: str, fake: Callable, library: torch.library.Library = LIBRARY) -> None:
    """Defines an op, "name(arguments) -> results", and the function that gives its results' shapes."""
    name = schema.partition("(")[0]
    DEFINED[name] = schema, fake

    @wraps(fake)
    def on_one_device(*arguments: object) -> object:
        # A meta tensor beside others brings the call here, where the results would be uninitialised memory.
        devices = {t.device for t in tree_leaves(arguments) if isinstance(t, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"tiger_fast::{name} takes tensors of one device, got {sorted(map(str, devices))}")
        return fake(*arguments)

    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{library.ns}::{name}", on_one_device, lib=library)


def kernels(namespace: str) -> object:
    """The ops of a namespace."""
    return getattr(torch.ops, namespace)


def mask(needs: Iterable[bool]) -> int:
    """The gradients that are wanted, as bits of an int: what the backward ops take."""
    return sum(1 << i for i, needed in enumerate(needs) if needed)


def wanted(needs: int, *likes: Tensor | None) -> list[Tensor]:
    """For the shape functions: an empty dense tensor for each of `likes` whose bit is set."""
    return [like.new_empty(like.shape) for i, like in enumerate(likes) if needs >> i & 1]


def spread(needs: Sequence[bool], gradients: Iterable[Tensor]) -> list[Tensor | None]:
    """The gradients in the places where they are needed, None elsewhere."""
    remaining = iter(gradients)
    return [next(remaining) if needed else None for needed in needs]
