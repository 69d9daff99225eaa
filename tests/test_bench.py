"""bench/: the timing core on a clock of its own, rows of tiny shapes, and what is refused. No test here rests on a time."""

import contextlib
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/ is not installed

from bench import __main__ as bench_command
from bench import grid, kept, measure, models, once, peers, presets, suites, table, timing
from bench.cases import BOTH, DIRECTIONS, FORWARD, OPS, Case, Sizes, footprint
from bench.timing import CudaClock, Plan
from profiling import cpu_report
from tiger_fast.ops import triton

ROOT = Path(__file__).resolve().parents[1]
SMALL = Sizes(B=2, N=6, D=24, M=3, T=2, R=4, C=5, G=3, heads=4)
TINY = ",".join(f"{name}={value}" for name, value in asdict(SMALL).items())


class Clock:
    """Time that passes only when a call made by `takes` spends it, with the same bursts of noise for all."""

    def __init__(self, noise: float = 0.0) -> None:
        self.now, self.draws, self.noise = 0.0, random.Random(0), noise
        self.order: list[str] = []

    def read(self) -> float:
        return self.now

    def takes(self, name: str, seconds: float, result=None):
        def call():
            self.order.append(name)
            # Now and then three times as long, as on a machine that others use too.
            burst = 2 * (self.draws.random() < 0.1)
            self.now += seconds * (1 + self.noise * self.draws.uniform(-1, 1) + burst * bool(self.noise))
            return result

        return call


def compare(clock: Clock, calls: dict, plan: Plan | None = None) -> timing.Row:
    plan = plan or Plan(warmup=0.01, seconds=0.3)
    return timing.compare(
        calls, ours="ours", reference="eager", tolerance=1e-4, plan=plan, clock=timing.HostClock(clock.read)
    )


@pytest.mark.parametrize("factor", [0.9, 1.1, 4.0])
def test_known_factor_lies_within_the_stated_noise(factor):
    one = torch.ones(3)
    clock = Clock(noise=0.05)
    row = compare(clock, {"ours": clock.takes("ours", 1e-3, one), "eager": clock.takes("eager", factor * 1e-3, one)})
    found = row.ratios["eager"]
    assert found.certain and found.low <= factor <= found.high
    assert abs(found.value / factor - 1) < 0.02 and found.high / found.low < 1.06


def test_equal_callables_are_rarely_told_apart():
    apart = 0
    for seed in range(40):
        clock = Clock(noise=0.1)
        clock.draws.seed(seed)
        row = compare(clock, {name: clock.takes(name, 1e-3, torch.ones(1)) for name in ("ours", "eager")})
        apart += not row.ratios["eager"].low <= 1 <= row.ratios["eager"].high
    assert apart <= 6  # of 40 intervals of 95 %: 2 expected, 7 and more in 0.5 % of all runs


def test_disagreement_gives_no_ratio_and_no_timing():
    good, bad = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.001])
    clock = Clock()
    peer = {"ours": clock.takes("ours", 1.0, good), "eager": clock.takes("eager", 1.0, good)}
    row = compare(clock, {**peer, "wrong": clock.takes("wrong", 1.0, bad)})
    assert set(row.ratios) == {"eager"} and "DISAGREES" in row.refused["wrong"] and clock.order.count("wrong") == 1
    row = compare(clock, {"ours": clock.takes("ours", 1.0, bad), "eager": clock.takes("eager", 1.0, good)})
    assert not row.ratios and not row.timings and "DISAGREES" in row.refused["ours"]


def test_peer_that_raises_is_one_line_and_the_rest_goes_on():
    def fails():
        raise RuntimeError("no such kernel\nand more")

    clock = Clock()
    good = {name: clock.takes(name, 1.0, torch.ones(1)) for name in ("ours", "eager")}
    row = compare(clock, {**good, "broken": fails})
    assert row.refused == {"broken": "raised RuntimeError: no such kernel"} and row.ratios["eager"].value == 1


@pytest.mark.parametrize(
    "other",
    [
        torch.tensor([1.0, math.nan]),
        torch.ones(2, 1),
        torch.ones(2, dtype=torch.float64),
        (torch.ones(2), torch.ones(2)),
    ],
    ids=["nan", "shape", "type", "structure"],
)
def test_error_of_what_cannot_be_compared_is_infinite(other):
    assert timing.error(other, torch.ones(2)) == math.inf
    assert timing.error(torch.ones(2), other) == math.inf


def test_an_infinity_agrees_with_itself_alone():
    some, infinite = torch.ones(3), torch.tensor([math.inf, 1.0, 1.0])
    # Beside a tensor that agrees, too: the largest of 0 and NaN depends on which comes first.
    for ours, theirs in ((some, infinite), (infinite, some), (-infinite, infinite)):
        assert timing.error((some, ours), (some, theirs)) == timing.error((ours, some), (theirs, some)) == math.inf
    assert timing.error(infinite, infinite.clone()) == 0


def test_error_sees_one_wrong_value_beside_large_ones_of_another_tensor():
    expected = (torch.full((3,), 1e6), torch.tensor([1e-3, 2e-3]))
    assert timing.error((expected[0], torch.tensor([1e-3, 1e-3])), expected) == pytest.approx(0.5)


def test_every_callable_follows_every_other():
    clock = Clock()
    timing.interleave(
        {name: clock.takes(name, 1.0) for name in "abc"},
        Plan(warmup=0, seconds=0, least=40),
        clock=timing.HostClock(clock.read),
    )
    assert set(itertools.pairwise(clock.order)) >= set(itertools.permutations("abc", 2))


def test_short_calls_are_repeated_until_the_clock_can_tell():
    clock = Clock()
    host = timing.HostClock(clock.read)
    found = timing.interleave({"short": clock.takes("short", 1e-6)}, Plan(warmup=0, seconds=0, least=6), clock=host)
    assert found["short"].calls == pytest.approx(timing.SAMPLE_SECONDS / 1e-6, rel=0.02)
    assert found["short"].median == pytest.approx(1e-6)


def test_outputs_are_dropped_before_the_next_call():
    alive: list[weakref.ref] = []

    def call():
        assert not any(reference() is not None for reference in alive)
        result = torch.ones(2)
        alive.append(weakref.ref(result))
        return result

    timing.interleave({"one": call}, Plan(warmup=0, seconds=0, least=6), clock=timing.HostClock(Clock().read))
    assert len(alive) > 6


def test_median_interval_is_the_binomial_one():
    assert timing.median_interval(range(5)) == (0, 4, False)
    assert timing.median_interval(range(6)) == (0, 5, True)
    assert timing.median_interval(reversed(range(20))) == (5, 14, True)  # ranks 6 and 15, of the tables


def test_peers_compute_what_the_reference_computes():
    everyone = presets.settings(peers="all", device="cpu")
    for op, direction in itertools.product(OPS, DIRECTIONS):
        case = Case(op, SMALL)
        expected = case.call(case.function("reference"), direction)()
        found, missing = peers.peers(case, everyone, compiles=False)
        assert set(missing) <= set(peers.PACKAGES)
        for name, function in found.items():
            if name not in peers.PACKAGES:  # those need a GPU
                assert timing.error(case.call(function, direction)(), expected) < 1e-5, (op, direction, name)


def test_algebra_of_the_modes_computes_what_the_reference_computes():
    for op, keywords in (
        ("leave_one_out", {"renormalize": True}),
        *(("counterfactual_losses", {"loss": loss}) for loss in ("l1", "mse", "bce", "cosine")),
    ):
        case = Case(op, SMALL, **keywords)
        found, _ = peers.peers(case, presets.settings(peers="all", device="cpu"), compiles=False)
        expected = case.call(case.function("reference"), BOTH)()
        assert timing.error(case.call(found["algebra"], BOTH)(), expected) < 1e-5, (op, keywords)


def test_footprint_counts_without_allocating_what_a_case_holds():
    for op, direction in itertools.product(OPS, DIRECTIONS):
        assert footprint(op, SMALL, direction) == sum(Case(op, SMALL).tensor_bytes(direction)), op
    assert footprint("leave_one_out", Sizes(N=2**24), BOTH) > 10**12


def test_costs_of_the_design_shape_are_the_designs():
    # The traffic in units of B N D; the small tensors (weights, a head) are under a tenth of a unit.
    units = {"leave_one_out": (24, 28), "counterfactual_losses": (4, 8), "group_attention": (16, 28)}
    for op, (forward, backward) in units.items():
        case = Case(op, Sizes())
        unit = 4 * case.sizes.B * case.sizes.N * case.sizes.D
        first, both = (case.cost(direction).bytes / unit for direction in DIRECTIONS)
        assert first == pytest.approx(forward, abs=0.1) and both - first == pytest.approx(backward, abs=0.1), op


def test_operations_of_sums_over_others_are_those_of_the_cheapest_way():
    for op in ("leave_one_out", "counterfactual_losses_from_projections"):
        counts = []
        for m in range(1, 17):
            case = Case(op, replace(SMALL, M=m))
            each = case.sizes.B * case.sizes.N * (case.sizes.T * case.sizes.D if "leave" in op else case.sizes.C)
            counts.append(case.cost(FORWARD).operations / each)
        if op == "leave_one_out":
            assert counts[:6] == [0, 2, 6, 10, 14, 17]  # by hand; two others are a product each
        assert all(later - earlier <= 8 for earlier, later in itertools.pairwise(counts)), op  # linear in M


def test_a_step_makes_all_of_the_optimisers_work_and_moves_nothing():
    model = models.Model("step", "decode", SMALL, presets.settings(device="cpu", shape=TINY))
    before, call = [p.detach().clone() for p in model.trained], model.call("reference")
    (first,), gradients = call()
    (again,), others = call()
    assert torch.equal(first, again) and all(map(torch.equal, gradients, others)) and gradients
    assert all(map(torch.equal, before, model.trained)) and all(p.grad is None for p in model.trained)
    states = [model._optimizer.state[p] for p in model.trained if p in model._optimizer.state]
    assert len(states) == len(gradients) and {state["step"].item() for state in states} == {2}
    assert all(state["exp_avg"].any() for state, g in zip(states, gradients) if g.any())


def test_costs_count_bytes_of_the_activations_type():
    full, half = (Case("group_attention", SMALL, dtype).cost(FORWARD) for dtype in (torch.float32, torch.bfloat16))
    assert full.bytes == 2 * half.bytes and full.operations == half.operations
    full, half = (Case("alignment_loss", SMALL, dtype).cost(FORWARD) for dtype in (torch.float32, torch.bfloat16))
    assert full.bytes == half.bytes  # float32 beside any type


@pytest.mark.parametrize(
    "wrong", [("--threads", "0"), ("--most-tokens", "-4"), ("--json", str(Path(__file__) / "x.json"))]
)
def test_grid_refuses_before_it_measures(wrong, monkeypatch, capsys):
    monkeypatch.setattr(grid, "run", lambda *_: pytest.fail("it measures"))
    with pytest.raises(SystemExit, match="2"):
        grid.main(["--op", "route", *wrong])
    assert "error: " in capsys.readouterr().err


def test_grid_has_the_cells_that_are_asked_for_and_none_twice():
    for op in set(OPS) - {"confidence_loss", "improvement_loss"}:
        found = grid.cells(op)
        assert len({str(cell) for cell in found}) == len(found) >= 60
        tokens = [sizes.B * sizes.N for sizes, _ in found]
        assert (min(tokens), max(tokens)) == (1, 65536)
        for name, low, high in (("D", 8, 1536), ("M", 1, 8), ("T", 1, 8)):
            values = [getattr(sizes, name) for sizes, _ in found]
            assert (min(values), max(values)) == (low, high)


# -- CUDA's clock, with events of our own ---------------------------------------------------------------------------------


class Cuda:
    """torch.cuda's part in a clock: a device that works through what calls queue, and events that see it pass."""

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.log: list[str] = []

    def clock(self) -> timing.CudaClock:
        return CudaClock(cuda=self, now=lambda: self.host)

    def queue(self, seconds: float) -> float:
        self.device = max(self.device, self.host) + seconds
        return self.device

    def synchronize(self) -> None:
        self.log.append("synchronize")
        self.host = self.device = max(self.host, self.device)

    def _sleep(self, cycles: int) -> None:
        self.log.append("busy")
        self.queue(cycles / timing.CYCLES)

    def Event(self, enable_timing: bool) -> "Event":  # noqa: N802, torch's name
        assert enable_timing
        return Event(self)

    def launches(self, seconds: float, host: float = 0.0):
        def call():
            self.log.append("call")
            self.host += host
            self.queue(seconds)

        return call


class Event:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.at = cuda, math.nan

    def record(self) -> None:
        self.cuda.log.append("record")
        self.at = self.cuda.queue(0.0)

    def synchronize(self) -> None:
        self.cuda.log.append("wait")
        self.cuda.host = max(self.cuda.host, self.at)

    def elapsed_time(self, other: "Event") -> float:
        return (other.at - self.at) * 1e3


def test_cuda_clock_times_the_device_between_events_and_not_the_host():
    cuda = Cuda()
    assert cuda.clock().sample(cuda.launches(0.25), 2) == pytest.approx(0.5)
    assert cuda.log == ["synchronize", "busy", "record", "call", "call", "record", "wait"]


@pytest.mark.parametrize("host", [2e-5, 3e-3])
def test_cuda_clock_does_not_see_a_host_that_is_slower_than_the_device(host):
    cuda = Cuda()
    calls = {"ours": cuda.launches(1e-5, host), "eager": cuda.launches(2e-5, 5 * host)}
    found = timing.interleave(calls, Plan(warmup=0.05, seconds=0, least=6), clock=cuda.clock())
    assert found["ours"].samples == pytest.approx([1e-5] * 6) and found["eager"].samples == pytest.approx([2e-5] * 6)


def test_one_call_a_sample_where_the_cache_is_flushed_before_each():
    cuda = Cuda()
    clock = cuda.clock()
    clock._flushed = torch.empty(1)
    found = timing.interleave({"ours": cuda.launches(1e-6)}, Plan(warmup=0, seconds=0, least=6), clock=clock)
    assert found["ours"].calls == 1


def test_interleave_divides_a_replay_by_the_calls_in_it():
    cuda = Cuda()
    replay = cuda.launches(1e-3)
    replay.count = 10
    calls = {"ours": replay, "eager": cuda.launches(2e-4)}
    found = timing.interleave(calls, Plan(warmup=0, seconds=0, least=6), clock=cuda.clock())
    assert found["ours"].median == pytest.approx(1e-4) and found["ours"].calls == 10
    assert timing.ratio(found["eager"], found["ours"]).value == pytest.approx(2)


def test_turns_go_round_through_the_copies():
    turns = timing.Turns([lambda i=i: i for i in range(3)])
    assert [turns() for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


@pytest.fixture
def capture(monkeypatch):
    """torch.cuda's part in a capture: the current stream, which a capture that fails does not put back, as torch's does not."""
    streams = ["user's"]

    @contextlib.contextmanager
    def stream(name):
        before, streams[0] = streams[0], name
        try:
            yield
        finally:
            streams[0] = before

    class Capture:
        def __init__(self, graph):
            self.before = streams[0]

        def __enter__(self):
            streams[0] = "capture's"

        def __exit__(self, kind, *_):
            if kind is not None:
                raise RuntimeError("operation failed due to a previous error during capture")
            streams[0] = self.before

    class Stream(str):
        def wait_stream(self, other):
            pass

    for name, value in {
        "Stream": lambda: Stream("side"),
        "current_stream": lambda: Stream(streams[0]),
        "stream": stream,
        "CUDAGraph": object,
        "graph": Capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return streams


def test_a_graph_keeps_every_turns_results_until_all_are_captured(capture):
    captured: list[weakref.ref] = []

    def call():
        result = torch.ones(2)
        if capture[0] == "capture's":
            assert all(reference() is not None for reference in captured)
            captured.append(weakref.ref(result))
        return result

    assert timing.Graph(timing.Turns([call] * 5)).count == len(captured) == 5
    assert all(reference() is None for reference in captured) and capture == ["user's"]


def test_a_capture_that_fails_leaves_the_stream_as_it_was(capture):
    def call():
        if capture[0] == "capture's":
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="previous error during capture"):
        timing.Graph(timing.Turns([call]))
    assert capture == ["user's"]


def timed_on_cuda(monkeypatch, host: dict[str, float], fails: set[str]) -> dict:
    """A row of a device where a call of ours takes 1 ms, of eager 2 ms, of sdpa 5 ms, and what a graph replays half as long."""
    cuda, seconds = Cuda(), {"ours": 1e-3, "eager": 2e-3, "sdpa": 5e-3}
    calls = {name: cuda.launches(value, host[name]) for name, value in seconds.items()}
    names = {call: name for name, call in calls.items()}

    def graph(call):
        if names[call] in fails:
            raise RuntimeError("not permitted when stream is capturing")
        return cuda.launches(seconds[names[call]] / 2)

    clock = cuda.clock()
    monkeypatch.setattr(timing, "CudaClock", lambda flush: clock)
    monkeypatch.setattr(timing, "host_seconds", lambda call, synchronize: host[names[call]])
    monkeypatch.setattr(timing, "Graph", graph)
    settings = replace(presets.settings(device="cpu", seconds=1e-3), device="cuda")
    benchmark = suites.Benchmark("group_attention", FORWARD)
    row = measure._header(benchmark, settings) | {"peers": {"eager": {"error": 0.0}, "sdpa": {"error": 0.0}}}
    built = suites.Built(calls, {}, 1e-3, timing.error)
    row, ours = measure.Session(settings, alone=True)._timed(row, benchmark, built, {})
    assert row["ours"] == ours.summary() and row["host_seconds"] == host["ours"]
    return row


LONG, SHORT = {"ours": 4e-4, "eager": 4e-4, "sdpa": 4e-4}, {"ours": 4e-4, "eager": 4e-4, "sdpa": 3e-3}


def test_what_is_longer_than_its_launch_is_not_replayed(monkeypatch):
    row = timed_on_cuda(monkeypatch, LONG, set())
    assert row["ours"]["median"] == pytest.approx(1e-3) and "launched" not in row and row["notes"] == []


def test_one_peer_that_is_shorter_than_its_launch_has_all_replayed(monkeypatch):
    row = timed_on_cuda(monkeypatch, SHORT, set())
    assert {name: peer["median"] for name, peer in row["peers"].items()} == pytest.approx(
        {"eager": 1e-3, "sdpa": 2.5e-3}
    )
    launched = {name: value["median"] for name, value in row["launched"].items()}
    assert launched == pytest.approx({"ours": 1e-3, "eager": 2e-3, "sdpa": 5e-3})
    assert row["ours"]["median"] == pytest.approx(5e-4) and "ratio" not in row["launched"]["ours"]


def test_a_peer_that_cannot_be_captured_keeps_its_launches_and_ours_everyones(monkeypatch):
    row = timed_on_cuda(monkeypatch, SHORT, {"sdpa"})
    assert row["peers"]["sdpa"]["median"] == pytest.approx(5e-3) and row["ours"]["median"] == pytest.approx(5e-4)
    assert row["peers"]["sdpa"]["ratio"]["value"] == pytest.approx(10) and row["fastest"] == "eager"
    assert row["notes"][0].startswith("sdpa cannot be captured into a CUDA graph (raised RuntimeError: not permitted")
    row = timed_on_cuda(monkeypatch, SHORT, {"ours"})
    assert row["ours"]["median"] == pytest.approx(1e-3) and "launched" not in row
    assert row["peers"]["eager"]["ratio"]["value"] == pytest.approx(2)
    (note,) = row["notes"]
    assert note.startswith("ours cannot be captured") and note.endswith("everyone is timed as launched")


# -- presets and suites --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"preset": "smok"}, "did you mean 'smoke'?"),
        ({"shape": "B=2,N"}, "'N' is not NAME=NUMBER"),
        ({"shape": "B=0"}, "'B=0' is not NAME=NUMBER"),
        ({"shape": "B=2147483648"}, "from 1 to 2^31 - 1"),
        ({"shape": "B=2,T=3,B=3"}, "names B twice"),
        ({"seconds": math.inf}, "seconds must be more than 0 and less than an hour, got inf"),
        ({"shape": "K=2"}, "there is no size 'K' (known: B, N, D, M, T, R, C, G, heads)"),
        ({"shape": "D=10,heads=3"}, "heads=3 does not divide D=10"),
        ({"shape": "M=17"}, "M=17 is above the limit of 16"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"backend": "gpu"}, "unknown backend"),
        ({"peers": "egar"}, "did you mean 'eager'?"),
        ({"seconds": 0.0}, "seconds must be more than 0"),
        pytest.param(
            {"preset": "gpu"},
            "no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
    ],
)
def test_bad_options_are_one_line_that_says_what_would_do(options, words):
    with pytest.raises(ValueError) as caught:
        presets.settings(**options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_every_preset_has_shapes_that_its_ops_take():
    for name, preset in presets.PRESETS.items():
        settings = presets.settings(name, device="cpu")
        ids = [benchmark.id for suite in suites.SUITES for benchmark in suites.of(suite, settings)]
        assert len(set(ids)) == len(ids) and {text.partition("/")[0] for text in ids} >= set(preset.ops), name
        for text in ids:
            assert suites.find(text, settings).id == text
        if preset.models:
            assert math.prod(preset.grid) == preset.sizes.N
            assert {"step/none", "step/decode", "step/linear", "step/first_order"} <= set(ids)
    assert not any(text.startswith(("route", "step")) for text in ids)  # the last, TAVER's


def test_variants_change_one_size_and_every_size_has_some():
    settings = presets.settings("design")
    found = list(suites.of("scaling", settings))
    assert {name for b in found for name in b.variant} == {"T", "M", "N", "D", "R", "C", "G"}
    for benchmark in found:
        own = settings.sizes(benchmark.subject)
        batch = benchmark.sizes(settings).B  # a model's is the preset's
        assert benchmark.sizes(settings) == replace(own, B=batch, **benchmark.variant)


@pytest.mark.parametrize(
    "text",
    [
        "rout/forward",
        "route/backward",
        "step/forward",
        "route/forward/K=2",
        "route/forward/M=20",
        "route/forward/T=8/T=4",
    ],
)
def test_ids_of_nothing_are_refused(text):
    with pytest.raises(ValueError):
        suites.find(text, presets.settings(device="cpu"))


def test_an_id_without_a_direction_names_those_that_there_are():
    with pytest.raises(ValueError, match="^'route' names no direction: route/forward or route/forward[+]backward$"):
        suites.find("route", presets.settings(device="cpu"))


def test_nothing_is_compiled_where_no_peer_is():
    for chosen, compiles in (("eager", False), ("eager,sdpa", False), ("algebra-compile", True), ("compile", True)):
        settings = presets.settings(device="cpu", peers=chosen)
        assert suites.Benchmark("route", FORWARD)._compiles(settings) is compiles, chosen
        assert suites.Benchmark("adapter", FORWARD)._compiles(settings) is compiles, chosen
    # Where none is named, smoke compiles two ops.
    settings = presets.settings(device="cpu")
    assert [suites.Benchmark(op, FORWARD)._compiles(settings) for op in ("route", "adapter")] == [True, False]


def test_a_product_is_held_against_the_most_that_the_machine_multiplied(monkeypatch):
    settings, cost = presets.settings(device="cpu"), Case("route", SMALL).cost(FORWARD)
    for at_shapes, rate in ((1e12, 3e12), (4e12, 4e12)):
        monkeypatch.setattr(timing, "product_rate", lambda *_, value=at_shapes: value)
        assert measure.product_limit(cost, settings, 3e12) == (rate, at_shapes)
    assert cost.products and measure.product_limit(replace(cost, products=()), settings, 3e12) == (3e12, None)
    assert measure.product_limit(None, settings, 3e12) == (3e12, None)


def test_memory_is_counted_without_being_taken():
    settings = presets.settings("design", shape="N=16777216")
    before = measure.resident("VmRSS")
    needed = suites.Benchmark("leave_one_out", BOTH).needs(settings)
    # Arguments, results, both once more (what is compared), and eager's stack of the experts.
    assert needed > 2 * footprint("leave_one_out", settings.sizes("leave_one_out"), BOTH) * 0.9 > 10**12
    assert measure.resident("VmRSS") - before < 1e9


def test_memory_counts_the_copies_that_rotate_and_the_buffers_of_the_limits(monkeypatch):
    monkeypatch.setattr(timing, "l2_bytes", lambda: 2**20)
    monkeypatch.setattr(timing, "COPY_BYTES", {"cpu": 2**20, "cuda": 2**20})
    settings, benchmark = presets.settings(device="cpu"), suites.Benchmark("leave_one_out", BOTH)
    once = benchmark.needs(settings)
    case = Case("leave_one_out", settings.sizes("leave_one_out"))
    turns = suites._turns(suites.size(case.arguments))
    assert benchmark.needs(replace(settings, device="cuda")) == once + (turns - 1) * sum(case.tensor_bytes(BOTH))
    timing.COPY_BYTES["cpu"] += 1000
    assert benchmark.needs(settings) == once + 3000


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        pytest.param("0::/\n", {}, None, id="no limit"),
        pytest.param(
            "0::/job/step\n", {"job": ("9000", 7000, 500), "job/step": ("max", 6000, 0)}, 2500, id="around it"
        ),
        pytest.param("0::/job/step\n", {"job": ("9000", 7000, 0), "job/step": ("8000", 6500, 0)}, 1500, id="its own"),
        pytest.param("0::/seen/from/outside\n", {"": ("9000", 7000, 0)}, 2000, id="a container"),
        pytest.param("4:cpu,memory:/job\n1:pids:/\n0::/\n", {"memory/job": ("9000", 7000, 300)}, 2300, id="version 1"),
    ],
)
def test_limits_of_control_groups_are_seen(groups, files, left, tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, (limit, used, given_back) in files.items():
        folder = tmp_path / "sys/fs/cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        first = name.startswith("memory")
        (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(f"{limit}\n")
        (folder / ("memory.usage_in_bytes" if first else "memory.current")).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(
            f"anon 10\n{'total_' * first}inactive_file {given_back}\n{'total_' * first}active_file 1\n"
        )
    assert presets._available_to_groups(tmp_path) == (None if left is None else left + 1)
    assert presets._available_to_groups(tmp_path / "not Linux") is None


# -- rows ------------------------------------------------------------------------------------------------------------------

ROW = {
    "id", "suite", "subject", "direction", "variant", "preset", "sizes", "dtype", "device", "backend", "ours", "peers",
    "fastest", "memory", "cost", "achieved", "limit", "peak_bytes", "kept_bytes", "host_seconds", "notes",
}  # fmt: skip
TIMES = {"median", "q1", "q3", "min", "rounds", "calls"}


class NoKept:
    """In place of the process with kept memory: it says nothing."""

    def __init__(self, settings):
        pass

    def wait(self):
        pass

    def ask(self, name):
        return {"error": "not asked for"}

    def close(self):
        pass


@pytest.fixture
def session(monkeypatch):
    """A session of tiny shapes, limits and times, without the process with kept memory."""
    monkeypatch.setattr(timing, "COPY_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(measure, "SQUARE", {"cpu": (16, 16, 16)})
    monkeypatch.setattr(measure, "Kept", NoKept)
    monkeypatch.setattr(presets, "available", lambda device: None)  # whatever this machine has left

    def make(**options):
        return measure.Session(
            presets.settings(**{"shape": TINY, "seconds": 1e-3, "device": "cpu", "peers": "eager"} | options)
        )

    return make


def row_of(session: measure.Session, text: str) -> dict:
    return session.row(suites.find(text, session.settings))[0]


def test_options_of_settings_make_the_same_settings():
    for options in (
        {},
        {"preset": "design", "shape": "B=2,N=64", "dtype": "bfloat16", "backend": "cpu", "seconds": 0.5},
    ):
        made = presets.settings(**options, device="cpu", peers="eager")
        assert presets.settings(**made.options(), peers="eager") == made


def test_rows_of_ops_and_models_have_what_a_reader_needs(session):
    made = session()
    for text in ("route/forward", "confidence_loss/forward+backward", "alignment_loss/forward+backward/M=2"):
        row = row_of(made, text)
        assert set(row) == ROW and set(row["ours"]) == TIMES, row
        eager = row["peers"]["eager"]
        assert set(eager) == TIMES | {"ratio", "error", "peak_bytes"} and row["fastest"] == "eager"
        assert eager["ratio"]["value"] == pytest.approx(eager["median"] / row["ours"]["median"])
        assert row["achieved"]["bytes_per_second"] == pytest.approx(row["cost"]["bytes"] / row["ours"]["median"])
        assert row["limit"]["copy_bandwidth"] > 0 and row["host_seconds"] > 0
        assert json.loads(json.dumps(row, allow_nan=False)) == row


@pytest.mark.parametrize("text", [f"{name}/{d}" for name, ds in models.SUBJECTS.items() for d in ds])
def test_models_on_both_backends_agree_and_are_timed(session, text):
    row = row_of(session(), text)
    beside = {"none"} if text.startswith("step/") and text != "step/none" else set()
    assert set(row) == ROW | beside and all(set(row[name]) == TIMES | {"ratio"} for name in beside)
    assert row["peers"]["eager"]["ratio"]["value"] > 0 and row["cost"] is None, row
    assert row["sizes"] == asdict(SMALL)


def test_bfloat16_is_measured_as_float32_is(session):
    made = session(dtype="bfloat16")
    assert "ours" in row_of(made, "group_attention/forward") and "ours" in row_of(made, "step/none")


def test_sixteen_bits_are_compared_with_the_reference_in_float32(session):
    # Of 4,096 tokens the reference adds up a norm's gradients in bfloat16, with an error that a wrong term might have too.
    row = row_of(
        session(dtype="bfloat16", shape=TINY.replace("N=6", "N=2048")), "competency_aggregate/forward+backward"
    )
    assert 0 < row["peers"]["eager"]["error"] and "ratio" in row["peers"]["eager"], row
    truth = Case("adapter", SMALL, torch.bfloat16).exact(BOTH)()
    assert all(t.dtype == torch.float32 for part in truth for t in part)


def test_a_peer_that_is_missing_raises_or_disagrees_is_a_word_and_the_row_goes_on(session, monkeypatch):
    def raises(*_, **__):
        raise RuntimeError("no such kernel\nand more")

    def wrong(qkv, num_heads):
        return torch.zeros_like(qkv[..., : qkv.shape[-1] // 3])

    monkeypatch.setitem(peers.PACKAGES, "xformers", ("xformers_that_nobody_has", "xformers"))
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "xformers_that_nobody_has" else object())
    others = {"sdpa": wrong, "flash-attn": raises, "xformers": raises}
    monkeypatch.setitem(peers.OTHERS, "group_attention_packed", others)
    row = row_of(session(peers="eager,sdpa,flash-attn,xformers"), "group_attention_packed/forward")
    found = row["peers"]
    assert found["flash-attn"] == {"refused": "raised RuntimeError: no such kernel"}
    assert found["xformers"] == {"missing": "xformers is not installed"}
    assert found["sdpa"]["refused"].startswith("DISAGREES") and "ratio" not in found["sdpa"]
    assert "ratio" in found["eager"] and row["fastest"] == "eager"
    text = "\n".join(table.lines([row]))
    for words in (
        "flash-attn refused: raised RuntimeError",
        "xformers missing: xformers is not installed",
        "DISAGREES",
    ):
        assert words in text


def test_ours_that_disagrees_is_an_error_and_has_no_time(session, monkeypatch):
    function = Case.function

    def off(self, backend):
        right = function(self, backend)
        return right if backend == "reference" else lambda **tensors: 1.01 * right(**tensors)

    monkeypatch.setattr(Case, "function", off)
    made = session(backend="cpu") if "cpu" in presets.available_backends() else pytest.skip("cpu is not compiled here")
    row = row_of(made, "leave_one_out/forward")
    assert row["error"].startswith("ours DISAGREES") and "ours" not in row


def test_eager_that_raises_in_sixteen_bits_is_a_word_and_the_row_goes_on(session, monkeypatch):
    def others(case, settings, *, compiles):
        def eager(**tensors):
            raise NotImplementedError("not for bfloat16")

        return {"eager": eager}, {}

    monkeypatch.setattr(suites, "peers", others)
    monkeypatch.setattr(measure.Session, "_add_kept", lambda *_: pytest.fail("eager cannot be measured there either"))
    row = row_of(session(dtype="bfloat16"), "group_attention/forward")
    assert row["peers"]["eager"] == {"refused": "raised NotImplementedError: not for bfloat16"}, row
    assert row["fastest"] is None and row["ours"]["median"] > 0 and row["limit"] is not None


@pytest.fixture
def asker():
    """Who asks a parent, and says nothing more while it answers."""
    read, write = os.pipe()
    with open(read) as file:
        yield file
    os.close(write)


def test_a_process_with_kept_memory_that_has_died_is_a_note_and_others_begin(session, monkeypatch):
    process = kept.Kept(presets.settings(device="cpu", shape=TINY, seconds=1e-3))
    process.wait()
    process._parents[2].kill()
    process._said[2].write("a warning\n")
    assert process.ask("route/forward") == {"error": "a process that measures it has ended (-9)"}
    assert "ratio" in process.ask("route/forward")
    process.close()

    begun, asked = [], []

    class Fake:
        def __init__(self, settings):
            begun.append(self)

        def wait(self):
            pass

        def ask(self, name):
            asked.append(name)
            return {"error": "ended"} if len(asked) == 1 else {"median": 1.0}

        def close(self):
            pass

    monkeypatch.setattr(measure, "Kept", Fake)
    monkeypatch.setattr(suites.Benchmark, "backend", lambda *_: "cpu")
    made = session()
    rows = [row_of(made, "route/forward") for _ in range(3)]
    assert rows[0]["notes"] == ["kept memory: ended"] and all("eager_kept" in row["memory"] for row in rows[1:]), rows
    assert len(begun) == 1
    # The reference against itself has nothing to show there.
    monkeypatch.setattr(suites.Benchmark, "backend", lambda *_: "reference")
    assert not row_of(made, "route/forward")["memory"]


def test_rows_with_kept_memory_are_measured_in_several_processes_of_which_one_may_end(monkeypatch, asker):
    settings = presets.settings(device="cpu", shape=TINY, seconds=1e-3)
    process = kept.Kept(settings)
    row = process.ask("leave_one_out/forward+backward")
    assert set(row) == TIMES | {"ratio", "ours", "processes", "threads"}, row
    assert len(row["processes"]) == kept.PROCESSES and row["rounds"] == row["ours"]["rounds"] >= kept.PROCESSES
    assert row["ratio"]["value"] == pytest.approx(statistics.geometric_mean(row["processes"]))
    assert row["ratio"]["low"] < row["ratio"]["value"] < row["ratio"]["high"]
    assert process.ask("rout/forward")["error"].startswith("raised ValueError: unknown benchmark 'rout'")
    assert "ratio" in process.ask("step/decode")
    process.close()
    monkeypatch.setattr(suites, "find", lambda *_: os._exit(7))
    with pytest.raises(RuntimeError, match=r"has ended \(7\)"):
        kept._forked("route/forward", settings, 1, True, asker)


def test_last_words_of_a_parent_that_ends_by_itself_are_quoted(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    process = kept.Kept(presets.settings(device="cpu"))
    process.wait()
    process._said[0].write("Traceback\nImportError: no torch\n\n")
    error = {"error": "a process that measures it has ended (1): ImportError: no torch"}
    assert process.ask("route/forward") == error
    # Others would end at their imports too, row after row.
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("begun again"))
    assert process.ask("router/forward") == error


@pytest.fixture
def served(monkeypatch, capsys):
    """What a parent answers to one question, by a run that has ended since."""

    def serve(settings, name):
        read, write = os.pipe()
        os.write(write, f"{json.dumps([name, True])}\n".encode())
        os.close(write)
        threads = torch.get_num_threads()
        with open(read) as asker:
            monkeypatch.setattr(sys, "stdin", asker)
            kept.serve([json.dumps(settings.options())])
        torch.set_num_threads(threads)
        ready, said = capsys.readouterr().out.splitlines()
        assert ready == "ready"
        return json.loads(said)

    return serve


def test_a_process_with_kept_memory_ends_with_a_run_that_was_killed(monkeypatch, served):
    monkeypatch.setattr(suites.Benchmark, "build", lambda *_: None)  # nothing is imported at first use here
    monkeypatch.setattr(kept, "_child", lambda *_: time.sleep(60))
    found = served(presets.settings(device="cpu"), "route/forward")
    assert found == {"error": "a process that measures it has ended (-9)"}


def test_parent_that_hangs_at_its_imports_is_ended(monkeypatch, tmp_path):
    (tmp_path / "hangs").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "hangs").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "hangs"))
    monkeypatch.setattr(kept, "STUCK_SECONDS", 0.1)
    process = kept.Kept(presets.settings(device="cpu"))
    assert process.ask("route/forward") == {"error": "a process that measures it has ended (-9)"}


def test_each_process_with_kept_memory_has_a_parent_of_its_own_and_the_first_compares_outputs(monkeypatch):
    asked, samples = [], {"ours": {"samples": [1.0, 1.0], "calls": 1}}

    class Parent:
        def __init__(self, *_, **__):
            self.number = len(asked)
            asked.append([])
            eager = {"samples": [2.0 + self.number] * 2, "calls": 1}
            self.stdin = SimpleNamespace(write=asked[self.number].append, flush=lambda: None)
            answers = iter(["ready\n", json.dumps({**samples, "eager": eager, "threads": 1})])
            self.stdout = SimpleNamespace(readline=lambda: next(answers))

    monkeypatch.setattr(kept.select, "select", lambda some, *_: (some, [], []))
    monkeypatch.setattr(subprocess, "Popen", Parent)
    row = kept.Kept(presets.settings(device="cpu")).ask("route/forward")
    assert [json.loads("".join(lines)) for lines in asked] == [["route/forward", i == 0] for i in range(4)]
    assert row["processes"] == pytest.approx([2.0, 3.0, 4.0, 5.0]) and row["threads"] == 1


def test_ours_that_disagrees_with_kept_memory_alone_fails(session, monkeypatch, served):
    settings = presets.settings(device="cpu", shape=TINY, seconds=1e-3, peers="eager")
    build = suites.Benchmark.build

    def wrong(self, settings):
        built = build(self, settings)
        built.calls["ours"] = lambda: torch.zeros(1)
        return built

    with monkeypatch.context() as patch:
        patch.setattr(suites.Benchmark, "build", wrong)
        patch.setattr(kept, "wait", lambda channels, _: channels[:1])  # until it has answered
        said = served(settings, "route/forward")
    assert said["refused"].startswith("ours DISAGREES")
    monkeypatch.setattr(NoKept, "ask", lambda *_: said)
    monkeypatch.setattr(suites.Benchmark, "backend", lambda *_: "cpu")
    row = row_of(session(), "route/forward")
    assert row["error"].startswith("ours DISAGREES") and row["error"].endswith(", with kept memory")


def test_what_says_nothing_with_kept_memory_is_ended(monkeypatch, asker):
    settings = presets.settings(device="cpu", shape=TINY, seconds=1e-3, peers="eager")
    monkeypatch.setattr(suites.Benchmark, "build", lambda *_: time.sleep(60))
    monkeypatch.setattr(kept, "STUCK_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match=r"has ended \(-9\)"):
        kept._forked("route/forward", settings, 1, True, asker)


def test_a_shape_that_does_not_fit_is_one_line_before_anything_is_allocated(session, monkeypatch):
    monkeypatch.setattr(presets, "available", lambda device: 10**6)
    monkeypatch.setattr(suites.Benchmark, "build", lambda *_: pytest.fail("allocated"))
    assert measure.lack(suites.Benchmark("route", FORWARD), presets.settings(device="cpu", shape=TINY), 10**6)
    row = row_of(session(shape="N=65536"), "route/forward")
    assert row["error"].startswith("does not fit: ") and row["error"].endswith("of cpu memory are free")
    row = row_of(session(shape="N=2000000000,B=2000000000"), "route/forward")
    assert row["error"] == "does not fit: its bytes are more than 64 bits count"


def test_on_cuda_torch_compile_takes_part_with_max_autotune_too():
    cuda = replace(presets.settings(peers="all", device="cpu"), device="cuda")
    found, _ = peers.peers(Case("route", SMALL), cuda, compiles=True)
    assert {"compile", "compile-max-autotune", "algebra", "algebra-compile"} < set(found)
    smoke = presets.settings(device="cpu")
    assert list(peers.peers(Case("route", SMALL), smoke, compiles=True)[0]) == ["eager", "compile"]


def test_targets_are_of_the_preset_as_it_stands_and_of_the_fastest_that_counts():
    row = {
        "preset": "design",
        "sizes": asdict(Sizes()),
        "dtype": "float32",
        "device": "cpu",
        "subject": "group_attention",
        "direction": "forward",
        "ours": {},
        "peers": {name: {"ratio": {"value": v}} for name, v in (("eager", 12.0), ("sdpa", 9.0), ("compile", 7.0))},
        "limit": {"share": 0.8},
    }
    assert table.against_targets(row) == [("eager/sdpa", 10.0, 9.0), ("compile", 6.5, 7.0)]
    gpu = row | {"preset": "gpu", "sizes": asdict(Sizes(B=32)), "dtype": "bfloat16", "device": "cuda", "peers": {}}
    (what, target, value), limit = table.against_targets(gpu)
    assert (what, target) == ("sdpa/flash-attn/xformers", 10.0) and math.isnan(value) and limit == ("limit", 0.85, 0.8)
    for other in ({"sizes": asdict(Sizes(G=2))}, {"dtype": "bfloat16"}, {"subject": "adapter"}):
        assert table.against_targets(row | other) == []


# -- commands ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "code", "usage"),
    [
        (["--help"], 0, "usage: python -m bench [-h]"),
        (["list", "--help"], 0, "usage: python -m bench list "),
        (["lst"], 2, "invalid choice: 'lst'"),
    ],
)
def test_the_command_hands_everything_after_its_name_to_the_named_one(given, code, usage, capsys):
    with pytest.raises(SystemExit) as ended:
        bench_command.main(given)
    assert ended.value.code == code and usage in "".join(capsys.readouterr())


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_once_lists_the_operators_of_ours(backend, capsys):
    if backend not in presets.available_backends() or backend == "triton" and not triton.INTERPRETED:
        pytest.skip(f"{backend} does not run on CPU tensors here")
    given = ["leave_one_out/forward+backward", "--shape", "B=1,N=4,D=16,M=2,T=2,heads=2", "--device", "cpu"]
    assert once.main([*given, "--backend", backend, "--table", "--repeat", "2"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("leave_one_out/forward+backward: ") and rest
    assert any("::leave_one_out_backward" in line and " 1.0 x" in line for line in rest) == (backend != "reference")


@pytest.mark.parametrize(
    "given",
    [
        ["rout/forward"],
        ["route/forward", "--shape", "x"],
        ["route/forward", "--preset", "x"],
        ["route/forward", "--repeat", "0"],
    ],
)
def test_once_of_nothing_is_one_line(given, capsys):
    assert once.main([*given, "--device", "cpu"]) == 64
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_once_and_the_report_for_a_cpu_of_what_does_not_fit_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(presets, "available", lambda device: 10**6)
    monkeypatch.setattr(suites.Benchmark, "build", lambda *_: pytest.fail("allocated"))
    assert once.main(["route/forward", "--device", "cpu"]) == 2
    assert cpu_report.main(["route/forward", "--preset", "smoke"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("route/forward: does not fit: ") and second.startswith("route/forward: does not fit: ")


def pytest_bench(*options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "bench/", "-q", "-p", "no:cacheprovider", *map(str, options)]
    # A worker of pytest-xdist's says so in the environment, and pytest-benchmark would measure nothing there.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_pytest_bench_writes_rows_into_the_json_of_pytest_benchmark_and_prints_a_table(tmp_path):
    options = ("--shape", TINY, "--seconds", "0.01", "--peers", "eager", "--device", "cpu")
    file = tmp_path / "found.json"
    done = pytest_bench(*options, "-k", "leave_one_out/forward and not test_scale", f"--benchmark-json={file}")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    document = json.loads(file.read_text())
    facts = document["machine_info"]
    assert (
        facts["device"]["class"] == timing.device_class("cpu") and facts["contract_version"] == timing.CONTRACT_VERSION
    )
    assert {"driver", "torch", "triton", "compiler", "revision", "dirty", "threads", "load", "contract"} <= set(facts)
    assert document["not_measured"] == []
    names = [b["extra_info"]["id"] for b in document["benchmarks"]]
    assert names == ["leave_one_out/forward", "leave_one_out/forward+backward"]
    for b in document["benchmarks"]:
        row = b["extra_info"]
        assert b["param"] == row["id"] and b["group"] == "ops" and set(row) == ROW, row
        assert b["stats"]["median"] == pytest.approx(row["ours"]["median"])
        assert b["stats"]["rounds"] == row["ours"]["rounds"] and b["stats"]["iterations"] == row["ours"]["calls"]
        if row["backend"] != "reference":
            assert "ratio" in row["memory"]["eager_kept"], row["notes"]
            assert row["memory"]["eager_kept"]["threads"] == presets.PRESETS["smoke"].kept_threads == 1
            assert len(row["memory"]["eager_kept"]["processes"]) == kept.PROCESSES
        assert f"| {row['id']} " in done.stdout


def test_pytest_bench_with_a_bad_option_is_one_line():
    done = pytest_bench("--preset", "nyud")
    assert done.returncode == 4
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("ERROR: unknown preset 'nyud'; did you mean 'nyud-b'?")


@pytest.mark.parametrize(
    "options, said",
    [
        (("-p", "no:benchmark"), "bench/ needs pytest-benchmark: pip install pytest-benchmark pytest-timeout"),
        (("--benchmark-json", "/nowhere/a.json"), "--benchmark-json=/nowhere/a.json: there is no such folder"),
        (("--gate", "--shape", "B=3"), "--gate does not go with --shape: baselines are of presets"),
    ],
)
def test_what_would_be_in_vain_is_one_line_before_anything_is_measured(options, said):
    done = pytest_bench(*options)
    assert done.returncode == 4
    assert [line for line in done.stderr.splitlines() if line.strip()] == [f"ERROR: {said}"]


def test_commands_end_quietly_where_nobody_reads_on():
    for arguments in (["list"], ["compare", ROOT / "nowhere.json", "--help"]):
        read, write = os.pipe()
        os.close(read)
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "bench", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=write, stderr=subprocess.PIPE)
        os.close(write)
        assert done.returncode == -signal.SIGPIPE and done.stderr == b""


@pytest.mark.parametrize("busy, said", [(1.0, False), (1.01, True), (None, False)])
def test_a_run_begun_beside_others_says_so_above_its_table(monkeypatch, busy, said):
    from bench import conftest

    lines = []
    reporter = SimpleNamespace(section=lambda title: None, write_line=lines.append)
    facts = timing.provenance() | {"busy": busy, "cores": 8}
    run = SimpleNamespace(settings=presets.settings(device="cpu"))
    stash = {conftest.ROWS: [{"peers": {}}], conftest.SESSION: run, conftest.FACTS: facts}
    monkeypatch.setattr(table, "lines", lambda rows: [])
    conftest.pytest_terminal_summary(reporter, SimpleNamespace(stash=stash, getoption=lambda name: None))
    assert any(line.startswith("BUSY") for line in lines) is said, lines


def test_a_gate_without_a_baseline_says_so_before_it_measures(tmp_path):
    done = pytest_bench("--gate", "--baselines", tmp_path, "--collect-only")
    assert done.stdout.startswith("gate: will fail, no baseline for "), done.stdout + done.stderr
    assert "gate:" not in pytest_bench("--collect-only").stdout


def test_cores_are_busy_with_what_others_do(monkeypatch):
    idle, used = (100, 0, 50, 1000, 10, 0, 0, 7), (150, 0, 50, 1020, 15, 0, 0, 32)

    def others(*after):
        texts = ["\n".join(f"cpu{i} {' '.join(map(str, t))} 0 0" for i, t in enumerate(s)) for s in ([idle] * 3, after)]
        left = iter(texts)
        monkeypatch.setattr(timing, "_read", lambda path: next(left))
        return timing.busy_cores()

    monkeypatch.setattr(timing, "BUSY_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    # Of a hundred ticks: half a user's, a quarter stolen by the hypervisor, the rest idle or waiting for a disk. The third
    # core is not this process's.
    assert others((100, 0, 50, 1050, 20, 0, 0, 7), idle, used) == 0.0
    assert others(used, idle, used) == 0.75 and others(used, used, idle) == 1.5
    monkeypatch.setattr(timing, "_read", lambda path: None)
    assert timing.busy_cores() is None
    assert "busy" not in timing.describe(timing.provenance())


def test_peak_memory_is_of_results_and_temporaries_and_what_stays():
    bytes_, stays = 64 * 2**20, []
    # A hole in glibc's heap, which serves blocks from it that it would map otherwise, and keeps their pages.
    torch.empty(30 * 2**20, dtype=torch.uint8)
    hole = [torch.empty(20 * 2**20, dtype=torch.uint8) for _ in range(10)]
    above = [bytearray(120_000) for _ in range(50)]
    del hole
    found = measure.peak_memory(lambda: torch.ones(bytes_ // 4) + 1, "cpu")
    if found is None:
        pytest.skip("this system does not say")
    assert 1.9 * bytes_ < found[0] < 2.5 * bytes_ and found[1] < bytes_ / 4, found
    found = measure.peak_memory(lambda: stays.append(torch.ones(bytes_ // 4)), "cpu")
    assert found[0] > 0.9 * bytes_ and found[1] > 0.9 * bytes_, found
    del above
