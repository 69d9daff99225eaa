"""Bad input: refused with ValueError or TypeError that names the argument, what came and what was expected."""

import re

import numpy
import pytest
import torch
from helpers import CASES, FUNCTIONS, PLAIN, THOROUGH, TOKEN_LOSSES, call, make, replaced, tensors

import tiger_fast
from tiger_fast import functional

EVERY_TENSOR = [
    (function, key)
    for function in FUNCTIONS
    for key in tensors(make(PLAIN[function]))
    if not key.startswith("experts[")
] + [(f, f"experts[{k}]") for f in FUNCTIONS for k in (0, 2) if "experts" in make(PLAIN[f])]
# The first tensor of a function sets what the others must be; a wrong one is told of another argument.
FIRST = {function: next(iter(tensors(make(PLAIN[function])))) for function in FUNCTIONS}
OTHERS = [(function, key) for function, key in EVERY_TENSOR if key != FIRST[function]]
INTEGERS = ("target",)  # of the plain counterfactual case, cross-entropy


@pytest.fixture(autouse=True, scope="module", params=THOROUGH)
def backend(request):
    """Every backend refuses the same things."""
    with tiger_fast.use_backend(request.param):
        yield request.param


def refused(error: type[Exception], function: str, arguments: dict, *words: object) -> None:
    """The call raises exactly `error`, and the message holds each of the words."""
    with pytest.raises((ValueError, TypeError)) as caught:
        call(function, arguments)
    assert caught.type is error, caught.value
    for word in words:
        # Whole words: "v" is in many of them.
        assert re.search(rf"(?<!\w){re.escape(str(word))}(?!\w)", str(caught.value)), word


def one(function: str, key: str, value: object) -> dict:
    return replaced(make(PLAIN[function]), {key: value})


@pytest.mark.parametrize(("function", "key"), EVERY_TENSOR)
def test_what_is_not_a_tensor_is_a_type_error(function, key):
    for value in (3, None, "text", numpy.zeros((2, 5, 6)), [1.0]):
        if value is not None or key not in ("base_bias", "head_bias"):
            refused(TypeError, function, one(function, key, value), key, type(value).__name__)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8], ids=str)
@pytest.mark.parametrize(("function", "key"), EVERY_TENSOR)
def test_types_outside_the_contract_are_type_errors(function, key, dtype):
    if key in INTEGERS and dtype == torch.int64:
        dtype = torch.int16
    value = tensors(make(PLAIN[function]))[key]
    refused(
        TypeError, function, one(function, key, value.to(dtype)), key, dtype, "int64" if key in INTEGERS else "float32"
    )


@pytest.mark.parametrize(("function", "key"), [pair for pair in OTHERS if pair[1] not in INTEGERS])
def test_mixed_types_are_type_errors(function, key):
    arguments = make(PLAIN[function])  # float64, beside which float32 parameters are fine and float16 is not
    refused(TypeError, function, replaced(arguments, {key: tensors(arguments)[key].half()}), key, torch.float16)


@pytest.mark.parametrize(
    ("function", "key"), [(f, k) for f, k in OTHERS if k.startswith("experts") or f == "group_attention"]
)
def test_activations_do_not_mix_float32_with_another(function, key):
    arguments = make(PLAIN[function], torch.bfloat16)
    refused(
        TypeError, function, replaced(arguments, {key: tensors(arguments)[key].float()}), key, "float32", "bfloat16"
    )


@pytest.mark.parametrize(("function", "key"), OTHERS)
def test_wrong_shapes_are_value_errors(function, key):
    value = tensors(make(PLAIN[function]))[key]
    for changed in (value[..., None], value[..., :-1].contiguous(), torch.cat([value, value]), value.flatten()[0]):
        if key in ("u", "scale", "shift", "head_weight") and changed.dim() == value.dim():
            # Another rank, task count or class count is told of the argument that has to match.
            refused(ValueError, function, one(function, key, changed))
        elif key == "linear_weight" and changed.shape[-1:] == value.shape[-1:]:
            refused(ValueError, function, one(function, key, changed), "gate_weight", tuple(value.shape))
        elif changed.shape != value.shape:
            refused(ValueError, function, one(function, key, changed), key, str(tuple(changed.shape)))


@pytest.mark.parametrize(("function", "key"), OTHERS)
def test_other_devices_are_value_errors(function, key):
    value = tensors(make(PLAIN[function]))[key]
    refused(ValueError, function, one(function, key, value.to("meta")), key, "meta", "cpu")


@pytest.mark.parametrize("backend", ["trition", "CPU", "", 3], ids=repr)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_refuses_an_unknown_backend(function, backend):
    with pytest.raises(ValueError, match="backend") as caught:
        call(function, make(PLAIN[function]), backend=backend)
    assert repr(backend) in str(caught.value) and "reference" in str(caught.value)


def changed(name: str, **changes: object) -> dict:
    """The arguments of a case with some replaced; a callable gets the old value."""
    arguments = make(name)
    return arguments | {k: v(arguments.get(k)) if callable(v) else v for k, v in changes.items()}


ones = torch.ones
wide = {"dtype": torch.float64}
LISTED = {
    "query 2-d": (ValueError, "route", changed("route", query=lambda t: t[0]), ["query", "(B, N, D)", "(5, 6)"]),
    "no experts": (ValueError, "route", changed("route", experts=[]), ["experts", "1 and 16", "0"]),
    "too many experts": (ValueError, "route", make("route", M=17), ["experts", "1 and 16", "17"]),
    "too many to leave out": (ValueError, "leave_one_out", make("leave_one_out", M=17), ["experts", "16", "17"]),
    "one 3-d tensor": (ValueError, "route", changed("route", experts=ones(2, 5, 6, **wide)), ["experts", "(2, 5, 6)"]),
    "experts (B, N, M, D)": (
        ValueError, "leave_one_out", changed("leave_one_out", experts=ones(2, 500, 4, 6)), ["experts", "16", "500"],
    ),
    "experts in a set": (TypeError, "route", changed("route", experts={1}), ["experts", "sequence", "set"]),
    "experts generated": (TypeError, "route", changed("route", experts=iter([])), ["experts", "sequence"]),
    "experts as text": (TypeError, "leave_one_out", changed("leave_one_out", experts="abc"), ["experts[0]", "str"]),
    "expert of another width": (
        ValueError, "route", changed("route", experts=lambda e: [e[0], e[1][..., :3]]),
        ["experts[1]", "(2, 5, 6)", "(2, 5, 3)"],
    ),
    "rank 0": (ValueError, "route", make("route", R=0), ["R of u", "1 and 256", "0"]),
    "rank 257": (ValueError, "route", make("route", R=257), ["R of u", "256", "257"]),
    "no task": (ValueError, "route", make("route", T=0), ["T of scale", "32", "0"]),
    "33 tasks": (ValueError, "route", make("route", T=33), ["T of scale", "32", "33"]),
    "tasks differ": (ValueError, "route", changed("route", shift=ones(2, 6, **wide)), ["shift", "scale", "3", "2"]),
    "width 0": (ValueError, "route", changed("route", query=ones(2, 5, 0), experts=[ones(2, 5, 0)]), ["D", "query", "0"]),
    "samples of scale": (
        ValueError, "route", changed("route", scale=ones(7, 3, 3, **wide)), ["scale", "(2, T, 3)", "(7, 3, 3)"],
    ),
    "v of another rank": (ValueError, "route", changed("route", v=ones(6, 2, **wide)), ["v", "(6, 3)", "(6, 2)"]),
    "33 mixtures": (ValueError, "leave_one_out", make("leave_one_out", T=33), ["T of weights", "32", "33"]),
    "a word for renormalize": (
        TypeError, "leave_one_out", changed("leave_one_out", renormalize="no"), ["renormalize", "bool", "str"],
    ),
    "a number for detach_target": (
        TypeError, "alignment_loss", changed("alignment_loss", detach_target=1), ["detach_target", "bool", "int"],
    ),
    "temperature 0": (ValueError, "causal_target", changed("causal_target", tau=0.0), ["tau", "> 0", "0.0"]),
    "temperature below 0": (ValueError, "alignment_loss", changed("alignment_loss", tau=-1), ["tau", "> 0", "-1"]),
    "temperature NaN": (ValueError, "causal_target", changed("causal_target", tau=float("nan")), ["tau", "nan"]),
    "temperature in words": (TypeError, "causal_target", changed("causal_target", tau="1"), ["tau", "number", "str"]),
    "temperature as tensor": (
        TypeError, "causal_target", changed("causal_target", tau=ones(())), ["tau", "number", "Tensor"],
    ),
    "no temperature": (TypeError, "alignment_loss", changed("alignment_loss", tau=None), ["tau", "number", "NoneType"]),
    "a scalar delta": (ValueError, "causal_target", {"delta": ones(())}, ["delta", "scalar"]),
    "delta without experts": (ValueError, "causal_target", {"delta": ones(3, 0)}, ["delta", "16", "0"]),
    "delta of 17": (ValueError, "causal_target", {"delta": ones(3, 17)}, ["delta", "16", "17"]),
    "mask of numbers": (TypeError, "alignment_loss", changed("alignment_loss", mask=ones(5)), ["mask", "bool", "float32"]),
    "mask not a tensor": (TypeError, "alignment_loss", changed("alignment_loss", mask=True), ["mask", "tensor", "bool"]),
    "mask too wide": (
        ValueError, "alignment_loss", changed("alignment_loss", mask=ones(2, 3, 5, 4) > 0),
        ["mask", "broadcast", "(2, 3, 5)", "(2, 3, 5, 4)"],
    ),
    "mask does not fit": (
        ValueError, "alignment_loss", changed("alignment_loss", mask=ones(2, 1) > 0), ["mask", "(2, 3, 5)", "(2, 1)"],
    ),
    "mask elsewhere": (
        ValueError, "alignment_loss", changed("alignment_loss", mask=(ones(5) > 0).to("meta")), ["mask", "meta", "cpu"],
    ),
    "heads do not divide": (
        ValueError, "group_attention", changed("group_attention", num_heads=4), ["num_heads", "divide", "6", "4"],
    ),
    "no heads": (ValueError, "group_attention", changed("group_attention", num_heads=0), ["num_heads", "0"]),
    "heads below 0": (ValueError, "group_attention", changed("group_attention", num_heads=-2), ["num_heads", "-2"]),
    "heads a float": (TypeError, "group_attention", changed("group_attention", num_heads=2.0), ["num_heads", "float"]),
    "heads True": (TypeError, "group_attention", changed("group_attention", num_heads=True), ["num_heads", "bool"]),
    "a group of 33": (ValueError, "group_attention", make("group_attention", G=33), ["G of q", "32", "33"]),
    "no group": (ValueError, "group_attention", make("group_attention", G=0), ["G of q", "32", "0"]),
    "packed of 33": (ValueError, "group_attention_packed", make("group_attention_packed", G=33), ["qkv", "32", "33"]),
    "packed not in three": (
        ValueError, "group_attention_packed", {"qkv": ones(1, 2, 3, 10), "num_heads": 1}, ["qkv", "3 D", "10"],
    ),
    "packed heads": (
        ValueError, "group_attention_packed", changed("group_attention_packed", num_heads=5), ["num_heads", "6", "5"],
    ),
    "adapter of a scalar": (ValueError, "adapter", changed("adapter", x=ones((), **wide)), ["x", "scalar"]),
    "adapter of nothing": (ValueError, "adapter", changed("adapter", x=ones(2, 0, **wide)), ["x", "0"]),
    "adapter of other channels": (
        ValueError, "adapter", changed("adapter", x=ones(2, 3, **wide)), ["linear_weight", "(D, 3)", "(6, 4)"],
    ),
    "adapter eps": (ValueError, "adapter", changed("adapter", eps=-1e-5), ["eps", ">= 0", "-1e-05"]),
    "aggregate eps": (
        TypeError, "competency_aggregate", changed("competency_aggregate", eps="1e-5"), ["eps", "number", "str"],
    ),
    "confidence of 17": (ValueError, "confidence_loss", make("confidence_loss", M=17), ["confidence", "16", "17"]),
    "confidence 1-d": (
        ValueError, "improvement_loss", changed("improvement_loss", confidence=ones(4)), ["confidence", "(B, M)", "(4,)"],
    ),
    "improvement eps": (
        ValueError, "improvement_loss", changed("improvement_loss", eps=float("nan")), ["eps", ">= 0", "nan"],
    ),
}  # fmt: skip
for _function in ("counterfactual_losses", "counterfactual_losses_from_projections"):
    _case = f"{_function} cross_entropy"
    LISTED |= {
        f"{_function} near loss": (
            ValueError, _function, changed(_case, loss="cross_entrpy"),
            ["loss", "'cross_entrpy'", "did you mean 'cross_entropy'?", *TOKEN_LOSSES],
        ),
        f"{_function} loss None": (TypeError, _function, changed(_case, loss=None), ["loss", "string", "NoneType"]),
        f"{_function} loss list": (TypeError, _function, changed(_case, loss=["l1"]), ["loss", "string", "list"]),
        f"{_function} ignore": (
            TypeError, _function, changed(_case, ignore_index="255"), ["ignore_index", "int", "str"],
        ),
        f"{_function} ignore float": (
            TypeError, _function, changed(_case, ignore_index=255.0), ["ignore_index", "int", "float"],
        ),
        f"{_function} one-hot target": (
            TypeError, _function, changed(_case, target=ones(2, 5, 4, **wide)), ["target", "int64", "float64"],
        ),
        f"{_function} classes for l1": (
            TypeError, _function, changed(_case, loss="l1"), ["target", "float32", "int64"],
        ),
        f"{_function} target shape": (
            ValueError, _function, changed(_case, loss="mse", target=ones(2, 5, **wide)), ["target", "(2, 5, 4)", "(2, 5)"],
        ),
        f"{_function} valid type": (
            TypeError, _function, changed(_case, valid=ones(2, 5)), ["valid", "bool", "float32"],
        ),
        f"{_function} valid shape": (
            ValueError, _function, changed(_case, valid=ones(5) > 0), ["valid", "(2, 5)", "(5,)"],
        ),
        f"{_function} valid device": (
            ValueError, _function, changed(_case, valid=(ones(2, 5) > 0).to("meta")), ["valid", "meta", "cpu"],
        ),
        f"{_function} valid not a tensor": (TypeError, _function, changed(_case, valid=True), ["valid", "tensor", "bool"]),
        f"{_function} all tasks' weights": (
            ValueError, _function, changed(_case, weights=ones(2, 3, 5, 4, **wide)),
            ["weights", "(2, 5, 4)", "(2, 3, 5, 4)"],
        ),
        f"{_function} too many": (ValueError, _function, make(_case, M=17), ["16", "17"]),
        f"{_function} no class": (ValueError, _function, changed(_case, **(
            {"projections": ones(2, 4, 5, 0, **wide)} if "proj" in _function else {"head_weight": ones(0, 6, **wide)}
        ), head_bias=None), ["C", "at least 1", "0"]),
    }  # fmt: skip


@pytest.mark.parametrize("name", LISTED)
def test_the_message_says_what_is_wrong(name):
    error, function, arguments, words = LISTED[name]
    refused(error, function, arguments, *words)


def test_nothing_is_written_before_an_error():
    arguments = make("route")
    before = {key: value.clone() for key, value in tensors(arguments).items()}
    with pytest.raises(ValueError):
        functional.route(**arguments | {"shift": torch.ones(3, 5)})
    assert all(torch.equal(value, before[key]) for key, value in tensors(arguments).items())


def test_checks_hold_under_autocast():
    arguments = make("route", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refused(ValueError, "route", arguments | {"v": torch.ones(6, 2)}, "v", "(6, 3)", "(6, 2)")
        refused(TypeError, "route", arguments | {"query": arguments["query"].double()}, "float64", "float32")
        refused(TypeError, "route", arguments | {"u": arguments["u"].half()}, "u", "float16")


def test_every_case_is_accepted_as_it_stands():
    for name in CASES:
        call(name, make(name))
