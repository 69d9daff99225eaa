"""`python -m bench once ID..`: runs ours of each benchmark, warm, for a profiler.

Kernels are compiled and warm before the range that cudaProfilerStart and Stop mark (`ncu --profile-from-start off`, `nsys
--capture-range cudaProfilerApi`); on CUDA the calls go through copies of the arguments, so that each finds its own in device
memory. With --table torch's own profiler lists the kernels instead, or on a CPU the operators by the time of their own.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import measure, presets, suites, timing

WARM = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 where what was asked for cannot run here or does not fit, 64 for what does not exist."""
    parser = argparse.ArgumentParser(prog="python -m bench once", description=__doc__)
    parser.add_argument(
        "ids", nargs="+", metavar="ID", help="such as route/forward; `python -m bench list` has them all"
    )
    parser.add_argument("--preset", default="smoke", help="default: smoke")
    parser.add_argument("--shape", help="sizes that differ, such as B=8,N=4096")
    for name in ("dtype", "device", "backend"):
        parser.add_argument(f"--{name}", help="see pytest bench/ --help")
    parser.add_argument("--repeat", type=int, default=1, help="calls in the range (default: 1)")
    parser.add_argument("--table", action="store_true", help="list kernels or operators by torch's profiler")
    options = parser.parse_args(arguments)
    try:
        if options.repeat < 1:
            raise ValueError(f"--repeat must be at least 1, got {options.repeat}")
        settings = presets.settings(
            options.preset,
            shape=options.shape,
            dtype=options.dtype,
            device=options.device,
            backend=options.backend,
            peers="eager",
        )
        chosen = [suites.find(name, settings) for name in options.ids]
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 2 if isinstance(problem, presets.NoGPU) else 64
    cuda = settings.device == "cuda"
    for benchmark in chosen:
        if lack := measure.lack(benchmark, settings):
            print(f"{benchmark.id}: {lack}", file=sys.stderr)
            return 2
        call = benchmark.build(settings).calls["ours"]
        for _ in range(WARM):
            call()
        if options.table:
            print("\n".join(table(benchmark.id, call, options.repeat, cuda)), flush=True)
        else:
            marked(call, options.repeat, cuda)
    return 0


def marked(call: timing.Call, repeat: int, cuda: bool) -> None:
    """The calls, on CUDA between cudaProfilerStart and Stop."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    for _ in range(repeat):
        call()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def table(name: str, call: Callable[[], Any], repeat: int, cuda: bool, top: int = 20) -> list[str]:
    """The kernels of a call, or its operators by the time of their own, the slowest first; the first line is their sum, the
    second on a CPU that of tiger_fast's own operators, without the products that they leave to torch."""
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
        for _ in range(repeat):
            call()
        if cuda:
            torch.cuda.synchronize()
    found = []
    for event in recorded.key_averages():
        micros = event.self_device_time_total if cuda else event.self_cpu_time_total
        if micros:
            found.append((micros / repeat, event.count / repeat, event.key))
    total = sum(micros for micros, *_ in found)
    lines = [f"{name}: {total:.1f} us of {'kernels' if cuda else 'operators'}"]
    own = [(micros, count) for micros, count, key in found if "tiger_fast" in key]
    if own and not cuda:
        found.append((*(sum(column) for column in zip(*own)), "all operators of tiger_fast"))
    return lines + [
        f"  {micros:10.1f} us {micros / total:5.0%} {count:7.1f} x  {key[:90]}"
        for micros, count, key in sorted(found, reverse=True)[:top]
    ]
