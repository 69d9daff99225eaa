"""What the trainer watches and keeps: routing health, logs, checkpoints, predictions."""

import csv
import io
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiger_fast._extras import require
from tiger_fast._files import write_whole
from tiger_fast.metrics.routing import RoutingStatistics, entropy
from tiger_fast.training.runfolder import RunFolder

require("lightning", extra="train")

from lightning.pytorch.callbacks import Callback, Checkpoint  # noqa: E402
from lightning.pytorch.loggers import Logger  # noqa: E402
from lightning.pytorch.plugins.io import TorchCheckpointIO  # noqa: E402
from lightning.pytorch.utilities import rank_zero_only  # noqa: E402

# Weights are called collapsed where the mean entropy is below this share of log M. A token that gives one of four
# experts .98 and the others the rest has .086 of log 4: the two thresholds mean about the same.
ENTROPY_SHARE = 0.1
# ... or where one expert has more than this share of the weight of all tasks: the others are then passengers.
TOP_SHARE = 0.98


class RoutingCollapse(UserWarning):
    """The routing weights have become one-hot, or all tasks use one expert."""


def collapse(shares: Tensor, entropies: Tensor, experts: list[str]) -> str | None:
    """Why the routing counts as collapsed, or None. shares (T, M), entropies (T,)."""
    members = len(experts)
    if members == 1:
        return None
    mean, most = float(entropies.mean()), math.log(members)
    if mean < ENTROPY_SHARE * most:
        return f"the weights' mean entropy is {mean:.3f} nats of at most {most:.3f}"
    total = shares.mean(dim=0)
    top = int(total.argmax())
    if total[top] > TOP_SHARE:
        return f"expert {experts[top]!r} has {float(total[top]):.1%} of all tasks' weight"
    return None


class RoutingHealth(Callback):
    """Logs how the model routes, and warns when the routing collapses.

    routing/entropy (nats, mean over tokens and tasks), routing/entropy/TASK and routing/TASK/EXPERT (mean weight) of
    the training batch at each logged step, over all tokens. The same under val/ for the validation set, over the tokens
    that count, with the divergence between causes and weights (TIGER eqs. 9-13, removal at the mixture), that of equal
    weights, and the agreement: see `RoutingStatistics`.
    """

    def __init__(self) -> None:
        self._statistics: RoutingStatistics | None = None
        self._collapsed = False
        self._due = LoggedSteps()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The step that the run goes on from was logged before."""
        self._due.start(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the batch."""
        if not self._due.now(trainer):
            return
        weights = outputs["weights"]
        shares, entropies = weights.mean(dim=(0, 2)), entropy(weights).mean(dim=(0, 2))
        values = _named(pl_module.model, shares, entropies)
        pl_module.log_dict(values, logger=False, on_step=True, on_epoch=False, sync_dist=True)
        self._judge(pl_module.model, shares, entropies)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the sums."""
        model, cf = pl_module.model, pl_module.model.settings.counterfactual
        statistics = RoutingStatistics(len(model.tasks), len(model.expert_specs), tau=cf.tau, eps=cf.eps)
        self._statistics = statistics.to(pl_module.device)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add a batch."""
        self._statistics.update(outputs["weights"], outputs["delta"], outputs["valid"])

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the figures; they are those of all ranks already."""
        with warnings.catch_warnings():
            # Equal weights have no ranks to correlate: the agreement is NaN, and that says it.
            warnings.simplefilter("ignore")
            figures = self._statistics.compute()
        # torchmetrics drops the dimensions of a figure that is a single number.
        tasks, members = len(pl_module.model.tasks), len(pl_module.model.expert_specs)
        shares, entropies = figures["weights"].reshape(tasks, members), figures["entropy"].reshape(tasks)
        values = _named(pl_module.model, shares, entropies)
        values |= {f"routing/{name}": figures[name] for name in ("divergence", "divergence_of_uniform", "agreement")}
        values = {f"val/{name}": value for name, value in values.items()}
        if trainer.state.fn == "fit":
            # The trainer takes this for the step that all validation figures are logged under, as RunLog's are.
            values["step"] = torch.tensor(trainer.global_step)
        pl_module.log_dict({name: value.float() for name, value in values.items()})
        self._judge(pl_module.model, shares, entropies)

    @rank_zero_only
    def _judge(self, model: Any, shares: Tensor, entropies: Tensor) -> None:
        reason = collapse(shares, entropies, model.expert_names)
        if reason and not self._collapsed:
            weight = model.settings.counterfactual.weight
            advice = f"a larger counterfactual weight (now {weight:g}) or a smaller learning rate keeps it open"
            warnings.warn(f"routing has collapsed: {reason}; {advice}", RoutingCollapse, stacklevel=2)
        self._collapsed = reason is not None


def _named(model: Any, shares: Tensor, entropies: Tensor) -> dict[str, Tensor]:
    values = {"routing/entropy": entropies.mean()}
    for task, row, figure in zip(model.task_names, shares, entropies, strict=True):
        values[f"routing/entropy/{task}"] = figure
        values |= {f"routing/{task}/{expert}": share for expert, share in zip(model.expert_names, row, strict=True)}
    return values


class LoggedSteps:
    """Says of each training batch whether it is the one whose optimiser step is logged (`log_every_n_steps`).

    With accumulated gradients several batches belong to a step, and the last one takes it.
    """

    def __init__(self) -> None:
        self._seen = 0

    def start(self, trainer: Any) -> None:
        """Steps up to here were logged by the run that this one continues."""
        self._seen = trainer.global_step

    def now(self, trainer: Any) -> bool:
        """To be asked once after every batch."""
        step = trainer.global_step
        fresh, self._seen = step != self._seen, step
        return fresh and step % trainer.log_every_n_steps == 0


class RunLog(Callback):
    """Hands the training figures to the loggers before a checkpoint is written, under the number of steps taken.

    The trainer's own way logs a step after its checkpoint: a run killed in between would lose the row. Validation
    figures go the trainer's way, which is before `RunCheckpoint` saves.
    """

    def __init__(self) -> None:
        self._due = LoggedSteps()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """What was logged after the checkpoint that this run goes on from will be logged again."""
        self._due.start(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, RunCSV):
                logger.rewind(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log losses, routing and the learning rate."""
        if self._due.now(trainer):
            found = sorted(trainer.callback_metrics.items())
            metrics = {name: float(value) for name, value in found if name.startswith(("train/", "routing/"))}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)


class RunCSV(Logger):
    """A table with one row for every logged step: whatever is logged for a step that has a row joins it.

    Rows are appended, and reach the operating system at once; the file is rewritten, whole or not at all, where a
    column or the last row changes. A resumed run has every row once, and those before the kill unchanged.

    Args:
        path: of the .csv file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._rows: dict[int, dict[str, str]] = {}
        self._columns = ["step"]

    @property
    def name(self) -> str:
        """Of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """One file, no versions."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are in config.yaml."""

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Read the table that is there and forget rows after `step`."""
        self._rows, self._columns = {}, ["step"]
        if self.path.is_file():
            with self.path.open(newline="") as file:
                reader = csv.DictReader(file)
                complete = [row for row in reader if None not in row and None not in row.values()]
            self._columns = list(reader.fieldnames or ["step"])
            for row in complete:
                if int(row["step"]) <= step:
                    self._rows[int(row["step"])] = {k: v for k, v in row.items() if v and k != "step"}
        self._rewrite()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add figures to the row of `step`."""
        step = int(step or 0)
        fresh = step not in self._rows
        self._rows.setdefault(step, {}).update({name: repr(float(value)) for name, value in metrics.items()})
        added = [name for name in metrics if name not in self._columns]
        self._columns += added
        if added or not fresh or not self.path.is_file():
            self._rewrite()
        else:
            with self.path.open("a", newline="") as file:
                file.write(self._line(step))

    def _line(self, step: int) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, restval="", lineterminator="\n").writerow(
            {"step": step, **self._rows[step]}
        )
        return text.getvalue()

    def _rewrite(self) -> None:
        content = ",".join(self._columns) + "\n" + "".join(self._line(step) for step in sorted(self._rows))
        write_whole(self.path, lambda file: file.write(content.encode()))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all, and are read as data (weights_only), never as code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write to a temporary file in the same folder, sync, and rename."""
        write_whole(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint to the CPU.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is corrupt, or holds more than tensors and plain values.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no checkpoint at {path}")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle, zip or runtime errors, depending on which bytes are wrong
            raise ValueError(
                f"{path} is not a readable checkpoint; without it, the run goes on from the one before: {error}"
            ) from error


class RunCheckpoint(Checkpoint):
    """Writes checkpoints/step-N.ckpt in the run's folder every so many steps and at the end, and keeps the last ones.

    Where a validation follows the step, the checkpoint is written after it: a resumed run does not repeat or miss one.

    Args:
        every_n_steps: steps between checkpoints.
        keep: how many stay; the former one goes only once the new one is on disk.
    """

    def __init__(self, every_n_steps: int = 100, keep: int = 2) -> None:
        if every_n_steps < 1 or keep < 1:
            raise ValueError(f"every_n_steps and keep must be at least 1, got {every_n_steps} and {keep}")
        self.every_n_steps, self.keep = every_n_steps, keep
        self._saved, self._due = 0, False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """What the run goes on from is saved already."""
        self._saved, self._due = trainer.global_step, False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save, or wait for the validation that follows."""
        step = trainer.global_step
        wanted = step % self.every_n_steps == 0 or step == trainer.max_steps
        if wanted and step != self._saved:
            self._due = validates_next(trainer, batch_idx)
            if not self._due:
                self._save(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Save what waited."""
        if self._due:
            self._save(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the last step, if it is not."""
        if trainer.global_step != self._saved:
            self._save(trainer)

    def _save(self, trainer: Any) -> None:
        if trainer.fast_dev_run:  # a trial, which owns no folder
            return
        for logger in trainer.loggers:
            logger.save()
        self._saved, self._due = trainer.global_step, False
        folder = RunFolder(trainer.default_root_dir)
        trainer.save_checkpoint(folder.path / "checkpoints" / f"step-{self._saved:08d}.ckpt", weights_only=False)
        if trainer.is_global_zero:
            for old in folder.checkpoints()[: -self.keep]:
                old.unlink()


def validates_next(trainer: Any, batch_idx: int) -> bool:
    """Whether the trainer validates right after the batch just done: its own rule, for intervals in batches."""
    every, epoch = trainer.check_val_every_n_epoch, trainer.current_epoch + 1
    if not trainer.enable_validation or (every is not None and epoch % every):
        return False
    if trainer.val_check_batch in (None, math.inf):
        return False
    done = trainer.fit_loop.total_batch_idx if every is None else batch_idx
    return (done + 1) % trainer.val_check_batch == 0


class ModelExport(Callback):
    """Writes model.safetensors (`TIGER.load` reads it) into the run's folder when training is complete."""

    @rank_zero_only
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Also after a run that was complete already: it may have been killed just before this."""
        if not trainer.interrupted and not trainer.fast_dev_run:
            pl_module.model.save(Path(trainer.default_root_dir) / "model.safetensors")


class PredictionWriter(Callback):
    """Writes each predicted batch to predictions/scene-N.safetensors in the run's folder, N the first of its `index`.

    A file holds every task's prediction by name, `weights` (B, T, N, M) and `index` (B,).
    """

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write one batch."""
        save = require("safetensors.torch", extra="train").save
        tensors = {**outputs["predictions"], "weights": outputs["weights"], "index": batch["index"]}
        content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        name = f"scene-{int(batch['index'][0]):06d}.safetensors"
        write_whole(Path(trainer.default_root_dir) / "predictions" / name, lambda file: file.write(content))
