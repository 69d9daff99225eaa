"""The static gate: every kernel, compiled ahead of time for the default GPU shape, has no stack and no spill, fits, loads 16
bytes at once and multiplies by matrix instructions; and the gate is able to refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from profiling import static_report
from tiger_fast.ops.triton import _MODULES

ROOT = Path(__file__).resolve().parents[1]
ARCH = "sm_90"


def child(*arguments: str) -> subprocess.CompletedProcess:
    """Python without the interpreter of kernels, in the repository's root."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> list[dict]:
    """The rows of the default cases."""
    file = tmp_path_factory.mktemp("static") / "report.json"
    done = child("-m", "profiling.static_report", "--arch", ARCH, "--json", str(file))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text())["rows"]


def test_no_kernel_of_the_default_shape_is_refused(report):
    refused = [static_report.line_of(row) for row in report if row["problems"]]
    assert not refused, "\n".join(refused)


def test_every_operator_is_compiled_in_every_type(report):
    # Operators may share a kernel, which is listed once, with the first type that needs it: so by module, and what is
    # float32 beside any activations is not compiled again.
    expected = {name for names in _MODULES.values() for name in names}
    assert expected == {name for op in static_report.OPS for name in (op, f"{op}_backward")}
    for dtype, absent in (("bfloat16", set()), ("float32", {"alignment"})):
        kernels = {row["kernel"] for row in report if row["dtype"] == dtype}
        assert absent == {module for module in _MODULES if not any(k.startswith(module) for k in kernels)}


def test_products_compile_where_float32_cannot_be_rounded_to_tf32():
    done = child("-m", "profiling.static_report", "--arch", "gfx90a", "--op", "counterfactual_losses", "--gate")
    assert done.returncode == 0, done.stdout[-4000:]
    assert "counterfactual_tokens_from_experts | bfloat16" in done.stdout


NARROW = """
from dataclasses import replace
import torch
from profiling import static_report
from tiger_fast._examples import calls, gpu_sizes
from tiger_fast.kernels import aot, config
config.assume("sm_90")
(call, *_) = calls("counterfactual_losses", gpu_sizes("counterfactual_losses"), torch.float32)
with config.trying({}) as made:
    static_report.launches_of(call)
with config.trying({key: replace(c, width=16) for key, c in made.items()}):
    (launch,) = static_report.launches_of(call)
print(aot.report(launch, "sm_90").narrow_tiles)
"""


def test_a_tile_too_small_for_whole_vectors_is_seen():
    done = child("-c", NARROW)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "16 x 16 of 32 bits by 64" in done.stdout


PLANTED = """
import sys
from profiling import static_report
from tiger_fast.kernels import config
config._HEURISTICS["leave_one_out"] = lambda *_, **__: config.Config(rows=64, width=128, num_warps=4, experts=8)
static_report.TYPES = static_report.TYPES[:1]
sys.exit(static_report.main(["--op", "leave_one_out", "--gate"]))
"""


def test_a_tile_far_too_large_is_refused():
    done = child("-c", PLANTED)
    assert done.returncode == 1, done.stderr[-4000:]
    (line,) = [
        line for line in done.stdout.splitlines() if line.startswith("leave_one_out_forward sm_90 bfloat16, default:")
    ]
    assert "bytes spilled" in line and "a stack of" in line


def test_a_kernel_that_compiles_for_too_long_is_named_and_ends():
    done = child("-m", "profiling.static_report", "--op", "leave_one_out", "--gate", "--limit", "0")
    assert done.returncode == 1, done.stderr[-4000:]
    assert "leave_one_out_forward sm_90 bfloat16, default: not compiled within 0 s" in done.stdout


GOOD = {
    "kernel": "made_up",
    "arch": ARCH,
    "dtype": "bfloat16",
    "row_bits": 128,
    "narrow_tiles": [],
    "stack_bytes": 0,
    "spill_bytes": 0,
    "shared_bytes": 227 << 10,
    "max_load_bits": 128,
    "min_load_bits": 32,
    "matrix_instructions": 1,
}


def test_a_good_kernel_is_not_refused():
    assert static_report.problems(GOOD, multiplying=True) == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"stack_bytes": 8}, "a stack of 8 bytes"),
        ({"spill_bytes": 4}, "4 bytes spilled"),
        ({"shared_bytes": (227 << 10) + 1}, "of shared memory"),
        ({"max_load_bits": 64}, "no load wider than 64 bits"),
        ({"min_load_bits": 16}, "loads of 16 bits"),
        ({"narrow_tiles": ["16 x 16 of 32 bits by 64"]}, "narrow loads: 16 x 16 of 32 bits by 64"),
        ({"matrix_instructions": 0}, "without matrix instructions"),
        ({"error": "CompilationError: x"}, "CompilationError"),
    ],
    ids=str,
)
def test_each_fault_is_refused(fault, words):
    (problem,) = static_report.problems(GOOD | fault, multiplying=True)
    assert words in problem


def test_faults_that_are_none_in_float32_or_unaligned_are_not_refused():
    assert not static_report.problems(GOOD | {"dtype": "float32", "matrix_instructions": 0, "min_load_bits": 16}, True)
    assert not static_report.problems(GOOD | {"row_bits": 16, "max_load_bits": 16, "min_load_bits": 16}, True)
    assert not static_report.problems(GOOD | {"matrix_instructions": 0}, False)


def test_the_committed_tables_are_of_these_sources():
    recorded = (static_report.COMMITTED / "SOURCES").read_text().strip()
    assert recorded == static_report.sources_hash(), (
        "kernels/ has changed since profiling/static/ was made: run `make static` and commit what it writes"
    )
