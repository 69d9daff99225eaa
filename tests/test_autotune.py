"""The search of the autotune, with a clock of its own, and its refusal where there is no GPU."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tiger_fast import autotune
from tiger_fast._examples import Sizes, calls
from tiger_fast.kernels import config
from tiger_fast.kernels.config import Config
from tiger_fast.ops.triton import INTERPRETED

ROOT = Path(__file__).resolve().parents[1]
START = Config(rows=16, width=64, num_warps=4)


def test_neighbours_differ_in_one_field_and_stay_usable():
    for other in autotune.neighbours(START):
        assert sum(getattr(other, name) != getattr(START, name) for name in vars(START)) == 1
        assert 1 <= other.num_warps <= 16 and 1 <= other.num_stages <= 5 and other.rows >= 1 and other.width >= 1
    small = Config(rows=1, width=1, num_warps=1, num_stages=1, registers=0)
    assert all(min(o.rows, o.width, o.num_warps, o.num_stages) >= 1 for o in autotune.neighbours(small))


def test_the_search_walks_to_the_fastest():
    goal = Config(rows=64, width=128, num_warps=8)

    def measure(candidate: Config) -> float:
        return (
            1 + sum(getattr(candidate, name) != value for name, value in vars(goal).items()) + abs(candidate.rows - 64)
        )

    assert autotune.search(START, measure) == (goal, 1)


def test_the_search_passes_over_what_cannot_be_used_and_stays_for_little():
    def only_start(candidate: Config) -> float | None:
        return 1.0 if candidate == START else None

    assert autotune.search(START, only_start) == (START, 1.0)
    assert autotune.search(START, lambda c: 1.0 if c == START else 0.99) == (START, 1.0), "1 % is noise"
    with pytest.raises(RuntimeError, match="cannot be used"):
        autotune.search(START, lambda _: None)


def test_other_results_and_nan_do_not_agree():
    expected = [torch.ones(4)]
    assert autotune.agrees([torch.ones(4) + 1e-6], expected, torch.float32)
    assert not autotune.agrees([torch.ones(4) + 1e-2], expected, torch.float32)
    assert not autotune.agrees([torch.full((4,), torch.nan)], expected, torch.float32)


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter: set TRITON_INTERPRET=1")
def test_a_kernel_is_tuned_and_its_file_is_read_again(tmp_path):
    namespace = "tiger_fast_interpreted"
    forward, _ = calls("leave_one_out", Sizes(B=1, N=2, D=64, M=2, T=2), torch.float32, "cpu", namespace=namespace)
    count = itertools.count(1)

    def seconds_of(function):
        function()
        return 0.9 ** next(count)  # every later one is faster

    found = autotune.tune(forward, torch.float32, seconds_of, lambda _: None, namespace)
    ((key, best),) = found.items()
    assert key.startswith("leave_one_out sm_90 4 bytes D=64 M=2")
    assert best != config.choose("leave_one_out", torch.device("cpu"), torch.float32, D=64, M=2)
    config.save(tmp_path / "tuned.json", found, {"device": "none"})
    assert config.load(tmp_path / "tuned.json") == found
    assert json.loads((tmp_path / "tuned.json").read_text())["measured_on"] == {"device": "none"}


def test_what_gives_other_results_or_raises_is_not_chosen_however_fast():
    def operator(_: str) -> torch.Tensor:
        chosen = config.choose("leave_one_out", torch.device("cpu"), torch.float32, D=64, M=2)
        if chosen.num_warps > start.num_warps:
            raise ValueError("out of resources")
        return torch.full((4,), 2.0 if chosen.width < start.width else 1.0)

    def seconds_of(_) -> float:
        chosen = config.choose("leave_one_out", torch.device("cpu"), torch.float32, D=64, M=2)
        return 0.1 if chosen.width < start.width or chosen.num_warps > start.num_warps else 1 / chosen.rows

    operator.name = "made up"
    start = config.choose("leave_one_out", torch.device("cpu"), torch.float32, D=64, M=2)
    said = []
    ((_, best),) = autotune.tune(operator, torch.float32, seconds_of, said.append).items()
    assert best.rows > start.rows and (best.width, best.num_warps) == (start.width, start.num_warps)
    assert any("other results" in line for line in said) and any("ValueError" in line for line in said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_ends_with_2(tmp_path):
    command = [
        sys.executable,
        "-m",
        "tiger_fast.autotune",
        "--op",
        "route",
        "--out",
        str(tmp_path / "tuned.json"),
    ]
    command += ["--shape", "B=32,N=1024,D=768,M=4,T=5,R=32", "--dtype", "bfloat16"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "there is no GPU here" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_size_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        autotune.main(["--op", "route", "--out", "x", "--shape", "B=32,Z=1"])
    assert "no size is called Z" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        autotune.main(["--op", "route", "--out", "x", "--shape", "N=x"])
    assert "numbers by name" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        autotune.main(["--op", "route", "--out", "nowhere/x"])
    assert "no file in a folder that exists" in capsys.readouterr().err


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter: set TRITON_INTERPRET=1")
def test_what_changes_no_launch_is_measured_once():
    namespace = "tiger_fast_interpreted"
    forward, _ = calls("leave_one_out", Sizes(B=1, N=2, D=64, M=2, T=2), torch.float32, "cpu", namespace=namespace)
    said = []
    autotune.tune(forward, torch.float32, lambda function: 1.0, said.append, namespace)
    tried = [line for line in said if "Config(" in line and "best" not in line]
    # Of the fields the kernel takes rows, width, warps, stages, registers and experts.
    assert 2 < len(tried) <= 1 + 2 * 6
    assert not any("one_pass=True" in line for line in tried)
