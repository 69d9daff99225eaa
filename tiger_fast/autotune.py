"""`python -m tiger_fast.autotune`: measures configurations on this machine's GPU and writes the best to a file.

Nothing else in the package tunes. `TIGER_FAST_TUNED=FILE`, or a place in kernels/tuned/, makes a file's choices go before the
heuristics. From a heuristic's choice the search goes to the fastest neighbour for as long as one is faster; a neighbour
differs in one field. One that does not compile, does not fit or gives other results is passed over. A configuration that a
kernel cannot run at all may stop the process: what was found before is in the file.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from tiger_fast._examples import Call, Sizes, calls, gpu_sizes
from tiger_fast.kernels import config
from tiger_fast.kernels.config import Config
from tiger_fast.kernels.launch import recording
from tiger_fast.ops.triton import NATIVE

# A neighbour has to be faster by more than what two measurements of one kernel differ by.
GAIN = 0.02
# Relative to the largest value of a result: another order of summation, rounded to the type.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}

Measure = Callable[[Config], "float | None"]


def neighbours(start: Config) -> Iterator[Config]:
    """Configurations that differ in one field: a switch, one stage more or less, or half and twice a number."""
    for field in fields(start):
        value = getattr(start, field.name)
        if isinstance(value, bool):
            others = (not value,)
        elif field.name == "num_stages":
            others = tuple(v for v in (value - 1, value + 1) if 1 <= v <= 5)
        elif field.name == "registers":
            others = tuple(v for v in (128, 168, 255) if v != value) if value else ()
        elif field.name == "num_warps":
            others = tuple(v for v in (value // 2, value * 2) if 1 <= v <= 16)
        else:
            others = tuple(v for v in (value // 2, value * 2) if v >= 1)
        yield from (replace(start, **{field.name: other}) for other in others)


def search(start: Config, measure: Measure, steps: int = 6) -> tuple[Config, float]:
    """The best of a walk over neighbours, and its seconds. `measure` gives None for what cannot be used.

    Raises:
        RuntimeError: if `start` cannot be used.
    """
    best, seconds = start, measure(start)
    if seconds is None:
        raise RuntimeError(f"the heuristic's own choice cannot be used: {start}")
    tried = {start}
    for _ in range(steps):
        found = [(measure(other), other) for other in neighbours(best) if other not in tried]
        tried |= {other for _, other in found}
        usable = [pair for pair in found if pair[0] is not None]
        fastest = min(usable, key=lambda pair: pair[0], default=(seconds, best))
        if fastest[0] >= seconds * (1 - GAIN):
            break
        seconds, best = fastest
    return best, seconds


def _tensors(results: object) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def agrees(results: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether results are the expected ones but for rounding; a NaN agrees with nothing."""
    for value, other in zip(results, expected, strict=True):
        if not other.numel():
            continue
        scale = other.double().abs().max().item() or 1.0
        if not (value.double() - other.double()).abs().max().item() <= TOLERANCES[dtype] * scale:
            return False
    return True


def _launches(call: Call, configs: dict[str, Config], namespace: str) -> str:
    # What a call would launch with these configurations; empty if that cannot be said.
    try:
        with config.trying(configs), recording() as launches:
            call(namespace)
    except Exception:  # `measure` meets it again, and says so
        return ""
    return "\n".join(f"{each.kernel.fn.__qualname__} {each.programs} {each.constants}" for each in launches)


def tune(
    call: Call,
    dtype: torch.dtype,
    seconds_of: Callable[[Callable[[], object]], float],
    say: Callable[[str], None],
    namespace: str = "tiger_fast",
) -> dict[str, Config]:
    """The best configuration found for each kernel that an operator's call launches, by the key of its choice; those
    that are the heuristic's are left out.

    `seconds_of` times a call without arguments: the whole operator, of which only one kernel changes at a time."""
    with config.trying({}) as choices:
        expected = _tensors(call(namespace))
    better: dict[str, Config] = {}
    for key, start in list(choices.items()):
        measured: set[str] = set()

        def measure(candidate: Config, key: str = key, measured: set[str] = measured) -> float | None:
            # A field that a kernel has no use for changes nothing but the clock's noise.
            launches = _launches(call, better | {key: candidate}, namespace)
            if launches in measured:
                return None
            if launches:
                measured.add(launches)
            # What is freed here is what the next call gets: unwritten results are NaN and not the last candidate's.
            for like in [torch.empty_like(value) for value in expected]:
                like.fill_(torch.nan if like.is_floating_point() else 7)
            try:
                with config.trying(better | {key: candidate}):
                    if not agrees(_tensors(call(namespace)), expected, dtype):
                        say(f"  {candidate}: other results")
                        return None
                    seconds = seconds_of(lambda: call(namespace))
            except Exception as problem:  # out of registers, shared memory, or no tile that the compiler takes
                say(f"  {candidate}: {type(problem).__name__}")
                return None
            say(f"  {candidate}: {seconds * 1e6:.1f} us")
            return seconds

        say(f"{call.name}: {key}")
        best, seconds = search(start, measure)
        if best != start:
            # Of many that are equal the luckiest would win: it has to win again.
            measured.clear()
            again = measure(start), measure(best)
            if None not in again and again[1] < again[0] * (1 - GAIN):
                better[key], seconds = best, again[1]
        say(f"  best: {better.get(key, start)}, {seconds * 1e6:.1f} us")
    return better


def _shape(text: str) -> dict[str, int]:
    try:
        sizes = {name: int(value) for name, _, value in (part.partition("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"a shape is numbers by name, such as B=32,N=1024, and not {text!r}") from None
    known = vars(Sizes())
    if unknown := sorted(set(sizes) - set(known)):
        raise argparse.ArgumentTypeError(f"no size is called {unknown[0]}; there are {', '.join(known)}")
    return sizes


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no file in a folder that exists")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m tiger_fast.autotune", description=__doc__)
    parser.add_argument("--op", nargs="+", choices=tuple(NATIVE), required=True)
    default = f"such as B=32,N=1024,D=768; the rest as in {Sizes(B=32)}"
    parser.add_argument("--shape", type=_shape, default={}, help=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--out", type=_file, required=True, help="the file; what it holds of other kernels stays")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no GPU here that torch can use: nothing to measure", file=sys.stderr)
        return 2
    from triton import __version__ as triton_version
    from triton.testing import do_bench

    dtype = getattr(torch, options.dtype)
    found = config.load(options.out) if options.out.exists() else {}
    measured_on = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton_version,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    for op in options.op:
        for call in calls(op, gpu_sizes(op, **options.shape), dtype, "cuda"):
            found |= tune(call, dtype, lambda f: do_bench(f, return_mode="median") / 1e3, print)
            config.save(options.out, found, measured_on)
    print(f"{len(found)} configurations in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
