"""The programs that need a GPU: that they say so where there is none, and that their dry runs run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def run(*command: object, **env: str) -> subprocess.CompletedProcess:
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    variables |= {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable} | env
    return subprocess.run([str(c) for c in command], cwd=ROOT, env=variables, capture_output=True, text=True)


@no_gpu
@pytest.mark.parametrize("module", ["profiling.host_cost"])
def test_without_a_gpu_a_program_says_so_and_ends_with_2(module):
    done = run(sys.executable, "-m", module)
    assert done.returncode == 2 and "there is no GPU here" in done.stderr


@no_gpu
def test_without_a_gpu_the_check_says_so_and_ends_with_2(tmp_path):
    done = run("bash", "profiling/gpu_check.sh", tmp_path / "out")
    assert done.returncode == 2 and "there is no GPU here" in done.stderr
    assert "there is no GPU here" in (tmp_path / "out" / "summary.txt").read_text()


def test_without_a_compiler_the_check_says_so_and_ends_with_2(tmp_path):
    # `true` in Python's place finds that there is a GPU.
    done = run("bash", "profiling/gpu_check.sh", tmp_path / "out", PYTHON="true", CC="/nonexistent")
    assert done.returncode == 2 and "there is no C compiler (/nonexistent) here" in done.stderr


def test_the_check_is_a_script_that_bash_reads():
    assert run("bash", "-n", "profiling/gpu_check.sh").returncode == 0
    assert run("bash", "profiling/gpu_check.sh").returncode == 64


def test_the_host_cost_has_a_row_for_each_function_and_layers_that_add_up():
    options = ("--rounds", "20", "--op", "leave_one_out", "alignment_loss")
    done = run(sys.executable, "-m", "profiling.host_cost", *options, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["leave_one_out", "alignment_loss"]
    for launcher, operator, function, gradients in (map(float, row[1:5]) for row in rows):
        assert 0 < launcher < operator < function and gradients > operator


def test_the_tests_for_a_gpu_run_dry():
    # One of each kind, of what the interpreter does fastest.
    chosen = "causal_target and not (sharp or expert or float16) or alignment_loss and through"
    options = ("-q", "-m", "gpu", "-k", chosen, "-o", "addopts=", "-p", "no:cacheprovider")
    command = (sys.executable, "-m", "pytest", "tests/test_gpu.py", "tests/test_conformance.py", *options)
    done = run(*command, TIGER_FAST_GPU_DRY_RUN="1")
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 20, done.stdout[-4000:]
