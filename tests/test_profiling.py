"""profiling/: that what needs a GPU says so where there is none and that its dry runs run; the scripts with stand-ins for
NVIDIA's tools; the reports on recorded files."""

import csv
import glob
import json
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from commands import RECORDED, run

from profiling import ncu_report, roofline  # noqa: E402
from tiger_fast.ops import triton  # noqa: E402

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@no_gpu
def test_without_a_gpu_the_host_cost_says_so_and_ends_with_2():
    done = run(sys.executable, "-m", "profiling.host_cost")
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


SCRIPTS = ("gpu_check", "ncu", "nsys")


@pytest.mark.parametrize("name", [*SCRIPTS, "tool"])
def test_a_script_is_one_that_bash_reads(name):
    assert run("bash", "-n", f"profiling/{name}.sh").returncode == 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_without_arguments_says_what_it_takes(name):
    done = run("bash", f"profiling/{name}.sh")
    assert done.returncode == 64 and f"usage: profiling/{name}.sh" in done.stderr


def test_the_host_cost_has_a_row_for_each_function_and_a_time_for_each_layer():
    options = ("--rounds", "20", "--op", "leave_one_out", "alignment_loss")
    done = run(sys.executable, "-m", "profiling.host_cost", *options, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["leave_one_out", "alignment_loss"]
    assert all(len(row) == 6 and min(map(float, row[1:5])) > 0 for row in rows)


def test_the_tests_for_a_gpu_run_dry():
    # One of each kind, of what the interpreter does fastest.
    chosen = "causal_target and not (sharp or expert or float16) or alignment_loss and through"
    options = ("-q", "-m", "gpu", "-k", chosen, "-o", "addopts=", "-p", "no:cacheprovider")
    command = (sys.executable, "-m", "pytest", "tests/test_gpu.py", "tests/test_conformance.py", *options)
    done = run(*command, TIGER_FAST_GPU_DRY_RUN="1")
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 20, done.stdout[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_check_runs_dry(tmp_path):
    done = run("bash", "profiling/gpu_check.sh", tmp_path, GPU_CHECK_DRY_RUN="1")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "STOPPED" not in done.stdout and "FAILED" not in done.stdout
    assert "| leave_one_out/forward " in done.stdout
    assert len(list(tmp_path.iterdir())) <= 8 and json.loads((tmp_path / "times.json").read_text())["benchmarks"]
    assert "leave_one_out_backward" in (tmp_path / "kernels.txt").read_text()


# --- nsys.sh and ncu.sh, with stand-ins on PATH --------------------------------------------------------------------------


# Both note their arguments, one a line, and the environment that the scripts owe them.
NCU = """#!/usr/bin/env bash
printf '%s\\n' "nvtx=$TIGER_FAST_NVTX" "$@" >>"$SEEN"
while [ $# -gt 0 ]; do
    [ "$1" != --log-file ] || cp "$RECORDING" "$2"
    shift
done
exit "${ENDS_WITH:-0}"
"""
NSYS = """#!/usr/bin/env bash
printf '%s\\n' "nvtx=$TIGER_FAST_NVTX" "$@" >>"$SEEN"
command=$1 output= format=
while [ $# -gt 0 ]; do
    [ "$1" != --output ] || output=$2
    [ "$1" != --format ] || format=$2
    shift
done
case $command.$format in
    profile.) echo report >"$output.nsys-rep" ;;
    stats.csv) echo sums >"${output}_cuda_gpu_kern_sum.csv" ;;
    stats.table) echo "the table" ;;
esac
"""
# Finds a GPU wherever it is asked, and is Python otherwise.
PYTHON = f"""#!/usr/bin/env bash
[ "$1" != -c ] || exit 0
exec {sys.executable} "$@"
"""


@pytest.fixture
def stand_ins(tmp_path):
    """Runs a script with them; what it returned and what the tool was called with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("ncu", NCU), ("nsys", NSYS), ("python", PYTHON)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    def script(name: str, *arguments: object, **env: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        variables = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python")}
        variables |= {"SEEN": str(tmp_path / "seen"), "RECORDING": str(RECORDED / "route.ncu.csv")}
        done = run("bash", f"profiling/{name}.sh", *arguments, **variables | env)
        seen = tmp_path / "seen"
        return done, seen.read_text().splitlines() if seen.exists() else []

    return script


def test_ncu_counts_what_bench_once_runs_and_reports_it(stand_ins, tmp_path):
    out = tmp_path / "out"
    done, seen = stand_ins("ncu", "route/forward+backward", "--out", out, "--shape", "B=16", "--backend", "triton")
    assert done.returncode == 0, done.stderr
    assert seen[0] == "nvtx=1" and "--nvtx" in seen
    for option, value in (("--profile-from-start", "off"), ("--page", "raw"), ("--print-units", "base")):
        assert seen[seen.index(option) + 1] == value
    once = seen[seen.index("-m") :]
    assert once[:4] == ["-m", "bench", "once", "route/forward+backward"]
    assert once[4:] == ["--shape", "B=16", "--backend", "triton", "--preset", "gpu", "--device", "cuda"]
    # Every metric that the report reads is asked for, and nothing that it does not know.
    metrics = seen[seen.index("--metrics") + 1].split(",")
    known = ncu_report.read(RECORDED / "route.ncu.csv").kernels[0].metrics
    assert set(metrics) == set(known) and len(metrics) == len(set(metrics))
    assert "THESE NUMBERS ARE NOT OF A REAL RUN" in done.stdout and "tensor cores (72% of its peak)" in done.stdout
    stem = out / "route.forward+backward.ncu"
    document = json.loads(stem.with_name(stem.name + ".json").read_text())
    assert document["synthetic"] and len(document["kernels"]) == 5
    # Half the preset's batch, half its floor but for the parameters.
    assert document["operators"]["route"]["floor"] == pytest.approx(507.22e6 / 2, rel=0.01)


def test_ncu_takes_several_benchmarks(stand_ins, tmp_path):
    done, seen = stand_ins(
        "ncu", "route/forward", "leave_one_out/forward", "--out", tmp_path / "out", "--preset", "smoke"
    )
    assert done.returncode == 0, done.stderr
    once = seen[seen.index("once") + 1 :]
    assert once == ["route/forward", "leave_one_out/forward", "--preset", "smoke", "--device", "cuda"]
    assert (tmp_path / "out" / "route.forward.and-1-more.ncu.csv").exists()


def test_ncu_that_fails_is_said_to_have_failed(stand_ins, tmp_path):
    done, _ = stand_ins("ncu", "route/forward", "--out", tmp_path / "out", ENDS_WITH="9")
    assert done.returncode == 1 and "ncu ended with 9" in done.stderr


def test_once_runs_benchmark_after_benchmark():
    options = ("--device", "cpu", "--shape", "N=16", "--table")
    done = run(sys.executable, "-m", "bench", "once", "leave_one_out/forward", "route/forward", *options)
    assert done.returncode == 0, done.stderr
    heads = [line.split(":")[0] for line in done.stdout.splitlines() if not line.startswith((" ", "USDT"))]
    assert heads == ["leave_one_out/forward", "route/forward"]


def test_nsys_captures_the_range_and_writes_its_sums(stand_ins, tmp_path):
    out = tmp_path / "out"
    done, seen = stand_ins("nsys", "step/decode", "--out", out)
    assert done.returncode == 0, done.stderr
    assert seen[:2] == ["nvtx=1", "profile"]
    for option, value in (("--capture-range", "cudaProfilerApi"), ("--trace", "cuda,nvtx")):
        assert seen[seen.index(option) + 1] == value
    assert seen[seen.index("once") + 1] == "step/decode"
    assert {path.name for path in out.iterdir()} >= {"step.decode.nsys-rep", "step.decode_cuda_gpu_kern_sum.csv"}
    assert done.stdout.splitlines() == ["the table", str(out / "step.decode.nsys-rep")]


@pytest.mark.parametrize("name", ["ncu", "nsys"])
def test_what_a_script_does_not_take_is_refused(stand_ins, tmp_path, name):
    for wrong in (["--table", "1"], ["--shape"], ["--out"]):
        done, seen = stand_ins(name, "route/forward", *wrong)
        assert done.returncode == 64 and wrong[0] in done.stderr and not seen
    # A time line ends with the first benchmark's range.
    done, seen = stand_ins("nsys", "route/forward", "route/forward+backward", "--out", tmp_path / "out")
    assert done.returncode == 64 and not seen


@no_gpu
@pytest.mark.parametrize("name", ["ncu", "nsys"])
def test_a_script_without_a_gpu_ends_with_2(stand_ins, tmp_path, name):
    done, seen = stand_ins(name, "route/forward", "--out", tmp_path / "out", PYTHON=sys.executable)
    assert done.returncode == 2 and not seen
    assert len(done.stderr.splitlines()) == 1 and "there is no GPU here" in done.stderr


@pytest.mark.parametrize("name", ["ncu", "nsys"])
def test_a_script_without_its_tool_ends_with_2(tmp_path, name):
    if any(glob.glob(place) for place in (f"/usr/local/cuda/bin/{name}", f"/opt/nvidia/nsight-*/*/{name}")):
        pytest.skip(f"{name} is here")
    done = run("bash", f"profiling/{name}.sh", "route/forward", "--out", tmp_path / "out")
    assert (
        done.returncode == 2 and done.stderr.startswith(f"{name} is not found") and len(done.stderr.splitlines()) == 1
    )


# --- the report on ncu's CSV ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recording():
    return ncu_report.read(RECORDED / "route.ncu.csv")


def test_a_recording_that_is_no_real_run_says_so_and_its_comment_is_no_table(recording):
    assert recording.synthetic.startswith("SYNTHETIC") and len(recording.kernels) == 5
    for path in RECORDED.iterdir():
        first = path.read_text().splitlines()[0]
        assert first.startswith("# SYNTHETIC") or first.startswith("# started on"), path


def test_kernels_have_bytes_shares_and_the_operator_of_their_range(recording):
    factors, forward, gradients, products, other = ncu_report.rows(recording)
    assert [row.operator for row in (factors, forward, gradients, products, other)] == [
        "route",
        "route",
        "route_backward",
        "route_backward",
        None,
    ]
    assert forward.bytes == 268_500_000 + 255_100_000 and forward.seconds == pytest.approx(214e-6)
    assert forward.bandwidth == pytest.approx(forward.bytes / 214e-6 / 3.35e12)
    assert (forward.tensor, forward.occupancy, forward.registers) == pytest.approx((0.285, 0.246, 168))
    assert gradients.local == 2048 + 4096 and other.tensor is None  # "n/a" in the file
    assert forward.peaks["tensor cores, bf16 and fp16"] == 9.894e14 and forward.peaks["bandwidth"] == 3.35e12


def test_the_first_limiter_is_named_with_its_reason(recording):
    found = [row.limiter for row in ncu_report.rows(recording)]
    assert found[0].startswith("too few programs (0.05 waves")
    assert found[1] == "device memory (73% of its peak)"
    assert found[2] == "latency: long scoreboard (48% of a warp's time); occupancy held by registers (1 programs)"
    assert found[3] == "tensor cores (72% of its peak)"


def test_without_stalls_the_limiter_is_not_guessed():
    assert ncu_report.limiter({}).startswith("not known")


def test_launches_of_a_kernel_are_added_and_their_shares_weighted_by_time():
    share = "sm__warps_active.avg.pct_of_peak_sustained_active"
    launches = [
        ncu_report.Kernel("k", "op", "", {"gpu__time_duration.sum": time, share: percent})
        for time, percent in ((1e-6, 10.0), (3e-6, 50.0))
    ]
    (row,) = ncu_report.rows(ncu_report.Recording(launches))
    assert row.launches == 2 and row.seconds == 4e-6 and row.occupancy == pytest.approx(0.4) and row.bytes is None


def test_the_page_with_a_row_for_each_metric_reads_the_same(recording, tmp_path):
    with (RECORDED / "route.ncu.csv").open() as file:
        table = list(csv.reader(line for line in file if line.startswith('"')))
    head, units, *body = table
    fixed = head[:13]
    path = tmp_path / "long.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow([*fixed, "Section Name", "Metric Name", "Metric Unit", "Metric Value"])
        for row in body:
            for name, unit, value in zip(head[13:], units[13:], row[13:]):
                # As it is without --print-units base.
                scaled = (f"{float(value.replace(',', '')) / 1e3:f}", "us") if unit == "ns" else (value, unit)
                writer.writerow([*row[:13], "Command line profiler metrics", name, scaled[1], scaled[0]])
    found = ncu_report.read(path)
    assert found.synthetic is None and len(found.kernels) == len(recording.kernels)
    for ours, theirs in zip(found.kernels, recording.kernels):
        assert (ours.symbol, ours.operator) == (theirs.symbol, theirs.operator)
        assert ours.metrics == pytest.approx(theirs.metrics)


def test_several_tables_in_a_file_are_read_one_after_the_other(recording, tmp_path):
    text = (RECORDED / "route.ncu.csv").read_text()
    (tmp_path / "two.csv").write_text(text + text)
    assert len(ncu_report.read(tmp_path / "two.csv").kernels) == 10


def test_kernels_without_a_range_go_to_the_only_operator_that_has_their_symbol():
    kernels = [ncu_report.Kernel(symbol, None, "", {}) for symbol in ("_forward", "_factors", "other")]
    symbols = {"route": ("_factors", "_forward"), "leave_one_out": ("_forward",)}
    found = ncu_report.resolved(ncu_report.Recording(kernels), symbols).kernels
    assert [kernel.operator for kernel in found] == [None, "route", None]


def test_the_report_compares_an_operators_kernels_with_the_floor_and_draws(tmp_path):
    png = tmp_path / "roofline.png"
    done = run(
        sys.executable, "-m", "profiling.ncu_report", RECORDED / "route.ncu.csv", "route/forward+backward", "--png", png
    )
    assert done.returncode == 0, done.stderr
    assert "route: 525.52 MB moved, at least 507.22 MB to move: 1.04x the floor" in done.stdout
    assert "route_backward: 1006.10 MB moved" in done.stdout
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_file_that_is_none_of_ncus_is_one_clear_line(tmp_path):
    (tmp_path / "empty.csv").write_text("==ERROR== ERR_NVGPUCTRPERM: no permission to read the counters\n")
    for code, *arguments in (
        (1, tmp_path / "empty.csv"),
        (1, tmp_path / "nowhere.csv"),
        (64, RECORDED / "route.ncu.csv", "rout/forward"),
    ):
        done = run(sys.executable, "-m", "profiling.ncu_report", *arguments)
        assert done.returncode == code and len(done.stderr.splitlines()) == 1, done.stderr
    assert "ERR_NVGPUCTRPERM" in run(sys.executable, "-m", "profiling.ncu_report", tmp_path / "empty.csv").stderr


def test_a_roofline_without_counts_is_no_picture(tmp_path):
    path = tmp_path / "none.png"
    assert roofline.draw(path, "", 1e12, {"units": 1e12}, [roofline.Point("a", 0, 1, 1)], "").startswith("no roofline")
    assert roofline.draw(path, "", 0, {}, [roofline.Point("a", 1, 1, 1)], "").startswith("no roofline")
    assert not path.exists()


# --- names ---------------------------------------------------------------------------------------------------------------


def test_every_benchmark_is_mapped_to_the_kernels_that_its_launchers_record():
    done = run(sys.executable, "-m", "profiling.names", "--json")
    assert done.returncode == 0, done.stderr
    uses = json.loads(done.stdout)
    by_id = {}
    for use in uses:
        by_id.setdefault(use["id"], {})[use["operator"]] = use
    # What Triton fuses, forward and backward, each under its own id.
    for op in triton.NATIVE:
        assert set(by_id[f"{op}/forward"]) == {op}
        assert set(by_id[f"{op}/forward+backward"]) == {op, f"{op}_backward"}
    assert all(use["kernels"] and len(use["kernels"]) == len(use["symbols"]) for use in uses)
    assert all((use["floor_bytes"] is not None) == (use["id"].partition("/")[0] in triton.NATIVE) for use in uses)
    assert {"route", "leave_one_out", "alignment_loss_backward"} <= set(by_id["step/decode"])
    assert by_id["head/forward"]["group_attention_packed"]["calls"] == 2  # among experts and among tasks


def test_names_depend_on_the_sizes_and_an_unknown_id_is_one_line():
    few = run(sys.executable, "-m", "profiling.names", "group_attention/forward")
    many = run(sys.executable, "-m", "profiling.names", "group_attention/forward/G=32")
    assert "forward_by_elements" in few.stdout and "forward_by_products" in many.stdout
    wrong = run(sys.executable, "-m", "profiling.names", "rout/forward")
    assert wrong.returncode == 64 and len(wrong.stderr.splitlines()) == 1 and "route" in wrong.stderr
