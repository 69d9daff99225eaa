"""A run's folder: whose it is, its lock, its checkpoints. Every file appears whole or not at all."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tiger_fast._files import write_whole

MARKER = "# A run of tiger_fast; the same configuration continues it. Format 1.\n"
_CHECKPOINT = re.compile(r"step-(\d+)\.ckpt")
# What `write_whole` and TIGER.save leave behind if they are killed: .NAME.XXXXXXXX, X of tempfile's alphabet.
_LEFTOVER = re.compile(r"\.(step-\d+\.ckpt|config\.yaml|metrics\.csv|model\.safetensors)\.[a-z0-9_]{8}")
# Keys that may differ between two starts of one run: where it lies and what the terminal shows.
_FREE_KEYS = {"data.workers", "trainer.default_root_dir", "trainer.enable_progress_bar", "trainer.enable_model_summary"}


class RunFolderError(ValueError):
    """The output folder cannot be used: it is somebody else's, or in use."""


class RunFolder:
    """The folder of one training run.

    Holds config.yaml (which marks it as a run's), checkpoints/step-N.ckpt, metrics.csv, tensorboard/ and, once the run
    is complete, model.safetensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: Any = None

    @property
    def config(self) -> Path:
        """The configuration that the run was started with."""
        return self.path / "config.yaml"

    def checkpoints(self) -> list[Path]:
        """The run's checkpoints, oldest first."""
        found = (self.path / "checkpoints").glob("step-*.ckpt")
        return sorted((path for path in found if _CHECKPOINT.fullmatch(path.name)), key=step_of)

    def newest_checkpoint(self) -> Path | None:
        """The last checkpoint, or None."""
        checkpoints = self.checkpoints()
        return checkpoints[-1] if checkpoints else None

    def claim(self, config: Mapping[str, Any]) -> None:
        """Make the folder this run's: new, or started before with the same configuration.

        Raises:
            RunFolderError: if it holds anything else, or another process is using it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"the output folder {self.path} is a file")
        if not self.config.is_file() and (found := sorted(self._foreign())):
            raise RunFolderError(
                f"the output folder {self.path} holds {found[0]!r} and no run of tiger_fast: name another with "
                "--trainer.default_root_dir"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if self.config.is_file():
            self._compare(config)
        yaml = _yaml()
        text = MARKER + yaml.safe_dump(dict(config), sort_keys=False)
        write_whole(self.config, lambda file: file.write(text.encode()))
        self._remove_leftovers()

    def _foreign(self) -> Iterator[str]:
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if path.name != ".lock" and not _LEFTOVER.fullmatch(path.name):
                yield path.name

    def _compare(self, config: Mapping[str, Any]) -> None:
        text = self.config.read_text(errors="replace")
        advice = "name another with --trainer.default_root_dir"
        if not text.startswith(MARKER):
            raise RunFolderError(f"the output folder {self.path} holds a config.yaml of something else: {advice}")
        before, now = _flat(_yaml().safe_load(text) or {}), _flat(config)
        keys = sorted(k for k in before.keys() | now.keys() if k not in _FREE_KEYS and before.get(k) != now.get(k))
        # A start that failed before its first log or checkpoint is no run yet.
        begun = self.checkpoints() or (self.path / "metrics.csv").exists()
        if keys and begun:
            shown = "; ".join(f"{key} is {before.get(key)!r} there, {now.get(key)!r} here" for key in keys[:5])
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            raise RunFolderError(f"the output folder {self.path} holds another run ({shown}{more}): {advice}")

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows: two runs in one folder go unnoticed there
            return
        # Kept open while the process lives. lockf, not flock: it ends with this process, killed or not, and workers
        # that it forked do not hold it on.
        self._lock = open(self.path / ".lock", "a")  # noqa: SIM115
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunFolderError(f"the output folder {self.path} is in use by another process") from None

    def _remove_leftovers(self) -> None:
        for folder in (self.path, self.path / "checkpoints"):
            for path in folder.glob(".*"):
                if _LEFTOVER.fullmatch(path.name):
                    path.unlink(missing_ok=True)


def step_of(checkpoint: Path) -> int:
    """The number of steps taken before a checkpoint, from its name."""
    return int(_CHECKPOINT.fullmatch(checkpoint.name)[1])


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _yaml() -> Any:
    from tiger_fast._extras import require

    return require("yaml", extra="train")
