"""What is measured of the ops: every function of the contract at a given size, and its cost by formula.

Costs count what any implementation has to do: bytes that must be read or written once if everything else stayed in
registers, and operations (a multiply-add is two) of the algebra with the fewest that is known. Real kernels do more.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map

from tiger_fast import functional
from tiger_fast._examples import Sizes, arguments, with_gradients
from tiger_fast.ops import backends
from tiger_fast.reference import TOKEN_LOSSES

FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)
OPS = backends.OPS
LOSSES = tuple(TOKEN_LOSSES)
SMALL = 4  # bytes of a routing weight, a difference, a confidence: float32 beside any type of activations

# Of ours and of each peer against the reference, relative to the largest value of each result. float32: sums of up to 65,536
# tokens in another order (gradients of parameters) differ by a few 1e-5 between two correct implementations, and by some 1e-4
# where a GPU's products round otherwise; a wrong term is 1e-2 and more. 16 bits, against the reference in float32 on the same
# values: a few units in the last place of the result.
TOLERANCE = 2e-4
TOLERANCES = {
    ("cpu", "float32"): TOLERANCE,
    ("cuda", "float32"): 1e-3,
    ("cpu", "bfloat16"): 6e-2,
    ("cuda", "bfloat16"): 6e-2,
    ("cpu", "float16"): 1e-2,
    ("cuda", "float16"): 1e-2,
}


@dataclass(frozen=True)
class Cost:
    """Bytes, operations, and the matrix products (rows, inner, columns) that are left to torch's library."""

    bytes: int
    operations: int
    products: tuple[tuple[int, int, int], ...] = ()

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.operations + other.operations, (*self.products, *other.products))


class Case:
    """One call of one function: arguments, cotangents for its outputs, cost.

    Args:
        op: a name among `OPS`.
        sizes: see `Sizes`.
        dtype: of activations and parameters.
        device: where they are.
        keywords: keyword arguments that are not tensors (the loss's name, renormalize).
    """

    def __init__(
        self,
        op: str,
        sizes: Sizes,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        **keywords: Any,
    ) -> None:
        self.op, self.sizes, self.dtype, self.device = op, sizes, dtype, device
        self.arguments, self.keywords = arguments(op, self.sizes, dtype, device, **keywords)
        self._leaves: dict[str, Any] | None = None
        self._cotangents: list[Tensor] | None = None

    def cost(self, direction: str) -> Cost:
        """What the direction has to move and to compute at least."""
        forward, backward = _COSTS[self.op](self.sizes, self.dtype.itemsize)
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
            drawn = [torch.randn(t.shape, generator=draw, device=self.device).to(self.dtype) for t in outputs]
            self._cotangents = [value.to(t.dtype) for value, t in zip(drawn, outputs)]
        return self._cotangents

    def exact(self, direction: str) -> Callable[[], Any]:
        """A call of the reference on the same values in float32: what 16-bit results are compared with. Sums over tokens that
        the reference makes in 16 bits (gradients of a norm's parameters on CPUs) are further from it than others' results."""

        def call() -> Any:
            twin = copy(self)
            twin.arguments = tree_map(lambda t: t.float() if t.is_floating_point() else t, self.arguments)
            twin._leaves = twin._cotangents = None
            return twin.call(twin.function("reference"), direction)()

        return call

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


def _without_gradient(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    with torch.no_grad():
        return function(**arguments)


def size(values: Any) -> int:
    """Bytes of all tensors in a nested value."""
    return sum(t.numel() * t.element_size() for t in tensors(values))


# -- costs: (forward, backward) ----------------------------------------------------------------------------------------


def _cost_route(n: Sizes, item: int) -> tuple[Cost, Cost]:
    rows, tokens = n.B * n.N, n.B * n.N * n.D
    small = SMALL * rows * n.T * n.M  # the weights
    query, low = (rows, n.D, n.D + n.R), (rows * n.M, n.D, n.R + n.T)
    parameters = item * (n.D * (n.D + 2 * n.R) + n.T * (n.D + n.R))
    forward = Cost(
        item * tokens * (1 + n.M + n.T) + small + parameters,
        _products(query, low) + 2 * tokens * n.M * (1 + n.T) + 6 * rows * n.T * n.M * n.R,
        (query, low),
    )
    # dq, d[W0 | U], d[V | c], and V S_k; the rest of dF_k and dalpha are per-token sums.
    products = ((rows, n.D + n.R, n.D), (n.D, rows, n.D + n.R), (n.D, rows * n.M, n.R + n.T), (rows * n.M, n.R, n.D))
    backward = Cost(
        item * tokens * (2 + 2 * n.M + n.T) + 2 * small + 2 * parameters,
        _products(*products) + 2 * tokens * n.M * (3 * n.T + 2) + 8 * rows * n.T * n.M * n.R,
        products,
    )
    return forward, backward


def _cost_leave_one_out(n: Sizes, item: int) -> tuple[Cost, Cost]:
    tokens, small = n.B * n.N * n.D, SMALL * n.B * n.T * n.N * n.M
    sums, each = _sums_of_others(n.M), n.M if n.M > 1 else 0
    return (
        Cost(item * tokens * (n.M + n.T * n.M) + small, tokens * n.T * (each + sums)),
        # The gradients of the others' sums, times the weight, and with the expert into the weight's gradient.
        Cost(item * tokens * (2 * n.M + n.T * n.M) + 2 * small, tokens * n.T * (4 * each + sums)),
    )


def _sums_of_others(m: int) -> int:
    # Additions for the m sums over all but one of m values: from the sums before and after each, or by subtraction from the
    # whole sum, whichever takes fewer. That a kernel adds up m - 1 others for each, which loses no digits, is its own affair.
    return max(0, min(3 * m - 6, 2 * m - 1))


def _cost_counterfactual(n: Sizes, item: int) -> tuple[Cost, Cost]:
    tokens, rows = n.B * n.N * n.D, n.B * n.N
    product, head = (rows * n.M, n.D, n.C), item * n.C * n.D
    losses_forward, losses_backward = _cost_token_losses(n)
    gradients = ((rows * n.M, n.C, n.D), (n.C, rows * n.M, n.D))
    return (
        Cost(item * tokens * n.M + head, _products(product) + losses_forward, (product,)),
        Cost(item * tokens * 2 * n.M + 2 * head, _products(*gradients) + losses_backward, gradients),
    )


def _cost_projections(n: Sizes, item: int) -> tuple[Cost, Cost]:
    values = item * n.B * n.M * n.N * n.C
    forward, backward = _cost_token_losses(n)
    return Cost(values, forward), Cost(2 * values, backward)


def _cost_token_losses(n: Sizes) -> tuple[int, int]:
    # M + 1 logit vectors of width C a token, from M weighted projections: M products, the full sum from one of the sums of
    # others, and about 4 operations a logit for the loss (an exponential counts as one); the backward has twice that.
    each = n.B * n.N * n.C * (n.M + _sums_of_others(n.M) + 1 + 4 * (n.M + 1))
    return each, 2 * each


def _cost_causal_target(n: Sizes, item: int) -> tuple[Cost, Cost]:
    values = n.B * n.T * n.N * n.M
    return Cost(2 * SMALL * values, 8 * values), Cost(3 * SMALL * values, 12 * values)


def _cost_alignment(n: Sizes, item: int) -> tuple[Cost, Cost]:
    values = n.B * n.T * n.N * n.M  # the target is detached: only the weights have a gradient
    return Cost(2 * SMALL * values, 18 * values), Cost(3 * SMALL * values, 14 * values)


def _cost_group_attention(n: Sizes, item: int) -> tuple[Cost, Cost]:
    tokens = n.B * n.N * n.D
    return (
        Cost(item * tokens * 4 * n.G, 4 * tokens * n.G * n.G),
        Cost(item * tokens * 7 * n.G, 10 * tokens * n.G * n.G),  # scores again, and four products
    )


def _cost_adapter(n: Sizes, item: int) -> tuple[Cost, Cost]:
    rows = n.B * n.N
    product, weights = (rows, n.C, 2 * n.D), item * 2 * n.C * n.D
    gradients = ((rows, 2 * n.D, n.C), (2 * n.D, rows, n.C))
    return (
        Cost(item * rows * (n.C + n.D) + weights, _products(product) + rows * (8 * n.C + 12 * n.D), (product,)),
        Cost(
            item * rows * (2 * n.C + n.D) + 2 * weights,
            _products(*gradients) + rows * (14 * n.C + 24 * n.D),
            gradients,
        ),
    )


def _cost_aggregate(n: Sizes, item: int) -> tuple[Cost, Cost]:
    tokens = n.B * n.N * n.D
    return (
        Cost(item * tokens * (n.M + 1), tokens * (2 * n.M + 8)),
        Cost(item * tokens * (2 * n.M + 1), tokens * (5 * n.M + 14)),
    )


def _cost_pairs(inputs: int) -> Callable[[Sizes, int], tuple[Cost, Cost]]:
    def cost(n: Sizes, item: int) -> tuple[Cost, Cost]:
        values = inputs * n.B * n.M
        return Cost(SMALL * values, 4 * values), Cost(2 * SMALL * values, 4 * values)

    return cost


def _products(*sizes: tuple[int, int, int]) -> int:
    return sum(2 * rows * inner * columns for rows, inner, columns in sizes)


_COSTS: dict[str, Callable[[Sizes, int], tuple[Cost, Cost]]] = {
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
