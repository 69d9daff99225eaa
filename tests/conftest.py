"""Which tests run where; each skip says why (addopts has -ra)."""

import os
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

# Lets the tests for a GPU run on CPU tensors, in the interpreter: to find what has nothing to do with one.
DRY_RUN = os.environ.get("TIGER_FAST_GPU_DRY_RUN") == "1"

# Read when Triton is first imported, by whatever test comes first: where there is no GPU its kernels run in its interpreter.
if DRY_RUN or not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _patch_language_once() -> None:
    """Triton's interpreter replaces the functions of triton.language for a launch, and again, to no effect, for every call of
    a device function, which takes it half its time: here not where the launch, or a call before, has done so."""
    try:
        from triton.runtime import interpreter
        from triton.runtime.interpreter import _LangPatchScope, _patch_lang
    except ImportError:  # no Triton, or one that does otherwise
        return
    language = interpreter.tl, interpreter.tl.core
    done: set[object] = set()

    @cache
    def modules(function: Callable, names: int) -> set[object]:
        # Of triton.language, which the function's module knows; the interpreter adds to its `names`.
        return {each for each in language for value in function.__globals__.values() if value is each}

    class Scope(_LangPatchScope):
        def restore(self) -> None:  # a launch has ended
            super().restore()
            done.clear()

    def patch_once(function: Callable) -> _LangPatchScope:
        seen = modules(function, len(function.__globals__))
        if seen <= done:
            return _LangPatchScope()
        scope = Scope()
        scope._changes = _patch_lang(function)._changes
        done.update(seen)
        return scope

    interpreter._patch_lang = patch_once


if os.environ.get("TRITON_INTERPRET") == "1":
    _patch_language_once()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--shard", metavar="I/N", help="run the I-th of N parts of the tests, I from 0")
    parser.addoption("--fuzz-cases", type=int, metavar="N", help="run N random cases of tests/test_native_fuzz.py")


@pytest.hookimpl(trylast=True)  # parts are of what -k and -m have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA GPU, and torch.cuda.is_available() is False")
    not_asked = pytest.mark.skip(reason="slow; runs with --slow")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available() and not DRY_RUN:
            item.add_marker(no_gpu)
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(not_asked)
    if shard := config.getoption("--shard"):
        index, parts = map(int, shard.split("/"))
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % parts != index])
        items[:] = items[index::parts]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is NaN (or an absurd integer)."""

    def fill(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*arguments: object, **keywords: object) -> Tensor:
            fresh = function(*arguments, **keywords)
            return fresh.fill_(torch.nan if fresh.is_floating_point() else 7) if fresh.numel() else fresh

        return filled

    monkeypatch.setattr(Tensor, "new_empty", fill(Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", fill(torch.empty_like))
    monkeypatch.setattr(torch, "empty", fill(torch.empty))
