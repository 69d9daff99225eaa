"""Which tests run where; each skip says why (addopts has -ra)."""

import os

import pytest
import torch

# Read when Triton is first imported, by whatever test comes first: where there is no GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Lets the tests for a GPU run on CPU tensors, in the interpreter: to find what has nothing to do with one.
DRY_RUN = os.environ.get("TIGER_FAST_GPU_DRY_RUN") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--shard", metavar="I/N", help="run the I-th of N parts of the tests, I from 0")
    parser.addoption("--fuzz-cases", type=int, metavar="N", help="run N random cases of tests/test_native_fuzz.py")


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
