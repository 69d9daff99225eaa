"""`python -m profiling.one_pass`: every operator once, forward and backward, at the default GPU shape; for a profiler.

Kernels are compiled and warm before the range that cudaProfilerStart and Stop mark (`ncu --profile-from-start off`). With
--table torch's own profiler lists the kernels instead: time, launches, and what share of the operator each takes.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from tiger_fast._examples import Call, calls, gpu_sizes
from tiger_fast.ops.triton import INTERPRETED, NATIVE

OPS = tuple(NATIVE)
DRY = {"B": 1, "N": 4, "D": 16, "M": 2, "T": 2, "R": 4, "C": 16, "G": 2, "heads": 1}


def _marked(chosen: Sequence[Call], namespace: str, cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    for call in chosen:
        call(namespace)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def table(call: Call, namespace: str, cuda: bool) -> list[str]:
    """The kernels of ten calls of an operator, the slowest first."""
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        for _ in range(10):
            call(namespace)
        if cuda:
            torch.cuda.synchronize()
    found = []
    for event in recorded.key_averages():
        micros = event.self_device_time_total if cuda else event.self_cpu_time_total
        if micros:
            found.append((micros, event.count, event.key))
    total = sum(micros for micros, *_ in found)
    lines = [f"{call.name}: {total / 10:.1f} us of kernels"]
    return lines + [
        f"  {micros / 10:10.1f} us {micros / total:5.0%} {count / 10:5.1f} launches  {key[:90]}"
        for micros, count, key in sorted(found, reverse=True)[:12]
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m profiling.one_pass", description=__doc__)
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="small, in Triton's interpreter: shows that this runs")
    options = parser.parse_args(arguments)
    cuda = not options.dry_run
    if options.dry_run and not INTERPRETED:
        parser.error("a dry run is one in Triton's interpreter: set TRITON_INTERPRET=1")
    if cuda and not torch.cuda.is_available():
        print("there is no GPU here that torch can use: nothing to profile", file=sys.stderr)
        return 2
    device, namespace = ("cuda", "tiger_fast") if cuda else ("cpu", "tiger_fast_interpreted")
    for op in options.op:
        sizes = gpu_sizes(op, **({} if cuda else DRY))
        chosen = calls(op, sizes, getattr(torch, options.dtype), device, namespace=namespace)
        for call in chosen:
            call(namespace)
        if options.table:
            print("\n".join(text for call in chosen for text in table(call, namespace, cuda)), flush=True)
        else:
            _marked(chosen, namespace, cuda)
    return 0


if __name__ == "__main__":
    sys.exit(main())
