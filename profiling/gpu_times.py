"""`python -m profiling.gpu_times`: each op forward and backward on a GPU, against eager PyTorch, torch.compile and, for group
attention, SDPA, at the default GPU shape.

Results are compared with the reference's first, and what disagrees is not timed. Then rounds: in each, every callable runs
once between two CUDA events, in shuffled order, on the next of several copies of the arguments, which together are four
times the L2 cache; so every call finds its arguments in device memory. What a call takes on the host counts where the
device waits for it, as it does for a user. Times are medians. The least bytes are arguments and results, once each forward
and, backward, arguments, gradients of results and of arguments; the copy is torch's, of 1 GiB, in the same run.
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench import timing
from bench.cases import DIRECTIONS, FORWARD, STATED_SIZES, Case, Sizes, peers, size
from tiger_fast.ops import triton

# The most important first: where time runs out, the last are left out.
OPS = (
    "route",
    "leave_one_out",
    "group_attention",
    "counterfactual_losses",
    "competency_aggregate",
    "alignment_loss",
    "adapter",
    "counterfactual_losses_from_projections",
    "group_attention_packed",
    "causal_target",
)
# What ours and eager may differ by, relative to the largest value of each result.
TOLERANCES = {"float32": 1e-3, "bfloat16": 6e-2, "float16": 1e-2}
COPY = 1 << 30
PEERS = ("eager", "compile", "algebra", "algebra compile", "sdpa")
ROUNDS = 5, 200  # at least and at most


class Clock:
    """Seconds of a call on a device: between CUDA events, or of the host for a dry run."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def __call__(self, function: Callable[[], Any]) -> float:
        self.synchronize()
        if not self.cuda:
            begin = time.perf_counter()
            function()
            return time.perf_counter() - begin
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def sizes_of(op: str, dry_run: bool) -> Sizes:
    """The default GPU shape, which has the CPU's widths; a small one for a dry run."""
    stated = replace(STATED_SIZES.get(op, Sizes()), B=32)
    return replace(stated, B=1, N=8, D=48, C=48, R=4) if dry_run else stated


def copies(case: Case, op: str, dtype: torch.dtype, device: str, cache: int) -> list[Case]:
    """The case and more of its kind, together four caches of arguments, at most 64."""
    count = max(2, min(64, math.ceil(4 * cache / size(case.arguments))))
    return [case, *(Case(op, case.sizes, dtype, device, **case.keywords) for _ in range(count - 1))]


def rounds(
    calls: Mapping[str, Sequence[Callable[[], Any]]], clock: Callable[[Callable[[], Any]], float], seconds: float
) -> dict[str, list[float]]:
    """Samples by name: in each round one of every callable's turns, in shuffled order, until `seconds` have passed."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    draws, begin = random.Random(0), time.perf_counter()
    for number in range(ROUNDS[1]):
        if number >= ROUNDS[0] and time.perf_counter() - begin > seconds:
            break
        for name in draws.sample(list(calls), len(calls)):
            turns = calls[name]
            samples[name].append(clock(turns[number % len(turns)]))
    return samples


def bandwidth(clock: Clock, device: str, count: int) -> float:
    """Bytes a second, reads and writes added, of torch's copy; the best of ten."""
    source, target = (torch.ones(count, dtype=torch.uint8, device=device) for _ in range(2))
    target.copy_(source)
    return 2 * count / min(clock(lambda: target.copy_(source)) for _ in range(10))


def least_bytes(case: Case, direction: str, results: Any) -> int:
    """See the module. `results` are those of the direction."""
    given = size(case.arguments)
    if direction == FORWARD:
        return given + size(results)
    outputs, gradients = results
    return 2 * given + 2 * size(outputs) + size(gradients)


def measure(op: str, direction: str, options: argparse.Namespace, clock: Clock, copied: float) -> dict[str, Any]:
    """A row: medians by name, ratios to ours, errors, who was refused and why, share of the copy's bandwidth."""
    torch.compiler.reset()
    dtype = getattr(torch, options.dtype)
    case = Case(op, sizes_of(op, options.dry_run), dtype, options.device)
    functions = {"ours": case.function(options.backend), **peers(case, options.compile)}
    for name in ("algebra", "algebra compile"):
        if name in functions:
            functions[name] = with_float32_weights(functions[name])
    expected = case.call(functions["eager"], direction)()
    row: dict[str, Any] = {"op": op, "direction": direction, "dtype": options.dtype, "sizes": asdict(case.sizes)}
    row |= {"errors": {}, "refused": {}, "least_bytes": least_bytes(case, direction, expected)}
    for name in [name for name in functions if name != "eager"]:
        try:
            begin = time.perf_counter()
            row["errors"][name] = timing.error(case.call(functions[name], direction)(), expected)
            clock.synchronize()
            row.setdefault("first_call_seconds", {})[name] = time.perf_counter() - begin
        except Exception as problem:  # a peer's failure is a line in the table, not the end of the run
            row["refused"][name] = f"raised {type(problem).__name__}: {str(problem).strip().splitlines()[:1]}"
            continue
        if not row["errors"][name] <= TOLERANCES[options.dtype]:
            row["refused"][name] = f"DISAGREES: {row['errors'][name]:.2g}"
    del expected
    agreeing = [name for name in functions if name not in row["refused"]]
    turns = copies(case, op, dtype, options.device, 1 << 16 if options.dry_run else cache_bytes())
    calls = {name: [each.call(functions[name], direction) for each in turns] for name in agreeing}
    for name in agreeing:
        for call in calls[name][:3]:
            call()
    samples = rounds(calls, clock, options.seconds)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    row |= {"copies": len(turns), "seconds": medians, "samples": {name: len(v) for name, v in samples.items()}}
    row["quartiles"] = {
        name: statistics.quantiles(values, n=4, method="inclusive")[::2] for name, values in samples.items()
    }
    if "ours" in medians:
        row["ratios"] = {name: value / medians["ours"] for name, value in medians.items() if name != "ours"}
        row["share_of_copy"] = row["least_bytes"] / copied / medians["ours"]
    return row


def with_float32_weights(algebra: Callable[..., Any]) -> Callable[..., Any]:
    """A peer that computes in one type, with its weights in the type of the contract."""

    def call(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, weights = algebra(**arguments)
        return tokens, weights.float()

    return call


def cache_bytes() -> int:
    """The L2 cache of the current GPU."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def header() -> str:
    """Of the table whose rows are `line`s."""
    names = "  ".join(f"{name:>{max(7, len(name))}}" for name in PEERS)
    return f"{'op':<38} {'direction':<16}  {'ours':>12}  {names}  copy's bandwidth, least bytes"


def line(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    if "error" in row:
        return f"{row['op']:<38} {row['direction']:<16} {row['error']}"
    ours = row["seconds"].get("ours")
    cells = [f"{row['op']:<38} {row['direction']:<16}", f"{ours * 1e3:9.3f} ms" if ours else f"{'-':>12}"]
    ratios = row.get("ratios", {})
    for name in PEERS:
        cells.append(f"{f'{ratios[name]:.2f}x' if name in ratios else '-':>{max(7, len(name))}}")
    cells += [f"{row['share_of_copy']:5.0%}" if ours else "    -", f"error {row['errors'].get('ours', math.nan):.1e}"]
    cells += [f"{name} {why}" for name, why in row["refused"].items()]
    return "  ".join(cells)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 where there is no GPU, 1 where an op of ours raised or disagreed."""
    parser = argparse.ArgumentParser(prog="python -m profiling.gpu_times", description=__doc__)
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--dtype", choices=TOLERANCES, default="bfloat16")
    parser.add_argument("--seconds", type=float, default=2.0, help="of rounds for each row (default: 2)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="no torch.compile among the peers")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file, after every row")
    parser.add_argument("--dry-run", action="store_true", help="small, on the CPU: shows that this program runs")
    options = parser.parse_args(arguments)
    options.device, options.backend = ("cpu", "reference") if options.dry_run else ("cuda", "triton")
    if not options.dry_run and not torch.cuda.is_available():
        print("there is no GPU here that torch can use: nothing to measure", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("highest")
    clock = Clock(options.device)
    copied = bandwidth(clock, options.device, COPY >> 10 if options.dry_run else COPY)
    result: dict[str, Any] = {"provenance": timing.provenance(), "copy_bandwidth": copied, "rows": []}
    result["device"] = "a dry run" if options.dry_run else torch.cuda.get_device_name()
    print(f"{result['device']}, torch {torch.__version__}, {options.dtype}; copy {copied / 1e9:.0f} GB/s\n{header()}")
    for op in (op for op in options.op if options.dry_run or op in triton.NATIVE):
        for direction in options.direction:
            try:
                row = measure(op, direction, options, clock, copied)
            except Exception as problem:  # the other rows are still to be measured
                text = str(problem).strip().splitlines()
                row = {
                    "op": op,
                    "direction": direction,
                    "error": f"{type(problem).__name__}: {text[0] if text else ''}",
                }
            result["rows"].append(row)
            print(line(row), flush=True)
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n")
            if not options.dry_run:
                torch.cuda.empty_cache()
    return int(any("error" in row or "ours" in row["refused"] for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
