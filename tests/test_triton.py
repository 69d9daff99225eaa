"""The Triton kernels in Triton's interpreter: that they run where they are listed, agree with the reference in every layout and
size, write all that they return, move no more memory than they must, and treat autograd as the contract says."""

from dataclasses import replace

import pytest

pytest.importorskip("triton")

import torch
from helpers import ACTIVATIONS, CASES, PLAIN, call, leaves, make, replaced, tensors, transform
from native import check, exactly, random_cotangents, raw_calls, run, sliced, transposed
from torch import Tensor

import tiger_fast
from tiger_fast.ops import backends
from tiger_fast.ops import triton as backend

if not backend.INTERPRETED:
    pytest.skip("these run in Triton's interpreter, which TRITON_INTERPRET=1 turns on", allow_module_level=True)

from tiger_fast.kernels import config

pytestmark = pytest.mark.usefixtures("poisoned")

FUNCTIONS = tuple(backend.NATIVE)
NATIVE_CASES = [name for name, case in CASES.items() if case.function in FUNCTIONS]
NATIVE_PLAIN = [PLAIN[function] for function in FUNCTIONS]
SMALL = {"B": 2, "T": 2, "M": 3, "N": 3, "D": 8, "R": 3, "C": 4, "G": 3}
# For what is not about values. Two experts are a number of arguments that Dynamo may take for one without a context.
FEW = {"M": 2, "D": 4, "R": 2, "G": 2}


def small(name: str, dtype: torch.dtype = torch.float32, companions: torch.dtype | None = None, **sizes: int) -> dict:
    """Few numbers; sizes that a case fixes stay."""
    chosen = {key: value for key, value in (SMALL | sizes).items() if key not in CASES[name].sizes}
    arguments = make(name, dtype, companions, **chosen)
    if "num_heads" in arguments and chosen.get("D", 0) % arguments["num_heads"]:
        arguments["num_heads"] = 1
    return arguments


def test_the_kernels_run_and_not_the_reference(monkeypatch):
    def refuse(*_):
        raise AssertionError("the reference ran")

    calls = [(name, small(name, **FEW)) for name in NATIVE_PLAIN]
    given = [random_cotangents(*each) for each in calls]
    monkeypatch.setitem(backends._NATIVE, "reference", dict.fromkeys(backends.OPS, refuse))
    for each, cotangents in zip(calls, given, strict=True):
        run(*each, cotangents, "triton")


@pytest.mark.parametrize("name", NATIVE_CASES)
def test_values_and_gradients_agree(name):
    check(name, small(name), backend="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_low_precision_agrees(name, dtype):
    check(name, small(name, dtype, torch.float32), shake=0, backend="triton")


@pytest.mark.parametrize("one_pass", [False, True], ids=["product, then fused", "one pass"])
@pytest.mark.parametrize(("dtype", "sizes"), [(torch.float32, {"D": 40, "N": 18}), (torch.bfloat16, {"D": 24, "M": 6})])
def test_both_designs_of_route_agree(one_pass, dtype, sizes, monkeypatch):
    def chosen(*arguments, **facts):
        return replace(choice(*arguments, **facts), one_pass=one_pass, experts=8)

    choice = config._HEURISTICS["route"]
    monkeypatch.setitem(config._HEURISTICS, "route", chosen)
    config.reload()
    try:
        arguments = small("route", dtype, torch.float32, **sizes)
        check("route", arguments, shake=0, backend="triton")
        products, addmm = [], torch.addmm
        monkeypatch.setattr(torch, "addmm", lambda *a, **k: products.append(1) or addmm(*a, **k))
        call("route", arguments, backend="triton")
        assert len(products) == (0 if one_pass else 2)
    finally:
        monkeypatch.undo()
        config.reload()


def test_shifts_beside_bfloat16_count_to_more_than_its_bits():
    arguments = small("route", torch.bfloat16, torch.float32)
    arguments["query"].zero_()  # the logits are then the shifts' alone
    arguments["base_bias"].zero_()
    arguments["shift"] *= 10
    weights = call("route", arguments, backend="triton")[1]
    expected = call("route", exactly(arguments), backend="reference")[1]
    assert (weights - expected).abs().max() < 1e-3  # a shift rounded to bfloat16 is off by some 2e-2


SIZES = [
    *({"D": 1, "R": 1}, {"D": 7, "R": 1}, {"D": 40, "R": 17, "C": 17}, {"N": 1}, {"B": 1, "N": 19}),
    *({"M": 1, "T": 1, "G": 1}, {"M": 5, "T": 3, "G": 5}),
    *({"B": 1, "M": 16, "T": 1, "N": 1}, {"B": 1, "T": 17, "N": 1}),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_odd_sizes_agree(name, sizes):
    if not set(sizes) & set(make_sizes(name)):
        pytest.skip("this function has none of these sizes")
    check(name, small(name, **({"M": 2} | sizes)), shake=0, backend="triton")


def make_sizes(name: str) -> set[str]:
    # The sizes that change a case's tensors.
    shapes = [t.shape for t in tensors(small(name)).values()]
    return {s for s in SMALL if [t.shape for t in tensors(small(name, **{s: SMALL[s] + 1})).values()] != shapes}


@pytest.mark.parametrize("sizes", [{"B": 0}, {"N": 0}, {"B": 0, "N": 0}], ids=str)
@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_nothing_is_computed_from_nothing(name, sizes):
    check(name, small(name, **sizes), backend="triton")


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_strides_change_nothing(name):
    dense = small(name, N=5)
    given = random_cotangents(name, dense)
    expected = run(name, dense, given, "triton")
    for change in (transposed, sliced):
        outputs, found = run(name, transform(change, dense), [change(c) for c in given], "triton")
        for value, other in zip(outputs, expected[0], strict=True):
            torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6)  # torch's products depend on layout
        for key, value in found.items():
            torch.testing.assert_close(value, expected[1][key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_each_gradient_alone_is_the_same(name):
    arguments = small(name, **FEW)
    given = random_cotangents(name, arguments)
    _, together = run(name, arguments, given, "triton")
    for key, value in together.items():
        _, alone = run(name, arguments, given, "triton", [key])
        if value is None:
            assert alone[key] is None
        else:
            torch.testing.assert_close(alone[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", [n for n in NATIVE_PLAIN if n.startswith(("route", "counterfactual", "competency"))])
def test_an_absent_gradient_counts_as_zero(name):
    arguments = small(name, **FEW)
    given = random_cotangents(name, arguments)
    for absent in range(len(given)):
        some = [None if i == absent else c for i, c in enumerate(given)]
        zeros = [torch.zeros_like(c) if i == absent else c for i, c in enumerate(given)]
        _, found = run(name, arguments, some, "triton")
        _, expected = run(name, arguments, zeros, "triton")
        for key, value in found.items():
            other = expected[key]
            if value is None:
                assert other is None or not other.any()
            else:
                torch.testing.assert_close(
                    value, torch.zeros_like(value) if other is None else other, rtol=1e-6, atol=1e-6
                )


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_what_is_not_finite_stays_in_its_token(name):
    arguments = small(name, N=18)
    per_token = {
        key: t for key, t in tensors(arguments).items() if key.partition("[")[0] in ACTIVATIONS[CASES[name].function]
    }
    if name.partition(" ")[0] == "alignment_loss" or not per_token:
        pytest.skip("this function has no output of its own for each token")
    broken = {}
    for key, value in per_token.items():
        broken[key] = value.clone()
        broken[key][..., 4, :] = torch.nan
    clean = call(name, arguments, backend="triton")
    outputs = call(name, replaced(arguments, broken), backend="triton")
    for value, expected in zip(outputs, clean, strict=True):
        if 18 not in value.shape:
            continue
        tokens = value.shape.index(18)
        others = torch.arange(18) != 4
        assert torch.equal(value.movedim(tokens, 0)[others], expected.movedim(tokens, 0)[others])
        assert value.movedim(tokens, 0)[4].isnan().any()


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_opcheck_accepts_every_operator(name):
    calls = raw_calls(name, small(name, **FEW), "triton")
    assert len(calls) >= 2
    for operator, values in calls:
        # The last test of opcheck asks for a derivative, which is in the autograd.Function outside the operator.
        torch.library.opcheck(
            operator, values, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        )


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_compiles_whole(name):
    arguments = small(name, **FEW)
    keys = [key for key, t in tensors(arguments).items() if t.is_floating_point()]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return call(name, replaced(arguments, dict(zip(keys, values, strict=True))), backend="triton")

    torch._dynamo.reset()  # other tests' compilations count towards its limit
    values = [tensors(arguments)[key] for key in keys]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*values), function(*values), strict=True):
        assert torch.equal(a, b)


def test_double_precision_is_refused_by_name():
    # That it runs the reference where nobody named a backend is a test on a GPU.
    arguments = small("leave_one_out", torch.float64)
    with pytest.raises(TypeError, match=r"'triton'.*float64"):
        call("leave_one_out", arguments, backend="triton")
    with tiger_fast.use_backend("triton"), pytest.raises(TypeError, match=r"'triton'.*float64"):
        call("leave_one_out", arguments)


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_exported_programs_run_on_tensors_that_want_gradients(name):
    # Many classes: the library makes the projections then.
    arguments = small(name, **FEW, **({"C": 300} if name.startswith("counterfactual_losses ") else {}))
    keys = list(tensors(arguments))

    class Function(torch.nn.Module):
        def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
            return call(name, replaced(arguments, dict(zip(keys, values, strict=True))), backend="triton")

    values = tuple(tensors(arguments).values())
    program = torch.export.export(Function(), values).module()
    assert any(
        "tiger_fast" in str(node.target)
        for part in program.modules()
        for node in getattr(part, "graph", program.graph).nodes
    )
    wanting = tuple(v.clone().requires_grad_() if v.is_floating_point() else v for v in values)
    for value, expected in zip(program(*wanting), call(name, arguments, backend="triton"), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_a_backward_under_autocast_is_the_same(name):
    arguments, wanted = leaves(small(name))
    outputs = call(name, arguments, backend="triton")
    given = random_cotangents(name, arguments)
    found = [torch.autograd.grad(outputs, list(wanted.values()), given, retain_graph=True, allow_unused=True)]
    with torch.autocast("cpu", torch.bfloat16):
        found.append(torch.autograd.grad(outputs, list(wanted.values()), given, allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert a is b is None or torch.equal(a, b)
