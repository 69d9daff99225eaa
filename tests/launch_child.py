"""Run by test_triton_launch.py in a process without the interpreter: prints, as JSON, for every operator and kernel the
distinct specialisations of its launches at many batches and numbers of tokens, from contiguous inputs and from views."""

import json
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from profiling.static_report import OPS, launches_of
from tiger_fast._examples import Call, arguments, calls_of, gpu_sizes
from tiger_fast.kernels import aot

# Within strides of 2^30 elements: from there on they are int64 where they were int32, and the kernel is another one.
BATCHES = [(1, 1), (1, 2), (2, 1), (2, 7), (7, 2), (1, 16), (16, 17), (3, 1000), (32, 1024), (1, 65536), (4096, 64)]
# Of classes whose projections come in parts: of samples, of one sample's tokens, and of later samples' tokens, which begin
# anywhere where the number of tokens is odd.
MANY_CLASSES = 1000
PARTS = [(2, 7), (32, 1023), (1, 40000), (3, 20001)]
ARCH = "sm_90"


def view(tensor: Tensor) -> Tensor:
    """The same shape within a larger tensor, its rows as aligned as before."""
    if tensor.dim() == 0:
        return tensor
    *lead, last = tensor.shape
    outer = tensor.new_empty((*(size + 1 for size in lead), last + 64 + -last % 16))
    return outer[(slice(1, None),) * len(lead)][..., :last]


def swapped(tensor: Tensor) -> Tensor:
    """The same shape with its first two dimensions the other way round in memory."""
    return tensor.new_empty(tensor.transpose(0, 1).shape).transpose(0, 1) if tensor.dim() > 2 else tensor


def calls(op: str, dtype: torch.dtype, batch: int, tokens: int, classes: int) -> dict[str, list[Call]]:
    sizes = gpu_sizes(op, B=batch, N=tokens, D=64, heads=4, C=64 if op == "adapter" else classes)
    given, others = arguments(op, sizes, dtype, "meta")
    found = {"contiguous": calls_of(op, given, others), "views": []}
    for change in (view, swapped):

        def changed(value: object, change: Callable[[Tensor], Tensor] = change) -> object:
            if isinstance(value, list):
                return [change(member) for member in value]
            return change(value) if isinstance(value, Tensor) else value

        found["views"] += calls_of(op, {name: changed(value) for name, value in given.items()}, others)
    return found


def main() -> None:
    keys: dict[str, dict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
    for dtype in (torch.float32, torch.bfloat16):
        for op in OPS:
            many = [(*each, MANY_CLASSES) for each in PARTS] if op.startswith("counterfactual") else []
            for batch, tokens, classes in [*((*each, 40) for each in BATCHES), *many]:
                for layout, several in calls(op, dtype, batch, tokens, classes).items():
                    for call in several:
                        # A forward that keeps something for the backward is another kernel.
                        keep = " keep" * any(value is True for value in call.arguments)
                        name = f"{call.name} {dtype} {classes}{keep}"
                        for place, launch in enumerate(launches_of(call)):
                            key = repr(aot.specialization(launch, ARCH))
                            which = "all parts" if classes == MANY_CLASSES else place
                            keys[f"{name}: {which} {aot.name_of(launch)}"][layout][key] = None
    print(json.dumps({name: {layout: list(found) for layout, found in each.items()} for name, each in keys.items()}))


main()
