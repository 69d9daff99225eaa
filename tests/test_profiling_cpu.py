"""profiling.cpu_report: counters as perf writes them, and the report of a benchmark. What needs no Triton, or has none."""

import json
import os
import sys

import pytest
from commands import RECORDED, run

from profiling import cpu_report


def test_counters_that_the_machine_lacks_are_named():
    found = cpu_report.parse((RECORDED / "route.forward.perf.csv").read_text())
    assert found.synthetic is None and found.misses() is None
    assert {"cycles", "instructions", "LLC-load-misses"} <= set(found.lacking) and found.values["page-faults"] > 0
    text = "\n".join(cpu_report.counted_lines(found, 1e-3, 1e10, None))
    assert "this machine does not count: cycles" in text and "GB/s" not in text


def test_counters_give_bytes_of_a_call_and_say_that_they_are_no_real_run(monkeypatch):
    monkeypatch.setattr(cpu_report, "line_bytes", lambda: 64)
    found = cpu_report.parse((RECORDED / "counters.perf.csv").read_text())
    assert found.calls == 10 and found.misses() == ("LLC-load-misses + LLC-store-misses", 5e6)
    first, cycles, moved, faults, lacking = cpu_report.counted_lines(found, 0.01, 1e10, 16_000_000)
    assert first.startswith("THESE COUNTS ARE NOT OF A REAL RUN") and "1.50 for each cycle" in cycles
    assert moved.startswith("32.00 MB") and moved.endswith("3.20 GB/s, 32% of the copy, 2.00x the floor")
    assert faults == "25 page faults" and lacking.endswith("cache-misses")


def test_what_is_no_output_of_perf_is_refused():
    with pytest.raises(ValueError, match="perf stat"):
        cpu_report.parse("cycles: many\n")
    with pytest.raises(ValueError, match="0 calls"):
        cpu_report.parse("100,,cycles,1,100.00,,\n# calls: 0\n")


def test_without_perf_the_reason_is_given(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cpu_report.count(lambda: None, 1, tmp_path / "perf.csv", "it") == "perf is not installed"


def test_a_perf_that_refuses_is_quoted_and_does_not_hang(monkeypatch, tmp_path):
    (tmp_path / "perf").write_text("#!/bin/sh\necho 'no access to performance counters' >&2\nexit 1\n")
    (tmp_path / "perf").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    # What an earlier run counted is not this one's.
    (tmp_path / "perf.csv").write_text("100,,cycles,1,100.00,,\n")
    why = cpu_report.count(lambda: None, 1, tmp_path / "perf.csv", "it")
    assert why == "perf stat counted nothing: no access to performance counters"


def test_the_report_for_a_cpu_has_operators_limits_counters_and_a_picture(tmp_path):
    options = ("--preset", "smoke", "--seconds", "0.05", "--out", tmp_path, "--json", tmp_path / "report.json")
    done = run(sys.executable, "-m", "profiling.cpu_report", "leave_one_out/forward", *options)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for row in document["ranges"]] == ["tiger_fast.leave_one_out"]
    assert document["operators"] and document["limit"]["copy_bandwidth"] > 0
    assert document["counters"] or document["uncounted"]
    assert (tmp_path / "leave_one_out.forward.cpu.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_for_a_cpu_takes_recorded_counters(tmp_path):
    options = (
        "--preset",
        "smoke",
        "--seconds",
        "0.05",
        "--out",
        tmp_path,
        "--counters",
        RECORDED / "counters.perf.csv",
    )
    done = run(sys.executable, "-m", "profiling.cpu_report", "leave_one_out/forward", *options)
    assert done.returncode == 0 and "THESE COUNTS ARE NOT OF A REAL RUN" in done.stdout, done.stderr
    wrong = run(sys.executable, "-m", "profiling.cpu_report", "leave_on_out/forward", *options)
    assert wrong.returncode == 64 and len(wrong.stderr.splitlines()) == 1


def test_counters_of_another_benchmark_are_refused(tmp_path, capsys):
    path = tmp_path / "perf.csv"
    path.write_text("100,,cycles,1,100.00,,\n# calls: 5\n# of: leave_one_out/forward: it\n")
    assert cpu_report.main(["route/forward", "--preset", "smoke", "--counters", str(path)]) == 1
    assert capsys.readouterr().err == f"{path} is of leave_one_out/forward: it\n"


@pytest.mark.parametrize("option", ["--counters", "--out"])
def test_a_file_that_is_something_else_is_one_line(option, tmp_path, capsys):
    path = tmp_path / "notes.md"
    path.write_text("cycles, as they are called, are counted\n")
    assert cpu_report.main(["confidence_loss/forward", "--preset", "smoke", option, str(path)]) == 1
    wanted = {"--counters": "there is no line of `perf stat -x,` in it", "--out": f"{path}: File exists"}
    assert capsys.readouterr().err == f"{wanted[option]}\n"


@pytest.mark.parametrize("wrong", [("--preset", "smok"), ("--dtype", "int8"), ("--shape", "Q=1")])
def test_what_there_is_not_is_one_line(wrong, capsys):
    assert cpu_report.main(["route/forward", *wrong]) == 64
    assert len(capsys.readouterr().err.splitlines()) == 1


WITHOUT_TRITON = """import runpy, sys
sys.modules["triton"] = None
runpy.run_module("profiling." + sys.argv.pop(1), run_name="__main__")"""


def test_what_ncu_wrote_is_read_without_triton(tmp_path):
    png = tmp_path / "roofline.png"
    done = run(sys.executable, "-c", WITHOUT_TRITON, "ncu_report", RECORDED / "route.ncu.csv", "--png", png)
    assert done.returncode == 0 and "first limiter" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("ncu_report", RECORDED / "route.ncu.csv", "route/forward"),
        ("names", "route/forward"),
        ("static_report",),
        ("host_cost",),
    ],
    ids=lambda command: command[0],
)
def test_without_triton_what_needs_it_is_one_line(command):
    done = run(sys.executable, "-c", WITHOUT_TRITON, *command)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
