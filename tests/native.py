"""What the tests of the native backends share: which cases the CPU's kernels run, a comparison with the reference that knows
what a type can hold, a record of operator calls, and memory that shows an access too far."""

import ctypes
import math
import mmap
from collections.abc import Callable, Iterable, Sequence

import torch
from helpers import CASES, PLAIN, call, replaced, tensors, transform
from torch import Tensor

from tiger_fast._examples import Recorder
from tiger_fast.ops import cpu

FUNCTIONS = tuple(cpu.NATIVE) if cpu.LOADED else ()
NATIVE_CASES = [name for name, case in CASES.items() if case.function in FUNCTIONS]
NATIVE_PLAIN = [PLAIN[function] for function in FUNCTIONS]

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SPACING = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


# --- comparison -----------------------------------------------------------------------------------------------------


def run(
    name: str,
    arguments: dict,
    cotangents: Sequence[Tensor | None],
    backend: str = "cpu",
    needs: Iterable[str] | None = None,
) -> tuple[tuple[Tensor, ...], dict[str, Tensor | None]]:
    """The outputs of a case, and the gradients with respect to `needs` (None: every floating tensor).

    A cotangent None stands for an output whose gradient is absent."""
    floating = {key: t for key, t in tensors(arguments).items() if t.is_floating_point()}
    wanted = {key: t.detach().requires_grad_() for key, t in floating.items() if needs is None or key in needs}
    outputs = call(name, replaced(arguments, wanted), backend=backend)
    given = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if c is not None and o.requires_grad]
    found = [None] * len(wanted)
    if given:
        found = torch.autograd.grad(
            [o for o, _ in given], list(wanted.values()), [c for _, c in given], allow_unused=True
        )
    return tuple(o.detach() for o in outputs), dict(zip(wanted, found, strict=True))


def random_cotangents(name: str, arguments: dict, seed: int = 1) -> list[Tensor]:
    """One for each output, in its type: random, but for a mean's, which is the number of rows, so that its gradients are
    of magnitude 1 like any other and errors in them stand out."""
    outputs = call(name, transform(lambda t: t.to("meta"), arguments))  # for their shapes and types nothing is computed
    generator = torch.Generator().manual_seed(seed)
    given = tensors(arguments).values()
    rows = max(t.numel() // max(1, t.shape[-1]) for t in given if t.dim())

    def one(output: Tensor) -> Tensor:
        shape = output.shape
        values = torch.randn(shape, generator=generator, dtype=torch.float64) if shape else torch.tensor(rows)
        return values.to(next(iter(given)).device, output.dtype)

    return [one(output) for output in outputs]


def exactly(values: object) -> object:
    """The same numbers in float64."""
    if isinstance(values, dict):
        return transform(lambda t: t.double() if t.is_floating_point() else t, values)
    return [None if value is None else value.double() for value in values]


def error(value: Tensor, exact: Tensor) -> float:
    assert value.shape == exact.shape, (tuple(value.shape), tuple(exact.shape))
    return (value.double() - exact).abs().max().item() if value.numel() else 0.0


def shaken(arguments: dict, seed: int, rounded_in: torch.dtype) -> dict:
    """The numbers in float64, each off by at most a rounding in a type."""
    generator = torch.Generator().manual_seed(seed)

    def one(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        noise = torch.rand(value.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return value.double() * (1 + SPACING[rounded_in] * noise.to(value.device))

    return transform(one, arguments)


def check_one(
    what: str,
    value: Tensor,
    eager: Tensor,
    exact: Tensor,
    factor: float,
    rounded_in: torch.dtype,
    terms: float,
    off: Tensor | None = None,
) -> None:
    """|value - exact| <= factor max(|eager - exact|, |off - exact|) + atol, each the largest over the tensor, where `off` is
    the exact result for slightly different arguments, if it is given.

    atol is one spacing of `rounded_in` at the tensor's magnitude, and at a tenth of that of `terms`, for eager is exact
    by chance where few numbers cancel; and rounding of sums in the accumulator at their terms' magnitude."""
    assert value.dtype == eager.dtype, (what, value.dtype, eager.dtype)
    if not exact.numel():
        assert value.shape == exact.shape, what
        return
    scale, worst = exact.abs().max().item(), error(eager, exact)
    if off is not None:
        worst = max(worst, error(off, exact))
    # What float64 is compared with was rounded as it was, and a norm's rows of no variance multiply it.
    sums = 4096 * SPACING[torch.float64] if value.dtype == torch.float64 else 128 * SPACING[torch.float32]
    atol = SPACING[rounded_in] * (scale + 0.1 * terms) + sums * (scale + terms)
    allowed = factor * (worst if math.isfinite(worst) else 0) + atol
    found = error(value, exact)
    assert found <= allowed, f"{what}: off by {found:.3g}, allowed {allowed:.3g} at {scale:.3g}"


def check(
    name: str,
    arguments: dict,
    cotangents: Sequence[Tensor | None] | None = None,
    needs: Iterable[str] | None = None,
    factor: float = 2,
    terms: float = 1,
    shake: int | None = None,
    backend: str = "cpu",
) -> None:
    """Compares values and gradients, three ways: a backend's kernels, the reference in the same types, and in float64.

    `terms` is the magnitude of what is summed. With `shake`, a seed, the kernels may also be as far off as rounding the
    arguments would make any implementation: on arguments that nobody chose, eager is exact by chance now and then."""
    given = random_cotangents(name, arguments) if cotangents is None else cotangents
    outputs, found = run(name, arguments, given, backend, needs)
    eager, eager_found = run(name, arguments, given, "reference", needs)
    exact, exact_found = run(name, exactly(arguments), exactly(given), "reference", needs)
    # What is stored on the way is rounded to the narrowest type: float32 weights, losses and parameters' gradients
    # beside bfloat16 activations come from products of these.
    floating = [t.dtype for t in tensors(arguments).values() if t.is_floating_point()]
    narrowest = max(floating, key=SPACING.get)
    off, off_found = [None] * len(outputs), {}
    if shake is not None:
        numbers = shaken({"cotangents": [c for c in given if c is not None], **arguments}, shake, narrowest)
        moved = iter(numbers.pop("cotangents"))
        off, off_found = run(name, numbers, [None if c is None else next(moved) for c in given], "reference", needs)
    for i, (value, *others) in enumerate(zip(outputs, eager, exact, strict=True)):
        assert value.is_contiguous()
        check_one(f"{name}: output {i}", value, *others, factor, narrowest, terms, off[i])
    for key, value in found.items():
        if value is None or exact_found[key] is None:
            assert value is None or not value.any(), f"{name}: {key} must have no gradient"
            assert exact_found[key] is None or not exact_found[key].any(), f"{name}: {key} has no gradient"
        else:
            assert value.dtype == tensors(arguments)[key].dtype
            other = torch.zeros_like(value) if eager_found[key] is None else eager_found[key]
            check_one(
                f"{name}: gradient of {key}",
                value,
                other,
                exact_found[key],
                factor,
                narrowest,
                terms,
                off_found.get(key),
            )


# --- layouts --------------------------------------------------------------------------------------------------------


def transposed(value: Tensor) -> Tensor:
    """The same numbers with the last two dimensions the other way round in memory."""
    return value.mT.contiguous().mT if value.dim() > 1 else value


def sliced(value: Tensor) -> Tensor:
    """The same numbers within a wider tensor, its rows not aligned."""
    if not value.dim():
        return value
    wide = value.new_zeros((*value.shape[:-1], value.shape[-1] + 3))
    wide[..., 1:-2] = value
    return wide[..., 1:-2]


# --- operator calls -------------------------------------------------------------------------------------------------


def raw_calls(name: str, arguments: dict, backend: str = "cpu") -> list[tuple]:
    """The calls of this library's operators in a forward and a backward pass, their tensors detached."""
    cotangents = random_cotangents(name, arguments)
    with Recorder() as recorder:
        run(name, arguments, cotangents, backend)
    return [(operator, map_tensors(torch.detach, values)) for operator, values, _ in recorder.native()]


def map_tensors(function: Callable[[Tensor], Tensor], values: Sequence) -> list:
    """The arguments of an operator with `function` applied to each tensor."""

    def one(value: object) -> object:
        if isinstance(value, Tensor):
            return function(value)
        return [one(member) for member in value] if isinstance(value, (list, tuple)) else value

    return [one(value) for value in values]


# --- memory ---------------------------------------------------------------------------------------------------------

_NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python names from 3.13 on


def lazily_mapped(count: int, dtype: torch.dtype) -> Tensor:
    """`count` zeros that take address space and no memory until they are touched. Raises OSError if refused."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype=dtype)


def guarded(value: Tensor) -> Tensor:
    """A dense copy whose last element is followed by memory that nobody may read."""
    if not value.numel():
        return value
    bytes_ = value.numel() * value.element_size()
    pages = -(-bytes_ // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    behind = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(behind), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(memory, dtype=value.dtype, count=value.numel(), offset=pages - bytes_).view(value.shape)
    return copy.copy_(value)
