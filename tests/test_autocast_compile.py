"""What torch's transformations must leave as it is: autocast, compile, export and activation checkpointing."""

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    FUNCTIONS,
    LOSSES,
    PLAIN,
    call,
    cotangents,
    gradients,
    leaves,
    make,
    relative_error,
    replaced,
    tensors,
    transform,
)
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from tiger_fast import functional

LOW = torch.bfloat16
# From projections the products are done, and only sums of float32 losses are left: it casts nothing.
PRODUCTS = [name for name in FUNCTIONS if name not in LOSSES or name == "counterfactual_losses"]


def autocast():
    return torch.autocast("cpu", dtype=LOW)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_autocast_outputs_have_the_type_of_the_rule(function):
    arguments = make(PLAIN[function], torch.float32)
    with autocast():
        outputs = call(function, arguments)
    narrow = function in PRODUCTS and function not in LOSSES
    assert outputs[0].dtype == (LOW if narrow else torch.float32)
    assert all(o.dtype == torch.float32 for o in outputs[1:])


@pytest.mark.parametrize("function", PRODUCTS)
def test_products_under_autocast_are_those_of_bfloat16_activations(function):
    arguments = make(PLAIN[function], torch.float32)
    narrow = {key: value.to(LOW) for key, value in tensors(arguments).items() if is_activation(function, key)}
    with autocast():
        outputs, found = gradients(PLAIN[function], arguments)
    expected, expected_found = gradients(PLAIN[function], replaced(arguments, narrow))
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    for key, value in found.items():
        assert value.dtype == tensors(arguments)[key].dtype, "a gradient has its argument's type"
        assert torch.equal(value, expected_found[key].to(value.dtype))


def is_activation(function: str, key: str) -> bool:
    return key.partition("[")[0] in ACTIVATIONS[function]


@pytest.mark.parametrize("function", [name for name in FUNCTIONS if name not in PRODUCTS])
def test_losses_under_autocast_are_float32_throughout(function):
    arguments = make(PLAIN[function], torch.float32)
    expected, expected_found = gradients(PLAIN[function], arguments)
    with autocast():
        outputs, found = gradients(PLAIN[function], arguments)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert all(value is None or torch.equal(value, expected_found[key]) for key, value in found.items())


@pytest.mark.parametrize("name", PLAIN.values(), ids=PLAIN)
def test_float64_is_never_cast_down(name):
    arguments = make(name)
    with autocast():
        outputs = call(name, arguments)
    for a, b in zip(outputs, call(name, arguments), strict=True):
        assert a.dtype == torch.float64 and torch.equal(a, b)


@pytest.mark.parametrize(
    "function", ["route", "leave_one_out", "counterfactual_losses", "group_attention", "competency_aggregate"]
)
def test_autocast_takes_float32_and_bfloat16_together(function):
    # Layers before the router give bfloat16, cached features are float32.
    arguments = make(PLAIN[function], torch.float32)
    keys = [key for key in tensors(arguments) if is_activation(function, key)]
    mixed = replaced(arguments, {key: tensors(arguments)[key].to(LOW) for key in keys[::2]})
    with pytest.raises(TypeError, match="share a type"):
        call(function, mixed)
    with autocast():
        for a, b in zip(call(function, mixed), call(function, arguments), strict=True):
            assert torch.equal(a, b)


def test_autocast_switched_off_is_no_autocast():
    with autocast(), torch.autocast("cpu", enabled=False):
        assert call("route", make("route", torch.float32))[0].dtype == torch.float32


def test_autocast_state_is_given_back():
    with autocast():
        call("route", make("route", torch.float32))
        assert torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == LOW


# --- torch.compile --------------------------------------------------------------------------------------------------


def dynamic(name: str, arguments: dict) -> dict:
    """The arguments with the dimensions that grow with B or N marked dynamic."""
    grown = tensors(make(name, B=11, N=13))
    for key, value in tensors(arguments).items():
        for axis, (have, other) in enumerate(zip(value.shape, grown[key].shape, strict=True)):
            if have != other:
                torch._dynamo.mark_dynamic(value, axis)
    return arguments


def runs_compiled(name: str, backend: str, dtype: torch.dtype, tolerance: float) -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(lambda arguments: call(name, arguments), fullgraph=True, backend=backend)
    for step, sizes in enumerate(({"B": 2, "N": 5}, {"B": 3, "N": 7}, {"B": 5, "N": 4})):
        arguments = make(name, dtype, seed=step, **sizes)
        expected, expected_found = gradients(name, arguments)
        arguments, wanted = leaves(arguments)
        outputs = compiled(dynamic(name, arguments))
        found = torch.autograd.grad(outputs, list(wanted.values()), cotangents(outputs), allow_unused=True)
        assert all(relative_error(a, b) <= tolerance for a, b in zip(outputs, expected, strict=True))
        for key, value in zip(wanted, found, strict=True):
            assert value is None or relative_error(value, expected_found[key]) <= 10 * tolerance, key
    assert counters["stats"]["unique_graphs"] == 1, "a new B or N compiled again"
    assert not counters["graph_break"]


# Compilation takes seconds, so: each function once, and the modes that take another path.
COMPILED = [
    *PLAIN.values(),
    "route per sample",
    "leave_one_out renormalized",
    "counterfactual_losses cross_entropy valid",
    "counterfactual_losses_from_projections cosine",
    "alignment_loss attached mask",
]


@pytest.mark.parametrize("name", sorted(set(COMPILED)))
def test_every_function_compiles_whole_and_once(name):
    # aot_eager traces forward and backward, as a compiler would, and runs them as they are.
    runs_compiled(name, "aot_eager", torch.float64, 1e-10)


def test_route_compiles_with_the_default_compiler():
    runs_compiled("route", "inductor", torch.float32, 1e-5)


def test_compiled_route_follows_autocast():
    torch._dynamo.reset()
    compiled = torch.compile(lambda a: call("route", a), fullgraph=True, backend="aot_eager")
    arguments = make("route", torch.float32)
    plain = compiled(arguments)
    with autocast():
        low, expected = compiled(arguments), call("route", arguments)
    assert plain[0].dtype == torch.float32 and low[0].dtype == LOW
    assert all(relative_error(a, b) < 2e-2 for a, b in zip(low, expected, strict=True))


def test_compiled_functions_refuse_bad_input():
    torch._dynamo.reset()
    compiled = torch.compile(lambda a: call("route", a), backend="aot_eager")
    with pytest.raises(ValueError, match="v must be"):
        compiled(make("route") | {"v": torch.ones(6, 2)})


# --- export, checkpointing ------------------------------------------------------------------------------------------


class Route(torch.nn.Module):
    """`route` with parameters of its own."""

    def __init__(self, arguments: dict) -> None:
        super().__init__()
        for name in ("base_weight", "base_bias", "u", "v", "scale", "shift"):
            setattr(self, name, torch.nn.Parameter(arguments[name].clone()))

    def forward(self, query, experts):
        parameters = (self.base_weight, self.base_bias, self.u, self.v, self.scale, self.shift)
        return functional.route(query, experts, *parameters)


def test_route_exports_with_dynamic_batch_and_tokens():
    arguments = make("route", torch.float32)
    module = Route(arguments)
    batch, tokens = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("tokens", min=1, max=4096)
    shape = {0: batch, 1: tokens}
    program = torch.export.export(
        module, (arguments["query"], arguments["experts"]), dynamic_shapes=(shape, [shape] * 4)
    ).module()
    for sizes in ({"B": 2, "N": 5}, {"B": 3, "N": 17}):
        other = make("route", torch.float32, seed=4, **sizes)
        found = program(other["query"], other["experts"])
        expected = module(other["query"], other["experts"])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", PLAIN.values(), ids=PLAIN)
def test_activation_checkpointing_changes_no_gradient(name, reentrant):
    plain = make(name)
    expected, expected_found = gradients(name, plain)
    arguments, wanted = leaves(plain)

    def run(*values):
        return call(name, replaced(arguments, dict(zip(wanted, values, strict=True))))

    outputs = checkpoint(run, *wanted.values(), use_reentrant=reentrant)
    torch.autograd.backward(outputs, cotangents(outputs))
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    for key, leaf in wanted.items():
        assert leaf.grad is None and expected_found[key] is None or torch.equal(leaf.grad, expected_found[key])


@pytest.mark.parametrize("name", PLAIN.values(), ids=PLAIN)
def test_inference_mode_and_no_grad_give_the_same_values(name):
    arguments = make(name)
    expected = call(name, arguments)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(call(name, arguments), expected, strict=True))
    with torch.inference_mode():
        inner = transform(torch.clone, arguments)
        assert all(torch.equal(a, b) for a, b in zip(call(name, inner), expected, strict=True))
