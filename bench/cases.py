"""What is measured: every function of the contract at a given size, its cost by formula, and who else computes it.

Costs count what any implementation has to do: bytes that must be read or written once if everything else stayed in
registers, and operations (a multiply-add is two) after the kernels' algebra. Real kernels do more.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tiger_fast import available_backends, functional
from tiger_fast._examples import Sizes, arguments, with_gradients
from tiger_fast.ops import backends
from tiger_fast.reference import TOKEN_LOSSES

FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)
OPS = backends.OPS
ITEM = 4  # bytes of a float32

# The shapes that CPU figures are stated for, where they differ from the defaults above.
STATED_SIZES = {
    "alignment_loss": Sizes(B=8),
    "causal_target": Sizes(B=8),
    "adapter": Sizes(C=768),
}
# Its ratios: (op, direction) -> (against eager, against torch.compile). Group attention's "eager" is the better of SDPA
# and einsum.
TARGETS = {
    ("route", FORWARD): (4.5, 2.4),
    ("route", BOTH): (3.5, 2.2),
    ("leave_one_out", FORWARD): (11.0, 6.5),
    ("counterfactual_losses", FORWARD): (7.0, 1.7),
    ("group_attention", FORWARD): (10.0, 6.5),
    ("group_attention", BOTH): (8.0, 5.0),
    ("alignment_loss", BOTH): (10.0, 3.0),
    ("competency_aggregate", FORWARD): (4.0, 1.6),
}

# Relative to the largest value of each result, float32: sums of up to 65,536 tokens in another order (gradients of
# parameters) differ by a few 1e-5 between two correct implementations; a wrong term is 1e-2 and more.
TOLERANCE = 2e-4


@dataclass(frozen=True)
class Cost:
    """Bytes, operations, and the matrix products (rows, inner, columns) that are left to torch's library."""

    bytes: int
    operations: int
    products: tuple[tuple[int, int, int], ...] = ()

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.operations + other.operations, (*self.products, *other.products))


class Case:
    """One call of one function: arguments, cotangents for its outputs, cost (which is that of float32).

    Args:
        op: a name among `OPS`.
        sizes: None: those of STATED_SIZES.
        dtype: of activations and parameters.
        device: where they are.
        keywords: keyword arguments that are not tensors (the loss's name, renormalize).
    """

    def __init__(
        self,
        op: str,
        sizes: Sizes | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        **keywords: Any,
    ) -> None:
        self.op, self.sizes, self.device = op, sizes or STATED_SIZES.get(op, Sizes()), device
        self.arguments, self.keywords = arguments(op, self.sizes, dtype, device, **keywords)
        self._leaves: dict[str, Any] | None = None
        self._cotangents: list[Tensor] | None = None

    def cost(self, direction: str) -> Cost:
        """What the direction has to move and to compute at least."""
        forward, backward = _COSTS[self.op](self.sizes)
        return forward if direction == FORWARD else forward + backward

    def function(self, backend: str) -> Callable[..., Any]:
        """The public function on a backend, with the case's keywords; takes the tensors by name."""
        op, keywords = getattr(functional, self.op), self.keywords

        def call(**arguments: Any) -> Any:
            return op(**arguments, **keywords, backend=backend)

        return call

    def call(self, function: Callable[..., Any], direction: str) -> Callable[[], Any]:
        """A call of `function` without arguments: forward under no_grad, or forward and all gradients, fresh ones."""
        if direction == FORWARD:
            return lambda: _without_gradient(function, self.arguments)
        if self._leaves is None:
            self._leaves = with_gradients(self.op, self.arguments, self.keywords)
        leaves = self._leaves
        wanted = [t for t in tensors(leaves) if t.requires_grad]

        def both() -> tuple[list[Tensor], tuple[Tensor, ...]]:
            outputs = tensors(function(**leaves))
            return outputs, torch.autograd.grad(outputs, wanted, self._cotangents_for(outputs))

        return both

    def _cotangents_for(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        if self._cotangents is None:
            draw = torch.Generator(self.device).manual_seed(1)
            self._cotangents = [torch.randn(t.shape, generator=draw, device=self.device).to(t.dtype) for t in outputs]
        return self._cotangents

    def tensor_bytes(self, direction: str) -> tuple[int, int]:
        """(bytes of the arguments, bytes of what a call returns), cotangents and gradients included."""
        returned = size(self.call(self.function("reference"), direction)())
        return size(self.arguments) + (size(self._cotangents or []) if direction == BOTH else 0), returned


def footprint(op: str, sizes: Sizes, direction: str, **keywords: Any) -> int:
    """Bytes of all arguments and results of a case, without making it."""
    with FakeTensorMode():
        return sum(Case(op, sizes, **keywords).tensor_bytes(direction))


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested dicts, lists and tuples, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [t for part in parts for t in tensors(part)]


def native_ops(backend: str = "cpu") -> tuple[str, ...]:
    """The ops that the backend fuses here; none where this installation does not have it."""
    return tuple(op for op in OPS if backend in available_backends() and op in backends._NATIVE[backend])


def ours(op: str) -> str:
    """The backend whose numbers are "ours": "cpu" where the op is native there, else "reference" (against itself)."""
    return "cpu" if op in native_ops() else "reference"


def _without_gradient(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    with torch.no_grad():
        return function(**arguments)


def size(values: Any) -> int:
    """Bytes of all tensors in a nested value."""
    return sum(t.numel() * t.element_size() for t in tensors(values))


# -- peers -------------------------------------------------------------------------------------------------------------


def peers(case: Case, compiled: bool) -> dict[str, Callable[..., Any]]:
    """Who computes the same: name -> function of the tensors by name. "eager" is the reference backend.

    Compiled peers share torch.compile's caches: call `torch.compiler.reset()` between cases.
    """
    functions = {"eager": case.function("reference")}
    if case.op == "route":
        functions["algebra"] = route_algebra
    if case.op in ("group_attention", "group_attention_packed"):
        heads = case.sizes.heads
        functions["sdpa"] = lambda q=None, k=None, v=None, qkv=None: sdpa(*_thirds(q, k, v, qkv), heads)
    if compiled:
        functions["compile"] = torch.compile(functions["eager"], fullgraph=True)
        if case.op == "route":
            functions["algebra compile"] = torch.compile(route_algebra, fullgraph=True)
    return functions


def route_algebra(
    query: Tensor,
    experts: list[Tensor],
    base_weight: Tensor,
    base_bias: Tensor,
    u: Tensor,
    v: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> functional.Routed:
    """`route` by the kernels' algebra in plain PyTorch, scale and shift shared: no per-task query of width D."""
    features = torch.stack(experts, dim=1)  # (B, M, N, D)
    base, z = query @ base_weight, query @ u
    projected = features @ torch.cat((v, (base_bias + shift).T), dim=1)  # (B, M, N, R + T)
    low, constant = projected.split((v.shape[1], shift.shape[0]), dim=-1)
    own = (base[:, None] * features).sum(dim=-1, keepdim=True)  # (B, M, N, 1)
    logits = (own + (z[:, None] * low) @ scale.T + constant) / math.sqrt(query.shape[-1])  # (B, M, N, T)
    weights = logits.permute(0, 3, 2, 1).softmax(dim=-1).contiguous()
    return functional.Routed(torch.einsum("btnm,bmnd->btnd", weights, features).contiguous(), weights)


def sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """`group_attention` by torch's scaled_dot_product_attention, tokens and heads as its heads (a view, no copy)."""
    batch, members, tokens, width = q.shape

    def split(t: Tensor) -> Tensor:
        return t.view(batch, members, tokens * heads, width // heads).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(split(q), split(k), split(v))  # (B, N heads, G, D / heads)
    return mixed.transpose(1, 2).reshape(batch, members, tokens, width).contiguous()


def _thirds(q: Tensor | None, k: Tensor | None, v: Tensor | None, qkv: Tensor | None) -> Sequence[Tensor]:
    return (q, k, v) if qkv is None else [t.contiguous() for t in qkv.chunk(3, dim=-1)]


# -- costs: (forward, backward) ----------------------------------------------------------------------------------------


def _cost_route(n: Sizes) -> tuple[Cost, Cost]:
    rows, tokens = n.B * n.N, n.B * n.N * n.D
    small = ITEM * rows * n.T * n.M  # the weights
    query, low = (rows, n.D, n.D + n.R), (rows * n.M, n.D, n.R + n.T)
    parameters = ITEM * (n.D * (n.D + 2 * n.R) + n.T * (n.D + n.R))
    forward = Cost(
        ITEM * tokens * (1 + n.M + n.T) + small + parameters,
        _products(query, low) + 2 * tokens * n.M * (1 + n.T) + 6 * rows * n.T * n.M * n.R,
        (query, low),
    )
    # dq, d[W0 | U], d[V | c], and V S_k; the rest of dF_k and dalpha are per-token sums.
    products = ((rows, n.D + n.R, n.D), (n.D, rows, n.D + n.R), (n.D, rows * n.M, n.R + n.T), (rows * n.M, n.R, n.D))
    backward = Cost(
        ITEM * tokens * (2 + 2 * n.M + n.T) + 2 * small + 2 * parameters,
        _products(*products) + 2 * tokens * n.M * (3 * n.T + 2) + 8 * rows * n.T * n.M * n.R,
        products,
    )
    return forward, backward


def _cost_leave_one_out(n: Sizes) -> tuple[Cost, Cost]:
    tokens, small = n.B * n.N * n.D, ITEM * n.B * n.T * n.N * n.M
    pairs = n.M * (n.M - 1)  # summed over the others, not subtracted
    return (
        Cost(ITEM * tokens * (n.M + n.T * n.M) + small, 2 * tokens * n.T * pairs),
        Cost(ITEM * tokens * (2 * n.M + n.T * n.M) + 2 * small, 4 * tokens * n.T * pairs),
    )


def _cost_counterfactual(n: Sizes) -> tuple[Cost, Cost]:
    tokens, rows = n.B * n.N * n.D, n.B * n.N
    product, head = (rows * n.M, n.D, n.C), ITEM * n.C * n.D
    losses_forward, losses_backward = _cost_token_losses(n)
    gradients = ((rows * n.M, n.C, n.D), (n.C, rows * n.M, n.D))
    return (
        Cost(ITEM * tokens * n.M + head, _products(product) + losses_forward, (product,)),
        Cost(ITEM * tokens * 2 * n.M + 2 * head, _products(*gradients) + losses_backward, gradients),
    )


def _cost_projections(n: Sizes) -> tuple[Cost, Cost]:
    values = ITEM * n.B * n.M * n.N * n.C
    forward, backward = _cost_token_losses(n)
    return Cost(values, forward), Cost(2 * values, backward)


def _cost_token_losses(n: Sizes) -> tuple[int, int]:
    # M + 1 logit vectors of width C a token, from M weighted projections: M + M (M - 1) multiply-adds a class, and
    # about 4 operations a logit for the loss (an exponential counts as one); the backward has twice that.
    each = n.B * n.N * n.C * (2 * n.M * n.M + 4 * (n.M + 1))
    return each, 2 * each


def _cost_causal_target(n: Sizes) -> tuple[Cost, Cost]:
    values = n.B * n.T * n.N * n.M
    return Cost(2 * ITEM * values, 8 * values), Cost(3 * ITEM * values, 12 * values)


def _cost_alignment(n: Sizes) -> tuple[Cost, Cost]:
    values = n.B * n.T * n.N * n.M  # the target is detached: only the weights have a gradient
    return Cost(2 * ITEM * values, 18 * values), Cost(3 * ITEM * values, 14 * values)


def _cost_group_attention(n: Sizes) -> tuple[Cost, Cost]:
    tokens = n.B * n.N * n.D
    return (
        Cost(ITEM * tokens * 4 * n.G, 4 * tokens * n.G * n.G),
        Cost(ITEM * tokens * 7 * n.G, 10 * tokens * n.G * n.G),  # scores again, and four products
    )


def _cost_adapter(n: Sizes) -> tuple[Cost, Cost]:
    rows = n.B * n.N
    product, weights = (rows, n.C, 2 * n.D), ITEM * 2 * n.C * n.D
    gradients = ((rows, 2 * n.D, n.C), (2 * n.D, rows, n.C))
    return (
        Cost(ITEM * rows * (n.C + n.D) + weights, _products(product) + rows * (8 * n.C + 12 * n.D), (product,)),
        Cost(
            ITEM * rows * (2 * n.C + n.D) + 2 * weights,
            _products(*gradients) + rows * (14 * n.C + 24 * n.D),
            gradients,
        ),
    )


def _cost_aggregate(n: Sizes) -> tuple[Cost, Cost]:
    tokens = n.B * n.N * n.D
    return (
        Cost(ITEM * tokens * (n.M + 1), tokens * (2 * n.M + 8)),
        Cost(ITEM * tokens * (2 * n.M + 1), tokens * (5 * n.M + 14)),
    )


def _cost_pairs(inputs: int) -> Callable[[Sizes], tuple[Cost, Cost]]:
    def cost(n: Sizes) -> tuple[Cost, Cost]:
        values = inputs * n.B * n.M
        return Cost(ITEM * values, 4 * values), Cost(2 * ITEM * values, 4 * values)

    return cost


def _products(*sizes: tuple[int, int, int]) -> int:
    return sum(2 * rows * inner * columns for rows, inner, columns in sizes)


_COSTS: dict[str, Callable[[Sizes], tuple[Cost, Cost]]] = {
    "route": _cost_route,
    "leave_one_out": _cost_leave_one_out,
    "counterfactual_losses": _cost_counterfactual,
    "counterfactual_losses_from_projections": _cost_projections,
    "causal_target": _cost_causal_target,
    "alignment_loss": _cost_alignment,
    "group_attention": _cost_group_attention,
    "group_attention_packed": _cost_group_attention,
    "adapter": _cost_adapter,
    "competency_aggregate": _cost_aggregate,
    "confidence_loss": _cost_pairs(4),
    "improvement_loss": _cost_pairs(2),
}

LOSSES = tuple(TOKEN_LOSSES)
