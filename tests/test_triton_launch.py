"""What a launch is specialised on, without compiling: another B, N or layout is no other kernel; and the choice of
configurations."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from helpers import make, transform
from native import raw_calls
from paths import FEW, PATHS

from profiling.static_report import OPS, launches_of
from tiger_fast._examples import Call, calls, gpu_sizes
from tiger_fast.kernels import config
from tiger_fast.ops import triton

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def specializations() -> dict[str, dict[str, list[str]]]:
    """By operator, type and kernel, and by layout: see launch_child.py."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "launch_child.py")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


# Kernels over rows of any leading dimensions, which take these in as few as the layout allows, from one to three (B, T, N):
# so many kernels, one for every layout.
ROWS = ("adapter", "alignment", "norm")


def several(specializations: dict, layouts: tuple[str, ...], allowed: Callable[[str], int]) -> str:
    """What has more specialisations than are allowed, with two of each."""
    lines = []
    for name, found in specializations.items():
        keys = list(dict.fromkeys(key for layout in layouts for key in found.get(layout, ())))
        if len(keys) > allowed(name):
            lines += [f"{name}: {len(keys)}", *keys[:2]]
    return "\n".join(lines)


def test_another_batch_or_number_of_tokens_compiles_nothing(specializations):
    assert {name.split()[0] for name in specializations} == {name for op in OPS for name in (op, f"{op}_backward")}
    found = several(specializations, ("contiguous",), lambda name: 1)
    assert not found, found


def test_views_with_aligned_rows_run_the_same_kernels(specializations):
    def allowed(name: str) -> int:
        return 3 if name.split()[-1].startswith(ROWS) else 1

    found = several(specializations, ("contiguous", "views"), allowed)
    assert not found, found


def test_no_float_argument_is_a_float64(specializations):
    keys = [key for found in specializations.values() for keys in found.values() for key in keys]
    assert not [key for key in keys if "fp64" in key.replace("*fp64", "")]
    assert any("'fp32'" in key for key in keys), "and some are float32"


# --- configurations -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No choice from before, and none left behind."""
    monkeypatch.delenv("TIGER_FAST_TUNED", raising=False)
    config.reload()
    yield
    config.assume(None)
    config.reload()


def choose() -> config.Config:
    return config.choose("leave_one_out", torch.device("meta"), torch.bfloat16, D=768, M=4)


def test_a_tuned_file_goes_before_the_heuristic(tmp_path, monkeypatch):
    tuned = config.Config(rows=1, width=16, num_warps=1, num_stages=5)
    config.save(tmp_path / "tuned.json", {"leave_one_out sm_90 2 bytes D=768 M=4": tuned}, {"device": "made up"})
    heuristic = choose()
    monkeypatch.setenv("TIGER_FAST_TUNED", str(tmp_path / "tuned.json"))
    config.reload()
    assert choose() == tuned != heuristic
    config.assume("sm_80")
    assert choose() != tuned, "it is of another architecture"
    config.assume(None)
    assert config.choose("leave_one_out", torch.device("meta"), torch.float32, D=768, M=4) != tuned, "of another type"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "configs"),
        ('{"configs": []}', "AttributeError"),
        ('{"configs": {"a kernel": {"rows": 1, "group": 2}}}', "'a kernel'.*group"),
        (
            '{"configs": {"a kernel": {"rows": 1, "width": "x", "num_warps": 4}}}',
            "'a kernel'.*width is no whole number",
        ),
    ],
)
def test_a_tuned_file_that_is_none_is_named(content, words, tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("TIGER_FAST_TUNED", str(path))
    config.reload()
    with pytest.raises(ValueError, match=rf"tuned\.json.*{words}"):
        choose()
    assert str(path) in triton.describe(), "it is the one in effect"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), "sm_80"),
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((12, 0), "sm_100"),
    ],
    ids=str,
)
def test_an_unknown_architecture_is_taken_for_the_newest_older_one(capability, expected, monkeypatch):
    major, minor = capability
    properties = SimpleNamespace(major=major, minor=minor, multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    config._architecture_of.cache_clear()
    assert config.architecture(CUDA).name == expected
    config._architecture_of.cache_clear()


@pytest.mark.parametrize(
    ("given", "expected", "warp", "tf32"),
    [
        ("gfx942:sramecc+:xnack-", "gfx942", 64, True),
        ("gfx90a:sramecc+:xnack-", "gfx90a", 64, False),
        ("gfx1100", "gfx1100", 32, False),
    ],
)
def test_devices_of_rocm_are_known_by_name_and_what_is_unknown_does_least(given, expected, warp, tf32, monkeypatch):
    properties = SimpleNamespace(major=9, minor=4, gcnArchName=given, warp_size=warp)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    config._architecture_of.cache_clear()
    found = config.architecture(CUDA)
    assert (found.name, found.warp, found.tf32) == (expected, warp, tf32)
    config._architecture_of.cache_clear()


def memory_of(call: Call) -> int:
    """Bytes of what a call's kernels are given that the call was not: its results and its scratch."""
    given = {t.untyped_storage()._cdata for t in tree_leaves(call.arguments) if isinstance(t, torch.Tensor)}
    tensors = [t for launch in launches_of(call) for t in tree_leaves(launch.arguments) if isinstance(t, torch.Tensor)]
    made = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(size for storage, size in made.items() if storage not in given)


@pytest.mark.parametrize("op", OPS)
def test_memory_grows_with_tokens_and_not_with_the_samples_they_are_of(op):
    few, many = (calls(op, gpu_sizes(op, B=batch, N=32768 // batch), torch.bfloat16) for batch in (32, 32768))
    for one, other in zip(few, many, strict=True):
        # A block of tokens has sums of its own, and samples of one token are a block each.
        assert memory_of(other) <= 1.5 * memory_of(one), other.name


@pytest.mark.parametrize("op", OPS)
def test_no_choice_depends_on_the_batch_or_on_tokens(op):
    chosen = defaultdict(set)
    for batch, tokens in ((1, 1), (1, 7), (3, 16), (32, 1024), (1, 65536)):
        for call in calls(op, gpu_sizes(op, B=batch, N=tokens), torch.bfloat16):
            with config.trying({}) as made:
                launches_of(call)
            chosen[call.name].add(frozenset(made.items()))
    assert all(len(found) == 1 for found in chosen.values())


@pytest.mark.parametrize("what", PATHS)
def test_the_paths_that_are_checked_on_a_gpu_are_taken(what):
    path = PATHS[what]
    for dtype in (torch.float32, torch.bfloat16):
        arguments = transform(lambda t: t.to("meta"), make(path.name, dtype, **(FEW | path.sizes)))
        made = [
            Call(op.name().split("::")[1], tuple(values)) for op, values in raw_calls(path.name, arguments, "triton")
        ]
        launched = [launch for call in made for launch in launches_of(call)]
        for name, holds in path.takes.items():
            found = [launch.constants for launch in launched if launch.kernel.fn.__name__ == name]
            assert found and all(map(holds, found)), (name, dtype, [launch.kernel.fn.__name__ for launch in launched])
