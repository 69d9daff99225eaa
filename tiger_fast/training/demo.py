"""`python -m tiger_fast demo`: TIGER, its twin without the counterfactual loss and the controls, on embedded scenes."""

import argparse
import json
import logging
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiger_fast._extras import require
from tiger_fast.data import HELDOUT_OFFSET, TRAIN_OFFSET, CachedSamples, Scenes
from tiger_fast.experts import load_specialists
from tiger_fast.metrics import RoutingStatistics
from tiger_fast.models import TIGER
from tiger_fast.training.callbacks import RoutingCollapse
from tiger_fast.training.datamodule import TrainBatches
from tiger_fast.training.demo_table import scores
from tiger_fast.training.infer import fit_image
from tiger_fast.training.module import TIGERModule
from tiger_fast.viz import curves_figure, predictions_figure, routing_figure

Trainer = require("lightning", extra="train").Trainer
Callback = require("lightning", extra="train").Callback

PRESET = "tiger-tiny"
# Written into every result, so that a folder of somebody else's is never replaced.
MARKER = ".tiger_fast-demo"
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")


@dataclass
class Run:
    """A trained model with its training loss by step, its seconds and its scores by task."""

    model: TIGER
    losses: list[float]
    seconds: float
    scores: dict[str, float] = field(default_factory=dict)


def build_models(
    experts: Sequence[Any], counterfactual_weight: float | None = None
) -> Iterator[tuple[str, Callable[[], TIGER]]]:
    """The demo's models by name: TIGER, the twin, and the controls, which mix without routing.

    A control is the same task-conditioned decoder on one specialist or on the plain mean of all. All its tasks share
    their tokens, so that no interaction could tell them apart. Its projections are widened until it has at least
    TIGER's trainable parameters: a win of TIGER's is then no matter of capacity.
    """

    def tiger(**changes: Any) -> TIGER:
        return TIGER.from_preset(PRESET, experts=experts, **changes)

    def control(members: Sequence[Any]) -> TIGER:
        def build(hidden: int) -> TIGER:
            plain = {"routing": "mean", "expert_interaction": False, "task_interaction": False}
            plain |= {"counterfactual": {"weight": 0.0}}
            return TIGER.from_preset(PRESET, experts=members, hidden=hidden, **plain)

        wanted = tiger().trainable_parameters()["total"]
        one, two = (build(hidden).trainable_parameters()["total"] for hidden in (1, 2))
        return build(1 + math.ceil((wanted - one) / (two - one)))

    weight = {} if counterfactual_weight is None else {"counterfactual": {"weight": counterfactual_weight}}
    yield "tiger", lambda: tiger(**weight)
    yield "without", lambda: tiger(counterfactual={"weight": 0.0})
    for expert in experts:
        yield expert.name, lambda expert=expert: control([expert])
    yield "mean", lambda: control(experts)


class _Curve(Callback):
    """Keeps the weighted task losses of every step, and says how training goes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        logged, tasks = trainer.callback_metrics, pl_module.model.tasks
        self.losses.append(float(sum(task.weight * logged[f"train/{task.name}"] for task in tasks)))
        if (done := len(self.losses)) % 100 == 0 or done == trainer.max_steps:
            recent = self.losses[-50:]
            print(
                f"  {self.name:<12} step {done:4d}/{trainer.max_steps}  task loss {sum(recent) / len(recent):7.3f}",
                flush=True,
            )


def train(
    name: str, model: TIGER, data: CachedSamples, *, steps: int, batch_size: int, learning_rate: float, seed: int
) -> Run:
    """Train with the library's trainer; every model sees the same scenes in the same order."""
    started = time.perf_counter()
    curve = _Curve(name)
    trainer = Trainer(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=1,
        max_steps=steps,
        gradient_clip_val=10.0,
        callbacks=[curve],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    with warnings.catch_warnings():
        # Expected of the twin, and reported as its entropy; and the trainer's remarks on what is as it should be.
        warnings.simplefilter("ignore", RoutingCollapse)
        warnings.filterwarnings("ignore", module=r"lightning\.")
        module = TIGERModule(model=model, lr=learning_rate, warmup_steps=steps // 20, seed=seed)
        trainer.fit(module, TrainBatches(data, batch_size, seed))
    return Run(model.cpu().eval(), curve.losses, time.perf_counter() - started)


def batches(data: CachedSamples, size: int = 20) -> Iterator[dict[str, Any]]:
    """All samples in order."""
    for indices in torch.arange(len(data)).split(size):
        yield data.batch(indices)


@torch.no_grad()
def evaluate(model: TIGER, data: CachedSamples) -> dict[str, float]:
    """Each task's metric on held-out scenes."""
    metrics = {task.name: task.metric() for task in model.tasks}
    for batch in batches(data):
        output = model(batch["image"], features=batch["features"])
        for name, metric in metrics.items():
            metric.update(output.predictions[name], batch[name])
    return {name: float(metric.compute()) for name, metric in metrics.items()}


@torch.no_grad()
def routing_statistics(model: TIGER, data: CachedSamples, removal: str = "mixture") -> dict[str, Tensor]:
    """Routing weights against counterfactual differences on held-out scenes."""
    cf = model.settings.counterfactual
    statistics = RoutingStatistics(len(model.tasks), len(model.expert_specs), tau=cf.tau, eps=cf.eps)
    for batch in batches(data):
        images, features = batch["image"], batch["features"]
        delta, valid = model.differences(batch, images, features=features, removal=removal)
        _, routed = model.route(images, features)
        statistics.update(routed.weights, delta, valid)
    return statistics.compute()


def make_report(runs: dict[str, Run], data: CachedSamples, seed: int) -> dict[str, Any]:
    """The figures of report.json but its seconds; see `main`."""
    model = runs["tiger"].model
    tasks, names = model.task_names, model.expert_names
    found = {name: routing_statistics(runs[key].model, data) for name, key in KEYS.items()}
    at_input = routing_statistics(model, data, removal="input")

    def table(values: Tensor) -> dict[str, dict[str, float]]:
        return {task: dict(zip(names, row, strict=True)) for task, row in zip(tasks, values.tolist(), strict=True)}

    return {
        "tasks": {
            task.name: {
                "metric": (metric := task.metric()).name,
                "value": runs["tiger"].scores[task.name],
                "higher_is_better": metric.higher_is_better,
            }
            for task in model.tasks
        },
        "controls": {name: runs[name].scores for name in runs if name not in KEYS.values()},
        "without": runs["without"].scores,
        "routing": table(found["with"]["weights"]),
        "causal": table(found["with"]["differences"]),
        "causal_input": table(at_input["differences"]),
        "agreement": {name: float(figures["agreement"]) for name, figures in found.items()},
        "agreement_input": float(at_input["agreement"]),
        "divergence": {name: float(figures["divergence"]) for name, figures in found.items()}
        | {"uniform": float(found["with"]["divergence_of_uniform"])},
        "entropy": {name: float(figures["entropy"].mean()) for name, figures in found.items()},
        "parameters": {name: run.model.trainable_parameters()["total"] for name, run in runs.items()},
        "training_seconds": {name: run.seconds for name, run in runs.items()},
        "counterfactual_weight": model.settings.counterfactual.weight,
        "seed": seed,
    }


# report.json's names of the two routed models.
KEYS = {"with": "tiger", "without": "without"}


def table_of(report: dict[str, Any]) -> str:
    """The report as text: scores of all models, routing against causes."""
    tasks = report["tasks"]
    heads = [f"{name} {row['metric']}{'↑' if row['higher_is_better'] else '↓'}" for name, row in tasks.items()]
    lines = [f"{'model':<14}{'parameters':>11}" + "".join(f"{head:>16}" for head in heads)]
    for model, row in scores(report).items():
        cells = "".join(f"{row[name]:>16.4f}" for name in tasks)
        lines.append(f"{model:<14}{report['parameters'][model]:>11,}{cells}")
    lines.append("")
    lines.append("mean routing weight / mean counterfactual difference, removed at the mixture / at the input")
    experts = list(next(iter(report["routing"].values())))
    lines.append(f"{'task':<12}" + "".join(f"{expert:>28}" for expert in experts))
    for task in tasks:
        cells = (
            f"{report['routing'][task][e]:.3f} / {report['causal'][task][e]:+.4f} / {report['causal_input'][task][e]:+.4f}"
            for e in experts
        )
        lines.append(f"{task:<12}" + "".join(f"{cell:>28}" for cell in cells))
    lines.append("")
    for name in ("agreement", "divergence", "entropy"):
        values = ", ".join(f"{key} {value:.3f}" for key, value in report[name].items())
        lines.append(f"{name + ':':<12}{values}")
    lines.append(f"agreement with differences at the input: {report['agreement_input']:.3f}")
    lines.append("")
    lines.append("without = TIGER without the counterfactual loss; the models below it are controls without routing")
    lines.append("agreement: rank correlation of routing weights with what removing an expert costs, 1 is best")
    lines.append(
        "divergence: of the weights from the causes at each token, 0 is best; "
        f"entropy: 0 is one-hot, {math.log(len(experts)):.3f} uniform"
    )
    return "\n".join(lines)


def photographs(size: tuple[int, int]) -> Iterator[tuple[str, Tensor]]:
    """Real photographs from scikit-image, cropped to the aspect ratio of `size` and resized: (3, H, W) in [0, 1]."""
    data = require("skimage.data", extra="train")
    for name in PHOTOGRAPHS:
        image = torch.from_numpy(getattr(data, name)().copy())
        yield name, fit_image(image.movedim(-1, 0).float() / 255, size)


@torch.no_grad()
def draw(runs: dict[str, Run], data: CachedSamples, folder: Path) -> None:
    """All pictures of the demo."""
    model = runs["tiger"].model
    grid = model.settings.grid
    batch = data.batch(torch.arange(6))
    output = model(batch["image"], features=batch["features"])
    predictions = {task.name: task.predict(output.predictions[task.name]) for task in model.tasks}
    predictions_figure(batch["image"], predictions, batch).savefig(folder / "predictions.png", dpi=120)
    for index in range(3):
        figure = routing_figure(
            batch["image"][index], output.weights[index], model.task_names, model.expert_names, grid
        )
        figure.savefig(folder / f"routing-{index}.png", dpi=120)
    curves_figure({name: run.losses for name, run in runs.items()}, "weighted task loss").savefig(
        folder / "losses.png", dpi=120
    )
    names, images = zip(*photographs(model.settings.image_size), strict=True)
    photos = torch.stack(images)
    output = model(photos)
    predictions = {task.name: task.predict(output.predictions[task.name]) for task in model.tasks}
    predictions_figure(photos, predictions).savefig(folder / "photographs.png", dpi=120)
    for index, name in enumerate(names):
        figure = routing_figure(photos[index], output.weights[index], model.task_names, model.expert_names, grid)
        figure.savefig(folder / f"routing-{name}.png", dpi=120)


def open_result(out: Path) -> Path:
    """A fresh folder beside `out` to write into; `close_result` puts it in its place.

    Raises:
        FileExistsError: if `out` holds something that is not an earlier result of the demo.
    """
    if out.exists() and not (out / MARKER).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} holds something else than a result of the demo: name another folder with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.part-"))
    fresh.chmod(0o755)
    (fresh / MARKER).touch()
    return fresh


def close_result(fresh: Path, out: Path) -> None:
    """Replace `out`, an earlier result or nothing, by the finished folder; the earlier one goes last."""
    former = None
    if out.exists():
        former = out.with_name(fresh.name.replace(".part-", ".former-"))
        out.rename(former)
    fresh.rename(out)
    if former is not None:
        shutil.rmtree(former)


def parser() -> argparse.ArgumentParser:
    """Options of the demo."""
    options = argparse.ArgumentParser(prog="python -m tiger_fast demo", description=__doc__)
    options.add_argument("--seed", type=int, default=0, help="of initialisation and batches")
    options.add_argument("--steps", type=int, default=400, help="training steps of every model")
    options.add_argument("--scenes", type=int, default=2000, help="training scenes")
    options.add_argument("--held-out", type=int, default=200, help="scenes for evaluation")
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--learning-rate", type=float, default=3e-3)
    options.add_argument("--counterfactual-weight", type=float, help="lambda_cf; the preset's if not given")
    options.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="result folder, replaced if it is a demo's"
    )
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, evaluate, print the table and write report.json, model and pictures to --out."""
    options = parser().parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    started = time.perf_counter()
    for module in ("matplotlib", "scipy.stats", "skimage.data"):
        require(module, extra="train")  # now rather than when all is trained
    try:
        fresh = open_result(options.out)
    except FileExistsError as error:
        raise SystemExit(str(error)) from None
    experts = load_specialists()
    print(f"rendering {options.scenes} training and {options.held_out} held-out scenes, asking the experts", flush=True)
    training = CachedSamples(Scenes(options.scenes, TRAIN_OFFSET), experts)
    held_out = CachedSamples(Scenes(options.held_out, HELDOUT_OFFSET), experts)
    runs: dict[str, Run] = {}
    for name, build in build_models(experts, options.counterfactual_weight):
        torch.manual_seed(options.seed)
        model = build()
        print(f"{name}: {model.trainable_parameters()['total']:,} trainable parameters", flush=True)
        own = [experts.index(expert) for expert in model.experts]
        runs[name] = train(
            name,
            model,
            training.of_experts(own),
            steps=options.steps,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            seed=options.seed,
        )
        runs[name].scores = evaluate(model, held_out.of_experts(own))
    report = make_report(runs, held_out, options.seed)
    runs["tiger"].model.save(fresh / "tiger-tiny.safetensors")
    draw(runs, held_out, fresh)
    names = ("steps", "scenes", "held_out", "batch_size", "learning_rate")
    report["settings"] = {name: getattr(options, name) for name in names} | {"torch": torch.__version__}
    report["seconds"] = time.perf_counter() - started
    (fresh / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    close_result(fresh, options.out)
    print("\n" + table_of(report))
    print(f"\n{report['seconds']:.0f} seconds; report.json, the model and pictures are in {options.out}")
