"""The Triton kernels on a GPU: values and gradients in every type and at the limits, nothing left unwritten, the same bits
every time, compilation, CUDA graphs, streams, devices, more than 2^31 elements, and NVIDIA's checkers.

With TIGER_FAST_GPU_DRY_RUN=1 most of it runs on CPU tensors in Triton's interpreter, smaller; what is about CUDA itself has
stand-ins there, or is skipped."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
from conftest import DRY_RUN
from helpers import CASES, PLAIN, call, leaves, make, relative_error, replaced, tensors, transform
from native import check, map_tensors, random_cotangents, raw_calls, run, sliced, transposed
from paths import FEW, PATHS
from torch import Tensor
from torch._dynamo.utils import counters

from tiger_fast._examples import Call, Recorder, calls, gpu_sizes
from tiger_fast.kernels.launch import recording
from tiger_fast.ops import backends, triton

pytestmark = pytest.mark.gpu
on_cuda = pytest.mark.skipif(DRY_RUN or not torch.cuda.is_available(), reason="needs a CUDA GPU, also in a dry run")

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cpu" if DRY_RUN else "cuda"
NAMESPACE = "tiger_fast_interpreted" if DRY_RUN else "tiger_fast"
FUNCTIONS = tuple(triton.NATIVE)
NATIVE_CASES = [name for name, case in CASES.items() if case.function in FUNCTIONS]
NATIVE_PLAIN = [PLAIN[function] for function in FUNCTIONS]
TYPES = (torch.float32, torch.bfloat16, torch.float16)
LOW = (torch.bfloat16, torch.float16)
MEDIUM = {"B": 2, "N": 67, "D": 96, "R": 16, "C": 40}
SMALL = {"B": 2, "T": 2, "M": 3, "N": 3, "D": 8, "R": 3, "C": 4, "G": 3}


def on_device(arguments: dict) -> dict:
    return transform(lambda t: t.to(DEVICE), arguments)


def sized(name: str, dtype: torch.dtype, companions: torch.dtype | None = None, **sizes: int) -> dict:
    """On the device; sizes that a case fixes stay, and a dry run has small ones."""
    chosen = {key: value for key, value in sizes.items() if key not in CASES[name].sizes}
    if DRY_RUN:
        chosen = {key: min(value, 3 * SMALL[key]) for key, value in chosen.items()}
    arguments = make(name, dtype, companions, **chosen)
    if "num_heads" in arguments and chosen.get("D", 0) % arguments["num_heads"]:
        arguments["num_heads"] = 1
    return on_device(arguments)


def along(what: str, dtype: torch.dtype) -> tuple[str, dict]:
    """A case and the arguments that take one of paths.py (in a dry run smaller ones)."""
    path = PATHS[what]
    return path.name, sized(path.name, dtype, **(FEW | path.sizes))


def compare(name: str, arguments: dict) -> None:
    check(name, arguments, shake=0, backend="triton")


# --- values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", NATIVE_CASES)
def test_values_and_gradients_agree(name, dtype, poisoned):
    compare(name, sized(name, dtype, **MEDIUM))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_parameters_in_float32_beside_low_activations_agree(name, dtype, poisoned):
    compare(name, sized(name, dtype, torch.float32, **MEDIUM))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_the_widths_of_real_models_agree(name, dtype, poisoned):
    arguments = sized(name, dtype, B=2, N=130, D=768, M=4, T=5, R=32, C=768 if name == "adapter" else 40, G=4)
    if "num_heads" in arguments and not DRY_RUN:
        arguments["num_heads"] = 12
    compare(name, arguments)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("what", PATHS)
def test_the_less_usual_paths_agree(what, dtype, poisoned):
    compare(*along(what, dtype))


# Several limits at once where each alone would only have the same code compiled again, for a second or so a kernel.
LIMITS = [
    *({"M": 1, "T": 1, "R": 1, "G": 1, "C": 1}, {"M": 16, "T": 32, "R": 256, "G": 32}, {"G": 9, "C": 300}),
    *({"D": 1}, {"D": 7}, {"D": 1000}, {"N": 1}, {"B": 1, "N": 300}, {"B": 0}, {"N": 0}, {"B": 0, "N": 0}),
]


@pytest.mark.parametrize("sizes", LIMITS, ids=str)
@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_limits_and_odd_sizes_agree(name, sizes, poisoned):
    shapes = [t.shape for t in tensors(make(name, **SMALL)).values()]
    if shapes == [t.shape for t in tensors(make(name, **(SMALL | sizes))).values()]:
        pytest.skip("this function has none of these sizes")
    for dtype in (torch.float32, torch.bfloat16):
        compare(name, sized(name, dtype, **({"B": 1, "N": 20} | sizes)))


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_strides_change_nothing(name, poisoned):
    dense = sized(name, torch.bfloat16, **MEDIUM)
    given = random_cotangents(name, dense)
    expected, expected_found = run(name, dense, given, "triton")
    for change in (transposed, sliced):
        outputs, found = run(name, transform(change, dense), [change(c) for c in given], "triton")
        for a, b in zip(outputs, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
        for key, value in found.items():
            assert value is None or relative_error(value, expected_found[key]) < 3e-2, key


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_the_same_bits_every_time(name):
    same_bits(name, sized(name, torch.bfloat16, B=4, N=257, D=768, M=4, T=5, R=32, C=40, G=4))


@pytest.mark.parametrize("what", PATHS)
def test_the_same_bits_every_time_on_the_less_usual_paths(what):
    same_bits(*along(what, torch.bfloat16))


def same_bits(name: str, arguments: dict) -> None:
    given = random_cotangents(name, arguments)
    expected, expected_found = run(name, arguments, given, "triton")
    for _ in range(2 if DRY_RUN else 100):
        outputs, found = run(name, arguments, given, "triton")
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        for key, value in found.items():
            assert value is None or torch.equal(value, expected_found[key]), key


# --- dispatch -------------------------------------------------------------------------------------------------------


@on_cuda
@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_cuda_tensors_run_the_kernels_by_default_and_float64_the_reference(name, monkeypatch):
    monkeypatch.delenv("TIGER_FAST_BACKEND", raising=False)
    for dtype, native in ((torch.float32, True), (torch.float64, False)):
        with Recorder() as recorder:
            call(name, sized(name, dtype))
        assert bool(recorder.native()) == native


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_the_kernels_run_and_not_the_reference(name, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("the reference ran")

    arguments = sized(name, torch.bfloat16)
    given = random_cotangents(name, arguments)
    monkeypatch.setitem(backends._NATIVE, "reference", dict.fromkeys(backends.OPS, refuse))
    run(name, arguments, given, "triton")


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_opcheck_accepts_every_operator(name):
    calls = raw_calls(name, sized(name, torch.float32), "triton")
    assert len(calls) >= 2
    for operator, values in calls:
        # The last test of opcheck asks for a derivative, which is in the autograd.Function outside the operator.
        torch.library.opcheck(
            operator, tuple(values), test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        )


@on_cuda
def test_autocast_runs_products_in_its_type():
    arguments = sized("route", torch.float32, **MEDIUM)
    narrow = arguments | {key: transform(lambda t: t.bfloat16(), arguments)[key] for key in ("query", "experts")}
    with torch.autocast("cuda", dtype=torch.bfloat16):
        outputs = call("route", arguments, backend="triton")
    for a, b in zip(outputs, call("route", narrow, backend="triton"), strict=True):
        assert torch.equal(a, b)


# --- compilation ----------------------------------------------------------------------------------------------------


def mark_dynamic(name: str, arguments: dict) -> dict:
    """The arguments with the dimensions that grow with B or N marked dynamic."""
    others = tensors(make(name, B=11, N=13))
    for key, value in tensors(arguments).items():
        for axis, (have, other) in enumerate(zip(value.shape, others[key].shape, strict=True)):
            if have != other:
                torch._dynamo.mark_dynamic(value, axis)
    return arguments


def compiles_once(name: str, compiler: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(lambda a: call(name, a, backend="triton"), fullgraph=True, backend=compiler)
    for seed, sizes in enumerate(({"B": 2, "N": 5}, {"B": 3, "N": 7}, {"B": 5, "N": 4})):
        arguments = on_device(make(name, torch.float32, seed=seed, **sizes))
        given = random_cotangents(name, arguments)
        expected, expected_found = run(name, arguments, given, "triton")
        arguments, wanted = leaves(arguments)
        outputs = compiled(mark_dynamic(name, arguments))
        found = torch.autograd.grad(outputs, list(wanted.values()), given, allow_unused=True)
        assert all(relative_error(a, b) <= 1e-5 for a, b in zip(outputs, expected, strict=True))
        for key, value in zip(wanted, found, strict=True):
            assert value is None or relative_error(value, expected_found[key]) <= 1e-4, key
    assert counters["stats"]["unique_graphs"] == 1, "a new B or N compiled again"
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_every_function_compiles_whole_and_once(name):
    compiles_once(name, "aot_eager")


@on_cuda
@pytest.mark.parametrize("name", ["route", "group_attention", "leave_one_out"])
def test_functions_compile_with_the_default_compiler(name):
    compiles_once(name, "inductor")


@on_cuda
@pytest.mark.parametrize("op", FUNCTIONS)
def test_another_batch_compiles_no_kernel(op):
    launched = set()

    def run_at(batch: int, tokens: int) -> None:
        for one in calls(op, gpu_sizes(op, B=batch, N=tokens, D=64, heads=4), torch.bfloat16, DEVICE):
            with recording() as found:
                one()
            launched.update(each.kernel for each in found)
            one()

    def compiled() -> int:
        return sum(len(caches[0]) for kernel in launched for caches in kernel.device_caches.values())

    run_at(2, 7)
    for kernel in launched:  # what other tests and sizes have compiled is forgotten
        kernel.device_caches.clear()
    run_at(2, 7)
    first = compiled()
    assert first >= len(launched) > 0
    for sizes in ((1, 1), (1, 16), (3, 1000), (16, 17)):
        run_at(*sizes)
        assert compiled() == first, sizes


# --- CUDA -----------------------------------------------------------------------------------------------------------


def close(value: Tensor, expected: Tensor) -> bool:
    """Equal but for bfloat16's rounding of what another algorithm of the library's products may give."""
    return relative_error(value, expected) < 2e-2


def captured(function: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    """A CUDA graph of a function, as a call that replays it, and the tensors that it writes."""
    if DRY_RUN:
        results = function()

        def again() -> None:
            for result, value in zip(results, function(), strict=True):
                result.copy_(value)

        return again, results
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels compile, and libraries take their memory, before the capture
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph.replay, results


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_graphs_replay_with_other_inputs(name):
    arguments = sized(name, torch.bfloat16, **MEDIUM)
    other = transform(torch.clone, sized(name, torch.bfloat16, **MEDIUM) | {})
    other = replaced(other, {k: v.flip(0) if v.dim() else v for k, v in tensors(other).items()})
    given = random_cotangents(name, arguments)
    held, wanted = leaves(arguments)
    inputs = tensors(held)

    def both() -> list[Tensor]:
        outputs = call(name, held, backend="triton")
        found = torch.autograd.grad(outputs, list(wanted.values()), given, allow_unused=True)
        return [*(o.detach() for o in outputs), *(g for g in found if g is not None)]

    replay, results = captured(both)
    for values in (other, transform(torch.clone, sized(name, torch.bfloat16, **MEDIUM))):
        outputs, found = run(name, values, given, "triton")
        expected = [*outputs, *(g for g in found.values() if g is not None)]
        with torch.no_grad():
            for key, value in tensors(values).items():
                inputs[key].copy_(value)
        for result in results:
            result.fill_(torch.nan)
        replay()
        synchronize()
        assert all(close(a, b) for a, b in zip(results, expected, strict=True))


def synchronize() -> None:
    if not DRY_RUN:
        torch.cuda.synchronize()


@on_cuda
@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_kernels_run_on_the_current_stream(name):
    arguments = sized(name, torch.bfloat16, **MEDIUM)
    given = random_cotangents(name, arguments)
    expected, expected_found = run(name, arguments, given, "triton")
    late = transform(lambda t: torch.zeros_like(t), arguments)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second: a kernel on another stream would be done before
        for key, value in tensors(late).items():
            value.copy_(tensors(arguments)[key])
        outputs, found = run(name, late, given, "triton")
    side.synchronize()
    assert all(close(a, b) for a, b in zip(outputs, expected, strict=True))
    assert all(value is None or close(value, expected_found[key]) for key, value in found.items())


@on_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_kernels_run_on_their_tensors_device(name):
    arguments = sized(name, torch.bfloat16, **MEDIUM)
    given = random_cotangents(name, arguments)
    expected, _ = run(name, arguments, given, "triton")
    there = transform(lambda t: t.to("cuda:1"), arguments)
    outputs, found = run(name, there, [c.to("cuda:1") for c in given], "triton")
    assert torch.cuda.current_device() == 0
    assert all(close(a.cpu(), b.cpu()) for a, b in zip(outputs, expected, strict=True))
    assert all(value is None or value.device.index == 1 for value in found.values())


# --- more than 2^31 elements ----------------------------------------------------------------------------------------

FAR = 1 << (12 if DRY_RUN else 31)


def needs_memory(gigabytes: float) -> None:
    if not DRY_RUN and torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes:g} GB of free GPU memory")


@pytest.fixture
def released() -> Iterator[None]:
    """Memory goes back to the device before and after, for other processes' tests."""
    empty = (lambda: None) if DRY_RUN else torch.cuda.empty_cache
    empty()
    yield
    empty()


@pytest.mark.parametrize("name", NATIVE_PLAIN)
def test_samples_may_lie_further_apart_than_int32(name, released):
    needs_memory(20)
    dtype = torch.bfloat16
    arguments = sized(name, dtype, B=2, N=9, D=64, C=8)
    given = random_cotangents(name, arguments)
    memory: dict[torch.dtype, tuple[Tensor, list[int]]] = {}

    def far(value: Tensor) -> Tensor:
        # Sample 1 begins FAR elements after sample 0; all tensors of a type share one storage.
        if value.dim() < 2 or value.shape[0] != 2 or value.element_size() > 4:
            return value
        inner = value[0].numel()
        if value.dtype not in memory:
            memory[value.dtype] = torch.zeros(FAR + (1 << 20), dtype=value.dtype, device=DEVICE), [0]
        storage, end = memory[value.dtype]
        strides = (FAR, *value[0].contiguous().stride())
        view = storage.as_strided(value.shape, strides, end[0])
        end[0] += -(-inner // 64) * 64
        assert end[0] <= min(FAR, 1 << 20)
        return view.copy_(value)

    expected, expected_found = run(name, arguments, given, "triton")
    outputs, found = run(name, transform(far, arguments), [far(c) for c in given], "triton")
    assert memory
    assert all(close(a, b) for a, b in zip(outputs, expected, strict=True))
    assert all(value is None or close(value, expected_found[key]) for key, value in found.items())


# Elements of a token in the largest tensor, which is to have more than 2^31, and sizes with which all of them fit into 80 GB.
WIDE = {
    "route": (768, {"T": 1, "M": 1, "R": 8, "D": 768}),
    "leave_one_out": (768, {"T": 1, "M": 2, "D": 768}),
    "counterfactual_losses": (768, {"M": 1, "C": 4, "D": 768}),
    "counterfactual_losses_from_projections": (768, {"M": 2, "C": 384}),
    "causal_target": (16, {"T": 1, "M": 16}),
    "alignment_loss": (16, {"T": 1, "M": 16}),
    "alignment_loss attached": (16, {"T": 1, "M": 16}),
    "group_attention": (768, {"G": 1, "D": 768, "heads": 12}),
    "group_attention_packed": (768, {"G": 1, "D": 256, "heads": 4}),
    "adapter": (768, {"C": 768, "D": 768}),
    "competency_aggregate": (768, {"M": 1, "D": 768}),
}


@pytest.mark.parametrize("name", WIDE)
def test_tensors_may_have_more_elements_than_int32(name, released):
    needs_memory(72)
    op, _, attached = name.partition(" ")
    row, sizes = WIDE[name]
    tokens = 37 if DRY_RUN else FAR // row + 5
    sizes = gpu_sizes(op, **{"B": 1, "N": tokens, **sizes})
    keywords = {"detach_target": False} if attached else {}
    # Every call apart, so that no more is held than it needs.
    for one in calls(op, sizes, torch.bfloat16, DEVICE, namespace=NAMESPACE, **keywords):
        results = as_list(one(NAMESPACE))
        if one.name == "alignment_loss":
            assert results[1] == tokens, "rows that count"
        for start in (0, tokens // 2, tokens - 3):

            def part(value: Tensor, start: int = start) -> Tensor:
                axes = [i for i, size in enumerate(value.shape) if size == tokens]
                return value.narrow(axes[0], start, 3) if axes else value

            few = as_list(Call(one.name, tuple(map_tensors(part, one.arguments)))(NAMESPACE))
            for a, b in zip(results, few, strict=True):
                # Of the largest number, for a mean's gradients are as small as it has rows.
                assert tokens not in a.shape or relative_error(part(a), b) < 5e-2
        del results, a


def as_list(results: Tensor | tuple | list) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


# --- checkers -------------------------------------------------------------------------------------------------------

EVERY_OPERATOR = """
import sys, torch
from test_gpu import PATHS, along, random_cotangents, run
from tiger_fast._examples import calls, gpu_sizes
from tiger_fast.ops.triton import NATIVE
device, namespace = sys.argv[1:]
sizes = {"B": 2, "N": 9, "D": 40, "M": 3, "T": 2, "R": 5, "C": 7, "G": 3, "heads": 2}
for op in NATIVE:
    for dtype in (torch.float32, torch.bfloat16):
        for call in calls(op, gpu_sizes(op, **sizes), dtype, device, namespace=namespace):
            call(namespace)
            print(call.name, dtype, flush=True)
for what in PATHS:
    name, arguments = along(what, torch.bfloat16)
    run(name, arguments, random_cotangents(name, arguments), "triton")
    print(what, flush=True)
if device != "cpu":
    torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not (found or DRY_RUN):
        pytest.skip("compute-sanitizer is not installed")
    checker = [] if DRY_RUN else [found, "--tool", tool, "--error-exitcode", "9"]
    # The caching allocator would hide an access past a tensor's end.
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*checker, sys.executable, "-c", EVERY_OPERATOR, DEVICE, NAMESPACE]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer does not support this device or its virtual machine")
    assert done.returncode == 0, said[-4000:]
    assert done.stdout.count("_backward torch.bfloat16") == len(FUNCTIONS)
    assert set(PATHS) <= set(done.stdout.splitlines())
