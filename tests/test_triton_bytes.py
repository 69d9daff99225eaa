"""How much memory the Triton kernels move, counted in Triton's interpreter: every load and store, by tensor.

A program that reads an address again finds it in a cache, as its tile is small; what reaches the device's memory is what
its programs read, each address once a program. Both are held to what the kernels' files state."""

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

pytest.importorskip("triton")

import numpy as np
import torch
from helpers import call
from torch import Tensor

from tiger_fast.ops import triton as backend

if not backend.INTERPRETED:
    pytest.skip("these run in Triton's interpreter, which TRITON_INTERPRET=1 turns on", allow_module_level=True)

from triton.runtime import interpreter

B, T, M, N, D, R, C, G = 2, 3, 4, 18, 40, 16, 24, 4


@dataclass
class Traffic:
    """Addresses of bytes by what was done: the number of accesses, and of those that are an address's first in a program."""

    all: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    first: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))

    def units(self, verb: str, *tensors: Tensor, first: bool = True) -> float:
        """Accesses of the tensors over their number of elements."""
        found = total = 0
        for tensor in tensors:
            start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
            for addresses in (self.first if first else self.all)[verb]:
                found += int(((addresses >= start) & (addresses < end)).sum())
            total += tensor.numel()
        return found / total


@contextmanager
def counted():
    """Counts what launches within it load and store."""
    builder, traffic = interpreter.InterpreterBuilder, Traffic()
    load, store, launch = builder.create_masked_load, builder.create_masked_store, interpreter.GridExecutor.__call__
    within: dict[tuple, list[np.ndarray]] = defaultdict(list)

    def note(self: object, verb: str, pointers: object, mask: object) -> None:
        mask = np.broadcast_to(mask.data.astype(bool), pointers.data.shape)  # an int1 may be held as integers
        addresses = np.ravel(pointers.data)[np.ravel(mask)]
        traffic.all[verb].append(addresses)
        within[verb, tuple(self.grid_idx)].append(addresses)

    def counting_load(self, pointers, mask, *rest):
        note(self, "load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        note(self, "store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counting_launch(*arguments, **keywords):
        launch(*arguments, **keywords)
        for (verb, _), addresses in within.items():
            traffic.first[verb].append(np.unique(np.concatenate(addresses)))
        within.clear()

    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    interpreter.GridExecutor.__call__ = counting_launch
    try:
        yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        interpreter.GridExecutor.__call__ = launch


def run(name: str, arguments: dict, wanted: list[Tensor]):
    """Outputs and gradients, their cotangents, and the traffic of the forward and of the backward."""
    for tensor in wanted:
        tensor.requires_grad_()
    with counted() as forward:
        outputs = call(name, arguments, backend="triton")
    cotangents = [torch.randn_like(o) for o in outputs]
    with counted() as backward:
        gradients = torch.autograd.grad(outputs, wanted, cotangents)
    return outputs, gradients, cotangents, forward, backward


def experts() -> list[Tensor]:
    return [torch.randn(B, N, D) for _ in range(M)]


def test_leave_one_out_reads_each_expert_once_and_writes_once():
    features, weights = experts(), torch.rand(B, T, N, M)
    for renormalize in (False, True):
        arguments = {"experts": features, "weights": weights, "renormalize": renormalize}
        (out,), gradients, (grad,), forward, backward = run("leave_one_out", arguments, [*features, weights])
        assert forward.units("load", *features, first=False) == 1
        assert forward.units("store", out, first=False) == 1
        assert backward.units("load", *features, first=False) == 1
        assert backward.units("load", grad, first=False) == 1
        assert backward.units("store", *gradients, first=False) == 1


def test_route_reads_each_expert_once_for_all_tasks():
    features = experts()
    query, shift = torch.randn(B, N, D), torch.randn(T, D)
    parameters = {"base_weight": torch.randn(D, D), "base_bias": torch.randn(D), "u": torch.randn(D, R)}
    parameters |= {"v": torch.randn(D, R), "scale": torch.randn(T, R), "shift": shift}
    arguments = {"query": query, "experts": features, **parameters}
    wanted = [query, *parameters.values(), *features]
    outputs, gradients, (grad, _), forward, backward = run("route", arguments, wanted)
    # Once for the logits and once, from a cache, for the mixtures of all tasks; the library's product reads the query.
    assert forward.units("load", *features) == 1
    assert forward.units("load", *features, first=False) == 2
    assert forward.units("load", query) == 0
    assert forward.units("store", outputs[0], first=False) == 1
    # In the gradients' kernel and for those of V and the shifts.
    assert backward.units("load", *features) == 2
    assert backward.units("load", *features, first=False) == 4
    assert backward.units("load", grad) == 1
    assert backward.units("load", grad, first=False) == 2
    assert backward.units("store", *gradients[-M:], first=False) == 1


def test_group_attention_reads_and_writes_everything_once():
    for members in (G, 16):  # by elements, and by products
        q, k, v = (torch.randn(B, members, 5, D) for _ in range(3))
        arguments = {"q": q, "k": k, "v": v, "num_heads": 2}
        (out,), gradients, (grad,), forward, backward = run("group_attention", arguments, [q, k, v])
        assert forward.units("load", q, k, v, first=False) == 1
        assert forward.units("store", out, first=False) == 1
        assert backward.units("load", q, k, v, grad) == 1
        assert backward.units("store", *gradients, first=False) == 1


def test_counterfactual_losses_read_each_expert_once_and_write_nothing_of_their_size():
    features, weights = experts(), torch.rand(B, N, M)
    head_weight, target = torch.randn(C, D), torch.randint(C, (B, N))
    arguments = {
        "experts": features,
        "weights": weights,
        "head_weight": head_weight,
        "head_bias": None,
        "target": target,
    }
    wanted = [*features, weights, head_weight]
    outputs, gradients, _, forward, backward = run(
        "counterfactual_losses", arguments | {"loss": "cross_entropy"}, wanted
    )
    assert forward.units("load", *features, first=False) == 1
    assert forward.units("store", *outputs, first=False) == 1
    written = sum(addresses.size for addresses in forward.all["store"])
    assert written == sum(o.numel() for o in outputs)  # more projections than channels are not kept
    assert backward.units("load", *features) == 1
    assert backward.units("store", *gradients[:M], first=False) == 1


def test_competency_aggregate_reads_each_expert_once():
    features, confidence, refined = experts(), torch.rand(B, M), torch.rand(B, M)
    arguments = {"experts": features, "confidence": confidence, "refined_confidence": refined}
    arguments |= {"norm_weight": torch.randn(D), "norm_bias": torch.randn(D)}
    wanted = [*features, confidence, refined, arguments["norm_weight"], arguments["norm_bias"]]
    outputs, gradients, (grad, _), forward, backward = run("competency_aggregate", arguments, wanted)
    assert forward.units("load", *features, first=False) == 1
    assert forward.units("store", outputs[0], first=False) == 1
    assert backward.units("load", *features, first=False) == 1
    assert backward.units("load", grad, first=False) == 1
    assert backward.units("store", *gradients[:M], first=False) == 1


def test_alignment_loss_reads_each_row_once():
    delta, weights = torch.randn(B, T, N, M), torch.rand(B, T, N, M).softmax(-1)
    for detach in (True, False):
        arguments = {"delta": delta, "weights": weights, "detach_target": detach}
        wanted = [weights] if detach else [delta, weights]
        _, gradients, _, forward, backward = run("alignment_loss", arguments, wanted)
        assert forward.units("load", delta, weights, first=False) == 1
        assert backward.units("load", delta, weights, first=False) == (0 if detach else 1)
        assert backward.units("store", *gradients, first=False) == 1
