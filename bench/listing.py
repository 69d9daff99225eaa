"""`python -m bench list`: the benchmarks of a preset by id, with their sizes; and the presets."""

import argparse
import sys
from collections.abc import Sequence

from bench import presets, suites


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 64 for a preset or a shape that there is not."""
    parser = argparse.ArgumentParser(prog="python -m bench list", description=__doc__)
    parser.add_argument("--preset", default="smoke", help="default: smoke")
    parser.add_argument("--shape", help="sizes that differ, such as B=8,N=4096")
    options = parser.parse_args(arguments)
    try:
        settings = presets.settings(options.preset, shape=options.shape, device="cpu")
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 64
    for name, preset in presets.PRESETS.items():
        print(f"preset {name}: {preset.about} ({preset.sizes}, {preset.dtype})")
    for suite in suites.SUITES:
        for benchmark in suites.of(suite, settings):
            print(f"{benchmark.id:<56} {benchmark.sizes(settings)}")
    return 0
