"""Calls of the operators at given sizes, on any device: what the static report compiles and the autotune times.

An operator is called by its schema: a forward's arguments come from the table here, and a backward's are, by name, those
of its forward, the outputs of its forward, and a gradient for each output.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# The shape that figures for GPUs are stated for. B batch, N tokens, D width, M experts, T tasks, R rank, C classes or an
# adapter's input channels, G members of a group.
DEFAULT = {"B": 32, "N": 1024, "D": 768, "M": 4, "T": 5, "R": 32, "C": 40, "G": 4, "heads": 12}
SIZES = {"adapter": DEFAULT | {"C": 768}}

# Outputs by the names that backward operators take them under, and with "grad_" before them their gradients. The gradient
# of an only output is `grad`.
OUTPUTS = {
    "route": ("tokens", "weights", "base", "z"),
    "leave_one_out": ("out",),
    "counterfactual_losses": ("full", "without", "kept"),
    "counterfactual_losses_from_projections": ("full", "without"),
    "causal_target": ("out",),
    "alignment_loss": ("out", "counted", "slopes"),
    "group_attention": ("out",),
    "group_attention_packed": ("out",),
    "adapter": ("out", "gate"),
    "competency_aggregate": ("out", "weights"),
}
OPS = tuple(OUTPUTS)
# Values that are probabilities or sums in float32 beside any activation type.
_FLOAT32 = ("weights", "delta", "confidence", "refined_confidence")
_PARAMETERS = ("base_weight", "base_bias", "u", "v", "scale", "shift", "head_weight", "head_bias")
# Losses by their place in tiger_fast.reference.TOKEN_LOSSES; the first is cross_entropy, whose target is a class.
_CLASSES = 0


@dataclass(frozen=True)
class Call:
    """An operator's name and its arguments, in order."""

    name: str
    arguments: tuple

    def __call__(self, namespace: str = "tiger_fast") -> object:
        return getattr(getattr(torch.ops, namespace), self.name)(*self.arguments)


Draw = Callable[..., Tensor]


def _experts(n: dict, draw: Draw) -> list[Tensor]:
    return [draw(n["B"], n["N"], n["D"]) for _ in range(n["M"])]


def _route(n: dict, draw: Draw) -> dict:
    D, R, T = n["D"], n["R"], n["T"]
    return {
        "query": draw(n["B"], n["N"], D),
        "experts": _experts(n, draw),
        "base_weight": draw(D, D) / math.sqrt(D),
        "base_bias": draw(D),
        "u": draw(D, R) / math.sqrt(D),
        "v": draw(D, R) / math.sqrt(R),
        "scale": draw(T, R),
        "shift": draw(T, D),
    }


def _leave_one_out(n: dict, draw: Draw) -> dict:
    return {
        "experts": _experts(n, draw),
        "weights": draw(n["B"], n["T"], n["N"], n["M"]).softmax(dim=-1),
        "renormalize": False,
    }


def _losses(n: dict, draw: Draw, first: dict, head: dict) -> dict:
    return {
        **first,
        "weights": draw(n["B"], n["N"], n["M"]).softmax(dim=-1),
        **head,
        "head_bias": draw(n["C"]),
        "target": None,
        "loss": _CLASSES,
        "valid": None,
        "ignore_index": 255,
    }


def _counterfactual(n: dict, draw: Draw) -> dict:
    head = {"head_weight": draw(n["C"], n["D"]) / math.sqrt(n["D"])}
    return _losses(n, draw, {"experts": _experts(n, draw)}, head) | {"keep": False}


def _projections(n: dict, draw: Draw) -> dict:
    return _losses(n, draw, {"projections": draw(n["B"], n["M"], n["N"], n["C"])}, {})


def _alignment(n: dict, draw: Draw) -> dict:
    delta = draw(n["B"], n["T"], n["N"], n["M"])
    return {
        "delta": delta,
        "weights": draw(*delta.shape).softmax(dim=-1),
        "tau": 1.0,
        "eps": 1e-6,
        "mask": None,
        "keep": False,
    }


def _adapter(n: dict, draw: Draw) -> dict:
    C, D = n["C"], n["D"]
    return {
        "x": draw(n["B"], n["N"], C),
        "norm_in_weight": draw(C),
        "norm_in_bias": draw(C),
        "linear_weight": draw(D, C) / math.sqrt(C),
        "linear_bias": draw(D),
        "gate_weight": draw(D, C) / math.sqrt(C),
        "gate_bias": draw(D),
        "norm_out_weight": draw(D),
        "norm_out_bias": draw(D),
        "eps": 1e-5,
    }


def _aggregate(n: dict, draw: Draw) -> dict:
    return {
        "experts": _experts(n, draw),
        "confidence": draw(n["B"], n["M"]).sigmoid(),
        "refined_confidence": draw(n["B"], n["M"]).sigmoid(),
        "norm_weight": draw(n["D"]),
        "norm_bias": draw(n["D"]),
        "eps": 1e-5,
    }


_ARGUMENTS: dict[str, Callable[[dict, Draw], dict]] = {
    "route": _route,
    "leave_one_out": _leave_one_out,
    "counterfactual_losses": _counterfactual,
    "counterfactual_losses_from_projections": _projections,
    "causal_target": lambda n, draw: {"delta": draw(n["B"], n["T"], n["N"], n["M"]), "tau": 1.0, "eps": 1e-6},
    "alignment_loss": _alignment,
    "group_attention": lambda n, draw: (
        {x: draw(n["B"], n["G"], n["N"], n["D"]) for x in "qkv"} | {"num_heads": n["heads"]}
    ),
    "group_attention_packed": lambda n, draw: {
        "qkv": draw(n["B"], n["G"], n["N"], 3 * n["D"]),
        "num_heads": n["heads"],
    },
    "adapter": _adapter,
    "competency_aggregate": _aggregate,
}


def arguments(
    op: str,
    sizes: dict[str, int],
    dtype: torch.dtype,
    device: torch.device | str = "meta",
    parameters: torch.dtype | None = None,
    **changes: object,
) -> dict[str, object]:
    """The arguments of a forward operator by name: activations in `dtype`, parameters too or in `parameters`, weights and
    confidences in float32, everything at the scale it has in use. `sizes` and `changes` go before the defaults."""
    n = SIZES.get(op, DEFAULT) | sizes
    generator = None if str(device) == "meta" else torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    found = _ARGUMENTS[op](n, draw) | {key: value for key, value in changes.items() if key != "keep"}
    if "target" in found:
        values = draw(n["B"], n["N"], n["C"]).sigmoid()
        found["target"] = values.argmax(dim=-1) if found["loss"] == _CLASSES else values

    def cast(name: str, value: object) -> object:
        if isinstance(value, list):
            return [cast(name, member) for member in value]
        if not isinstance(value, Tensor) or not value.is_floating_point() or name in _FLOAT32:
            return value
        parameter = name in _PARAMETERS or name.endswith(("_weight", "_bias"))
        return value.to(parameters or dtype) if parameter else value.to(dtype)

    return {name: cast(name, value) for name, value in found.items()}


def _keeps(given: dict[str, object]) -> bool:
    # Whether the autograd.Function asks for what spares the backward work: see tiger_fast/ops/counterfactual.py.
    if "head_weight" not in given:
        return True
    expert, (classes, width) = given["experts"][0], given["head_weight"].shape
    return len(given["experts"]) * classes * 4 <= width * expert.element_size()


def backward_arguments(op: str, given: dict[str, object], outputs: object) -> tuple:
    """The arguments of `{op}_backward`, every floating argument but a target wanted."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    values = dict(zip(OUTPUTS[op], outputs, strict=True))
    for output in ("kept", "slopes"):
        if output in values and not given["keep"]:
            values[output] = None
    schema = getattr(torch.ops.tiger_fast, f"{op}_backward").default._schema
    taken = [argument.name for argument in schema.arguments]
    grads = {"grad": next(iter(values))} | {f"grad_{name}": name for name in values}
    grads = {grad: torch.randn_like(values[name]) for grad, name in grads.items() if grad in taken}
    leaves = [t for name, v in given.items() if name != "target" for t in (v if isinstance(v, list) else [v])]
    wanted = sum(isinstance(t, Tensor) and t.is_floating_point() for t in leaves)
    needs = (1 << wanted) - 1
    if op == "alignment_loss" and given["keep"]:
        needs = 2  # what is kept serves a target that is held fixed
    known = {**values, **grads, **given, "needs": needs}
    if op in ("competency_aggregate", "route"):
        known["weights"] = values["weights"]
    return tuple(known[name] for name in taken)


def calls(
    op: str,
    sizes: dict[str, int],
    dtype: torch.dtype,
    device: torch.device | str = "meta",
    parameters: torch.dtype | None = None,
    namespace: str = "tiger_fast",
    **changes: object,
) -> list[Call]:
    """The calls of an op's forward without gradients and of its forward and backward with all of them."""
    given = arguments(op, sizes, dtype, device, parameters, **changes)
    found = [Call(op, tuple(given.values()))]
    if "keep" in given:
        given["keep"] = changes.get("keep", _keeps(given))
        found.append(Call(op, tuple(given.values())))
    found.append(Call(f"{op}_backward", backward_arguments(op, given, found[-1](namespace))))
    return found
