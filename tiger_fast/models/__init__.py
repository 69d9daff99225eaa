"""The papers' models, their presets and tasks."""

from tiger_fast.models.presets import PRESETS, CounterfactualSettings, ExpertSpec, TIGERSettings
from tiger_fast.models.tasks import Task, nyud_tasks, pascal_tasks, scenes_tasks
from tiger_fast.models.tiger import TIGER, Objective, TIGEROutput

__all__ = [
    "PRESETS",
    "TIGER",
    "CounterfactualSettings",
    "ExpertSpec",
    "Objective",
    "TIGEROutput",
    "TIGERSettings",
    "Task",
    "nyud_tasks",
    "pascal_tasks",
    "scenes_tasks",
]
