"""The choice of a backend: argument before context before environment before device, and what show_config lists."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from helpers import FUNCTIONS, PLAIN, call, make

import tiger_fast
from tiger_fast.ops import BACKENDS, backends

ABSENT = [name for name in BACKENDS if name not in tiger_fast.available_backends()]
CPU = torch.device("cpu")


@pytest.fixture
def second(monkeypatch):
    """A made-up installation: "cpu" exists and has one native function, which tells that it ran."""
    ran = []

    def route(*arguments):
        ran.append("route")
        return tiger_fast.reference.route(*arguments)

    monkeypatch.setitem(backends._NATIVE, "cpu", {"route": route})
    monkeypatch.delenv("TIGER_FAST_BACKEND", raising=False)
    return ran


def test_the_argument_goes_before_the_context_before_the_environment(second, monkeypatch):
    assert backends.resolve(None, CPU) == "cpu"
    monkeypatch.setenv("TIGER_FAST_BACKEND", "reference")
    assert backends.resolve(None, CPU) == "reference"
    with tiger_fast.use_backend("cpu"):
        assert backends.resolve(None, CPU) == "cpu"
        assert backends.resolve("reference", CPU) == "reference"
        with tiger_fast.use_backend("reference"):
            assert backends.resolve(None, CPU) == "reference"
            assert backends.resolve("cpu", CPU) == "cpu"
        assert backends.resolve(None, CPU) == "cpu"
    assert backends.resolve(None, CPU) == "reference"


def test_an_empty_environment_variable_is_none_at_all(second, monkeypatch):
    monkeypatch.setenv("TIGER_FAST_BACKEND", "")
    assert backends.resolve(None, CPU) == "cpu"


def test_a_device_without_a_backend_of_its_own_runs_the_reference(second):
    assert backends.resolve(None, torch.device("meta")) == "reference"
    assert backends.resolve(None, torch.device("mps")) == "reference"


def test_the_chosen_backend_is_what_runs(second):
    expected = call("route", make("route"), backend="reference")
    assert not second
    for run in (lambda: call("route", make("route")), lambda: call("route", make("route"), backend="cpu")):
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
        assert second.pop() == "route"


@pytest.mark.parametrize("function", [name for name in FUNCTIONS if name != "route"])
def test_what_a_backend_does_not_fuse_runs_the_reference_under_its_name(second, function):
    arguments = make(PLAIN[function])
    for a, b in zip(call(function, arguments, backend="cpu"), call(function, arguments), strict=True):
        assert torch.equal(a, b)


def test_the_context_ends_with_an_error_too(second):
    with pytest.raises(RuntimeError), tiger_fast.use_backend("reference"):
        raise RuntimeError
    assert backends.resolve(None, CPU) == "cpu"


def test_the_context_holds_in_other_threads(second):
    # Backward passes and data loaders run in threads of their own.
    found = []
    with tiger_fast.use_backend("reference"):
        thread = threading.Thread(target=lambda: found.append(backends.resolve(None, CPU)))
        thread.start()
        thread.join()
    assert found == ["reference"]


def test_contexts_of_two_threads_may_overlap(second):
    first, other = tiger_fast.use_backend("reference"), tiger_fast.use_backend("cpu")
    first.__enter__()
    other.__enter__()
    first.__exit__(None, None, None)
    assert backends._forced == "cpu", "the second is still open"
    other.__exit__(None, None, None)
    assert backends._forced is None


def test_the_context_decorates_a_function_and_may_be_entered_by_each_call(second):
    @tiger_fast.use_backend("reference")
    def chosen(depth):
        return [backends.resolve(None, CPU), *(chosen(depth - 1) if depth else ())]

    assert chosen(2) == ["reference"] * 3 and backends.resolve(None, CPU) == "cpu"


@pytest.mark.parametrize("typo", ["referense", "Reference", "tritn", "cuda"])
def test_unknown_names_are_refused_with_the_nearest(typo, monkeypatch):
    near = {"referense": "reference", "Reference": "reference", "tritn": "triton"}.get(typo)

    def check(message: str, source: str) -> None:
        assert source in message and repr(typo) in message
        assert all(name in message for name in BACKENDS)
        assert near is None or f"did you mean {near!r}?" in message

    with pytest.raises(ValueError) as caught:
        call("causal_target", make("causal_target"), backend=typo)
    check(str(caught.value), "backend=")
    with pytest.raises(ValueError) as caught, tiger_fast.use_backend(typo):
        pass
    check(str(caught.value), "use_backend")
    monkeypatch.setenv("TIGER_FAST_BACKEND", typo)
    with pytest.raises(ValueError) as caught:
        call("causal_target", make("causal_target"))
    check(str(caught.value), "TIGER_FAST_BACKEND")
    call("causal_target", make("causal_target"), backend="reference")  # the argument goes first


def test_backends_that_cannot_run_here_are_refused_by_name(monkeypatch):
    monkeypatch.delitem(backends._NATIVE, "triton", raising=False)
    with pytest.raises(ValueError, match=r"backend=.*'triton'.*available here: reference"):
        call("causal_target", make("causal_target"), backend="triton")
    with pytest.raises(ValueError, match=r"use_backend.*'triton'"), tiger_fast.use_backend("triton"):
        pass
    monkeypatch.setenv("TIGER_FAST_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"TIGER_FAST_BACKEND.*'triton'"):
        call("causal_target", make("causal_target"))


def test_show_config_lists_every_function_and_backend(second):
    lines = tiger_fast.show_config().splitlines()
    assert tiger_fast.__version__ in lines[0] and torch.__version__ in lines[0]
    header = lines[1].split()
    assert header == list(tiger_fast.available_backends())
    table = {line.split()[0]: line.split()[1:] for line in lines[2 : 2 + len(FUNCTIONS)]}
    assert set(table) == set(FUNCTIONS) == set(backends.OPS)
    column = header.index("cpu")
    assert [name for name in FUNCTIONS if table[name][column] == "native"] == ["route"]
    assert all(row[header.index("reference")] == "reference" for row in table.values())


def test_show_config_says_what_is_absent():
    text = tiger_fast.show_config()
    assert all(name in text for name in BACKENDS)
    assert ("cpu: not compiled here" in text) == ("cpu" in ABSENT)
    assert ("triton: not here" in text) == ("triton" in ABSENT)
    with tiger_fast.use_backend("reference"):
        assert "cpu tensors: reference" in tiger_fast.show_config()


@pytest.mark.skipif("cpu" in ABSENT, reason="this installation has no compiled CPU kernels")
def test_show_config_states_the_level_and_the_memory_that_is_kept():
    ops = torch.ops.tiger_fast
    tiger_fast.empty_cache()
    (line,) = [line for line in tiger_fast.show_config().splitlines() if line.startswith("cpu: ")]
    assert f"level {ops.cpu_level()}," in line
    assert f"keeps 0 of at most {ops.cpu_cache_limit() >> 20} MiB" in line and "TIGER_FAST_CACHE_MIB" in line
    arguments = make("leave_one_out", torch.float32, B=1, T=1, M=2, N=3000, D=256)
    tiger_fast.functional.leave_one_out(**arguments, backend="cpu")
    assert f"keeps {ops.cpu_cached_bytes() >> 20} of" in tiger_fast.show_config() and ops.cpu_cached_bytes() > 0
    tiger_fast.empty_cache()
    assert "keeps 0 of" in tiger_fast.show_config()


def test_the_cache_can_be_emptied_whatever_is_installed(monkeypatch):
    tiger_fast.empty_cache()
    monkeypatch.setattr(backends.cpu, "LOADED", False)
    tiger_fast.empty_cache()
    assert "keeps" not in tiger_fast.show_config()


def test_reference_is_always_available():
    assert "reference" in tiger_fast.available_backends()
    assert set(tiger_fast.available_backends()) <= set(BACKENDS)
    assert set(backends._NATIVE["reference"]) == set(FUNCTIONS)


@pytest.mark.parametrize("library", ["/nonexistent.so", torch.__file__], ids=["absent", "no library"])
def test_a_native_library_that_is_named_and_is_none_is_an_import_error_that_names_the_variable(library):
    environment = os.environ | {
        "TIGER_FAST_NATIVE_LIBRARY": library,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run([sys.executable, "-c", "import tiger_fast"], env=environment, capture_output=True, text=True)
    assert done.returncode and f"ImportError: TIGER_FAST_NATIVE_LIBRARY is {library!r}" in done.stderr


@pytest.mark.skipif("triton" in ABSENT, reason="this installation runs no Triton kernels")
@pytest.mark.skipif(torch.cuda.is_available(), reason="here its kernels run on CUDA tensors and not in the interpreter")
def test_a_backend_is_refused_on_tensors_of_another_device(monkeypatch):
    monkeypatch.setitem(backends._DEVICES, "triton", ("cuda",))
    with pytest.raises(ValueError, match="'triton' runs on cuda tensors, got one on cpu"):
        call("causal_target", make("causal_target", torch.float32), backend="triton")
    meta = make("causal_target", torch.float32) | {"delta": torch.empty(2, 3, device="meta")}
    assert call("causal_target", meta, backend="triton")[0].is_meta
