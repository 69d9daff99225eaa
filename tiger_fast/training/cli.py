"""`python -m tiger_fast fit|validate|predict`: the trainer from a configuration file and the command line."""

import difflib
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tiger_fast._extras import require
from tiger_fast.training.callbacks import AtomicCheckpointIO, ModelExport, PredictionWriter, RunCheckpoint, RunCSV
from tiger_fast.training.datamodule import SceneData
from tiger_fast.training.module import TIGERModule
from tiger_fast.training.runfolder import RunFolder, step_of

require("jsonargparse", extra="train")

from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar  # noqa: E402
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI  # noqa: E402
from lightning.pytorch.loggers import TensorBoardLogger  # noqa: E402
from lightning.pytorch.utilities import rank_zero_only  # noqa: E402

TRAINER_DEFAULTS = {
    "default_root_dir": "runs/fit",
    # Not "auto", which takes Apple's GPUs: they have no float64, in which the metrics add up.
    "accelerator": "cuda" if torch.cuda.is_available() else "cpu",
    "max_steps": 600,
    "log_every_n_steps": 10,
    "gradient_clip_val": 10.0,  # the dense-prediction protocols' norm
    "num_sanity_val_steps": 0,
}


class Parser(LightningArgumentParser):
    """The parser, without what a file cannot give; its error about an unknown key names the nearest one there is."""

    def add_class_arguments(self, theclass: type, *args: Any, **options: Any) -> Any:
        """A ready model cannot come from a file."""
        if theclass is TIGERModule:
            options["skip"] = {"model", *options.get("skip", ())}
        return super().add_class_arguments(theclass, *args, **options)

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Print usage and message, and exit with status 2."""
        super().error(message + self._near_match(message), ex)

    def _near_match(self, message: str) -> str:
        # "Subcommand 'fit' does not accept option 'data.batchsize'" (a file's), "unrecognized arguments: --data.b 1".
        found = re.search(r"(?:does not accept (?:option|nested key) '|unrecognized arguments: --)([\w.]+)", message)
        near = difflib.get_close_matches(found[1], list(self._keys()), n=1, cutoff=0.5) if found else []
        return f"; did you mean {near[0]!r}?" if near else ""

    def _keys(self) -> Iterator[str]:
        for action in self._actions:
            if isinstance(action.choices, dict):  # the subcommands' parsers
                for parser in action.choices.values():
                    yield from parser._keys()
            else:
                yield action.dest


class TIGERCLI(LightningCLI):
    """LightningCLI with TIGERModule and SceneData, a run folder that resumes, and errors without tracebacks."""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__(
            TIGERModule,
            SceneData,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"prog": "python -m tiger_fast"},
            args=list(sys.argv[1:] if args is None else args),
            auto_configure_optimizers=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """What there is; `weights_only` is not for the user: checkpoints are data."""
        skipped = {"weights_only", "datamodule", "model"}
        return {
            "fit": {"train_dataloaders", "val_dataloaders", *skipped},
            "validate": {"dataloaders", *skipped},
            "predict": {"dataloaders", "return_predictions", *skipped},
        }

    def add_arguments_to_parser(self, parser: Any) -> None:
        """One seed for everything, and the checkpoints' settings."""
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """As given: `main` may be called beside a command line of somebody else's."""
        self.config = parser.parse_args(args)

    def instantiate_classes(self) -> None:
        """Bad settings end with a message."""
        with _errors_as_messages():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Loggers, checkpoints and callbacks in the run's folder, unless the configuration has its own."""
        given = self._get(self.config_init, "trainer")
        self.folder = RunFolder(given["default_root_dir"])
        plugins = given.get("plugins") or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        extra = []
        if self.subcommand == "fit":
            extra = [ModelExport()]
            if given.get("logger") in (None, True):
                kwargs["logger"] = self._loggers()
        else:
            kwargs["logger"] = False
            extra = [PredictionWriter()] if self.subcommand == "predict" else []
        callbacks = given.get("callbacks") or []
        if given.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            # The rich one, which the trainer prefers, shows "Epoch 0/-2" where the end is given in steps.
            extra.append(TQDMProgressBar())
        kwargs["callbacks"] = [*callbacks, *extra]
        return super().instantiate_trainer(**kwargs)

    def _loggers(self) -> list[Any]:
        newest = self.folder.newest_checkpoint()
        # TensorBoard hides what a killed run logged after the checkpoint that this one goes on from.
        purge = (step_of(newest) if newest else 0) + 1
        board = TensorBoardLogger(
            self.folder.path, name="tensorboard", version="", default_hp_metric=False, purge_step=purge
        )
        return [RunCSV(self.folder.path / "metrics.csv"), board]

    def before_fit(self) -> None:
        """Claim the folder; go on from its newest checkpoint, unless told from which."""
        self._check_model()
        if not self.trainer.fast_dev_run:
            with _errors_as_messages():
                self._claim()
            if self.config_init[self.subcommand].get("ckpt_path") is None:
                self._start_from(self.folder.newest_checkpoint())

    def _check_model(self) -> None:
        # Before the folder is claimed: a model that cannot be trained here leaves no trace.
        with _errors_as_messages():
            self.model.configure_model()
            model = self.model.model
            if len(model.experts) != len(model.expert_specs):
                raise ValueError(
                    f"preset {self.model.hparams.preset!r} asks for experts {model.expert_names}, and this release "
                    "loads the embedded specialists only: take preset 'tiger-tiny', or train with their features in Python"
                )

    @rank_zero_only
    def _claim(self) -> None:
        config = self.config[self.subcommand].clone().as_dict()
        config.pop("config", None)
        for part in ("model", "data"):
            config[part].pop("seed", None)  # linked to seed_everything
        # Plain values, so that it can be written and read again.
        self.folder.claim(json.loads(json.dumps(config, default=str)))

    def before_validate(self) -> None:
        """Take the weights of the run's newest checkpoint, unless told which."""
        if self.config_init[self.subcommand].get("ckpt_path") is None:
            newest = self.folder.newest_checkpoint()
            if newest is None:
                raise SystemExit(f"error: no checkpoint in {self.folder.path}: run fit first, or give --ckpt_path")
            self._start_from(newest)

    def before_predict(self) -> None:
        """As before_validate; nothing is gathered in memory."""
        self.before_validate()

    def _start_from(self, checkpoint: Any) -> None:
        if checkpoint is not None:
            self.config_init[self.subcommand]["ckpt_path"] = str(checkpoint)
            print(f"going on from {checkpoint}" if self.subcommand == "fit" else f"weights of {checkpoint}", flush=True)

    def predict(self, **kwargs: Any) -> None:
        """Predict and write."""
        self.trainer.predict(**kwargs, return_predictions=False)
        print(f"predictions are in {self.folder.path / 'predictions'}")


@contextmanager
def _errors_as_messages() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, ImportError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


def _is_about_the_run(record: logging.LogRecord) -> bool:
    # The trainer's tips recommend other products.
    return "Tip:" not in record.getMessage()


def main(args: Sequence[str] | None = None) -> None:
    """Run `fit`, `validate` or `predict`.

    Args:
        args: the subcommand and its options; None: the command line's.

    Raises:
        SystemExit: with status 2 for an unknown key or value, with a message for anything else that the user can mend.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_about_the_run)
    with warnings.catch_warnings():
        # The frozen experts' modules: they are to be in eval mode.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        TIGERCLI(args)
