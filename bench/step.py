"""`python -m bench.step`: a training step, forward and backward, on "cpu" against "reference", and where its time goes.

Models: "tiny", tiger-tiny on 8 scenes whose experts' tokens are cached, as the trainer does it; "head", a 768-wide TIGER
head of four experts and five tasks on random features (32 x 32 tokens, a small decoder). Counterfactual modes as in
`CounterfactualSettings`, and "none". The optimiser's own step is no part of it.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import tiger_fast
from bench import timing
from bench.timing import Plan
from tiger_fast.data import TRAIN_OFFSET, CachedSamples, Scenes
from tiger_fast.experts import load_specialists
from tiger_fast.models import TIGER, ExpertSpec, TIGERSettings
from tiger_fast.models.presets import MODES
from tiger_fast.models.tasks import scenes_tasks

SENTENCE = 384  # width of the sentence embeddings; random ones cost the same and need no encoder
# Of the loss, and of the gradient as one vector relative to its largest entry. The gradient of a whole model in float32
# moves by about 1e-4 with the order of sums.
TOLERANCE = 2e-3
BATCHES = {"tiny": 8, "head": 1}  # tiny: the demo's

Inputs = tuple[Tensor, list[Tensor], dict[str, Tensor]]


def counterfactual(mode: str) -> dict[str, Any]:
    """The settings of a mode; "none" leaves the counterfactual step out."""
    return {"weight": 0.0} if mode == "none" else {"mode": mode}


def tiny(mode: str) -> tuple[TIGER, Inputs]:
    """tiger-tiny and a batch of scenes."""
    torch.manual_seed(0)
    model = TIGER.from_preset("tiger-tiny", embeddings=torch.randn(5, SENTENCE), counterfactual=counterfactual(mode))
    samples = CachedSamples(Scenes(BATCHES["tiny"], TRAIN_OFFSET), load_specialists(), workers=0)
    batch = samples.batch(torch.arange(BATCHES["tiny"]))
    return model, (batch["image"], batch["features"], {name: batch[name] for name in model.task_names})


def head(mode: str) -> tuple[TIGER, Inputs]:
    """A 768-wide head and random features."""
    torch.manual_seed(0)
    settings = TIGERSettings(grid=(32, 32), patch_size=4, decoder=((128, 1), (64, 1)), query_width=16)
    specs = [ExpertSpec("a", 1024, 14), ExpertSpec("b", 1024, 14), ExpertSpec("c", 256, 16), ExpertSpec("d", 768, 16)]
    model = TIGER(
        settings.replace(counterfactual=counterfactual(mode)),
        scenes_tasks(),
        specs,
        embeddings=torch.randn(5, SENTENCE),
    )
    batch, side = BATCHES["head"], 128
    targets = {
        "semseg": torch.randint(9, (batch, side, side)),
        "depth": torch.rand(batch, 1, side, side) * 5 + 0.5,
        "normals": F.normalize(torch.randn(batch, 3, side, side), dim=1),
        "saliency": torch.randint(2, (batch, side, side)),
        "edge": torch.randint(2, (batch, 1, side, side)).float(),
    }
    features = [torch.randn(batch, 1024, spec.dim) for spec in specs]
    return model, (torch.rand(batch, 3, side, side), features, targets)


MODELS: dict[str, Callable[[str], tuple[TIGER, Inputs]]] = {"tiny": tiny, "head": head}


def step(model: TIGER, inputs: Inputs, backend: str) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    """A call that returns the objective and fresh gradients of all trained parameters that it reaches."""
    images, features, targets = inputs
    trained = [p for p in model.parameters() if p.requires_grad]

    def call() -> tuple[Tensor, list[Tensor]]:
        with tiger_fast.use_backend(backend):
            total = model.objective(targets, images, features=features).total
            found = torch.autograd.grad(total, trained, allow_unused=True)
        return total.detach(), [gradient for gradient in found if gradient is not None]

    return call


def disagreement(ours: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]]) -> float:
    """The larger error of the objective and of the gradient. As one vector: some of its parts are 0 but for rounding
    (the bias of a key), and have no relative error."""
    if [g.shape for g in ours[1]] != [g.shape for g in theirs[1]]:
        return math.inf
    one, other = (torch.cat([g.flatten() for g in gradients]) for gradients in (ours[1], theirs[1]))
    return max(timing.error(ours[0], theirs[0]), timing.error(one, other))


def profiled(call: Callable[[], Any], top: int) -> list[dict[str, Any]]:
    """The operators with the largest time of their own in one call, after a first: name, calls, seconds, share."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    events = [e for e in recorded.key_averages() if e.self_cpu_time_total > 0]
    total = sum(e.self_cpu_time_total for e in events)
    rows = [
        {
            "name": e.key,
            "calls": e.count,
            "seconds": e.self_cpu_time_total / 1e6,
            "share": e.self_cpu_time_total / total,
        }
        for e in sorted(events, key=lambda e: -e.self_cpu_time_total)
    ]
    own = [row for row in rows if "tiger_fast" in row["name"]]
    sums = {key: sum(row[key] for row in own) for key in ("calls", "seconds", "share")}
    return [{"name": "all operators of tiger_fast", **sums}, *rows[:top]]


def measure(name: str, mode: str, *, plan: Plan, top: int) -> dict[str, Any]:
    """One row: both backends interleaved, and what each spends its time on."""
    model, inputs = MODELS[name](mode)
    mine = "cpu" if "cpu" in tiger_fast.available_backends() else "reference"
    calls = {"ours": step(model, inputs, mine), "reference": step(model, inputs, "reference")}
    error = disagreement(calls["ours"](), calls["reference"]())
    row: dict[str, Any] = {"model": name, "counterfactual": mode, "backend": mine, "error": error}
    if not error <= TOLERANCE:
        return row
    timings = timing.interleave(calls, plan)
    row["timings"] = {key: value.summary() for key, value in timings.items()}
    row["ratio"] = asdict(timing.ratio(timings["reference"], timings["ours"]))
    row["profile"] = {key: profiled(call, top) for key, call in calls.items()}
    return row


def report(rows: Sequence[dict[str, Any]]) -> str:
    """A table of ratios, then each step's operators."""
    lines = ["| model | counterfactual | ours | ms | reference ms | ratio |", "|---|---|---|---|---|---|"]
    for row in rows:
        place = f"| {row['model']} | {row['counterfactual']} | {row['backend']} |"
        if "ratio" not in row:
            lines.append(f"{place} DISAGREES: error {row['error']:.2g} against {TOLERANCE:.0e} | | |")
            continue
        times = [row["timings"][key]["median"] * 1e3 for key in ("ours", "reference")]
        lines.append(f"{place} {times[0]:.1f} | {times[1]:.1f} | {timing.Ratio(**row['ratio'])} |")
    for row in rows:
        for which, operators in row.get("profile", {}).items():
            backend = row["backend"] if which == "ours" else "reference"
            lines += ["", f"{row['model']}, counterfactual {row['counterfactual']}, {backend}: time of their own"]
            for op in operators:
                lines.append(f"  {op['share']:5.1%} {op['seconds'] * 1e3:9.2f} ms {op['calls']:5} x {op['name']}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--model", action="append", choices=tuple(MODELS), help="may be repeated (default: all)")
    parser.add_argument("--mode", action="append", choices=("none", *MODES), help="may be repeated (default: all)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of rounds for each backend (default: 8)")
    parser.add_argument("--top", type=int, default=12, help="operators listed for each step (default: 12)")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    facts, rows = timing.provenance(), []
    for name in options.model or MODELS:
        for mode in options.mode or ("none", *MODES):
            print(f"measuring {name} {mode}", file=sys.stderr, flush=True)
            rows.append(measure(name, mode, plan=Plan(seconds=options.seconds, least=6), top=options.top))
    if options.json:
        options.json.write_text(json.dumps({"provenance": facts, "rows": rows}, indent=1) + "\n")
    print(timing.describe(facts))
    print(report(rows))


if __name__ == "__main__":
    main()
