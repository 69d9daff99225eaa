"""`python -m profiling.names [ID..]`: which operators a benchmark calls, and which Triton kernels each of them launches.

Nothing here is typed by hand: the calls are recorded on tensors without memory, and so are the launches that they make, for the
architecture named. A profiler shows a kernel by its symbol; `module_symbol` tells apart kernels of one symbol, as the range
`tiger_fast.kernels.<operator>` does.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from bench import cases, models, presets, suites
from tiger_fast import available_backends
from tiger_fast._examples import Call, Recorder, calls
from tiger_fast.ops.triton import NATIVE, launcher

try:
    from tiger_fast.kernels import aot, config
    from tiger_fast.kernels.launch import recording
except ModuleNotFoundError as problem:
    if problem.name.partition(".")[0] != "triton":
        raise
    aot = None  # what ncu wrote can be read without it

RANGE = "tiger_fast.kernels."


class NoTriton(ValueError):
    """Triton is not installed."""

    def __init__(self) -> None:
        super().__init__("Triton is not installed, without which nothing says what a benchmark launches")


@dataclass(frozen=True)
class Use:
    """An operator in a benchmark.

    Attributes:
        id: the benchmark's.
        operator: its name.
        calls: how often one call of the benchmark calls it. A CPU decodes without one expert after the other; a GPU decodes
            all of these at once, and calls what the decoder needs once for them.
        kernels: what it launches, as `module_symbol`, each once.
        symbols: the same as a profiler names them.
        floor_bytes: the least that all its calls have to move, by bench.cases; None in a model, whose parts have no formula.
    """

    id: str
    operator: str
    calls: int
    kernels: tuple[str, ...]
    symbols: tuple[str, ...]
    floor_bytes: int | None


def uses_of(benchmark: suites.Benchmark, settings: presets.Settings, architecture: str | None = None) -> list[Use]:
    """The operators of a benchmark, in the order of their first calls; functions that Triton does not fuse have none.

    Args:
        benchmark, settings: what is run.
        architecture: that kernels are chosen for; None: the GPU's, or sm_90.

    Raises:
        NoTriton: without it.
        ValueError: where a model's calls cannot be recorded, for no backend that fuses them is here.
    """
    if aot is None:
        raise NoTriton
    made: dict[str, list] = {}
    config.assume(architecture or _architecture())
    try:
        for call in _calls(benchmark, settings):
            with recording() as launches:
                launcher(call.name)(*call.arguments)
            made.setdefault(call.name, []).append(launches)
    finally:
        config.assume(None)
    return [_use(benchmark, settings, operator, lists) for operator, lists in made.items()]


def _architecture() -> str:
    gpu = torch.cuda.is_available()
    return config.architecture(torch.device("cuda", torch.cuda.current_device())).name if gpu else "sm_90"


def _use(benchmark: suites.Benchmark, settings: presets.Settings, operator: str, lists: list) -> Use:
    kernels = {aot.name_of(launch): launch.kernel.fn.__name__ for launches in lists for launch in launches}
    floor = None
    if benchmark.subject in cases.OPS:
        with FakeTensorMode():
            case = cases.Case(benchmark.subject, benchmark.sizes(settings), settings.torch_dtype)
        floor = case.cost(cases.FORWARD).bytes
        if operator.endswith("_backward"):
            floor = case.cost(cases.BOTH).bytes - floor
    return Use(benchmark.id, operator, len(lists), tuple(kernels), tuple(kernels.values()), floor)


def _calls(benchmark: suites.Benchmark, settings: presets.Settings) -> list[Call]:
    subject, sizes = benchmark.subject, benchmark.sizes(settings)
    if subject in cases.OPS:
        made = calls(subject, sizes, settings.torch_dtype) if subject in NATIVE else []
        # One forward that serves both directions, or one for each; then the backward.
        return made[:1] if benchmark.direction == cases.FORWARD else made[-2:]
    backend = next((name for name in ("cpu", "triton") if name in available_backends()), None)
    if backend is None:
        raise ValueError(f"{benchmark.id} is recorded as a backend runs it, and neither cpu nor triton can run here")
    with FakeTensorMode():
        call = models.Model(subject, benchmark.direction, sizes, settings).call(backend)
        with Recorder() as recorder:
            call()
    return [Call(operator._opname, _without_memory(given)) for operator, given, _ in recorder.native()]


def _without_memory(given: Any) -> Any:
    return tree_map_only(
        Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), given
    )


# --- the options of commands that take benchmarks ------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The ids, and what was handed to `bench once` with them."""
    parser.add_argument("ids", nargs="*", metavar="ID", help="benchmarks, as `python -m bench list` names them")
    parser.add_argument("--preset", default="gpu", help="default: gpu")
    parser.add_argument("--shape", help="sizes that differ: B=8,N=4096")
    parser.add_argument("--dtype", help="of activations")


def chosen(options: argparse.Namespace) -> Iterator[tuple[suites.Benchmark, presets.Settings]]:
    """The benchmarks that the options name.

    Raises:
        ValueError: for one that there is not, or sizes that do not go together.
    """
    settings = presets.settings(options.preset, shape=options.shape, dtype=options.dtype, device="cpu")
    for name in options.ids:
        yield suites.find(name, settings), settings


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 without Triton, 64 for a preset, a shape or an id that there is not."""
    parser = argparse.ArgumentParser(prog="python -m profiling.names", description=__doc__)
    add_arguments(parser)
    parser.add_argument(
        "--arch", choices=tuple(config.ARCHITECTURES) if aot else (), help="default: the GPU's, or sm_90"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_intermixed_args(arguments)
    try:
        if not options.ids:
            settings = presets.settings(options.preset, shape=options.shape, dtype=options.dtype, device="cpu")
            options.ids = [b.id for suite in ("ops", "models") for b in suites.of(suite, settings)]
        found = [(benchmark.id, uses_of(benchmark, settings, options.arch)) for benchmark, settings in chosen(options)]
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 2 if isinstance(problem, NoTriton) else 64
    if options.json:
        print(json.dumps([asdict(use) for _, uses in found for use in uses], indent=1))
        return 0
    for name, uses in found:
        print(name if uses else f"{name}: no kernel of Triton's")
        for use in uses:
            print(f"  {use.operator}{f' x {use.calls}' if use.calls > 1 else ''}: {', '.join(use.kernels)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
