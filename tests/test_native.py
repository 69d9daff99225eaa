"""The compiled CPU kernels: that they run where they are listed, agree with the reference in every type, layout and
size, need no copies, and treat memory, threads, autograd and wrong input as the contract says."""

import copy
import io
import json
import math
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_compiler
from helpers import ACTIVATIONS, CASES, SIZES, call, leaves, make, replaced, tensors, transform
from torch._dynamo.backends.common import aot_autograd
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile
from torch.utils.checkpoint import checkpoint

import tiger_fast
from tiger_fast import functional, reference
from tiger_fast._examples import Recorder
from tiger_fast.ops import backends, cpu

if not cpu.LOADED:
    pytest.skip("this installation has no compiled CPU kernels", allow_module_level=True)

from native import (
    FUNCTIONS,
    NATIVE_CASES,
    NATIVE_PLAIN,
    SPACING,
    TYPES,
    check,
    lazily_mapped,
    random_cotangents,
    raw_calls,
    run,
)
from native_children import SCENARIOS

ops = torch.ops.tiger_fast
MIB = 1 << 20
LOW = (torch.bfloat16, torch.float16)


# Products by torch's library need not be the same at another number of threads.
BY_TORCH = ("route", "adapter")


@pytest.fixture(autouse=True, scope="module")
def poison():
    """What a kernel leaves unwritten is NaN, in every test here."""
    ops.cpu_set_poison(True)
    yield
    ops.cpu_set_poison(False)


def grown(name: str, **sizes: int) -> dict:
    """These sizes but for those that the case fixes; one head where D is not a multiple of the case's."""
    return {key: value for key, value in sizes.items() if key not in CASES[name].sizes}


def arguments_of(name: str, dtype: torch.dtype, companions: torch.dtype | None = None, **sizes: int) -> dict:
    arguments = make(name, dtype, companions, **grown(name, **sizes))
    if "num_heads" in arguments and sizes.get("D", 0) % arguments["num_heads"]:
        arguments["num_heads"] = 1
    return arguments


# --- the kernels run ------------------------------------------------------------------------------------------------

LIMITS = [
    *({"M": 1}, {"M": 2}, {"M": 5}, {"M": 16, "T": 2}, {"T": 1}, {"T": 32}, {"M": 16, "T": 32}, {"R": 1}, {"R": 256}),
    *({"G": 1}, {"G": 2}, {"G": 5}, {"G": 8}, {"G": 9}, {"G": 32}, {"C": 1}, {"C": 2}, {"C": 300}, {"D": 1}, {"D": 7}),
    *({"D": 64}, {"D": 768, "C": 40}, {"D": 1000}, {"N": 1}, {"B": 1, "N": 300}, {"B": 0}, {"N": 0}, {"B": 0, "N": 0}),
]


def only_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the reference raises."""

    def refuse(*_, **__):
        raise AssertionError("the reference ran")

    for key, value in vars(reference).items():
        # Types may be asked for; equations may not.
        if callable(value) and getattr(value, "__module__", "") == reference.__name__ and key != "accumulator":
            monkeypatch.setattr(reference, key, refuse)
    monkeypatch.setitem(backends._NATIVE, "reference", dict.fromkeys(backends.OPS, refuse))


# What a call may do in Python beside its operators: views, and the casts of arguments to what an operator takes.
AROUND = {"detach", "alias", "view", "_unsafe_view", "_reshape_alias", "unbind", "split", "slice", "select", "expand"}
AROUND |= {"t", "transpose", "permute", "squeeze", "unsqueeze", "as_strided", "_to_copy", "contiguous", "lift_fresh"}
# Zeros for gradients of nothing.
AROUND |= {"empty", "zeros", "zeros_like", "new_zeros", "new_empty", "clone"}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_listed_as_native_never_runs_the_reference(function, dtype, monkeypatch):
    # Inputs and expectations first: check() runs the reference too.
    trials = [(name, {}) for name in NATIVE_CASES if CASES[name].function == function]
    changes = {str(transform(lambda t: t.shape, make(trials[0][0])))}
    for sizes in LIMITS:
        shapes = str(transform(lambda t: t.shape, arguments_of(trials[0][0], dtype, **sizes)))
        if shapes not in changes:  # else the function has no such size
            changes.add(shapes)
            trials.append((trials[0][0], {"B": 1, "N": 2} | sizes))
    assert len(trials) > 6
    prepared = []
    for name, sizes in trials:
        for companions in (dtype, torch.float32) if dtype in LOW else (dtype,):
            arguments = arguments_of(name, dtype, companions, **sizes)
            prepared.append((name, arguments, random_cotangents(name, arguments)))
    with monkeypatch.context() as patch:
        only_native(patch)
        for name, arguments, cotangents in prepared:
            with Recorder() as recorder:
                outputs, found = run(name, arguments, cotangents)
            forward, *backward = [operator for operator, *_ in recorder.native()]
            assert "backward" not in str(forward), name
            assert any("backward" in str(operator) for operator in backward), f"{name}: no gradient by a kernel"
            others = {
                str(operator).split(".")[1] for operator, *_ in recorder.calls if operator.namespace != "tiger_fast"
            }
            assert others <= AROUND, f"{name} computes in Python: {others - AROUND}"
            assert all(o.isfinite().all() for o in outputs) and any(g is not None for g in found.values())
    for name, arguments, cotangents in prepared:
        check(name, arguments, cotangents)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_cpu_tensors_run_natively_by_default(function, monkeypatch):
    monkeypatch.delenv("TIGER_FAST_BACKEND", raising=False)
    name = next(name for name in NATIVE_PLAIN if CASES[name].function == function)
    with Recorder() as recorder:
        call(name, make(name, torch.float32))
    assert recorder.native()


def test_the_table_lists_what_runs():
    table = {
        line.split()[0]: line.split()[2] for line in tiger_fast.show_config().splitlines()[2 : 2 + len(backends.OPS)]
    }
    assert [op for op, runs in table.items() if runs == "native"] == [op for op in backends.OPS if op in FUNCTIONS]


# --- accuracy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("companions", ["same", "float32"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", NATIVE_CASES)
def test_low_precision_is_no_worse_than_eager(name, dtype, companions):
    other = dtype if companions == "same" else torch.float32
    for classes in (4, 24, 70):  # the last two by register tiles, of half a vector and of whole ones
        check(name, arguments_of(name, dtype, other, D=40, N=19, C=classes))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_rows_of_any_width_are_summed_whole(function, dtype):
    name = next(name for name in NATIVE_PLAIN if CASES[name].function == function)
    for width in (2, 3, 8, 15, 16, 17, 31, 33, 63, 65, 129):
        check(name, arguments_of(name, dtype, D=width, C=width, N=2, B=1))


@pytest.mark.parametrize("name", NATIVE_CASES)
def test_many_tokens_in_chunks_agree_with_the_reference(name):
    check(name, arguments_of(name, torch.float32, B=2, N=301, D=36))


# At these sizes the wide gradients, and outputs, pass 8 MiB and are stored past the caches.
WIDE = ("route", "leave_one_out", "counterfactual_losses", "group_attention", "group_attention_packed", "adapter")
WIDE += ("competency_aggregate",)


def token_slices(function: str, outputs: tuple, found: dict, where: slice) -> list[torch.Tensor]:
    """The part of outputs and gradients that belongs to some tokens."""
    last = function == "counterfactual_losses"
    parts = [o[..., where] if last else o[..., where, :] for o in outputs if o.dim() > 2 or last]
    names = (*ACTIVATIONS[function], "weights")
    return parts + [g[..., where, :] for key, g in found.items() if key.partition("[")[0] in names and g is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in NATIVE_PLAIN if CASES[name].function in WIDE])
def test_large_outputs_hold_what_small_ones_do(name, dtype):
    tokens = (8 * MIB) // (256 * dtype.itemsize)
    arguments = make(name, dtype, B=1, T=1, M=2, G=2, N=tokens, D=256, C=8, R=4)
    cotangents = random_cotangents(name, arguments)
    function, whole = CASES[name].function, run(name, arguments, cotangents)
    for where in (slice(0, 3), slice(tokens // 2, tokens // 2 + 3), slice(tokens - 3, tokens)):

        def part(value: torch.Tensor, where: slice = where) -> torch.Tensor:
            axes = [i for i, size in enumerate(value.shape) if size == tokens]
            return value.narrow(axes[0], where.start, 3) if axes else value

        few = run(name, transform(part, arguments), [part(c) for c in cotangents])
        for a, b in zip(token_slices(function, *whole, where), token_slices(function, *few, slice(None)), strict=True):
            # Not bitwise: a few tokens may take another path than many.
            close = torch.allclose(a.float(), b.float(), *((1e-4, 1e-5) if dtype == torch.float32 else (2e-2, 1e-2)))
            assert close, (where, (a.float() - b.float()).abs().max())


# --- operators, compilers, autograd ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_operators_pass_opcheck(name):
    calls = raw_calls(name, make(name, torch.float32))
    assert len(calls) >= 2
    for operator, arguments in calls:
        schema = operator._schema
        assert not schema.is_mutable
        assert not any(value.alias_info for value in (*schema.arguments, *schema.returns)), "an operator aliases"
        torch.library.opcheck(operator, tuple(arguments))  # schema, autograd, fake tensors, dynamic shapes


@pytest.mark.parametrize("name", [name for name in NATIVE_CASES if name not in NATIVE_PLAIN])
def test_shape_functions_hold_in_every_mode(name):
    for operator, arguments in raw_calls(name, make(name, torch.bfloat16, torch.float32)):
        torch.library.opcheck(operator, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


def dynamic(name: str, arguments: dict) -> dict:
    """The arguments with the dimensions that grow with B or N marked dynamic."""
    others = tensors(make(name, B=11, N=13))
    for key, value in tensors(arguments).items():
        for axis, (have, other) in enumerate(zip(value.shape, others[key].shape, strict=True)):
            if have != other:
                torch._dynamo.mark_dynamic(value, axis)
    return arguments


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_compiled_graphs_hold_the_operators_and_serve_any_batch(name):
    graphs = []

    def keep(graph, _):
        graphs.append({node.target for node in graph.graph.nodes if node.op == "call_function"})
        return graph.forward

    torch._dynamo.reset()
    compiler = aot_autograd(fw_compiler=make_boxed_compiler(keep), bw_compiler=make_boxed_compiler(keep))
    compiled = torch.compile(lambda a: call(name, a, backend="cpu"), fullgraph=True, backend=compiler)
    for sizes in ({"B": 2, "N": 5}, {"B": 3, "N": 7}):
        arguments = make(name, torch.float32, **sizes)
        cotangents = random_cotangents(name, arguments)
        expected, expected_found = run(name, arguments, cotangents)
        arguments, wanted = leaves(arguments)
        outputs = compiled(dynamic(name, arguments))
        found = torch.autograd.grad(outputs, list(wanted.values()), cotangents, allow_unused=True)
        assert all(torch.allclose(a, b, 1e-5, 1e-6) for a, b in zip(outputs, expected, strict=True))
        for key, value in zip(wanted, found, strict=True):
            assert value is None or torch.allclose(value, expected_found[key], 1e-4, 1e-5), key
    assert len(graphs) == 2, "one forward and one backward graph, whatever the batch"
    assert all(any("tiger_fast" in str(target) for target in graph) for graph in graphs)


class Function(torch.nn.Module):
    """A case's function, for export."""

    def __init__(self, name: str, keywords: dict) -> None:
        super().__init__()
        self.name, self.keywords = name, keywords

    def forward(self, arguments):
        return call(self.name, arguments | self.keywords, backend="cpu")


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_functions_export_with_their_operators(name):
    def split(arguments):
        given = {key: value for key, value in arguments.items() if isinstance(value, (torch.Tensor, list))}
        return given, {key: value for key, value in arguments.items() if key not in given}

    given, keywords = split(make(name, torch.float32))
    others = tensors(make(name, B=11, N=13))
    dims = {2: torch.export.Dim("batch", min=1, max=64), 5: torch.export.Dim("tokens", min=1, max=4096)}

    def shape(key, value):
        pairs = enumerate(zip(value.shape, others[key].shape, strict=True))
        return {axis: dims[have] for axis, (have, other) in pairs if have != other}

    shapes = {
        key: [shape(f"{key}[{i}]", member) for i, member in enumerate(value)]
        if isinstance(value, list)
        else shape(key, value)
        for key, value in given.items()
    }
    module = Function(name, keywords)
    program = torch.export.export(module, (given,), dynamic_shapes=(shapes,))
    # The part where autocast is off is a graph of its own within the program's.
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    assert any("tiger_fast" in str(node.target) for graph in graphs for node in graph.nodes)
    for sizes in ({}, {"B": 3, "N": 9}):
        other, _ = split(make(name, torch.float32, seed=4, **sizes))
        for a, b in zip(program.module()(other), module(other), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_checkpointing_runs_the_kernels_again_and_changes_nothing(name, reentrant):
    plain = make(name, torch.float32)
    cotangents = random_cotangents(name, plain)
    expected, expected_found = run(name, plain, cotangents)
    arguments, wanted = leaves(plain)

    def function(*values):
        return call(name, replaced(arguments, dict(zip(wanted, values, strict=True))), backend="cpu")

    with Recorder() as recorder:
        outputs = checkpoint(function, *wanted.values(), use_reentrant=reentrant)
        torch.autograd.backward(outputs, cotangents)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    for key, leaf in wanted.items():
        assert leaf.grad is None and expected_found[key] is None or torch.equal(leaf.grad, expected_found[key])
    forward = recorder.native()[0][0]
    assert sum(operator == forward for operator, *_ in recorder.native()) == 2


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_double_backward_raises(name):
    arguments, wanted = leaves(make(name))
    loss = sum(o.square().sum() for o in call(name, arguments, backend="cpu"))
    found = torch.autograd.grad(loss, list(wanted.values()), create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        sum(g.sum() for g in found if g is not None).backward()


# --- values that are easily wrong ------------------------------------------------------------------------------------


# Classes on both sides of where vectors go over tokens instead of classes, which 4 and 16 experts move.
EDGES = [(4, 16), (4, 17), (4, 53), (4, 54), (16, 17), (16, 18), (1, 106), (1, 107)]


@pytest.mark.parametrize(("experts", "classes"), EDGES)
@pytest.mark.parametrize(
    "name", [name for name in NATIVE_CASES if "counterfactual" in name and name.endswith(("entropy", "bce", "cosine"))]
)
def test_classes_where_the_layout_changes(name, experts, classes):
    check(name, make(name, torch.float32, B=2, N=19, M=experts, C=classes, D=24))


@pytest.mark.parametrize("name", [name for name in NATIVE_CASES if name.endswith(" ignore")])
@pytest.mark.parametrize("classes", [4, 90])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nan_in_tokens_that_do_not_count_reaches_no_gradient(name, classes, backend):
    arguments = make(name, torch.float32, N=40, C=classes)
    ignored = arguments["target"] == 1
    assert ignored.any() and not ignored.all()
    cotangents = random_cotangents(name, arguments)
    clean = run(name, arguments, cotangents, backend)

    def spoil(value: torch.Tensor) -> torch.Tensor:
        return torch.where(ignored.unsqueeze(-1), torch.nan, value)

    if "experts" in arguments:
        arguments["experts"] = [spoil(e) for e in arguments["experts"]]
    else:
        arguments["projections"] = torch.stack([spoil(p) for p in arguments["projections"].unbind(1)], 1)
    outputs, found = run(name, arguments, cotangents, backend)
    assert all(torch.equal(a, b) for a, b in zip(outputs, clean[0], strict=True))
    for key, value in found.items():
        assert torch.equal(value, clean[1][key]), key


@pytest.mark.parametrize("name", [name for name in NATIVE_CASES if name.endswith(" valid")])
@pytest.mark.parametrize("classes", [4, 90])
def test_a_nan_bias_is_nothing_to_tokens_that_do_not_count(name, classes):
    arguments = make(name, torch.float32, N=40, C=classes)
    arguments["head_bias"] = torch.full_like(arguments["head_bias"], torch.nan)
    outputs, found = run(name, arguments, random_cotangents(name, arguments))
    away = ~arguments["valid"]
    full, without = outputs
    assert away.any() and full[away].eq(0).all() and full[~away].isnan().all()
    assert without.movedim(1, -1)[away].eq(0).all()
    assert found["weights"][away].eq(0).all()


@pytest.mark.parametrize("name", [name for name in NATIVE_CASES if name.endswith(" l1")])
@pytest.mark.parametrize("classes", [4, 90])
def test_where_logit_and_target_tie_there_is_no_slope(name, classes):
    arguments = make(name, torch.float32, N=9, C=classes)
    arguments["weights"] = torch.zeros_like(arguments["weights"])
    arguments["target"] = arguments["head_bias"].expand_as(arguments["target"])
    outputs, found = run(name, arguments, random_cotangents(name, arguments))
    assert all(o.eq(0).all() for o in outputs)
    assert all(value.eq(0).all() for value in found.values())


def test_kept_projections_of_another_size_are_refused():
    name = "counterfactual_losses cross_entropy"
    operator, values = raw_calls(name, make(name, torch.float32, D=40))[-1]
    kept = values[2]
    assert kept is not None, "the forward pass keeps its projections at these sizes"
    operator(*values)
    for wrong in (kept[:, :-1], kept[..., :-1].contiguous(), kept.double(), kept.mT):
        with pytest.raises(RuntimeError, match="kept"):
            operator(*values[:2], wrong, *values[3:])


def test_axes_of_rows_that_no_even_step_joins():
    def scattered(value: torch.Tensor) -> torch.Tensor:
        return value.permute(3, 1, 0, 2, 4).contiguous().permute(2, 1, 3, 0, 4)

    arguments = make("adapter", torch.float32, C=24, D=40)
    arguments["x"] = scattered(torch.randn(4, 5, 3, 2, 24, generator=torch.Generator().manual_seed(0)))
    check("adapter", arguments, [scattered(c) for c in random_cotangents("adapter", arguments)])


# What is cut up by size: the head's products by D above 1024, heads above 256 KiB, route's tiles by M D.
LARGE_ROWS = [
    ("counterfactual_losses cross_entropy", {"B": 1, "N": 13, "D": 1040, "C": 57}),
    ("counterfactual_losses bce", {"B": 1, "N": 13, "D": 1040, "C": 24}),
    ("counterfactual_losses mse", {"B": 1, "N": 13, "D": 2049, "C": 150}),
    ("route", {"B": 1, "N": 21, "D": 1537, "M": 16, "T": 2}),
    ("route", {"B": 1, "N": 5, "D": 4100, "M": 16, "T": 1}),
    ("group_attention", {"B": 1, "N": 3, "D": 4100, "G": 9}),
    ("adapter", {"B": 1, "N": 40, "D": 4100, "C": 33}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "sizes"), LARGE_ROWS)
def test_rows_that_are_cut_up(name, sizes, dtype):
    check(name, arguments_of(name, dtype, **sizes))


# Partial sums so large that there are fewer chunks of tokens.
LARGE_SUMS = [
    ("counterfactual_losses cross_entropy", {"B": 1, "N": 300, "D": 512, "C": 300, "M": 2}),
    ("route", {"B": 1, "N": 300, "D": 768, "R": 256, "T": 2, "M": 2}),
]


@pytest.mark.parametrize(("name", "sizes"), LARGE_SUMS)
def test_which_gradients_are_wanted_changes_no_bit_of_large_sums(name, sizes):
    arguments = make(name, torch.float32, **sizes)
    cotangents = random_cotangents(name, arguments)
    check(name, arguments, cotangents)
    _, full = run(name, arguments, cotangents)
    alone = [key for key in ("scale", "shift", "head_bias", "weights") if full.get(key) is not None]
    for key in alone:
        _, found = run(name, arguments, cotangents, needs=[key])
        assert torch.equal(found[key], full[key]), key


def test_samples_of_one_token():
    check("competency_aggregate", make("competency_aggregate", torch.float32, B=150, N=1, D=40))


# --- what is computed and kept --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_the_backward_makes_what_is_needed_and_no_more(name):
    arguments = make(name, torch.float32)
    cotangents = random_cotangents(name, arguments)
    _, full = run(name, arguments, cotangents)
    keys = [key for key, value in full.items() if value is not None]
    subsets = [[key] for key in keys] + [[key for key in keys if key != left] for left in keys] + [keys]
    for needs in subsets:
        if not needs:
            continue
        with Recorder() as recorder:
            _, found = run(name, arguments, cotangents, needs=needs)
        made = [result for operator, _, result in recorder.native() if "backward" in str(operator)]
        made = [t for result in made for t in (result if isinstance(result, (list, tuple)) else [result])]
        wanted = sum(full[key].numel() for key in needs)
        assert sum(t.numel() for t in made) == wanted, f"{needs}: {[tuple(t.shape) for t in made]}"
        for key in needs:
            assert torch.equal(found[key], full[key]), f"{key} differs when only {needs} are needed"


@pytest.mark.parametrize("name", NATIVE_CASES)
def test_an_absent_output_gradient_counts_as_zero(name):
    arguments = make(name)
    cotangents = random_cotangents(name, arguments)
    for present in range(len(cotangents)):
        given = [c if i == present else None for i, c in enumerate(cotangents)]
        zeros = [c if i == present else torch.zeros_like(c) for i, c in enumerate(cotangents)]
        (_, found), (_, expected) = run(name, arguments, given), run(name, arguments, zeros)
        for key, value in found.items():
            if value is None:
                assert expected[key] is None or not expected[key].any(), key
            else:
                assert torch.allclose(value, expected[key], 1e-12, 1e-14), key


@pytest.mark.parametrize("name", NATIVE_CASES)
def test_little_is_saved_for_the_backward(name):
    sizes = grown(name, B=2, N=50, D=64, R=8, C=16)
    arguments, _ = leaves(make(name, torch.float32, **sizes))
    if "num_heads" in arguments and "D" in sizes:
        arguments["num_heads"] = 2
    kept = {}
    with saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        outputs = call(name, arguments, backend="cpu")
    assert any(o.requires_grad for o in outputs)
    given = {t.untyped_storage().data_ptr() for t in tensors(arguments).values()}
    numbers = SIZES | CASES[name].sizes | sizes
    tokens = numbers["B"] * numbers["N"]
    extra = sorted(t.numel() for owner, t in kept.items() if owner not in given)
    # Routing weights, per-token sums and losses are small; beyond these there may be (B, N, D + R) in all.
    small = tokens * numbers["T"] * (numbers["M"] + 1)
    assert sum(size for size in extra if size > small) <= tokens * (numbers["D"] + numbers["R"]), extra


# --- threads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    """set_num_threads, undone in the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NATIVE_CASES)
def test_results_are_the_same_bit_by_bit_at_any_thread_count(name, dtype, threads):
    # Classes for whole register tiles of the head.
    arguments = arguments_of(name, dtype, B=3, N=211, D=48, C=70)
    cotangents = random_cotangents(name, arguments)
    expected = None
    for count in (1, 2, 3, 8, 2, 1):
        threads(count)
        outputs, found = run(name, arguments, cotangents)
        results = [*outputs, *(value for value in found.values() if value is not None)]
        if CASES[name].function in BY_TORCH:
            again, found = run(name, arguments, cotangents)
            expected = [*again, *(value for value in found.values() if value is not None)]
        expected = results if expected is None else expected
        for i, (a, b) in enumerate(zip(results, expected, strict=True)):
            assert torch.equal(a, b), f"result {i} differs at {count} threads"


@pytest.mark.parametrize("name", [name for name in NATIVE_CASES if CASES[name].function == "route"])
def test_what_route_sums_itself_is_the_same_bit_by_bit_at_any_thread_count(name, threads):
    arguments = arguments_of(name, torch.float32, B=3, N=211, D=48)
    # base and z, torch's products, are those of one forward pass.
    operator, values = raw_calls(name, arguments)[-1]
    assert "route_backward" in str(operator)
    own = sum(1 << bit for bit in (4, 5, 6, *range(7, 7 + len(arguments["experts"]))))  # V, scale, shift, experts
    expected = None
    for count in (1, 2, 3, 8):
        threads(count)
        found = operator(*values[:-1], own)
        expected = found if expected is None else expected
        assert len(found) == len(arguments["experts"]) + 3
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), f"{count} threads"


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_calls_from_several_threads_do_not_disturb_each_other(name):
    # Large enough for blocks of the cache where the function's outputs are.
    sizes = {"B": 1, "N": 400, "D": 128, "T": 4}
    prepared = []
    for seed in range(4):
        arguments = make(name, torch.float32, seed=seed, **grown(name, **sizes))
        cotangents = random_cotangents(name, arguments)
        prepared.append((arguments, cotangents, run(name, arguments, cotangents)))
    failures = []

    def work(seed):
        arguments, cotangents, (expected, expected_found) = prepared[seed]
        for _ in range(4):
            outputs, found = run(name, arguments, cotangents)
            same = all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
            same = same and all(v is None or torch.equal(v, expected_found[key]) for key, v in found.items())
            if not same:
                failures.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


# --- memory ---------------------------------------------------------------------------------------------------------


def large(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict:
    """Arguments of leave_one_out whose output takes 3 MiB in float32."""
    return make("leave_one_out", dtype, seed=seed, B=1, T=1, M=2, N=1536, D=256)


def mixture(seed: int = 0) -> torch.Tensor:
    return functional.leave_one_out(**large(seed), backend="cpu")


@pytest.fixture
def empty():
    """Starts and ends with nothing kept."""
    tiger_fast.empty_cache()
    yield
    tiger_fast.empty_cache()


def test_large_outputs_are_kept_and_handed_out_again(empty):
    assert ops.cpu_cached_bytes() == 0
    first = mixture()
    assert ops.cpu_cached_bytes() == 0
    address, size = first.data_ptr(), first.numel() * first.element_size()
    assert address % 64 == 0
    del first
    kept = ops.cpu_cached_bytes()
    assert size <= kept <= ops.cpu_cache_limit()
    second = mixture()
    assert second.data_ptr() == address and ops.cpu_cached_bytes() == 0
    third = mixture(1)
    assert third.data_ptr() != address
    del second, third
    assert ops.cpu_cached_bytes() == 2 * kept
    tiger_fast.empty_cache()
    assert ops.cpu_cached_bytes() == 0


def test_small_outputs_are_not_kept(empty):
    call("leave_one_out", make("leave_one_out"), backend="cpu")
    assert ops.cpu_cached_bytes() == 0


def kept_for_a_gradient(out: torch.Tensor) -> torch.Tensor:
    """A product with a factor that wants a gradient, for which the graph keeps `out`."""
    return torch.ones((), requires_grad=True) * out


# How something may go on referring to an output's memory, and how the whole output is read through it.
HOLDERS = {
    "a view": (
        lambda out: out[..., ::2],
        lambda held: held.as_strided((1, 1, 2, 1536, 256), (0, 0, 1536 * 256, 256, 1)),
    ),
    "a detached tensor": (torch.Tensor.detach, lambda held: held),
    "a graph": (kept_for_a_gradient, lambda held: held.grad_fn._saved_other),
    "an array": (torch.Tensor.numpy, torch.from_numpy),
    "a storage": (torch.Tensor.untyped_storage, lambda held: torch.empty(0).set_(held, 0, (1, 1, 2, 1536, 256))),
    "a dict": (lambda out: {"out": [out]}, lambda held: held["out"][0]),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_that_anything_refers_to_is_not_handed_out(holder, empty):
    hold, read = HOLDERS[holder]
    out = mixture()
    expected, address = out.clone(), out.data_ptr()
    held = hold(out)
    del out
    later = [mixture(seed) for seed in range(1, 4)]
    assert address not in [o.data_ptr() for o in later]
    assert torch.equal(read(held), expected)
    later.clear()
    tiger_fast.empty_cache()
    assert torch.equal(read(held), expected)
    del held
    assert mixture().data_ptr() == address, "the block came back with its last reference"


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_outputs_and_gradients_are_never_overwritten_by_later_calls(name):
    # Sizes whose wide outputs pass 1 MiB.
    sizes = grown(name, B=2, N=600, D=128, T=3)
    held = []
    for seed in range(3):
        arguments = make(name, torch.float32, seed=seed, **sizes)
        cotangents = random_cotangents(name, arguments)
        outputs, found = run(name, arguments, cotangents)
        new = [*outputs, *(value for value in found.values() if value is not None)]
        inputs = [*tensors(arguments).values(), *cotangents]
        owners = [t.untyped_storage().data_ptr() for t in (*inputs, *(t for t, _ in held), *new)]
        assert len(set(owners[-len(new) :])) == len(new) and not set(owners[-len(new) :]) & set(owners[: -len(new)])
        held += [(t, t.clone()) for t in new]
        held += [(t, t.clone()) for t in inputs]
    assert all(torch.equal(now, then) for now, then in held)


def test_large_outputs_are_tensors_like_any_other(empty):
    out = mixture()
    expected = out.clone()
    buffer = io.BytesIO()
    torch.save(out, buffer)
    buffer.seek(0)
    for other in (torch.load(buffer), pickle.loads(pickle.dumps(out)), copy.deepcopy(out)):
        assert torch.equal(other, expected) and other.data_ptr() != out.data_ptr()
    kept = ops.cpu_cached_bytes()
    shared = out.share_memory_()
    assert shared.is_shared() and torch.equal(shared, expected)
    assert ops.cpu_cached_bytes() > kept, "its block came back when it moved to shared memory"
    del out, shared
    out = mixture()
    out.add_(1).mul_(2)
    assert torch.equal(out, (expected + 1) * 2)
    out.requires_grad_().sum().backward()
    assert out.grad.eq(1).all()


def test_large_outputs_cannot_be_resized_in_place(empty):
    out = mixture()
    held, expected = out.detach(), out.clone()
    with pytest.raises(RuntimeError, match="resiz"):
        out.resize_(2 * out.numel())
    assert torch.equal(held, expected)


def test_blocks_of_a_like_size_are_reused_and_small_needs_take_no_huge_block(empty):
    big = make("leave_one_out", torch.float32, B=1, T=1, M=2, N=12288, D=256)  # 24 MiB
    functional.leave_one_out(**big, backend="cpu")
    kept = ops.cpu_cached_bytes()
    assert kept >= 24 * MIB
    small = mixture()
    assert ops.cpu_cached_bytes() == kept, "3 MiB must not occupy a block of 24"
    del small


# --- strides --------------------------------------------------------------------------------------------------------


def transposed(value: torch.Tensor) -> torch.Tensor:
    return value.mT.contiguous().mT if value.dim() > 1 else value


def reversed_axes(value: torch.Tensor) -> torch.Tensor:
    order = tuple(reversed(range(value.dim())))
    return value.permute(order).contiguous().permute(order)


def inner_first(value: torch.Tensor) -> torch.Tensor:
    """Rows as they were, the axes before them in the other order."""
    return value.transpose(0, -2).contiguous().transpose(0, -2) if value.dim() > 2 else value


def sliced_rows(value: torch.Tensor) -> torch.Tensor:
    """A part of longer rows, at an odd offset: rows aligned to nothing."""
    wide = torch.nn.functional.pad(value, (3, 5)) if value.dim() else value
    return wide[..., 3 : 3 + value.shape[-1]] if value.dim() else wide


def every_second(value: torch.Tensor) -> torch.Tensor:
    return value.repeat_interleave(2, 0)[1::2] if value.dim() > 1 else value


def repeated(value: torch.Tensor) -> torch.Tensor:
    """The first of the leading axis, for all of it: stride 0."""
    return value[:1].expand_as(value) if value.dim() > 1 else value


LAYOUTS = (transposed, reversed_axes, inner_first, sliced_rows, every_second, repeated)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_strided_arguments_and_cotangents_give_the_same(name, layout):
    for dtype in (torch.float32, torch.bfloat16):
        arguments = transform(layout, arguments_of(name, dtype, N=7, D=40))
        cotangents = [layout(c) for c in random_cotangents(name, arguments)]
        check(name, arguments, cotangents)


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_expanded_cotangents_are_read_as_they_are(name):
    arguments = arguments_of(name, torch.float32, N=7, D=40)
    for cotangents in ([torch.ones(()).expand_as(c) for c in random_cotangents(name, arguments)],):
        check(name, arguments, [c.to(o.dtype) for c, o in zip(cotangents, random_cotangents(name, arguments))])


def copies(name: str, arguments: dict, cotangents: list) -> list[int]:
    """Sizes of the copies that torch makes within a forward and a backward pass."""
    with profile(record_shapes=True) as record:
        run(name, arguments, cotangents)
    sizes = [event.input_shapes[0] for event in record.function_events if event.name == "aten::copy_"]
    return [math.prod(shape) for shape in sizes]


# Sizes at which every tensor with tokens has more elements than any parameter that may be packed: B N > D R.
TOKENS = {"N": 101, "D": 64, "R": 3, "C": 16}


def rows_elsewhere(value: torch.Tensor) -> torch.Tensor:
    """Tensors with tokens have dense rows, parts of longer ones, and their other axes in another order."""
    return inner_first(sliced_rows(value)) if value.dim() > 2 else value


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_strided_rows_are_not_copied(name):
    arguments = arguments_of(name, torch.float32, **TOKENS)
    # What a product of torch's library reads must have its tokens at one step.
    factors = {key: sliced_rows(arguments[key]) for key in ("query", "x") if key in arguments}
    arguments = transform(rows_elsewhere, arguments) | factors
    cotangents = [rows_elsewhere(c) for c in random_cotangents(name, arguments)]
    assert not [size for size in copies(name, arguments, cotangents) if size >= 2 * TOKENS["N"]]


@pytest.mark.parametrize("name", [name for name in NATIVE_PLAIN if "experts" in make(name)])
def test_experts_that_are_views_of_one_tensor_are_not_copied(name):
    arguments = make(name, torch.float32, **TOKENS)
    whole = torch.stack(arguments["experts"], dim=2)  # (B, N, M, D): neighbours in memory, and no (B, N, D) is dense
    arguments["experts"] = list(whole.unbind(2))
    cotangents = random_cotangents(name, arguments)
    assert not [size for size in copies(name, arguments, cotangents) if size >= 2 * TOKENS["N"]]
    check(name, arguments, cotangents)
    stacked = arguments | {"experts": torch.stack(arguments["experts"], dim=1)}
    for a, b in zip(run(name, stacked, cotangents)[0], run(name, arguments, cotangents)[0], strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif("group_attention" not in FUNCTIONS, reason="group_attention has no kernel here")
def test_views_of_a_packed_projection_are_not_copied():
    qkv = make("group_attention_packed", torch.float32, **TOKENS)["qkv"]
    arguments = dict(zip("qkv", qkv.chunk(3, dim=-1), strict=True)) | {"num_heads": 2}
    cotangents = random_cotangents("group_attention", arguments)
    assert not copies("group_attention", arguments, cotangents)
    check("group_attention", arguments, cotangents)


@pytest.mark.parametrize("name", [name for name in NATIVE_PLAIN if {"weights", "delta"} & set(make(name))])
def test_small_inputs_of_any_strides_are_not_copied(name):
    arguments = make(name, torch.float32, **TOKENS)
    small = {key: reversed_axes(value) for key, value in arguments.items() if key in ("weights", "delta", "target")}
    arguments |= small
    assert not [size for size in copies(name, arguments, random_cotangents(name, arguments)) if size >= 2 * TOKENS["N"]]


FAR = 2**31 + 64


def far(value: torch.Tensor, axis: int) -> torch.Tensor:
    """The same values with steps of more than 2^31 elements along an axis, in memory that is never touched between."""
    strides = list(value.contiguous().stride())
    strides[axis] = FAR
    count = sum((size - 1) * stride for size, stride in zip(value.shape, strides, strict=True)) + 1
    try:
        memory = lazily_mapped(count, value.dtype)
    except OSError as error:
        pytest.skip(f"the system does not lend {count * value.element_size() >> 30} GiB of addresses: {error}")
    return memory.as_strided(value.shape, strides).copy_(value)


@pytest.mark.parametrize("axis", ["first", "tokens"])
@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_offsets_pass_2_to_the_31_elements(name, axis):
    arguments = make(name, torch.float32, N=3)

    def place(value: torch.Tensor) -> torch.Tensor:
        if axis == "first":
            return far(value, 0) if value.dim() > 1 and value.shape[0] == 2 else value
        return far(value, -2) if value.dim() > 2 and value.shape[-2] == 3 else value

    moved = transform(place, arguments)
    strides = [t.stride() for t in tensors(moved).values()]
    if not any(FAR in stride for stride in strides):
        pytest.skip("no argument has such an axis")
    cotangents = random_cotangents(name, arguments)
    outputs, found = run(name, moved, [place(c) for c in cotangents])
    expected, expected_found = run(name, arguments, cotangents)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert all(value is None or torch.equal(value, expected_found[key]) for key, value in found.items())


# --- processes of their own -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def children():
    """What tests/native_children.py printed, by scenario: (exit status, output)."""
    program = Path(__file__).with_name("native_children.py")
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("TIGER_FAST_C", "TIGER_FAST_B"))
    }
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {name: (status, output) for name, status, output in lines} | {None: (done.returncode, done.stderr)}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_in_a_process_of_its_own(scenario, children):
    status, output = children.get(scenario, children[None])
    assert scenario in children and status == 0, f"{scenario} ended with {status}:\n{output[-4000:]}"
    if output.startswith("this processor or build has no"):
        pytest.skip(output.strip())


def test_spacings_are_those_of_the_types():
    assert {dtype: torch.finfo(dtype).eps for dtype in TYPES} == SPACING
