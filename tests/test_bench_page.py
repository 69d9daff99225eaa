"""The page of results: made of the committed files and of nothing else."""

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/ is not installed

from bench_results import IDS, Machine, document, results, row

from bench import baseline, files, gate, page, timing
from bench.presets import PRESETS

DOCS = files.ROOT / "docs"


def timings(ours: float, **peers: float) -> dict[str, timing.Timing]:
    return {name: timing.Timing((t * 0.98, *[t] * 6, t * 1.02), 1) for name, t in {"ours": ours, **peers}.items()}


def stated(preset: str, dtype: str, kind: str, **facts) -> files.Results:
    """One file of a few rows, as `python -m bench` would have measured them."""
    common = {"preset": preset, "dtype": dtype, "device": kind, "sizes": asdict(PRESETS[preset].sizes)}
    kept = {"eager_kept": {"median": 2.0, "ratio": {"value": 2.5, "low": 2.4, "high": 2.6, "certain": True}}}
    rows = [
        row("route/forward", timings(1e-3, eager=5e-3, compile=2e-3), memory=kept, **common),
        row("group_attention/forward", timings(1e-3, eager=12e-3, sdpa=9e-3, compile=7e-3), **common),
        row("route/forward/T=8", timings(4e-3, eager=40e-3), **common),
        row("route/forward/T=1", timings(1e-3, eager=2e-3), **common),
        row("router/forward", timings(1e-3, eager=2e-3), cost=None, achieved=None, limit=None, **common),
        row("step/none", timings(1.0, eager=2.0), cost=None, achieved=None, limit=None, **common),
        row("step/decode", timings(1.5, eager=4.5), cost=None, achieved=None, limit=None, **common),
    ]
    rows[0]["peers"]["eager"]["peak_bytes"] = 7_000_000
    rows[1]["peers"]["flash-attn"] = {"missing": "flash-attn is not installed"}
    rows[1]["peers"]["xformers"] = {"refused": "raised RuntimeError: no such kernel"}
    found = document(rows, **facts)
    lost = {**row("adapter/forward", timings(1.0), **common), "error": "does not fit: eager takes 9.0 GB"}
    del lost["ours"]
    return results({**found, "not_measured": [lost]})


@pytest.fixture(scope="module")
def cpu() -> files.Results:
    return stated("design", "float32", "cpu")


@pytest.fixture(scope="module")
def gpu() -> files.Results:
    return stated("gpu", "bfloat16", "cuda", device={"name": "A GPU", "class": "cuda-sm_90"})


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def cells(text: str, *begin: str) -> list[str]:
    """Of the first table row that begins with these."""
    for line in text.splitlines():
        found = [cell.strip() for cell in line.strip("|").split("|")]
        if found[: len(begin)] == list(begin):
            return found
    raise AssertionError(f"no row {begin}")


def test_committed_page_is_what_the_command_makes_of_the_committed_files():
    found, problems = page.read(files.RESULTS)
    assert not problems
    assert (DOCS / "results.md").read_text() == page.render(found), "run: python -m bench page"
    assert {path.name for path in (DOCS / "results").glob("*")} == set(page.pictures(found))


def test_every_picture_that_is_shown_is_made_and_the_other_way_round(cpu, gpu):
    shown = re.findall(r"\]\(results/(.*?)\)", page.render([cpu, gpu]))
    assert len(shown) == 6 and sorted(shown) == sorted(page.pictures([cpu, gpu]))


def test_targets_are_met_or_missed_and_the_gpus_not_measured(cpu):
    text = section(page.render([cpu]), "Targets")
    assert cells(text, "route", "forward", "eager")[3:] == ["4.50", "5.00 met"]
    assert cells(text, "route", "forward", "compile")[3:] == ["2.40", "2.00 MISSED"]
    assert cells(text, "group_attention", "forward", "eager or sdpa")[3:] == ["10.00", "9.00 MISSED"]
    assert cells(text, "leave_one_out", "forward", "eager")[3:] == ["11.00", "not measured"]
    second = text.partition("GPU")[2]
    assert cells(second, "route", "forward", "limit")[3:] == ["60%", "not measured"]


def test_gpu_columns_say_not_measured_until_a_gpus_file_is_there(cpu, gpu):
    without, both = (section(page.render(found), "CPU and GPU") for found in ([cpu], [cpu, gpu]))
    assert cells(without, "route", "forward")[5:] == ["not measured"] * 3
    assert cells(both, "route", "forward")[5:] == ["5.00 ±0%", "2.00 ±0% compile", "5% (bytes)"]
    assert cells(both, "adapter", "forward")[2:] == ["not measured"] * 6


def test_page_without_any_result_says_so():
    text = page.render([])
    assert "No results are committed." in text and "not measured" in text and "met" not in section(text, "Targets")


def test_times_are_for_gpus_alone(cpu, gpu):
    text = page.render([cpu, gpu])
    of_cpu, of_gpu = section(text, "cpu-x86_64-avx2-2c design float32"), section(text, "cuda-sm_90 gpu bfloat16")
    assert " us |" not in of_cpu and " ms" not in of_cpu
    head = cells(of_gpu, "", "ours")
    assert cells(of_gpu, "route forward")[head.index("us")] == "1000"


def test_curves_are_relative_to_our_first(cpu):
    text = section(page.render([cpu]), "cpu-x86_64-avx2-2c design float32")
    assert cells(text, "route forward", "T = 1, 8")[2:] == ["1.00, 4.00", "2.00 ±0%, 10.00 ±0%"]


def test_step_without_the_loss_is_quoted_where_it_was_interleaved(cpu):
    # The times of two rows are of different minutes: nothing is said of them.
    text = section(page.render([cpu]), "cpu-x86_64-avx2-2c design float32")
    assert cells(text, "mode") == ["mode", "eager", "peak, MB", "eager's"]
    assert cells(text, "decode") == ["decode", "3.00 ±0%", "3", ""] and page.STEPS not in text
    found = stated("design", "float32", "cpu")
    found.rows["step/decode"]["none"] = {"ratio": {"value": 0.8, "low": 0.76, "high": 0.82, "certain": True}}
    text = section(page.render([found]), "cpu-x86_64-avx2-2c design float32")
    assert cells(text, "mode") == ["mode", "none", "eager", "peak, MB", "eager's"] and page.STEPS in text
    assert cells(text, "decode") == ["decode", "0.80 ±5%", "3.00 ±0%", "3", ""]
    assert cells(text, "none") == ["none", "", "2.00 ±0%", "3", ""]


def test_memory_is_stated_beside_eagers_and_ratios_with_kept_memory(cpu):
    text = section(page.render([cpu]), "cpu-x86_64-avx2-2c design float32")
    head, found = cells(text, "", "ours"), cells(text, "route forward", "cpu")
    assert [found[head.index(name)] for name in ("peak, MB", "eager's", "kept")] == ["3", "7", "2.50 ±4%"]


def test_what_is_missing_is_named_with_its_rows(cpu):
    text = page.render([cpu])
    for line in (
        "- flash-attn: flash-attn is not installed (group_attention/forward)",
        "- xformers: raised RuntimeError: no such kernel (group_attention/forward)",
        "- does not fit: eager takes 9.0 GB (adapter/forward)",
    ):
        assert line in text.splitlines()
    assert cells(text, "adapter forward", "cpu")[2] == "does not fit: eager takes 9.0 GB"


def test_dirty_file_is_marked():
    found = stated("design", "float32", "cpu", dirty=True)
    assert "DIRTY" in section(page.render([found]), "Where")


def test_command_writes_the_same_twice_and_takes_old_pictures_away(tmp_path, capsys):
    machine = Machine(0)
    merged, _ = baseline.merge([results(machine.document(IDS[:8])) for _ in range(3)])
    baseline.write(merged, tmp_path / "in")
    broken = tmp_path / "in" / "cpu-x86_64-avx2-2c" / "broken.json"
    broken.write_text("{")
    old, other = (tmp_path / "out" / "results" / name for name in ("cpu-old-smoke-float32-ratios.svg", "logo.svg"))
    old.parent.mkdir(parents=True)
    for path in (old, other):
        path.write_text("<?xml")
    arguments = ["--results", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    made = []
    for _ in range(2):
        assert page.main(arguments) == 1  # one file is of no use, and the rest goes on
        made.append({path.name: path.read_text() for path in (tmp_path / "out").rglob("*.*") if path.is_file()})
    # What is not this page's stays.
    assert made[0] == made[1] and not old.exists() and other.exists()
    assert len(made[0]) == 5 and all(text.startswith("<?xml") for name, text in made[0].items() if name != "results.md")
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith(f"{broken}: not JSON") for line in errors)
    broken.unlink()
    assert page.main(arguments) == 0


def test_page_is_made_of_one_run_too(tmp_path, capsys):
    path = tmp_path / "in" / "cpu-x86_64-avx2-2c" / "smoke-float32.json"
    path.parent.mkdir(parents=True)
    run = Machine(0).document(IDS[:8])
    lost = {**row(IDS[8], timings(1.0)), "error": "does not fit: eager takes 9.0 GB"}
    checked = row(IDS[9], timings(1.0))  # as --benchmark-disable leaves it: outputs compared, nothing timed
    del lost["ours"], checked["ours"]
    run["benchmarks"] += document([checked])["benchmarks"]
    path.write_text(json.dumps({**run, "not_measured": [lost]}))
    assert page.main(["--results", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "results.md").read_text()
    assert cells(text, "cpu-x86_64-avx2-2c")[-1] == "1" and "±" in cells(text, "route forward", "cpu")[3]
    assert f"- does not fit: eager takes 9.0 GB ({IDS[8]})" in text.splitlines()
    # The gate has no noise from it, and says so in a line.
    report = gate.check(results(Machine(1).document(IDS[:8])), lambda names: {}, tmp_path / "in")
    assert report.failed and report.text == (
        f"gate: FAILED, {path}: not made by `python -m bench baseline`, so nothing is known of its noise"
    )


def test_figures_of_several_runs_are_their_median_and_targets_are_judged_on_each():
    runs = [stated("design", "float32", "cpu") for _ in range(3)]
    for run, factor in zip(runs, (1.0, 0.8, 1.2)):
        for name in list(run.rows)[2:]:  # of sizes that the preset does not have
            run.rows.pop(name)
        for each in run.rows.values():
            for peer in each["peers"].values():
                if "ratio" in peer:
                    peer["q1"] *= factor
    merged = results(baseline.merge(runs)[0])
    text = page.render([merged])
    route, attention = merged.rows["route/forward"]["runs"]["eager"]["ratio"], "group_attention"
    assert cells(text, "route", "forward", "eager") == ["route", "forward", "eager", "4.50", "5.00 met (2 of 3 runs)"]
    assert cells(text, attention, "forward", "eager or sdpa")[-1] == "9.00 MISSED (1 of 3 runs)"
    assert cells(text, attention, "forward", "compile")[-1] == "7.00 met (2 of 3 runs)"
    assert sorted(route) == pytest.approx([4, 5, 6]) and cells(text, "route forward", "cpu")[3] == "5.00 ±20%"


def test_a_folder_without_results_changes_nothing(tmp_path, capsys):
    assert page.main(["--results", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"{tmp_path / 'none'}: no results in it\n" and not (tmp_path / "out").exists()


def test_a_page_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert page.main(["--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"{tmp_path / 'file'}: File exists"


def test_page_says_what_the_gate_notices():
    names = [*IDS[:6], IDS[6]]  # six rows of route, one of leave_one_out

    def noticed(drift):
        machine = Machine(0, drift=drift)
        merged, _ = baseline.merge([results(machine.twice(names)) for _ in range(7)])
        then = results(merged)
        text = section(page.render([then]), "What the gate notices")
        found = {check.name: check for check in gate.checks(then.rows, then.rows)}
        for subject, name in (("route", "route, its 6 rows"), ("leave_one_out", IDS[6])):
            rows = str(len(found[name].peers))
            assert cells(text, subject) == [subject, rows, f"{math.exp(found[name].noticed):.2f}", ""]
        return found

    few, many = noticed(0.01), noticed(0.08)
    assert few["route, its 6 rows"].noticed < 0.5 * many["route, its 6 rows"].noticed
    assert "What the gate notices" not in page.render([results(Machine(0).document(names))])


def test_file_without_rows_is_a_line(tmp_path):
    path = tmp_path / "cpu-x86_64-avx2-2c" / "plain.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"machine_info": {}, "benchmarks": []}))
    assert page.read(tmp_path) == ([], [f"{path}: no rows of bench in it"])


# Of a clone whose commits were rewritten before they landed, as bench/README.md says.
REWRITTEN = {"bf3e8c76259776087702ad68c351d7c2310427c8"}


def test_revisions_of_committed_results_are_in_the_history():
    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", files.ROOT, *arguments], capture_output=True, text=True)

    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("no whole history is here")
    found = {files.load(path).machine["revision"] for path in files.RESULTS.glob("*/*.json")}
    assert found and REWRITTEN <= found
    for revision in found - REWRITTEN:
        assert git("merge-base", "--is-ancestor", revision, "HEAD").returncode == 0, revision
