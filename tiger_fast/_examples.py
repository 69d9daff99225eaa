"""Arguments for every function of the contract at given sizes, and the calls of operators that the function makes of them:
what benchmarks time, the autotune tunes and the static report compiles."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from tiger_fast import functional
from tiger_fast.ops import triton
from tiger_fast.ops.library import NAMESPACE


@dataclass(frozen=True)
class Sizes:
    """B batch, N tokens, D width, M experts, T tasks, R rank, C classes or input channels, G members of a group."""

    B: int = 4
    N: int = 1024
    D: int = 768
    M: int = 4
    T: int = 5
    R: int = 32
    C: int = 40
    G: int = 4
    heads: int = 12

    def __str__(self) -> str:
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))


def gpu_sizes(op: str, **changes: int) -> Sizes:
    """The sizes that figures for GPUs are stated for, with changes."""
    return replace(Sizes(B=32, C=768) if op == "adapter" else Sizes(B=32), **changes)


# Probabilities and sums, which are float32 beside any activation type.
_IN_FLOAT32 = ("weights", "delta", "confidence", "refined_confidence", "task_loss", "refined_task_loss")
_PARAMETERS = ("u", "v", "scale", "shift")  # beside those that are called weights and biases


def arguments(
    op: str,
    sizes: Sizes,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    parameters: torch.dtype | None = None,
    **keywords: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of a function by name, drawn at the scale they have in use, and its other arguments.

    Args:
        op: the function's name.
        sizes: see `Sizes`.
        dtype: of activations, and of parameters (and not of routing weights, losses and confidences: float32).
        device: where they are made.
        parameters: another type for these.
        keywords: other arguments than tensors (the loss's name, renormalize), where they are not the usual ones.
    """
    meta = torch.device(device).type == "meta"
    generator = None if meta else torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    def placed(name: str, value: Tensor) -> Tensor:
        if name in _IN_FLOAT32 or not value.is_floating_point():
            return value
        parameter = name in _PARAMETERS or name.endswith(("_weight", "_bias"))
        return value.to((parameters or dtype) if parameter else dtype)

    others = _keywords(op, sizes) | keywords
    drawn = _BUILDERS[op](sizes, normal, others)
    return {name: tree_map(partial(placed, name), value) for name, value in drawn.items()}, others


def with_gradients(op: str, tensors: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """The same tensors as leaves that want gradients, except a target, and differences that are held fixed."""
    held = {"target", "delta"} if op == "alignment_loss" and others.get("detach_target", True) else {"target"}

    def leaf(value: Tensor) -> Tensor:
        return value.detach().requires_grad_() if value.is_floating_point() else value

    return {name: value if name in held else tree_map(leaf, value) for name, value in tensors.items()}


# --- calls of operators ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """An operator's name and its arguments, in order."""

    name: str
    arguments: tuple

    def __call__(self, namespace: str = NAMESPACE) -> Any:
        return getattr(getattr(torch.ops, namespace), self.name)(*self.arguments)


class Recorder(TorchDispatchMode):
    """Every operator that is called within, in order: (operator, arguments, result)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        result = operator(*arguments, **(keywords or {}))
        self.calls.append((operator, arguments, result))
        return result

    def native(self) -> list[tuple]:
        """The calls of this library's operators."""
        return [entry for entry in self.calls if entry[0].namespace.startswith("tiger_fast")]


def calls_of(op: str, tensors: Mapping[str, Any], others: Mapping[str, Any], namespace: str = NAMESPACE) -> list[Call]:
    """The calls of operators that a function's compiled form makes without gradients and, forward and backward, with all
    of them; one forward where the two are the same."""
    bound = inspect.signature(getattr(functional, op)).bind(**tensors, **others)
    bound.apply_defaults()
    others = {name: value for name, value in bound.arguments.items() if name not in {"backend", *tensors}}
    order = [name for name in bound.arguments if name != "backend"]

    def call(given: Mapping[str, Any]) -> list[Tensor]:
        return tree_leaves(triton.NATIVE[op](*((given | others)[name] for name in order), namespace=namespace))

    def both() -> None:
        given = with_gradients(op, tensors, others)
        wanted = [t for t in tree_leaves(given) if isinstance(t, Tensor) and t.requires_grad]
        outputs = call(given)
        torch.autograd.grad(outputs, wanted, [torch.randn_like(t) for t in outputs])

    with torch.no_grad():
        (alone,) = _made_by(lambda: call(tensors))
    forward, backward = _made_by(both)
    return [forward, backward] if _plain(alone) == _plain(forward) else [alone, forward, backward]


def calls(
    op: str,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device | str = "meta",
    parameters: torch.dtype | None = None,
    namespace: str = NAMESPACE,
    **keywords: Any,
) -> list[Call]:
    """`calls_of` the `arguments` of a function."""
    return calls_of(op, *arguments(op, sizes, dtype, device, parameters, **keywords), namespace)


def _made_by(function: Callable[[], Any]) -> list[Call]:
    # The results go with the recorder: no more is held than the calls need.
    with Recorder() as recorder:
        function()
    return [
        Call(operator._opname, tree_map_only(Tensor, torch.detach, given)) for operator, given, _ in recorder.native()
    ]


def _plain(call: Call) -> tuple:
    return tuple(value for value in call.arguments if isinstance(value, (bool, int, float)))


# --- tensors --------------------------------------------------------------------------------------------------------

Draw = Callable[..., Tensor]


def _keywords(op: str, n: Sizes) -> dict[str, Any]:
    if op.startswith("counterfactual"):
        return {"loss": "cross_entropy"}
    return {"num_heads": n.heads} if op.startswith("group_attention") else {}


def _experts(n: Sizes, normal: Draw) -> list[Tensor]:
    return [normal(n.B, n.N, n.D) for _ in range(n.M)]


def _route(n: Sizes, normal: Draw, keywords: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "query": normal(n.B, n.N, n.D),
        "experts": _experts(n, normal),
        "base_weight": normal(n.D, n.D) / n.D**0.5,
        "base_bias": normal(n.D),
        "u": normal(n.D, n.R) / n.D**0.5,
        "v": normal(n.D, n.R) / n.R**0.5,
        "scale": normal(n.T, n.R),
        "shift": normal(n.T, n.D),
    }


def _leave_one_out(n: Sizes, normal: Draw, keywords: Mapping[str, Any]) -> dict[str, Any]:
    return {"experts": _experts(n, normal), "weights": normal(n.B, n.T, n.N, n.M).softmax(dim=-1)}


def _losses(n: Sizes, normal: Draw, keywords: Mapping[str, Any]) -> dict[str, Any]:
    weights = normal(n.B, n.N, n.M).softmax(dim=-1)
    if keywords["loss"] == "cross_entropy":
        target = (1000 * normal(n.B, n.N)).long() % n.C
    else:
        target = normal(n.B, n.N, n.C).sigmoid()
        # Away from the logits: where both tie but for rounding, the sign of l1's slope is chance.
        target = target + 20 if keywords["loss"] == "l1" else target
    return {"weights": weights, "head_bias": normal(n.C), "target": target}


def _counterfactual(n: Sizes, normal: Draw, keywords: Mapping[str, Any]) -> dict[str, Any]:
    head = normal(n.C, n.D) / n.D**0.5
    return {"experts": _experts(n, normal), "head_weight": head, **_losses(n, normal, keywords)}


def _projections(n: Sizes, normal: Draw, keywords: Mapping[str, Any]) -> dict[str, Any]:
    return {"projections": normal(n.B, n.M, n.N, n.C), **_losses(n, normal, keywords)}


def _alignment(n: Sizes, normal: Draw, keywords: Mapping[str, Any]) -> dict[str, Any]:
    shape = (n.B, n.T, n.N, n.M)
    return {"delta": normal(*shape), "weights": normal(*shape).softmax(dim=-1)}


def _adapter(n: Sizes, normal: Draw, keywords: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "x": normal(n.B, n.N, n.C),
        "norm_in_weight": normal(n.C),
        "norm_in_bias": normal(n.C),
        "linear_weight": normal(n.D, n.C) / n.C**0.5,
        "linear_bias": normal(n.D),
        "gate_weight": normal(n.D, n.C) / n.C**0.5,
        "gate_bias": normal(n.D),
        "norm_out_weight": normal(n.D),
        "norm_out_bias": normal(n.D),
    }


def _aggregate(n: Sizes, normal: Draw, keywords: Mapping[str, Any]) -> dict[str, Any]:
    confidences = {name: normal(n.B, n.M).sigmoid() for name in ("confidence", "refined_confidence")}
    return {"experts": _experts(n, normal), **confidences, "norm_weight": normal(n.D), "norm_bias": normal(n.D)}


def _confidence(n: Sizes, normal: Draw, keywords: Mapping[str, Any]) -> dict[str, Any]:
    names = ("confidence", "task_loss", "refined_confidence", "refined_task_loss")
    return {name: normal(n.B, n.M).sigmoid() for name in names}


def _improvement(n: Sizes, normal: Draw, keywords: Mapping[str, Any]) -> dict[str, Any]:
    return {name: normal(n.B, n.M).sigmoid() for name in ("confidence", "refined_confidence")}


_BUILDERS: dict[str, Callable[[Sizes, Draw, Mapping[str, Any]], dict[str, Any]]] = {
    "route": _route,
    "leave_one_out": _leave_one_out,
    "counterfactual_losses": _counterfactual,
    "counterfactual_losses_from_projections": _projections,
    "causal_target": lambda n, normal, keywords: {"delta": normal(n.B, n.T, n.N, n.M)},
    "alignment_loss": _alignment,
    "group_attention": lambda n, normal, keywords: {name: normal(n.B, n.G, n.N, n.D) for name in "qkv"},
    "group_attention_packed": lambda n, normal, keywords: {"qkv": normal(n.B, n.G, n.N, 3 * n.D)},
    "adapter": _adapter,
    "competency_aggregate": _aggregate,
    "confidence_loss": _confidence,
    "improvement_loss": _improvement,
}
