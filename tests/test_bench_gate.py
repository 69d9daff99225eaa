"""The gate's statistic on machines whose noise is known, baselines, and what a file can be wrong in: nothing here is timed."""

import dataclasses
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/ is not installed

from bench_results import IDS, SIZES, SUBJECTS, Machine, document, results, row, with_kept

from bench import again, baseline, calibrate, compare, conftest, files, gate, slowed, timing

CLASS = "cpu-x86_64-avx2-2c"


def baseline_of(machine: Machine, runs: int = 7, **keywords) -> files.Results:
    return results(baseline.merge([results(machine.twice(**keywords)) for _ in range(runs)])[0], "baseline.json")


def judged(then: files.Results, machine: Machine) -> list[gate.Check]:
    now = results(machine.document())
    return gate.judge(gate.checks(then.rows, now.rows), machine.again)


def slower(found: list[gate.Check]) -> list[str]:
    return [check.name for check in found if check.slower]


# -- the two rates -----------------------------------------------------------------------------------------------------

# Rounds of 3 % noise and more, one in ten hit by a burst, and ratios that drift by 1 to 4 % from run to run: for each
# measurement anew, for a run and all that is measured again for it, or half of it so.
DRIFTS = [(0.03, 0.01, 0.5), (0.05, 0.02, 0.0), (0.03, 0.02, 1.0), (0.03, 0.04, 0.5), (0.03, 0.04, 1.0)]


def caught(found: list[str], subject: str) -> bool:
    return any(name.startswith((f"{subject}/", f"{subject},")) for name in found)


@pytest.mark.parametrize(("noise", "drift", "lasting"), DRIFTS)
def test_unchanged_runs_raise_an_alarm_in_one_of_twenty_at_most(noise, drift, lasting):
    kind, alarms = {"noise": noise, "drift": drift, "lasting": lasting}, []
    for draw in range(8):
        then = baseline_of(Machine(draw, **kind))
        for run in range(5):
            alarms.append(slower(judged(then, Machine(1000 + 5 * draw + run, **kind))))
    assert sum(map(bool, alarms)) <= len(alarms) / 20, alarms


@pytest.mark.parametrize("lasting", [0.0, 0.5, 1.0])
def test_kernel_slowed_by_a_tenth_is_caught_in_nine_of_ten_runs(lasting):
    kind, found = {"noise": 0.03, "drift": 0.01, "lasting": lasting}, []
    for draw in range(4):
        then = baseline_of(Machine(draw, **kind))
        for run, subject in enumerate(SUBJECTS):
            found.append(caught(slower(judged(then, Machine(2000 + run, slow={subject: 1.1}, **kind))), subject))
    assert sum(found) >= 0.9 * len(found), f"{sum(found)} of {len(found)}"


@pytest.mark.parametrize("lasting", [0.0, 0.5, 1.0])
def test_what_a_noisy_check_says_it_notices_it_notices(lasting):
    kind, found = {"noise": 0.03, "drift": 0.04, "lasting": lasting}, []
    for draw in range(16):
        then = baseline_of(Machine(draw, **kind))
        said = {check.name: check.noticed for check in judged(then, Machine(1000 + draw, **kind))}
        assert statistics.median(said.values()) > gate.NOTICED
        for run, subject in enumerate(SUBJECTS[draw % 4 :: 4]):
            machine = Machine(2000 + 8 * draw + run, slow={subject: math.exp(said[f"{subject}, its 6 rows"])}, **kind)
            found.append(caught(slower(judged(then, machine)), subject))
    assert sum(found) >= 0.9 * len(found), f"{sum(found)} of {len(found)}"


def test_quantiles_of_students_t_are_the_tables():
    for free, half, rare in ((1, 12.706, 318.31), (2, 4.3027, 22.327), (5, 2.5706, 5.8934), (10, 2.2281, 4.1437)):
        assert gate.student(0.975, free) == pytest.approx(half, rel=1e-4)
        assert gate.student(0.999, free) == pytest.approx(rare, rel=1e-4)
    assert gate.student(0.5, 10) == pytest.approx(0, abs=1e-6)


def test_verdict_of_a_noisy_check_says_what_it_notices():
    then = baseline_of(Machine(0, noise=0.2))
    text = gate.table(judged(then, Machine(1, noise=0.2)))
    assert "x and more" in text


# -- how a run is judged -----------------------------------------------------------------------------------------------


def test_first_look_that_was_a_burst_is_no_alarm_and_a_slow_kernel_stays_slow():
    then = baseline_of(Machine(0))
    now = results(Machine(1, slow={"route": 1.5}).document())
    healthy, slow = Machine(2), Machine(2, slow={"route": 1.5})
    for machine in (healthy, slow):
        machine.document(())
    found = gate.judge(gate.checks(then.rows, now.rows), healthy.again)
    assert not slower(found) and any(check.again for check in found)
    found = gate.judge(gate.checks(then.rows, now.rows), slow.again)
    assert {name.split(",")[0].split("/")[0] for name in slower(found)} == {"route"} and len(slower(found)) >= 6


def test_only_what_looks_slower_is_measured_again_and_no_longer_than_it_takes():
    then, machine = baseline_of(Machine(0)), Machine(1, slow={"route": 1.5})
    now, asked = results(machine.document()), []

    def measure(wanted):
        asked.append({name for name, _ in wanted})
        return machine.again(wanted)

    found = gate.judge(gate.checks(then.rows, now.rows), measure)
    suspects = {name for check in found if check.suspect for name in check.peers}
    assert asked[0] == suspects and set(IDS[:6]) <= suspects and len(suspects) < len(IDS) / 2
    assert len(asked) == gate.PASSES // 2 + 1 == max(len(check.again) for check in found)


def test_row_that_cannot_be_measured_again_fails():
    then = baseline_of(Machine(0))
    now = results(Machine(1, slow={"route": 1.5}).document())
    found = gate.judge(gate.checks(then.rows, now.rows), lambda names: {})
    lost = [check for check in found if check.slower]
    assert lost and all("not measured again" in check.verdict for check in lost)


def test_faster_rows_are_said_to_be():
    then = baseline_of(Machine(0))
    found = judged(then, Machine(1, slow={"route": 0.5}))
    assert not slower(found)
    assert all("faster" in check.verdict for check in found if check.name.startswith(("route/", "route,")))


def timings(ours: float, **peers: float) -> dict[str, timing.Timing]:
    spread = (0.99, 1.0, 1.0, 1.0, 1.0, 1.0, 1.01)
    return {name: timing.Timing(tuple(t * s for s in spread), 1) for name, t in {"ours": ours, **peers}.items()}


def test_yardstick_is_the_peer_whose_ratio_was_steadiest_over_the_runs():
    runs = []
    for eager in (5.0, 6.0, 4.0, 7.0, 5.5):
        runs.append(results(document([row(name, timings(1.0, eager=eager, compile=3.0)) for name in IDS[:8]])))
    then = baseline.merge(runs)[0]
    checks = gate.checks(results(then).rows, runs[0].rows)
    assert {peer for check in checks for peer in check.peers.values()} == {"compile"}
    # Where the steadiest is missing now, the next one serves.
    without = {name: row(name, timings(1.0, eager=5.0)) for name in IDS[:8]}
    assert {peer for check in gate.checks(results(then).rows, without) for peer in check.peers.values()} == {"eager"}


def test_eager_with_kept_memory_is_a_yardstick_beside_ours_there(tmp_path):
    runs = []
    for eager in (5.0, 6.0, 4.0, 7.0, 5.5):
        found = row(IDS[0], timings(1.0, eager=eager))
        with_kept(found, row(IDS[0], timings(2.0, eager=5.0)))
        runs.append(results(document([found])))
    merged = baseline.merge(runs)[0]
    then = results(merged)
    (check,) = gate.checks(then.rows, runs[0].rows)
    assert check.peers == {IDS[0]: files.KEPT} and check.first == check.centre == pytest.approx(math.log(2.5))
    # Without it eager serves, and the run fails all the same.
    (check,) = gate.checks(then.rows, {IDS[0]: row(IDS[0], timings(1.0, eager=5.0))})
    assert check.peers == {IDS[0]: "eager"}
    baseline.write(merged, tmp_path)
    for why in ("kept memory: a process that measures it has ended (1): no memory", None):
        lacks = row(IDS[0], timings(1.0, eager=5.0), notes=[why] if why else [])
        report = gate.check(results(document([lacks])), lambda _: {}, tmp_path)
        said = why.removeprefix("kept memory: ") if why else "not measured"
        assert (
            report.failed
            and f"FAILED, 1 rows without eager, kept memory, their yardstick: {IDS[0]} ({said})" in report.text
        )


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_noise_that_passes_share_with_their_run_is_learnt_from_runs_measured_again(share):
    then = baseline_of(Machine(0, noise=0.003, bursts=0.0, drift=0.04, lasting=share), runs=25)
    found = [gate.series(row)["eager"] for row in then.rows.values()]
    assert gate.lasting(found) == pytest.approx(share, abs=0.15)
    # Where one was not measured again, the worst is taken.
    assert gate.lasting([*found[1:], dataclasses.replace(found[0], again=())]) == 1


def test_however_little_noise_there_is_five_percent_are_allowed():
    kind = {"noise": 1e-4, "bursts": 0.0, "drift": 1e-4}
    then = baseline_of(Machine(0, **kind), runs=7)
    for factor, slower in ((1.04, False), (1.06, True)):
        machine = Machine(1, slow=dict.fromkeys(SUBJECTS, factor), **kind)
        found = gate.judge(gate.checks(then.rows, results(machine.document()).rows), machine.again)
        assert {check.slower for check in found} == {slower} and {check.allowed for check in found} == {math.log(1.05)}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("runs", [3, 7])
def test_shared_noise_is_seldom_taken_for_less_than_it_is(runs, share):
    draws, found = random.Random(0), []

    def one_row():
        size = draws.uniform(0.01, 0.04)
        stays, passes = math.sqrt(share) * size, math.sqrt(1 - share) * size
        first = [draws.gauss(0, stays) for _ in range(runs)]
        values, again = ([value + draws.gauss(0, passes) for value in first] for _ in range(2))
        return gate.Series(tuple(values), size * draws.uniform(0.5, 1.0), tuple(again))

    for _ in range(300):
        found.append(gate.lasting([one_row() for _ in range(50)]))
    # To the safe side by a standard error, which five of six estimates then are.
    assert sum(value >= share - 1e-9 for value in found) > 0.75 * len(found)
    assert abs(statistics.mean(found) - share) < 0.15, statistics.mean(found)


def test_second_thread_that_idles_shows_in_the_subject_as_it_is_used(tmp_path):
    def run(machine, idle):
        rows = [machine.row(name, ("eager",)) for name in IDS if machine.document(())]
        for found in rows:
            with_kept(found, machine.row(found["id"]))
            if idle and found["subject"] == "route":
                found["ours"] = {field: value * idle for field, value in found["ours"].items()}
        return results(document(rows))

    made = baseline.merge([run(Machine(draw), None) for draw in range(5)])[0]
    then, now = results(made), run(Machine(9), 2.0)
    found = gate.judge(gate.checks(then.rows, now.rows), lambda wanted: {name: now.rows[name] for name, _ in wanted})
    assert slower(found) == ["route, its 6 rows, as used"]
    assert {peer for check in found for peer in check.peers.values() if "used" not in check.name} == {files.KEPT}
    # With another number of threads what threads do is no change of ours.
    for threads, failed in ((2, True), (1, False)):
        baseline.write(changed(made, threads=threads), tmp_path)
        report = gate.check(now, lambda wanted: {name: now.rows[name] for name, _ in wanted}, tmp_path)
        assert report.failed == failed and ("as used are not judged" in report.text) != failed


def test_a_baseline_that_notices_nothing_fails_and_says_so_when_it_is_made(tmp_path, capsys):
    def made(folder, drift):
        machine, paths = Machine(0, drift=drift), []
        for i in range(3):
            paths.append(tmp_path / f"{i}.json")
            paths[-1].write_text(json.dumps(machine.document(IDS[:6])))
        assert baseline.main(["--out", str(folder), "--merge", *map(str, paths)]) == 0
        return said(folder, Machine(1).document(IDS[:6])), capsys.readouterr().out

    report, text = made(tmp_path / "noisy", 0.5)
    assert report.failed and report.text.splitlines()[-1].startswith("gate: FAILED, none of 7 checks would notice")
    (noisy,) = [line.split("|") for line in text.splitlines() if line.startswith("| route ")]
    report, text = made(tmp_path / "quiet", 0.01)
    assert not report.failed and report.text.splitlines()[-1] == "gate: 7 checks, none slower"
    (quiet,) = [line.split("|") for line in text.splitlines() if line.startswith("| route ")]
    assert float(noisy[3]) > 2 > float(quiet[3]) and noisy[2].strip() == quiet[2].strip() == "6"


def test_row_wanted_with_two_peers_is_measured_in_both_kinds_of_process(monkeypatch):
    asked = []

    def measured(options, names):
        asked.append((options["peers"], names))
        return {name: {"peers": "here", "memory": {}} for name in names}

    def kept(options, names):
        asked.append(names)
        return dict.fromkeys(names, "there")

    monkeypatch.setattr(again, "_measured", measured)
    monkeypatch.setattr(again, "_kept", kept)
    wanted = [("route/forward", files.KEPT), ("adapter/forward", "compile"), ("route/forward", "eager")]
    found = again.in_fresh_processes({"preset": "smoke", "peers": None})(wanted)
    assert asked == [("eager,compile", ["adapter/forward", "route/forward"]), ["route/forward"]]
    assert found["route/forward"] == {"peers": "here", "memory": {"eager_kept": "there"}}


def test_noisier_rounds_than_the_baselines_allow_more():
    then = baseline_of(Machine(0, noise=0.02))
    calm, rough = (gate.checks(then.rows, results(Machine(1, noise=n).document()).rows) for n in (0.02, 0.08))
    assert all(r.allowed > 2 * c.allowed for c, r in zip(calm, rough) if c.allowed > gate.LEAST_ALLOWED)


def test_selection_of_rows_is_allowed_what_they_are_in_a_whole_run(monkeypatch):
    # But for how much noisier rounds are now, which is seen in the rows that run.
    monkeypatch.setattr(gate, "_worse", lambda rows, now: 1.0)
    then, machine = baseline_of(Machine(0)), Machine(1)
    whole = {check.name: check.allowed for check in gate.checks(then.rows, results(machine.document()).rows)}
    some = gate.checks(then.rows, results(Machine(1).document(IDS[:7])).rows)
    # All six rows of a subject are one check more; the single row of the next subject is not that subject's mean.
    assert [check.name for check in some] == [*IDS[:7], "route, its 6 rows"]
    assert all(check.allowed == pytest.approx(whole[check.name], rel=1e-9) for check in some)


def test_median_noise_is_that_of_normal_values():
    # From tables of order statistics of a normal distribution.
    for count, exact in ((1, 1.0), (3, 0.6698), (5, 0.5356), (7, 0.4587), (9, 0.4076)):
        assert gate.median_noise(count) == pytest.approx(exact, rel=0.02)


# -- what the gate says of files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def then() -> dict:
    machine = Machine(0)
    return baseline.merge([results(machine.document()) for _ in range(5)])[0]


def said(folder: Path, document: dict, machine: Machine | None = None) -> gate.Report:
    machine = machine or Machine(1)
    machine.document(())
    return gate.check(results(document), machine.again, folder)


def changed(document: dict, **facts) -> dict:
    return {**document, "machine_info": {**document["machine_info"], **facts}}


def test_no_baseline_fails_and_says_how_to_make_one(tmp_path):
    report = said(tmp_path, Machine(1).document())
    assert report.failed and len(report.text.splitlines()) == 1
    assert "no baseline for cpu-x86_64-avx2-2c" in report.text and "bench baseline --preset smoke" in report.text


def test_healthy_run_passes_with_a_table(tmp_path, then):
    baseline.write(then, tmp_path)
    report = said(tmp_path, Machine(1).document())
    assert not report.failed
    head = next(line for line in report.text.splitlines() if line.startswith("| row "))
    assert all(word in head for word in ("peer", "then", "now", "allowed", "verdict"))
    assert all(name in report.text for name in IDS)


def test_slow_kernel_fails_and_is_named_first(tmp_path, then):
    baseline.write(then, tmp_path)
    machine = Machine(1, slow={"adapter": 1.3})
    report = said(tmp_path, machine.document(), machine)
    lines = report.text.splitlines()
    assert report.failed and "FAILED, slower than allowed: adapter" in lines[-1]
    first = lines[next(i for i, line in enumerate(lines) if line.startswith("| row ")) + 2]
    assert first.startswith("| adapter") and "SLOWER in 3 of 3 passes" in first


def test_an_interrupted_run_is_not_judged(monkeypatch):
    monkeypatch.setattr(gate, "check", lambda *_: pytest.fail("it measures again what looks slower"))
    config = SimpleNamespace(getoption=lambda name: name == "bench_gate", stash=pytest.Stash())
    conftest.pytest_sessionfinish(SimpleNamespace(config=config, exitstatus=pytest.ExitCode.INTERRUPTED))
    assert config.stash[conftest.VERDICT] == "gate: not judged, the run was interrupted"


DAMAGE = ("facts", "median", "q3", "runs", "ratios", "limit", "suite", "sizes")


def without(part: str) -> str:
    found = Machine(1).document(IDS[:2])
    row = found["benchmarks"][0]["extra_info"]
    if part == "facts":
        found["machine_info"] = None
    elif part == "runs":
        row["runs"] = {"eager": {"noise": [0.1]}}
    elif part == "ratios":
        row["runs"] = {"eager": {"noise": [0.1], "ratio": []}}
    elif part == "limit":
        row["limit"] = {"share": 0.5}
    elif part in row:
        row.pop(part)
    else:
        row["ours"].pop(part)
    return json.dumps(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((without(part), "not a result of pytest-benchmark") for part in DAMAGE),
        ("{", "not JSON"),
        ("[]", "not a result of pytest-benchmark"),
        (json.dumps(document([])), "not made by `python -m bench baseline`"),
        (json.dumps(Machine(1).document(IDS[:2])), "not made by `python -m bench baseline`"),
    ],
    ids=[*DAMAGE, "broken", "other", "empty", "one-run"],
)
def test_unusable_baseline_fails_in_one_line(tmp_path, text, words):
    path = tmp_path / CLASS / "smoke-float32.json"
    path.parent.mkdir()
    path.write_text(text)
    report = said(tmp_path, Machine(1).document(IDS[:2]))
    assert report.failed and len(report.text.splitlines()) == 1 and words in report.text and str(path) in report.text


OTHERS = [fact for fact in files.DECISIVE if fact != "seconds"]


@pytest.mark.parametrize(
    ("facts", "words", "fails"),
    [
        ({"contract_version": 0}, "timing contract 0, and this run's is 2", True),
        ({"contract_version": 1}, "timing contract 1 then and 2 now: ratios mean the same", False),
        ({"device": {"name": "B", "class": "cuda-sm_90"}}, "measured on cuda-sm_90", True),
        ({"device": {"name": "B", "class": CLASS}}, "device differs, B then and A processor now", False),
        ({"dirty": True}, "dirty tree", False),
        ({"seconds": 0.12}, "measured with --seconds 0.12, and this run with None", True),
        *(({fact: "other"}, f"{fact} differs, other then and ", False) for fact in OTHERS),
    ],
    ids=["contract", "contract-alike", "class", "device", "dirty", "seconds", *OTHERS],
)
def test_baseline_of_other_circumstances_is_a_line(tmp_path, then, facts, words, fails):
    path = tmp_path / CLASS / "smoke-float32.json"
    path.parent.mkdir()
    path.write_text(json.dumps(changed(then, **facts)))
    report = said(tmp_path, Machine(1).document())
    assert report.failed == fails and sum(words in line for line in report.text.splitlines()) == 1
    assert ("row " in report.text) != fails  # what can be compared still is


def test_rows_that_cannot_be_compared_are_a_line_each_and_the_rest_goes_on(tmp_path, then):
    baseline.write(then, tmp_path)
    now = Machine(1).document()
    rows = [benchmark["extra_info"] for benchmark in now["benchmarks"]]
    rows[0]["sizes"] = {**SIZES, "B": 3}
    rows[1]["peers"] = {"sdpa": {"missing": "not installed"}}
    rows[2]["backend"] = "reference"
    rows.pop(3)
    rows.append(row("new_op/forward", timings(1.0, eager=2.0)))
    report = said(tmp_path, document(rows))
    assert not report.failed
    for words in (
        f"1 rows of other sizes than the baseline's, not compared: {IDS[0]}",
        f"{IDS[1]}: no peer of the baseline in this run (eager)",
        f"{IDS[2]}: backend reference now, cpu then",
        f"1 rows in the baseline and not in this run, nor any subject of theirs as a whole: {IDS[3]}",
        "1 rows new: not in the baseline: new_op/forward",
    ):
        assert sum(words in line for line in report.text.splitlines()) == 1, words
    assert all(name in report.text.partition("row ")[2] for name in IDS[4:])


def test_run_of_which_nothing_can_be_compared_fails(tmp_path, then):
    baseline.write(then, tmp_path)
    rows = [
        {**benchmark["extra_info"], "sizes": {**SIZES, "B": 3}} for benchmark in Machine(1).document()["benchmarks"]
    ]
    report = said(tmp_path, document(rows))
    assert report.failed and report.text.splitlines()[-1] == "gate: FAILED, no row can be compared"
    assert len(report.text.splitlines()) == 2


def test_row_that_raises_now_fails(tmp_path, then):
    baseline.write(then, tmp_path)
    now = Machine(1).document(IDS[1:])
    lost = {**row(IDS[0], timings(1.0)), "error": "ours raised ValueError: no"}
    del lost["ours"]
    now["not_measured"] = [lost]
    report = said(tmp_path, now)
    assert report.failed and f"gate: FAILED, {IDS[0]}: ours raised ValueError: no" in report.text.splitlines()


def test_reference_against_itself_is_not_gated(tmp_path):
    machine, runs = Machine(0), []
    for _ in range(3):
        rows = [machine.row(name) if machine.document(()) else None for name in IDS[:6]]
        rows[0]["backend"] = "reference"
        runs.append(results(document(rows)))
    assert gate.gated(results(baseline.merge(runs)[0])) == list(IDS[1:6])


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["-n", "2"], pytest.ExitCode.USAGE_ERROR, "--gate does not go with -n"),
        (["--benchmark-skip"], pytest.ExitCode.USAGE_ERROR, "--gate does not go with --benchmark-skip"),
        (["--benchmark-disable"], pytest.ExitCode.USAGE_ERROR, "--gate does not go with --benchmark-disable"),
        (["--deselect", "bench/"], pytest.ExitCode.NO_TESTS_COLLECTED, "gate: FAILED, nothing was measured"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_gate_that_would_see_nothing_fails(options, code, words, capsys, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)  # a worker of pytest-xdist's says so there
    found = pytest.main([str(files.ROOT / "bench"), "--gate", "-p", "no:cacheprovider", "--device", "cpu", *options])
    said = capsys.readouterr()
    assert found == code and words in said.out + said.err


# -- baselines ---------------------------------------------------------------------------------------------------------


def test_baseline_has_each_run_and_nothing_of_the_machines_owner(tmp_path, then):
    (path,) = baseline.write(then, tmp_path)
    assert path == tmp_path / CLASS / "smoke-float32.json"
    found = files.load(path)
    assert "node" not in found.machine and found.device == "A processor"
    assert list(found.rows) == list(IDS)
    chosen = []
    for each in found.benchmarks.values():
        runs, kept = each["extra_info"]["runs"]["eager"], each["extra_info"]["peers"]["eager"]
        assert len(runs["ratio"]) == len(runs["noise"]) == 5 and "data" not in each["stats"]
        ratio = kept["q1"] / each["extra_info"]["ours"]["q1"]
        chosen.append([abs(one / ratio - 1) < 1e-4 for one in runs["ratio"]])
    # The rows that are kept are all of one run.
    assert sum(map(all, zip(*chosen, strict=True))) == 1


# That a run was slowed on purpose is refused for itself.
SAME = tuple(fact for fact in files.DECISIVE if fact != "slowed")


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"revision": "1" * 40}, "revision"),
        ({"backend": "reference"}, "backend"),
        *(({fact: "other"}, fact) for fact in SAME),
    ],
    ids=["revision", "backend", *SAME],
)
def test_runs_that_differ_are_not_merged(facts, words):
    machine = Machine(0)
    runs = [machine.document(IDS[:2]) for _ in range(3)]
    with pytest.raises(files.Unusable, match=rf"last.json: {words} .* not the runs of one baseline"):
        baseline.merge([results(runs[0]), results(runs[1]), results(changed(runs[2], **facts), "last.json")])


def test_run_for_a_baseline_measures_what_has_kept_memory_again(tmp_path, monkeypatch):
    asked = []
    found = changed(Machine(0).document(IDS[:3]), seconds=0.5, backend=None)
    rows = [benchmark["extra_info"] for benchmark in found["benchmarks"]]
    for each in rows[:2]:
        with_kept(each, each)
    rows[1]["backend"] = "reference"

    def in_fresh_processes(options):
        def measure(wanted):
            asked.append((options, list(wanted)))
            return {rows[0]["id"]: {"memory": {"eager_kept": "again"}}}

        return measure

    monkeypatch.setattr(baseline.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 3))
    monkeypatch.setattr(baseline, "in_fresh_processes", in_fresh_processes)
    file = tmp_path / "run.json"
    assert baseline.run([], file) == 3 and not asked, "nothing was measured"
    file.write_text(json.dumps(found))
    assert baseline.run([], file) == 3
    options = {"preset": "smoke", "dtype": "float32", "device": "cpu", "seconds": 0.5, "backend": None}
    assert asked == [(options, [(IDS[0], files.KEPT)])]
    again = [row.get("again") for row in files.load(file).rows.values()]
    assert again == [{"memory": {"eager_kept": "again"}}, None, None]


def test_an_interrupted_baseline_keeps_its_runs_and_says_so(tmp_path, monkeypatch, capsys):
    codes = iter([0, 2])

    def run(_, path):
        path.write_text("{}")
        return next(codes)

    monkeypatch.setattr(baseline.files, "ROOT", tmp_path)
    monkeypatch.setattr(baseline, "run", run)
    assert baseline.main(["--runs", "3"]) == 130
    said = capsys.readouterr()
    assert "--merge takes the runs that are whole" in said.err
    made = sorted((tmp_path / "runs" / "baseline").glob("*/run-*.json"))
    assert [path.name for path in made] == ["run-1.json", "run-2.json"] and str(made[0]) in said.out


def test_what_was_measured_again_stands_in_the_baseline_beside_its_run():
    machine = Machine(0)
    runs = [results(machine.twice(IDS[:2])) for _ in range(3)]
    row = results(baseline.merge(runs)[0]).rows[IDS[0]]
    ratios = [run.rows[IDS[0]]["again"] for run in runs]
    assert row["runs"]["eager"]["again"] == pytest.approx(
        [again["peers"]["eager"]["q1"] / again["ours"]["q1"] for again in ratios], rel=1e-4
    )
    assert "again" not in row
    runs[1].rows[IDS[0]].pop("again")
    merged, notes = baseline.merge(runs)
    assert "again" not in results(merged).rows[IDS[0]]["runs"]["eager"]
    assert notes == [f"measured again after some of the runs only, which does not count: {IDS[0]}"]


def test_the_rows_of_a_baseline_are_of_the_run_nearest_to_the_medians():
    runs = [document([row(name, timings(1.0, eager=r)) for name, r in zip(IDS, rs)]) for rs in ((2, 9), (5, 5), (6, 4))]
    found = results(baseline.merge([results(run) for run in runs])[0])
    assert [found.rows[name]["peers"]["eager"]["ratio"]["value"] for name in IDS[:2]] == [5, 5]


def test_two_runs_are_too_few():
    with pytest.raises(files.Unusable, match="at least 3"):
        baseline.merge([results(Machine(0).document(IDS[:2])) for _ in range(2)])


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (IDS[0], {"B": 3}, r"last.json: .*/forward: B=3 is not the preset's"),
        ("adapter/forward", {"C": 20}, r"last.json: adapter/forward: C=20 is not the preset's"),
        ("route/forward/T=8", {"T": 3}, r"last.json: route/forward/T=8: T=3 is not the preset's"),
    ],
)
def test_runs_of_another_shape_are_no_baseline(name, changes, words):
    machine = Machine(0)
    runs = [results(machine.document([name]), "last.json") for _ in range(3)]
    assert baseline.merge(runs)[0]["benchmarks"]
    runs[2].rows[name]["sizes"] = {**runs[2].rows[name]["sizes"], **changes}
    with pytest.raises(files.Unusable, match=words):
        baseline.merge(runs)


def test_runs_with_ours_slowed_on_purpose_are_no_baseline():
    machine = Machine(0)
    runs = [results(changed(machine.document(IDS[:2]), slowed="route=1.1")) for _ in range(3)]
    with pytest.raises(files.Unusable, match="slowed on purpose"):
        baseline.merge(runs)


def test_one_run_given_twice_is_refused():
    machine = Machine(0)
    runs = [results(machine.document(IDS[:2]), f"{i}.json") for i in range(3)]
    with pytest.raises(files.Unusable, match="3.json is the same run as 1.json"):
        baseline.merge([*runs, results(json.loads(json.dumps(document([*runs[1].rows.values()]))), "3.json")])


def test_row_that_is_not_in_every_run_is_left_out_with_a_line():
    machine = Machine(0)
    runs = [results(machine.document(names)) for names in (IDS[:3], IDS[:3], IDS[:2])]
    merged, notes = baseline.merge(runs)
    assert list(results(merged).rows) == list(IDS[:2])
    assert notes == [f"{IDS[2]}: measured at one size in 2 of 3 runs, left out"]


def test_command_merges_files_and_refuses_what_it_cannot_read(tmp_path, capsys, monkeypatch):
    machine, paths = Machine(0), []
    for i in range(3):
        paths.append(tmp_path / f"{i}.json")
        paths[-1].write_text(json.dumps(machine.document(IDS[:4])))
    assert baseline.main(["--out", str(tmp_path / "out"), "--merge", *map(str, paths)]) == 0
    assert list(files.load(tmp_path / "out" / CLASS / "smoke-float32.json").rows) == list(IDS[:4])
    assert baseline.main(["--out", str(tmp_path), "--merge", *[str(tmp_path / "none.json")] * 3]) == 1
    assert capsys.readouterr().err == f"{tmp_path / 'none.json'}: No such file or directory\n"
    # Before anything is measured.
    monkeypatch.setattr(baseline, "run", lambda options, file: pytest.fail("a run was made"))
    for arguments, words in (
        (["--shape", "B=1"], "as it is"),
        (["--shape=B=1"], "as it is"),
        (["--runs", "2"], "at least 3"),
        (["--gate"], "--gate is for later runs"),
        (["--benchmark-json=x.json"], "files of their own"),
        (["-k", "route", "--merge", *map(str, paths)], "nothing for -k route to change"),
        (["--out", str(paths[0])], "File exists"),
    ):
        assert baseline.main(arguments) == 1 and words in capsys.readouterr().err


# -- slowed on purpose, and the calibration ----------------------------------------------------------------------------


def test_slowed_call_takes_a_tenth_longer_and_returns_the_same():
    now = itertools.count()
    clock, begin = (lambda: next(now)), None

    def call():
        for _ in range(1000):
            next(now)
        return "result"

    begin = next(now)
    assert slowed.slow(call, 1.1, clock)() == "result"
    assert next(now) - begin == pytest.approx(1100, abs=6)
    assert slowed.slow(call, 1.0) is call


def test_subject_to_slow_is_read_from_the_environment(monkeypatch):
    monkeypatch.delenv(slowed.VARIABLE, raising=False)
    assert slowed.factor("route") == 1
    monkeypatch.setenv(slowed.VARIABLE, "route=1.10")
    assert (slowed.factor("route"), slowed.factor("router")) == (1.1, 1)
    for bad in ("route", "route=fast", "route=0.5", "route=nan"):
        monkeypatch.setenv(slowed.VARIABLE, bad)
        with pytest.raises(ValueError, match="wanted SUBJECT=FACTOR"):
            slowed.factor("route")
    monkeypatch.setenv(slowed.VARIABLE, "rout=1.10")
    with pytest.raises(ValueError, match="'rout' is none of route, "):
        slowed.factor("route")


def test_baseline_too_noisy_to_guard_anything_says_so(tmp_path, capsys):
    for noise, words in ((0.02, False), (1.0, True)):
        machine, paths = Machine(0, noise=noise), []
        for i in range(3):
            paths.append(tmp_path / f"{i}.json")
            paths[-1].write_text(json.dumps(changed(machine.document(IDS[:4]), date=str(i))))
        assert baseline.main(["--merge", *map(str, paths), "--out", str(tmp_path / "out")]) == 0
        assert ("too noisy to notice ours at half its speed" in capsys.readouterr().out) == words


def test_calibration_counts_alarms_of_the_subject_that_was_slowed():
    def ran(subject, *slower):
        return {"subject": subject, "factor": 1.1, "slower": list(slower)}

    text = calibrate.rates(
        [ran(None), ran(None, "adapter/forward"), ran("route", "route/forward"), ran("route", "router/forward")]
        + [ran("router", "router, its 4 rows")]
    )
    assert text.splitlines() == [
        "unchanged: 1 false alarms in 2 runs",
        "  adapter/forward",
        "route slowed by 1.1: caught in 1 of 2 runs",
        "router slowed by 1.1: caught in 1 of 1 runs",
        "all of them: caught in 2 of 3 runs",
    ]


def test_calibration_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys, then):
    (path,) = baseline.write(then, tmp_path)
    monkeypatch.setattr(timing, "device_class", lambda device: CLASS)
    made = []

    def run(options, subject, factor):
        if len(made) == 5:
            raise files.Unusable("gate: FAILED, something else")
        made.append((options, subject))
        return {
            "slower": [f"{subject}/forward"] if subject else [],
            "subject": subject,
            "factor": factor,
            "seconds": 90,
        }

    monkeypatch.setattr(calibrate, "run", run)
    arguments = [str(path), "--runs", "2", "--each", "1", "--folder", str(tmp_path / "runs"), "--seconds", "1"]
    assert calibrate.main(arguments) == 1 and "something else" in capsys.readouterr().err
    wanted = [
        "--preset",
        "smoke",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--seconds",
        "1",
        "--baselines",
        str(tmp_path),
    ]
    assert made[0] == (wanted, None)
    made[:] = made[:0]
    assert calibrate.main(arguments) == 0
    assert [subject for _, subject in made] == list(SUBJECTS[3:])
    text = capsys.readouterr().out
    assert "all of them: caught in 8 of 8 runs" in text and "5 runs left, some 8 minutes" in text
    # Of all this nothing is left to do; of what was made otherwise nothing is counted.
    assert calibrate.main(arguments) == 0 and len(made) == 5
    again = [*arguments[:-1], "2"]
    assert calibrate.main(again) == 1 and "made with other options" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "code", lambda: "other")
        assert calibrate.main(arguments) == 1 and "made with other code" in capsys.readouterr().err
    path.write_text(path.read_text() + " ")
    assert calibrate.main(arguments) == 1 and "made with other baseline" in capsys.readouterr().err
    monkeypatch.setattr(timing, "device_class", lambda device: "cpu-other")
    assert calibrate.main(arguments) == 1 and f"on {CLASS}, and this is cpu-other" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [("--runs", "-1"), ("--each", "-1"), ("--slow", "0.9")])
def test_calibration_refuses_senseless_numbers(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        calibrate.main(["baseline.json", *wrong])
    assert "--slow is more than 1" in capsys.readouterr().err


def test_calibration_of_some_subjects(tmp_path, monkeypatch, capsys, then):
    (path,) = baseline.write(then, tmp_path)
    monkeypatch.setattr(timing, "device_class", lambda device: CLASS)
    made = []

    def run(options, subject, factor):
        made.append(subject)
        return {"slower": [], "subject": subject, "factor": factor, "seconds": 1}

    monkeypatch.setattr(calibrate, "run", run)
    arguments = [str(path), "--runs", "0", "--each", "2", "--folder", str(tmp_path / "runs"), "--subjects"]
    assert calibrate.main([*arguments, "route,adapter"]) == 0 and made == ["route", "adapter"] * 2
    assert calibrate.main([*arguments, "routes"]) == 1
    assert "no rows of ours for 'routes', only for route, leave_one_out" in capsys.readouterr().err
    # Code that changes while it is measured.
    codes = iter("aab")
    monkeypatch.setattr(calibrate, "code", lambda: next(codes))
    assert calibrate.main([*arguments[:4], "3", "--folder", str(tmp_path / "other"), "--subjects", "route"]) == 1
    assert "has changed" in capsys.readouterr().err and len(list((tmp_path / "other").glob("*.json"))) == 1


def test_results_that_are_not_committed_yet_make_no_tree_dirty(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "code.py").write_text("")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "code")
    monkeypatch.setattr(timing, "ROOT", tmp_path)
    for name in ("bench/results/cpu/smoke.json", "docs/results.md", "docs/results/a.svg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert timing.provenance()["dirty"] is False
    (tmp_path / "docs" / "other.md").write_text("")
    assert timing.provenance()["dirty"] is True


def test_process_that_fails_measures_nothing():
    measure = again.in_fresh_processes({"preset": "smoke", "device": "cpu", "shape": "B=1,N=2"})
    assert measure([("no_op/forward", "eager"), ("no_op/forward", files.KEPT)]) == {}


# -- compare -----------------------------------------------------------------------------------------------------------


def pair(tmp_path: Path, then: dict, now: dict) -> list[str]:
    paths = []
    for name, found in (("then.json", then), ("now.json", now)):
        paths.append(tmp_path / name)
        paths[-1].write_text(json.dumps(found))
    return [str(path) for path in paths]


def test_compare_sorts_by_change_and_marks_times_as_absolute(tmp_path, capsys):
    old = [row(name, timings(1.0, eager=6.0, compile=3.0)) for name in IDS[:3]]
    new = [row(name, timings(t, eager=6.0, compile=3.0)) for name, t in zip(IDS, (1.0, 1.2, 0.8))]
    assert compare.main(pair(tmp_path, document(old), document(new))) == 0
    text = capsys.readouterr().out
    first, _, second = text.partition("ABSOLUTE times on A processor")
    for part in (first, second):
        names = [line.split()[1] for line in part.splitlines() if line.startswith("| route/")]
        assert names == [IDS[1], IDS[0], IDS[2]]
    slow = next(line for line in first.splitlines() if line.startswith(f"| {IDS[1]}"))
    assert "-16.7%" in slow and slow.endswith("| slower       |")
    assert next(line for line in first.splitlines() if line.startswith(f"| {IDS[0]} ")).endswith("within noise |")


def test_compare_is_by_kept_memory_and_the_range_of_a_baselines_runs(tmp_path, capsys):
    def file(ratio, *runs):
        kept = {"median": 2.0, "ratio": {"value": ratio, "low": ratio / 1.01, "high": ratio * 1.01, "certain": True}}
        made = row(IDS[0], timings(1.0, eager=6.0), memory={"eager_kept": kept})
        return document([made | ({"runs": {files.KEPT: {"ratio": runs, "noise": [0.01]}}} if runs else {})])

    for then, words in ((file(2.5), "slower"), (file(2.5, 1.9, 2.5, 2.6), "within noise")):
        assert compare.main(pair(tmp_path, then, file(2.0))) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {IDS[0]} "))
        assert files.KEPT in line and "-20.0%" in line and line.split("|")[-2].strip() == words


@pytest.mark.parametrize("drift", [0.0, 0.05])
def test_compare_of_unchanged_code_seldom_says_that_a_row_moved(drift):
    moved, caught, narrow = [], [], []
    for seed in range(6):
        machine = Machine(seed, drift=drift)
        changes, _ = compare.ratios(results(machine.document()), results(machine.document()))
        wide = compare.excess(changes)
        moved += [change.moved(wide) for change in changes]
        narrow += [change.moved() for change in changes]
        machine.slow = {"route": 2.0}
        changes, _ = compare.ratios(results(Machine(seed + 9, drift=drift).document()), results(machine.document()))
        wide = compare.excess(changes)
        caught += [change.moved(wide) and change.factor < 1 for change in changes if change.name.startswith("route/")]
    # What moves all rows alike, half of the drift, is not taken for noise: it might be the compiler's options.
    assert statistics.mean(moved) <= (0.1 if drift else 0.01) and statistics.mean(caught) > 0.9
    assert not drift or statistics.mean(narrow) > 1.5 * statistics.mean(moved)


def test_compare_doubts_what_single_runs_alone_tell_apart_and_not_a_baselines_range():
    def change(factor, *single):
        return compare.Change(
            "a", "eager", (1.0, 0.99, 1.01), (factor, factor * 0.99, factor * 1.01), single or (True, True)
        )

    drift = [1.1, 0.9, 1.12, 0.88, 1.0, 1.05, 0.95, 1.0]
    wide = compare.excess([change(factor) for factor in drift])
    assert 10 < wide < 20 and compare.excess([change(factor) for factor in drift[1:]]) == 1
    assert compare.excess([change(factor, False, False) for factor in drift]) == 1
    # All of them by as much is no noise.
    assert compare.excess([change(0.9 * factor) for factor in drift]) == pytest.approx(wide)
    assert [change(factor).verdict(wide) for factor in (1.0, 1.05, 0.95, 2.0, 0.5)] == [
        "within noise", "faster?", "slower?", "faster", "slower"
    ]  # fmt: skip
    assert change(0.95, False, False).verdict(wide) == "slower"
    documents = [
        results(document([row(name, timings(t, eager=6.0)) for name, t in zip(IDS, times)]))
        for times in ([1.0] * 8, drift)
    ]
    text = compare.report(*documents)
    assert "times as much as these say" in text and "slower?" in text


def test_compare_finds_the_row_with_the_narrowest_interval(tmp_path, capsys):
    # Rounds that do not agree are all that eager's say here.
    found = timings(1.0, compile=3.0)
    noisy = timing.Timing(tuple(6.0 * (1 + 0.3 * (i % 2)) for i in range(len(found["ours"].samples))), 1)
    for peers in ({"eager": noisy, **found}, {**found, "eager": noisy}):
        made = document([row(IDS[0], peers)])
        assert compare.main(pair(tmp_path, made, made)) == 0
        assert f"| {IDS[0]} | compile |" in capsys.readouterr().out


def test_compare_of_two_devices_warns_and_has_no_times(tmp_path, capsys):
    rows = [row(name, timings(1.0, eager=6.0)) for name in IDS[:2]]
    other = document(rows, device={"name": "B", "class": CLASS}, dirty=True)
    assert compare.main(pair(tmp_path, document(rows), other)) == 0
    text = capsys.readouterr().out
    assert "device differs, A processor then and B now" in text and "dirty tree" in text
    assert "ABSOLUTE" not in text and "times are not compared" in text and " ms" not in text


def test_compare_names_what_it_leaves_out(tmp_path, capsys):
    old = [row(name, timings(1.0, eager=6.0)) for name in IDS[:4]]
    new = [row(IDS[0], timings(1.0, eager=6.0)), row(IDS[1], timings(1.0, eager=6.0), sizes={**SIZES, "T": 1, "B": 9})]
    new += [row(IDS[2], timings(1.0, eager=6.0), dtype="bfloat16"), row(IDS[3], timings(1.0, sdpa=6.0))]
    new += [row(IDS[4], timings(1.0, eager=6.0))]
    assert compare.main(pair(tmp_path, document(old), document(new))) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        f"{IDS[1]}: B={SIZES['B']} then and B=9 now, not compared",
        f"{IDS[2]}: dtype=float32 then and dtype=bfloat16 now, not compared",
        f"{IDS[3]}: no peer in common",
        f"only now: {IDS[4]}",
    ):
        assert line in lines
    for name in IDS[1:3]:
        assert sum(line.startswith(name) for line in lines) == 1, "and no time of it"


def test_compare_reads_pytest_benchmarks_own_files(tmp_path, capsys):
    def plain(seconds):
        stats = {"median": seconds, "q1": seconds * 0.9, "q3": seconds * 1.1, "mean": seconds}
        benchmarks = [{"fullname": "t.py::test_it", "extra_info": {}, "stats": stats}]
        return {"machine_info": {"cpu": {"brand_raw": "A processor"}}, "benchmarks": benchmarks}

    assert compare.main(pair(tmp_path, plain(1.0), plain(2.0))) == 0
    text = capsys.readouterr().out
    assert "ABSOLUTE" in text and "-50.0%" in text and "slower" not in text


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        (document([], contract_version=0), document([], contract_version=2), "timing contract 0"),
        (document([row(IDS[0], timings(1.0))]), document([row(IDS[1], timings(1.0))]), "nothing in common"),
    ],
    ids=["contract", "nothing"],
)
def test_compare_refuses_in_one_line(tmp_path, capsys, then, now, words):
    assert compare.main(pair(tmp_path, then, now)) == 1
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1
