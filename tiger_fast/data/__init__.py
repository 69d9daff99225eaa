"""Data sets that give the samples the trainer reads."""

from tiger_fast.data.cached import CachedSamples
from tiger_fast.data.scenes import (
    CLASSES,
    HELDOUT_OFFSET,
    IGNORE_INDEX,
    MAX_DEPTH,
    NUM_CLASSES,
    SPECIALIST_HELDOUT_OFFSET,
    SPECIALIST_OFFSET,
    TRAIN_OFFSET,
    Scenes,
)

__all__ = [
    "CachedSamples",
    "CLASSES",
    "HELDOUT_OFFSET",
    "IGNORE_INDEX",
    "MAX_DEPTH",
    "NUM_CLASSES",
    "SPECIALIST_HELDOUT_OFFSET",
    "SPECIALIST_OFFSET",
    "TRAIN_OFFSET",
    "Scenes",
]
