"""Two processes (gloo, on the CPU) that share a batch have the gradients of one process with all of it."""

import csv
import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from tiny_run import TINY_SETTINGS, tiny_config
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tiger_fast import experts
from tiger_fast.models import TIGER, ExpertSpec
from tiger_fast.models.checkpoint import read_checkpoint

MODES = ("decode", "linear", "first_order")
EXPERTS = [ExpertSpec("a", 6, 4), ExpertSpec("b", 10, 8), ExpertSpec("c", 4, 4)]
BATCH, WORLD = 4, 2
# Sums over the batch are taken in another order. Relative to the largest entry of each gradient; float64.
TOLERANCE = 1e-10


def tiny_model(mode: str) -> TIGER:
    torch.manual_seed(0)
    settings = {**TINY_SETTINGS, "counterfactual": {"mode": mode}}
    # The mean of Delta's deviation from 0 is arbitrary in a fresh model; a large weight keeps L_cf's share visible.
    settings["counterfactual"]["weight"] = 10.0
    return TIGER.from_preset("tiger-tiny", experts=EXPERTS, **settings).double()


def random_batch() -> dict[str, Any]:
    """Targets with very different numbers of valid pixels in the two halves of the batch."""
    torch.manual_seed(1)
    size = (BATCH, 24, 32)
    half = torch.arange(BATCH)[:, None, None] < BATCH // 2
    ignored = half & (torch.rand(size) < 0.7)
    normals = nn.functional.normalize(torch.randn(BATCH, 3, 24, 32).double(), dim=1)
    return {
        "image": torch.rand(BATCH, 3, 24, 32).double(),
        "features": [torch.randn(BATCH, 12, e.dim).double() for e in EXPERTS],
        "semseg": torch.randint(0, 9, size).masked_fill(ignored, 255),
        "depth": (torch.rand(size).double() + 0.5).masked_fill(ignored, 0)[:, None],
        "normals": normals.masked_fill(ignored[:, None], 0),
        "saliency": (torch.rand(size) < torch.where(half, 0.1, 0.6)).long().masked_fill(ignored, 255),
        "edge": (torch.rand(size) < 0.2).double().masked_fill(ignored, 255)[:, None],
    }


class Step(nn.Module):
    """The objective as a forward pass, so that DistributedDataParallel sees it."""

    def __init__(self, model: TIGER) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any], step: int) -> Tensor:
        self.objective = self.model.objective(batch, batch["image"], features=batch["features"], step=step)
        return self.objective.total


def gradients(step: Step) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in step.model.named_parameters() if p.grad is not None}


def part(value: Any, rank: int) -> Any:
    return [v.chunk(WORLD)[rank] for v in value] if isinstance(value, list) else value.chunk(WORLD)[rank]


def alignment_value(step: Step) -> Tensor:
    objective = step.objective
    if objective.record is not None:
        return torch.as_tensor(objective.record.loss * objective.record.share)
    return objective.counterfactual


def one_step(mode: str, rank: int) -> dict[str, Any]:
    step = Step(tiny_model(mode))
    parallel = DistributedDataParallel(step)  # its hooks reduce the gradients for as long as it lives
    loss = parallel({name: part(value, rank) for name, value in random_batch().items()}, 0)
    loss.backward()
    values = torch.stack([loss.detach(), alignment_value(step).double()])
    dist.all_reduce(values)
    return {"gradients": gradients(step), "values": values / WORLD}


def rank_main(rank: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    results = {mode: one_step(mode, rank) for mode in MODES}
    if rank == 0:
        torch.save(results, out)
    # A group that is taken down while a reducer still refers to it, or while the other rank still talks to it, can
    # abort the process: nothing is left of the models by now, and both ranks arrive here first.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "results.pt")
        mp.spawn(rank_main, (os.path.join(folder, "rendezvous"), out), nprocs=WORLD)
        return torch.load(out, weights_only=True)


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_have_the_gradients_of_one(mode: str, two_processes: dict[str, Any]) -> None:
    step = Step(tiny_model(mode))
    loss = step(random_batch(), 0)
    loss.backward()
    expected, got = gradients(step), two_processes[mode]["gradients"]
    assert got.keys() == expected.keys()
    error = max(float((got[n] - g).abs().max() / g.abs().max().clamp(min=1e-12)) for n, g in expected.items())
    print(f"{mode}: largest difference {error:.1e} of a gradient's largest entry")
    assert error < TOLERANCE
    values = torch.stack([loss.detach(), alignment_value(step).double()])
    # The alignment loss's own value passes through float32 (record and weights).
    torch.testing.assert_close(two_processes[mode]["values"], values, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_the_counterfactual_loss_is_part_of_what_is_compared(mode: str) -> None:
    # Without it the router's gradient is another one: the test above would see a wrong share of it.
    step, without = Step(tiny_model(mode)), Step(tiny_model(mode))
    without.model.load_state_dict(step.model.state_dict())
    step(random_batch(), 0).backward()
    settings = without.model.settings.replace(counterfactual={"weight": 0.0})
    without.model.settings = settings
    without(random_batch(), 0).backward()
    ours, theirs = gradients(step)["router.base_weight"], gradients(without)["router.base_weight"]
    assert float((ours - theirs).abs().max() / theirs.abs().max()) > 1e-3


def test_linear_heads_have_gradients_on_steps_without_the_counterfactual_loss() -> None:
    # DistributedDataParallel waits for the gradient of every parameter.
    model = TIGER.from_preset(
        "tiger-tiny", experts=EXPERTS, **{**TINY_SETTINGS, "counterfactual": {"mode": "linear", "every": 2}}
    ).double()
    batch = random_batch()
    objective = model.objective(batch, batch["image"], features=batch["features"], step=1)
    objective.total.backward()
    assert objective.counterfactual is None
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_run_on_two_processes_is_the_run_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "load_specialists", None)  # so that what tiny_run does to it is undone
    for devices in (1, 2):
        config = tiny_config(tmp_path / f"on-{devices}", devices=devices, max_steps=6, val_check_interval=3)
        config["trainer"]["strategy"] = "ddp" if devices > 1 else "auto"
        config["data"] |= {"batch_size": 4 // devices, "val_size": 5}
        # The largest rate that keeps AdamW, which divides a gradient by its own size, from enlarging rounding errors.
        config["model"]["lr"] = 1e-4
        path = tmp_path / f"on-{devices}.yaml"
        path.write_text(yaml.safe_dump(config))
        if devices == 1:
            tiny_run.main(["fit", "--config", str(path)])
            continue
        # The command as a user gives it: lightning starts the second process by itself.
        command = [sys.executable, str(Path(tiny_run.__file__)), "fit", "--config", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    one, two = (read_checkpoint(tmp_path / f"on-{n}" / "model.safetensors", "TIGER")[1] for n in (1, 2))
    for name, value in one.items():
        if name.startswith("query_encoder.stem") and value.dim() == 1:
            continue  # with a channel per group, GroupNorm undoes the biases before it: their gradient is rounding
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    one, two = (list(csv.DictReader((tmp_path / f"on-{n}" / "metrics.csv").open())) for n in (1, 2))
    assert [row["step"] for row in one] == [row["step"] for row in two] == ["2", "3", "4", "6"]
    for ours, theirs in zip(two, one, strict=True):
        for name, value in theirs.items():
            assert bool(value) == bool(ours[name]), name
            # val/routing/divergence: the salient share of a batch, a weight of its loss, depends on the batch.
            close = 0.02 if name == "val/routing/divergence" else 2e-3
            assert not value or float(ours[name]) == pytest.approx(float(value), rel=close, abs=2e-3), name
