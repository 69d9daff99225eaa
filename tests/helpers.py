"""Inputs for every function of the contract, by case: one table that the tests of values, types, strides, autocast,
compilation and errors all draw from."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

from tiger_fast import available_backends, functional

SIZES = {"B": 2, "T": 3, "M": 4, "N": 5, "D": 6, "R": 3, "C": 4, "G": 3}

# Arguments that share the activation type; the other floating ones may be float32 beside it.
ACTIVATIONS = {
    "route": ("query", "experts"),
    "leave_one_out": ("experts",),
    "counterfactual_losses": ("experts",),
    "counterfactual_losses_from_projections": ("projections",),
    "causal_target": (),
    "alignment_loss": (),
    "group_attention": ("q", "k", "v"),
    "group_attention_packed": ("qkv",),
    "adapter": ("x",),
    "competency_aggregate": ("experts",),
    "confidence_loss": (),
    "improvement_loss": (),
}
FUNCTIONS = tuple(ACTIVATIONS)
# Functions whose outputs are float32 or float64 whatever their arguments are.
LOSSES = tuple(name for name in FUNCTIONS if "loss" in name or name == "causal_target")
TOKEN_LOSSES = ("cross_entropy", "l1", "mse", "bce", "cosine")

# The backends that every test of the contract runs on. Triton's interpreter is too slow for that: see test_triton.py.
THOROUGH = tuple(name for name in available_backends() if name != "triton")

Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A call of `function`: sizes that differ from SIZES, keyword arguments, and choices of the builder."""

    function: str
    sizes: dict = field(default_factory=dict)
    keywords: dict = field(default_factory=dict)
    choices: dict = field(default_factory=dict)


def _simplex(values: Tensor) -> Tensor:
    return values.softmax(dim=-1)


def _route(n: SimpleNamespace, draw: Draw, per_sample: str = "", bias: bool = True) -> dict:
    lead = {name: (n.B,) if name in per_sample else () for name in ("scale", "shift")}
    return {
        "query": draw(n.B, n.N, n.D),
        "experts": [draw(n.B, n.N, n.D) for _ in range(n.M)],
        "base_weight": draw(n.D, n.D) / n.D**0.5,
        "base_bias": draw(n.D) if bias else None,
        "u": draw(n.D, n.R) / n.D**0.5,
        "v": draw(n.D, n.R) / n.R**0.5,
        "scale": draw(*lead["scale"], n.T, n.R),
        "shift": draw(*lead["shift"], n.T, n.D),
    }


def _leave_one_out(n: SimpleNamespace, draw: Draw) -> dict:
    experts = [draw(n.B, n.N, n.D) for _ in range(n.M)]
    return {"experts": experts, "weights": _simplex(draw(n.B, n.T, n.N, n.M))}


def _target(n: SimpleNamespace, draw: Draw, loss: str) -> Tensor:
    if loss == "cross_entropy":
        return (draw(n.B, n.N).abs() * 1000).long() % n.C
    values = draw(n.B, n.N, n.C)
    return values.sigmoid() if loss == "bce" else values


def _rest(n: SimpleNamespace, draw: Draw, loss: str, bias: bool, valid: bool) -> dict:
    return {
        "head_bias": draw(n.C) if bias else None,
        "target": _target(n, draw, loss),
        "valid": draw(n.B, n.N) > -0.5 if valid else None,
    }


def _counterfactual(n: SimpleNamespace, draw: Draw, loss: str, bias: bool = True, valid: bool = False) -> dict:
    return {
        "experts": [draw(n.B, n.N, n.D) for _ in range(n.M)],
        "weights": _simplex(draw(n.B, n.N, n.M)),
        "head_weight": draw(n.C, n.D) / n.D**0.5,
        **_rest(n, draw, loss, bias, valid),
    }


def _projections(n: SimpleNamespace, draw: Draw, loss: str, bias: bool = True, valid: bool = False) -> dict:
    return {
        "projections": draw(n.B, n.M, n.N, n.C),
        "weights": _simplex(draw(n.B, n.N, n.M)),
        **_rest(n, draw, loss, bias, valid),
    }


def _alignment(n: SimpleNamespace, draw: Draw, mask: bool = False) -> dict:
    return {
        "delta": draw(n.B, n.T, n.N, n.M),
        "weights": _simplex(draw(n.B, n.T, n.N, n.M)),
        "mask": draw(n.B, 1, n.N) > -0.5 if mask else None,
    }


def _adapter(n: SimpleNamespace, draw: Draw) -> dict:
    return {
        "x": draw(n.B, n.N, n.C),
        "norm_in_weight": draw(n.C),
        "norm_in_bias": draw(n.C),
        "linear_weight": draw(n.D, n.C),
        "linear_bias": draw(n.D),
        "gate_weight": draw(n.D, n.C),
        "gate_bias": draw(n.D),
        "norm_out_weight": draw(n.D),
        "norm_out_bias": draw(n.D),
    }


def _aggregate(n: SimpleNamespace, draw: Draw) -> dict:
    return {
        "experts": [draw(n.B, n.N, n.D) for _ in range(n.M)],
        "confidence": draw(n.B, n.M).sigmoid(),
        "refined_confidence": draw(n.B, n.M).sigmoid(),
        "norm_weight": draw(n.D),
        "norm_bias": draw(n.D),
    }


def _confidence(n: SimpleNamespace, draw: Draw) -> dict:
    return {
        "confidence": draw(n.B, n.M).sigmoid(),
        "task_loss": draw(n.B, n.M).abs(),
        "refined_confidence": draw(n.B, n.M).sigmoid(),
        "refined_task_loss": draw(n.B, n.M).abs(),
    }


_BUILDERS: dict[str, Callable[..., dict]] = {
    "route": _route,
    "leave_one_out": _leave_one_out,
    "counterfactual_losses": _counterfactual,
    "counterfactual_losses_from_projections": _projections,
    "causal_target": lambda n, draw: {"delta": draw(n.B, n.T, n.N, n.M)},
    "alignment_loss": _alignment,
    "group_attention": lambda n, draw: {name: draw(n.B, n.G, n.N, n.D) for name in "qkv"},
    "group_attention_packed": lambda n, draw: {"qkv": draw(n.B, n.G, n.N, 3 * n.D)},
    "adapter": _adapter,
    "competency_aggregate": _aggregate,
    "confidence_loss": _confidence,
    "improvement_loss": lambda n, draw: {k: v for k, v in _confidence(n, draw).items() if "confidence" in k},
}


def _cases() -> dict[str, Case]:
    cases = {
        "route": Case("route"),
        "route no bias": Case("route", choices={"bias": False}),
        "route per sample": Case("route", choices={"per_sample": "scale shift"}),
        "route scale per sample": Case("route", choices={"per_sample": "scale"}),
        "route shift per sample": Case("route", choices={"per_sample": "shift"}),
        "route one expert": Case("route", sizes={"M": 1}),
        "route one task": Case("route", sizes={"T": 1}),
        "route width 1": Case("route", sizes={"D": 1, "R": 1}),
        "causal_target": Case("causal_target"),
        "causal_target sharp": Case("causal_target", keywords={"tau": 0.3, "eps": 1e-3}),
        "causal_target one expert": Case("causal_target", sizes={"M": 1}),
        "alignment_loss": Case("alignment_loss"),
        "alignment_loss mask": Case("alignment_loss", choices={"mask": True}),
        "alignment_loss attached": Case("alignment_loss", keywords={"detach_target": False, "tau": 0.7}),
        "alignment_loss attached mask": Case(
            "alignment_loss", keywords={"detach_target": False}, choices={"mask": True}
        ),
        "alignment_loss one expert": Case("alignment_loss", sizes={"M": 1}, keywords={"detach_target": False}),
        "adapter": Case("adapter"),
        "adapter to width 1": Case("adapter", sizes={"D": 1}),
        "competency_aggregate": Case("competency_aggregate"),
        "competency_aggregate one expert": Case("competency_aggregate", sizes={"M": 1}),
        "confidence_loss": Case("confidence_loss", keywords={"eps": 1e-4}),
        "improvement_loss": Case("improvement_loss", keywords={"eps": 1e-4}),
    }
    for mode in (False, True):
        name = "leave_one_out renormalized" if mode else "leave_one_out"
        cases[name] = Case("leave_one_out", keywords={"renormalize": mode})
        cases[f"{name} one expert"] = Case("leave_one_out", sizes={"M": 1}, keywords={"renormalize": mode})
        cases[f"{name} width 1"] = Case("leave_one_out", sizes={"D": 1}, keywords={"renormalize": mode})
    for function in ("counterfactual_losses", "counterfactual_losses_from_projections"):
        for loss in TOKEN_LOSSES:
            one = {"function": function, "keywords": {"loss": loss}}
            cases[f"{function} {loss}"] = Case(**one, choices={"loss": loss})
            cases[f"{function} {loss} valid"] = Case(**one, choices={"loss": loss, "valid": True})
        one = {"function": function, "keywords": {"loss": "cross_entropy"}}
        cases[f"{function} no bias"] = Case(**one, choices={"loss": "cross_entropy", "bias": False})
        cases[f"{function} ignore"] = Case(function, {}, {"loss": "cross_entropy", "ignore_index": 1}, one["keywords"])
        cases[f"{function} one expert"] = Case(**one, sizes={"M": 1}, choices={"loss": "cross_entropy"})
    for function in ("group_attention", "group_attention_packed"):
        cases[function] = Case(function, keywords={"num_heads": 2})
        cases[f"{function} one head"] = Case(function, sizes={"D": 5}, keywords={"num_heads": 1})
        cases[f"{function} heads of width 1"] = Case(function, sizes={"D": 3}, keywords={"num_heads": 3})
        cases[f"{function} one member"] = Case(function, sizes={"G": 1}, keywords={"num_heads": 2})
    return cases


CASES = _cases()
# One case a function, for what does not depend on a function's modes.
PLAIN = {case.function: name for name, case in reversed(CASES.items()) if not case.sizes}
assert set(PLAIN) == set(FUNCTIONS)


def make(
    name: str, dtype: torch.dtype = torch.float64, companions: torch.dtype | None = None, seed: int = 0, **sizes: int
) -> dict:
    """The arguments of a case by name: activations in `dtype`, other floating ones in `companions` (else `dtype`).

    The values do not depend on the types but for their rounding."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    numbers = SimpleNamespace(**(SIZES | case.sizes | sizes))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    arguments = _BUILDERS[case.function](numbers, draw, **case.choices)
    for key, value in arguments.items():
        to = dtype if companions is None or key in ACTIVATIONS[case.function] else companions
        arguments[key] = _map(lambda t, to=to: t.to(to) if t.is_floating_point() else t, value)
    return {key: value for key, value in arguments.items() if key != "valid" or value is not None} | case.keywords


def _map(function: Callable[[Tensor], Tensor], value: object) -> object:
    if isinstance(value, Tensor):
        return function(value)
    return [function(member) for member in value] if isinstance(value, list) else value


def transform(function: Callable[[Tensor], Tensor], arguments: dict) -> dict:
    """The arguments with `function` applied to each tensor."""
    return {key: _map(function, value) for key, value in arguments.items()}


def call(name: str, arguments: dict, **keywords: object) -> tuple[Tensor, ...]:
    """The outputs of a case's function (a case's or a function's name), always as a tuple."""
    function = CASES[name].function if name in CASES else name
    result = getattr(functional, function)(**arguments, **keywords)
    return (result,) if isinstance(result, Tensor) else tuple(result)


def tensors(arguments: dict) -> dict[str, Tensor]:
    """Every tensor of the arguments, experts[0] and on included."""
    found = {}
    for key, value in arguments.items():
        if isinstance(value, Tensor):
            found[key] = value
        elif isinstance(value, list):
            found |= {f"{key}[{i}]": member for i, member in enumerate(value)}
    return found


def replaced(arguments: dict, values: dict[str, Tensor]) -> dict:
    """The arguments with tensors put in under the names that `tensors` gives."""
    arguments = {key: list(value) if isinstance(value, list) else value for key, value in arguments.items()}
    for name, value in values.items():
        key, _, index = name.rstrip("]").partition("[")
        if index:
            arguments[key][int(index)] = value
        else:
            arguments[key] = value
    return arguments


def leaves(arguments: dict) -> tuple[dict, dict[str, Tensor]]:
    """Arguments whose floating tensors are fresh leaves that want a gradient, and these by name.

    Their strides are kept."""
    wanted = {k: t.detach().requires_grad_() for k, t in tensors(arguments).items() if t.is_floating_point()}
    return replaced(arguments, wanted), wanted


def cotangents(outputs: tuple[Tensor, ...], seed: int = 1) -> list[Tensor]:
    """A random cotangent for each output, of its type."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]


def gradients(name: str, arguments: dict, **keywords: object) -> tuple[tuple[Tensor, ...], dict[str, Tensor | None]]:
    """The outputs of a case, and the gradients of their products with random cotangents, by argument."""
    arguments, wanted = leaves(arguments)
    outputs = call(name, arguments, **keywords)
    found = torch.autograd.grad(outputs, list(wanted.values()), cotangents(outputs), allow_unused=True)
    return tuple(o.detach() for o in outputs), dict(zip(wanted, found, strict=True))


def relative_error(value: Tensor, reference: Tensor) -> float:
    """max |value - reference| / max |reference|; the difference itself where the reference is 0."""
    assert value.shape == reference.shape, (tuple(value.shape), tuple(reference.shape))
    if value.numel() == 0:
        return 0.0
    largest = reference.double().abs().max().item()
    return (value.double() - reference.double()).abs().max().item() / (largest or 1.0)
