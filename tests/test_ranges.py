"""Ranges for profilers: which names are seen when they are on, that none is when they are off, and what off costs."""

import sys

import pytest
import torch
from helpers import FUNCTIONS, PLAIN, call, leaves, make
from torch.profiler import ProfilerActivity, profile

from tiger_fast import _ranges, functional, profiler_ranges, use_backend
from tiger_fast.models import TIGER
from tiger_fast.models.tasks import scenes_tasks

OURS = ("tiger_fast.", "tiger.", "trainer.")


def names(function):
    """The names of our ranges that torch.profiler sees while `function` runs, with how often."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        function()
    return {event.key: event.count for event in seen.key_averages() if event.key.startswith(OURS)}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_has_a_range_when_on_and_none_when_off(function):
    arguments = make(PLAIN[function], torch.float32)
    assert names(lambda: call(function, arguments)) == {}
    with profiler_ranges():
        assert names(lambda: call(function, arguments)) == {f"tiger_fast.{function}": 1}
    assert names(lambda: call(function, arguments)) == {}


def test_ranges_can_be_off_within_on():
    arguments = make(PLAIN["leave_one_out"], torch.float32)
    with profiler_ranges(), profiler_ranges(False):
        assert names(lambda: call("leave_one_out", arguments)) == {}


def test_contexts_of_two_threads_may_overlap():
    first, second = profiler_ranges(), profiler_ranges()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert _ranges.on, "the second is still open"
    second.__exit__(None, None, None)
    assert not _ranges.on


def test_triton_operators_have_ranges_forward_and_backward():
    pytest.importorskip("triton")
    arguments, _ = leaves(make(PLAIN["leave_one_out"], torch.float32))

    def both():
        with use_backend("triton"):
            torch.stack([t.sum() for t in call("leave_one_out", arguments)]).sum().backward()

    with profiler_ranges():
        seen = names(both)
    assert seen == {f"tiger_fast.{name}": 1 for name in SEEN_OF_LEAVE_ONE_OUT}


SEEN_OF_LEAVE_ONE_OUT = ("leave_one_out", "kernels.leave_one_out", "kernels.leave_one_out_backward")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_full_graph_is_compiled_with_ranges_on_and_off_and_gives_the_same(function):
    arguments = make(PLAIN[function], torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(lambda given: call(function, given), fullgraph=True, backend="aot_eager")
    expected = call(function, arguments)
    for on in (False, True):
        with profiler_ranges(on):
            for ours, theirs in zip(compiled(arguments), expected, strict=True):
                torch.testing.assert_close(ours, theirs)


def test_what_is_exported_with_ranges_on_has_none_in_it():
    class Module(torch.nn.Module):
        def forward(self, experts, weights):
            return functional.leave_one_out(experts, weights)

    given = torch.randn(2, 4, 5, 6), torch.rand(2, 3, 5, 4)
    with profiler_ranges():
        program = torch.export.export(Module(), given)
    assert "record_function" not in program.graph_module.code
    torch.testing.assert_close(program.module()(*given), functional.leave_one_out(*given))


def test_autocast_has_its_rule_inside_a_range():
    arguments = make(PLAIN["leave_one_out"], torch.float32)
    with profiler_ranges(), torch.autocast("cpu", dtype=torch.bfloat16):
        (out,) = call("leave_one_out", arguments)
    assert out.dtype == torch.bfloat16


def instructions(function, *arguments):
    """Bytecode instructions that a call runs, by the file they are in."""
    counts = {}

    def trace(frame, event, argument):
        frame.f_trace_opcodes = True
        if event == "opcode":
            file = frame.f_code.co_filename
            counts[file] = counts.get(file, 0) + 1
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*arguments)
    finally:
        sys.settrace(previous)
    return counts


def test_off_costs_a_function_a_look_at_a_global_and_nothing_else():
    # LOAD_GLOBAL, LOAD_ATTR and a jump are in ops/backends.py; nothing of _ranges.py runs.
    weights = torch.rand(2, 3, 5, 4)
    counts = instructions(functional.leave_one_out, torch.randn(2, 4, 5, 6), weights)
    assert any(file.endswith("backends.py") for file in counts) and _ranges.__file__ not in counts
    with profiler_ranges():
        assert _ranges.__file__ in instructions(functional.leave_one_out, torch.randn(2, 4, 5, 6), weights)


def test_off_costs_a_phase_one_call_that_makes_nothing():
    def inside():
        with _ranges.phase("name"):
            pass

    counts = instructions(inside)
    assert 0 < counts[_ranges.__file__] <= 12 and sum(counts.values()) <= 60


def tiny(mode):
    counterfactual = {"weight": 0.0} if mode == "none" else {"mode": mode}
    torch.manual_seed(0)
    return TIGER.from_preset("tiger-tiny", embeddings=torch.randn(5, 384), counterfactual=counterfactual)


PARTS = ("adapters", "expert_interaction", "router", "task_interaction", "decoder", "losses", "experts")


@pytest.mark.parametrize("mode", ["none", "decode", "linear", "first_order"])
def test_the_phases_of_a_model_are_named(mode):
    model = tiny(mode)
    height, width = model.settings.image_size
    images = torch.rand(1, 3, height, width)
    targets = {
        "semseg": torch.randint(9, (1, height, width)),
        "depth": torch.rand(1, 1, height, width) + 0.5,
        "normals": torch.nn.functional.normalize(torch.randn(1, 3, height, width), dim=1),
        "saliency": torch.randint(2, (1, height, width)),
        "edge": torch.randint(2, (1, 1, height, width)).float(),
    }

    def step():
        model.objective(targets, images).total.backward()

    assert names(step) == {}
    with profiler_ranges():
        seen = names(step)
    phases = {name.removeprefix("tiger.") for name in seen if name.startswith("tiger.")}
    assert phases == {*PARTS, *(() if mode == "none" else ("counterfactual",))}
    decodes = 1 + (len(model.expert_names) if mode == "decode" else 0)
    assert seen["tiger.decoder"] == decodes and seen["tiger.losses"] == decodes * len(scenes_tasks())
    assert "tiger_fast.route" in seen
