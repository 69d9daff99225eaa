"""Random calls of every compiled CPU kernel against the reference in float64: shapes, strides, types, arguments and
which gradients are wanted.

The suite runs the same few cases each time. `--fuzz-cases 10000` (`make fuzz`) draws new ones, as many as it says in
all, and prints what fails as a Trial(...); `python tests/test_native_fuzz.py "Trial(...)"` runs that one again. Where a
case ends the process, it stands in .hypothesis/last_trial.
"""

import sys
from dataclasses import dataclass, field
from math import prod

import pytest
import torch
from helpers import CASES, SIZES, call, make, replaced, tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tiger_fast.ops import cpu

if not cpu.LOADED:
    pytest.skip("this installation has no compiled CPU kernels", allow_module_level=True)

from native import FUNCTIONS, NATIVE_CASES, TYPES, check, guarded, random_cotangents

ops = torch.ops.tiger_fast
IN_THE_SUITE = 100  # cases a function: about a second
NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in TYPES}


# --- layouts: the same shape, other strides -------------------------------------------------------------------------


def dense(value: Tensor) -> Tensor:
    return value.contiguous()


def transposed(value: Tensor) -> Tensor:
    return value.mT.contiguous().mT if value.dim() > 1 else value


def reversed_axes(value: Tensor) -> Tensor:
    order = tuple(reversed(range(value.dim())))
    return value.permute(order).contiguous().permute(order)


def outer_swapped(value: Tensor) -> Tensor:
    return value.transpose(0, -2).contiguous().transpose(0, -2) if value.dim() > 2 else value


def in_longer_rows(value: Tensor) -> Tensor:
    if not value.dim():
        return value
    longer = value.new_zeros(*value.shape[:-1], value.shape[-1] + 4)
    longer[..., 3:-1] = value
    return longer[..., 3:-1]


def every_third_row(value: Tensor) -> Tensor:
    if value.dim() < 2:
        return value
    longer = value.new_zeros(*value.shape[:-2], 3 * value.shape[-2], value.shape[-1])
    longer[..., ::3, :] = value
    return longer[..., ::3, :]


def every_second_element(value: Tensor) -> Tensor:
    return torch.stack([value, value], dim=-1)[..., 1]


def one_sample(value: Tensor) -> Tensor:
    return value[:1].expand_as(value) if value.dim() > 1 else value


def one_row(value: Tensor) -> Tensor:
    return value[..., :1, :].expand_as(value) if value.dim() > 1 else value


LAYOUTS = {
    function.__name__: function
    for function in (
        *(dense, transposed, reversed_axes, outer_swapped, in_longer_rows, every_third_row, every_second_element),
        *(one_sample, one_row, guarded),
    )
}


# --- trials ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One call and its gradients. `layouts` are dealt to the tensor arguments in turn, then to the cotangents."""

    case: str
    sizes: dict
    dtype: str
    companions: str
    layouts: tuple = ("dense",)
    absent: tuple = ()  # outputs whose gradient is absent
    unneeded: tuple = ()  # arguments that want no gradient
    keywords: dict = field(default_factory=dict)
    magnitude: float = 1.0
    seed: int = 0

    def run(self) -> None:
        dtype = NAMES[self.dtype]
        arguments = make(self.case, dtype, NAMES[self.companions], self.seed, **self.sizes) | self.keywords
        layouts = [LAYOUTS[name] for name in self.layouts]
        values = {}
        for i, (key, value) in enumerate(tensors(arguments).items()):
            if key.partition("[")[0] in ("query", "experts", "q", "qkv", "x", "delta", "projections"):
                value = value * self.magnitude
            values[key] = layouts[i % len(layouts)](value)
        arguments = replaced(arguments, values)
        cotangents = [layouts[-1](c) for c in random_cotangents(self.case, arguments, self.seed + 1)]
        cotangents = [None if i in self.absent else c for i, c in enumerate(cotangents)]
        needs = [key for key in values if key not in self.unneeded]
        # More than on well-behaved numbers: softmaxes of large ones hang on the last bit of a 16-bit product.
        large = max(1, self.magnitude)
        check(self.case, arguments, cotangents, needs, factor=4 * large, terms=large**3, shake=self.seed)


WIDTHS = st.one_of(st.integers(1, 20), st.sampled_from((24, 31, 32, 33, 48, 63, 64, 65, 96, 100, 127, 128, 200, 257)))


@st.composite
def trials(draw: st.DrawFn, function: str) -> Trial:
    # A norm of one or two channels is constant, and its gradient what rounding leaves of terms that cancel.
    cases = [name for name in NATIVE_CASES if CASES[name].function == function and name != "adapter to width 1"]
    case = draw(st.sampled_from(cases))
    fixed = CASES[case].sizes
    few = st.one_of(st.integers(1, 6), st.sampled_from((7, 8, 9, 16)))
    sizes = {
        "B": draw(st.integers(0, 3)),
        "T": draw(st.one_of(st.integers(1, 4), st.sampled_from((5, 8, 32)))),
        "M": draw(few),
        "G": draw(st.one_of(few, st.just(32))),
        "D": draw(WIDTHS),
        "R": draw(st.one_of(st.integers(1, 9), st.sampled_from((16, 33, 64, 256)))),
        "C": draw(st.one_of(st.integers(1, 12), WIDTHS)),
    }
    if CASES[case].choices.get("loss") == "cosine":
        sizes["C"] += 1  # of one class it is 1 or -1, and its gradient such a rest too
    if function in ("adapter", "competency_aggregate"):
        sizes["D"] += 2
    sizes = {key: value for key, value in sizes.items() if key not in fixed}
    # Few tokens where a token is large, so that a case takes milliseconds.
    numbers = SIZES | fixed | sizes
    token = max(prod(numbers[key] for key in keys) for keys in ("TMD", "GGD", "MCD", "TMR", "TMC"))
    most = max(1, min(70, 60_000 // (token * max(1, numbers["B"]))))
    sizes["N"] = draw(st.integers(0, most))
    keywords = {}
    if "num_heads" in CASES[case].keywords:
        width = (fixed | sizes)["D"]
        keywords["num_heads"] = draw(st.sampled_from([heads for heads in range(1, width + 1) if width % heads == 0]))
    if function in ("alignment_loss", "causal_target"):
        keywords["tau"] = draw(st.sampled_from((0.5, 1.0, 3.0)))
        keywords["eps"] = draw(st.sampled_from((1e-6, 1e-3, 0.5)))
    if function in ("adapter", "competency_aggregate"):
        keywords["eps"] = draw(st.sampled_from((1e-5, 1e-2)))
    if CASES[case].choices.get("loss") == "cross_entropy":
        keywords["ignore_index"] = draw(st.sampled_from((255, 0, 1, -100)))
    dtype = draw(st.sampled_from(list(NAMES)))
    example = make(case, **(sizes | {"B": 1, "N": 1})) | keywords
    outputs = len(call(case, example, backend="reference"))
    keys = [key for key, value in tensors(example).items() if value.is_floating_point()]
    return Trial(
        case,
        sizes,
        dtype,
        companions=draw(st.sampled_from((dtype, "float64" if dtype == "float64" else "float32"))),
        layouts=tuple(draw(st.lists(st.sampled_from(list(LAYOUTS)), min_size=1, max_size=len(keys) + 1))),
        absent=tuple(sorted(draw(st.sets(st.integers(0, outputs - 1), max_size=outputs - 1)))),
        unneeded=tuple(draw(st.lists(st.sampled_from(keys), unique=True, max_size=len(keys)))),
        keywords=keywords,
        magnitude=draw(st.sampled_from((1.0, 1.0, 0.1, 4.0))),
        seed=draw(st.integers(0, 2**16)),
    )


@pytest.fixture(autouse=True, scope="module")
def poison():
    """What a kernel leaves unwritten is NaN."""
    ops.cpu_set_poison(True)
    yield
    ops.cpu_set_poison(False)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_random_calls_agree_with_the_reference(function, pytestconfig):
    asked = pytestconfig.getoption("--fuzz-cases")
    count = IN_THE_SUITE if asked is None else -(-asked // len(FUNCTIONS))

    @settings(
        max_examples=count,
        derandomize=asked is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(trial=trials(function))
    def run(trial: Trial) -> None:
        last.write_text(repr(trial))
        trial.run()

    last = pytestconfig.rootpath / ".hypothesis" / "last_trial"
    last.parent.mkdir(exist_ok=True)
    run()


if __name__ == "__main__":
    ops.cpu_set_poison(True)
    eval(sys.argv[1], {"Trial": Trial}).run()
