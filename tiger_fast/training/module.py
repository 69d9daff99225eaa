"""TIGER as a LightningModule: its objective, optimiser, metrics and predictions, and nothing of the model's own."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tiger_fast._extras import require, unknown
from tiger_fast._ranges import phase
from tiger_fast.models import TIGER
from tiger_fast.models.presets import preset as find_preset
from tiger_fast.models.tasks import TASK_SETS, select_tasks
from tiger_fast.training.callbacks import RoutingHealth, RunLog

LightningModule = require("lightning", extra="train").LightningModule

SCHEDULES = ("cosine", "poly", "constant")
POLY_POWER = 0.9  # the dense-prediction protocols' exponent


class TIGERModule(LightningModule):
    """Trains, validates and predicts with a TIGER model.

    Before every batch torch's global generator is seeded with a function of seed, step and batch: what the model
    draws (`counterfactual.sampled`) is then the same on all ranks and after a resume. A resumed run is the
    uninterrupted one bit for bit on a CPU, at the same number of threads.

    Args:
        preset: the model's preset (`TIGER.from_preset`).
        tasks: names among the preset's tasks; None: all.
        experts: names of embedded specialists; None: the preset's experts.
        settings: settings that differ from the preset's; `counterfactual` may be a mapping of its own settings.
        model: a ready model instead of all of the above.
        lr: the largest learning rate, of AdamW.
        weight_decay: of the weight matrices and convolutions; vectors (biases, norms) do not decay.
        betas: of AdamW.
        schedule: of the rate after the warm-up: "cosine" to 0, "poly" ((1 - t)^0.9) or "constant".
        warmup_steps: steps over which the rate rises linearly.
        seed: of the initialisation and of what the model draws in training.

    Raises:
        ValueError: for an unknown preset, task, setting or schedule; names the near match.
    """

    def __init__(
        self,
        preset: str = "tiger-tiny",
        tasks: list[str] | None = None,
        experts: list[str] | None = None,
        settings: dict[str, Any] | None = None,
        model: TIGER | None = None,
        lr: float = 3e-3,
        weight_decay: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        schedule: str = "cosine",
        warmup_steps: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise unknown("schedule", schedule, SCHEDULES)
        if not lr > 0 or weight_decay < 0 or warmup_steps < 0:
            raise ValueError(
                f"need lr > 0, weight_decay >= 0 and warmup_steps >= 0, got {lr}, {weight_decay}, {warmup_steps}"
            )
        self.save_hyperparameters(ignore=["model"])
        if model is None:
            chosen = find_preset(preset)
            chosen.settings.replace(**(settings or {}))
            select_tasks(tasks or [], TASK_SETS[chosen.tasks]())
        self.model: TIGER | None = model
        self.metrics: torch.nn.ModuleDict | None = None

    def configure_model(self) -> None:
        """Build the model and its metrics, once.

        Raises:
            ValueError: for a precision that would cast the metrics' float64 sums, too, to bfloat16 or float16.
        """
        precision = str(self.trainer.precision) if self._trainer is not None else ""
        if precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"precision {precision!r} would score in 16 bits: take {precision.replace('true', 'mixed')!r}"
            )
        if self.model is None:
            h = self.hparams
            torch.manual_seed(h.seed)
            self.model = TIGER.from_preset(h.preset, tasks=h.tasks, experts=h.experts, **(h.settings or {}))
        if self.metrics is None:
            self.metrics = torch.nn.ModuleDict({t.name: t.metric() for t in self.model.tasks if t.metric is not None})

    def configure_callbacks(self) -> list[Any]:
        """Routing health, and the log that both it and the losses go to."""
        return [RoutingHealth(), RunLog()]

    def forward(self, images: Tensor | None = None, *, features: list[Tensor] | None = None) -> Any:
        """`TIGER.forward`."""
        return self.model(images, features=features)

    # -- training ----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """See the class."""
        text = f"{self.hparams.seed}/{self.global_step}/{batch_idx}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The objective (TIGER eq. 14) of one batch."""
        with phase("trainer.objective"):
            objective = self.model.objective(
                self._targets(batch), batch["image"], features=batch.get("features"), step=self.global_step
            )
        self._record = objective.record
        self._log_step({"loss": objective.total, **objective.tasks}, prog_bar=("loss",))
        if objective.counterfactual is not None:
            self._log_step({"counterfactual": objective.counterfactual})
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"], logger=False)
        return {"loss": objective.total, "weights": objective.weights}

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        """Lightning's, in a range; the objective and its backward are within it."""
        with phase("trainer.step"):
            super().optimizer_step(*arguments, **keywords)

    def on_after_backward(self) -> None:
        """The first-order counterfactual loss is known only now."""
        record = self._record
        if record is not None and record.loss is not None:
            self._log_step({"counterfactual": record.loss * record.share})

    def _log_step(self, values: Mapping[str, Tensor], prog_bar: tuple[str, ...] = ()) -> None:
        # To the loggers by RunLog; the mean over ranks is the whole batch's (nn.losses.mean_over_valid).
        for name, value in values.items():
            self.log(f"train/{name}", value.detach(), prog_bar=name in prog_bar, logger=False, sync_dist=True)

    def _targets(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: batch[name] for name in self.model.task_names if name in batch}

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, and the schedule by step."""
        h = self.hparams
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": h.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, h.lr, tuple(h.betas))
        total = self.trainer.estimated_stepping_batches
        if h.schedule != "constant" and math.isinf(total):
            raise ValueError(f"schedule {h.schedule!r} needs an end: set max_steps or max_epochs")
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: rate_share(step, total, h.schedule, h.warmup_steps)
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- evaluation --------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Updates every task's metric; returns what `RoutingHealth` looks at."""
        targets, images, features = self._targets(batch), batch["image"], batch.get("features")
        output = self.model(images, features=features)
        for name, metric in self.metrics.items():
            if name in targets:
                metric.update(output.predictions[name], targets[name])
                self.log(f"val/{name}", metric, on_step=False, on_epoch=True)
        delta, valid = self.model.differences(targets, images, features=features, removal="mixture")
        return {"weights": output.weights, "delta": delta, "valid": valid}

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        """predictions by task, as a user wants to see them (`Task.predict`), and the routing weights (B, T, N, M)."""
        output = self.model(batch["image"], features=batch.get("features"))
        seen = {task.name: task.predict(output.predictions[task.name].float()) for task in self.model.tasks}
        return {"predictions": seen, "weights": output.weights}


def rate_share(step: int, total: float, schedule: str, warmup: int) -> float:
    """The learning rate at `step` of `total` as a share of the largest."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    left = 1 - min((step - warmup) / max(total - warmup, 1), 1.0)
    return left**POLY_POWER if schedule == "poly" else 0.5 * (1 - math.cos(math.pi * left))
