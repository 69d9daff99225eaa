"""How much memory the Triton kernels move, counted in Triton's interpreter: every load and store, by tensor.

A program that reads an address again finds it in a cache, as its tile is small; what reaches the device's memory is what
its programs read, each address once a program. Both are held to what the kernels' files state: for single tensors, and for
all that is read and written, where what stands beside the files' units is named."""

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest

pytest.importorskip("triton")

import numpy as np
import torch
from helpers import call
from torch import Tensor

from tiger_fast._examples import Sizes
from tiger_fast._examples import arguments as examples
from tiger_fast.kernels import config
from tiger_fast.ops import triton as backend

if not backend.INTERPRETED:
    pytest.skip("these run in Triton's interpreter, which TRITON_INTERPRET=1 turns on", allow_module_level=True)

from triton.runtime import interpreter

B, T, M, N, D, R, C, G = 2, 3, 4, 18, 40, 16, 24, 4
UNIT, WEIGHTS = B * N * D, B * T * N * M  # elements of an expert, and of the routing weights


@dataclass
class Traffic:
    """Addresses of bytes by what was done: the number of accesses, and of those that are an address's first in a program."""

    all: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    first: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    programs: list[int] = field(default_factory=list)  # of each launch

    @property
    def totals(self) -> tuple[int, int]:
        """Elements that are loaded and stored, each once a program."""
        loaded, stored = (sum(addresses.size for addresses in self.first[verb]) for verb in ("load", "store"))
        return loaded, stored

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
        traffic.programs.append(len({index for _, index in within}))
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
        assert forward.totals == (M * UNIT + WEIGHTS, T * M * UNIT)
        between = 3 * WEIGHTS * renormalize  # the scales, and two sums for each weight
        assert backward.totals == ((M + T * M) * UNIT + WEIGHTS + between, M * UNIT + WEIGHTS + between)


@pytest.fixture(params=[False, True], ids=["product, then fused", "one pass"])
def one_pass(request, monkeypatch):
    """Both designs of route's forward."""
    choice = config._HEURISTICS["route"]
    monkeypatch.setitem(config._HEURISTICS, "route", lambda *a, **k: replace(choice(*a, **k), one_pass=request.param))
    config.reload()
    yield request.param
    monkeypatch.undo()
    config.reload()


def test_route_reads_each_expert_once_for_all_tasks(one_pass):
    features = experts()
    query, shift = torch.randn(B, N, D), torch.randn(T, D)
    parameters = {"base_weight": torch.randn(D, D), "base_bias": torch.randn(D), "u": torch.randn(D, R)}
    parameters |= {"v": torch.randn(D, R), "scale": torch.randn(T, R), "shift": shift}
    arguments = {"query": query, "experts": features, **parameters}
    wanted = [query, *parameters.values(), *features]
    outputs, gradients, (grad, _), forward, backward = run("route", arguments, wanted)
    # Once for the logits and once, from a cache, for the mixtures of all tasks; the query is read by the library's product,
    # or once.
    assert forward.units("load", *features) == 1
    assert forward.units("load", *features, first=False) == 2
    assert forward.units("load", query) == one_pass
    assert forward.units("store", outputs[0], first=False) == 1
    # In the gradients' kernel and for those of V and the shifts.
    assert backward.units("load", *features) == 2
    assert backward.units("load", *features, first=False) == 4
    assert backward.units("load", grad) == 1
    assert backward.units("load", grad, first=False) == 2
    assert backward.units("store", *gradients[-M:], first=False) == 1

    columns = 32  # of [V | c]: R + 2 T, to a power of two
    factors, z, logits, y = D * columns, B * N * R, WEIGHTS, B * N * M * columns
    made = D * (R + T + 1)  # v, shift and bias, which the factors are made of
    _, programs = forward.programs
    beside = z + WEIGHTS + made + programs * (T * R + factors)  # these wait in a cache for all programs, as do W0 and U
    base_of = programs * (D * D + D * R) if one_pass else 0
    # The query and the experts, or base and the experts; mixtures, and base and z if the library does not write them.
    assert forward.totals[0] == (1 + M) * UNIT + beside + base_of
    assert forward.totals[1] == (T + one_pass) * UNIT + one_pass * z + WEIGHTS + factors
    _, programs, sums = backward.programs
    beside = z + 2 * WEIGHTS + made + programs * (T * R + factors)
    assert backward.totals[0] == (1 + M + T) * UNIT + M * UNIT + beside + logits + 2 * y
    assert backward.totals[1] == (M + 1) * UNIT + z + logits + y + programs * T * R + (1 + sums) * factors


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

    (tiles,) = forward.programs
    assert forward.totals == (M * UNIT + tiles * (2 * M + 2 * D), UNIT + B * M)
    programs = backward.programs[0]
    products, sums = tiles * M, programs * 2 * D
    # Each program's weights and norm weight; the sums; for the confidences the products, weights and their gradient.
    assert backward.totals[0] == (M + 1) * UNIT + programs * (M + D) + sums + products + 2 * B * M
    assert backward.totals[1] == M * UNIT + products + sums + 2 * D + 2 * B * M


def test_adapter_reads_and_writes_what_stands_around_the_products():
    arguments, _ = examples("adapter", Sizes(B=B, N=N, D=D, C=C))
    _, _, _, forward, backward = run("adapter", arguments, list(arguments.values()))
    narrow = B * N * C  # x, y and their gradients
    tiles, wide_tiles = forward.programs
    # x, then both products; y, then the output. Parameters come from a cache.
    assert forward.totals == (narrow + 2 * UNIT + tiles * 2 * C + wide_tiles * 4 * D, narrow + UNIT)
    tiles, wide, _, last, _ = backward.programs
    sums, last_sums = wide * 4 * D, last * 2 * C
    # Norm again: x, y. Both products and the output's gradient; theirs. The gradient of y and x; x's. Sums are read again.
    loaded = narrow + 3 * UNIT + 2 * narrow + sums + last_sums
    assert backward.totals[0] == loaded + tiles * 2 * C + wide * 3 * D + last * C
    assert backward.totals[1] == narrow + 2 * UNIT + narrow + sums + 4 * D + last_sums + 2 * C


def test_losses_of_projections_read_and_write_these_once():
    sizes = Sizes(B=B, N=N, M=M, C=C)
    arguments, others = examples("counterfactual_losses_from_projections", sizes)
    wanted = [arguments[name] for name in ("projections", "weights", "head_bias")]
    _, _, _, forward, backward = run("counterfactual_losses_from_projections", arguments | others, wanted)
    projections, weights, losses = B * N * M * C, B * N * M, B * N * (M + 1)
    (programs,) = forward.programs
    assert forward.totals == (projections + weights + B * N + programs * C, losses)  # with labels and bias
    (programs,) = backward.programs
    assert backward.totals[0] == projections + weights + B * N + programs * C + losses
    assert backward.totals[1] == projections + weights + programs * C


def test_alignment_loss_reads_each_row_once():
    delta, weights = torch.randn(B, T, N, M), torch.rand(B, T, N, M).softmax(-1)
    for detach in (True, False):
        arguments = {"delta": delta, "weights": weights, "detach_target": detach}
        wanted = [weights] if detach else [delta, weights]
        _, gradients, _, forward, backward = run("alignment_loss", arguments, wanted)
        assert forward.units("load", delta, weights, first=False) == 1
        assert backward.units("load", delta, weights, first=False) == (0 if detach else 1)
        assert backward.units("store", *gradients, first=False) == 1
