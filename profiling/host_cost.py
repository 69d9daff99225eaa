"""`python -m profiling.host_cost`: what a call of each function costs on the host, layer by layer, with no kernel launched.

Launches are recorded and not made, so what is left is Python and torch: the launcher (tiles, strides, outputs), torch's
dispatcher around it, autograd.Function around that, and the checks and the choice of a backend around all. Arguments are
small; the best of many calls counts, which other processes disturb least. Without a GPU set TRITON_INTERPRET=1, and
Triton's own share of a launch is not in the numbers.
"""

import argparse
import sys
import timeit
from collections.abc import Callable, Sequence

import torch

from tiger_fast import functional
from tiger_fast._examples import Sizes, arguments, calls_of, with_gradients
from tiger_fast.ops import triton

SIZES = Sizes(B=1, N=16, D=64, R=8, C=8, heads=2)


def microseconds(function: Callable[[], object], rounds: int) -> float:
    """The best of `rounds` turns of five calls each, a call's."""
    return min(timeit.repeat(function, number=5, repeat=rounds)) / 5 * 1e6


def layers(op: str, device: str, rounds: int) -> dict[str, float]:
    """Microseconds of the forward from the innermost layer outwards; "gradients" is the public function, building a graph."""
    namespace = "tiger_fast" if device == "cuda" else "tiger_fast_interpreted"
    from tiger_fast.kernels.launch import recording  # needs Triton, of which `main` says whether it is there

    tensors, others = arguments(op, SIZES, torch.bfloat16, device)
    call = calls_of(op, tensors, others, namespace)[0]
    launcher = triton.launcher(op)
    public, leaves = getattr(functional, op), with_gradients(op, tensors, others)
    with recording():
        found = {
            "launcher": microseconds(lambda: launcher(*call.arguments), rounds),
            "operator": microseconds(lambda: call(namespace), rounds),
        }
        with torch.no_grad():
            found["function"] = microseconds(lambda: public(**tensors, **others, backend="triton"), rounds)
        found["gradients"] = microseconds(lambda: public(**leaves, **others, backend="triton"), rounds)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 where the kernels cannot be reached."""
    parser = argparse.ArgumentParser(prog="python -m profiling.host_cost", description=__doc__)
    parser.add_argument("--op", nargs="+", choices=tuple(triton.NATIVE), default=tuple(triton.NATIVE))
    parser.add_argument("--rounds", type=int, default=400)
    options = parser.parse_args(arguments)
    if missing := triton.missing():
        print(f"there is no GPU here that torch can use: {missing}", file=sys.stderr)
        return 2
    device = "cpu" if triton.INTERPRETED else "cuda"
    names = ("launcher", "operator", "function", "gradients")
    print(
        f"microseconds a call, no kernel launched; launcher's share of the last\n{'op':<40}"
        + "".join(f"{n:>11}" for n in names)
    )
    for op in options.op:
        found = layers(op, device, options.rounds)
        share = found["launcher"] / found["gradients"]
        print(f"{op:<40}" + "".join(f"{found[name]:11.1f}" for name in names) + f"{share:8.0%}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
