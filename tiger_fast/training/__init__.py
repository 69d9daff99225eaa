"""Data sets and loops: the trainer around TIGER, the specialists' training script, the demo.

The names below need lightning (pip install "tiger_fast[train]") and are imported when first asked for, so that the
scripts beside them do without it.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "AtomicCheckpointIO": "callbacks",
    "PredictionWriter": "callbacks",
    "RoutingHealth": "callbacks",
    "RunCheckpoint": "callbacks",
    "RunCSV": "callbacks",
    "RunLog": "callbacks",
    "SceneData": "datamodule",
    "TIGERModule": "module",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
