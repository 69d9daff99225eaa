"""Fast, exact, drop-in routing over frozen vision experts (TIGER, TAVER)."""

from tiger_fast import functional
from tiger_fast._ranges import profiler_ranges
from tiger_fast._version import __version__
from tiger_fast.nn import CounterfactualLoss, Router, TaskInstructionEncoder
from tiger_fast.ops import available_backends, empty_cache, show_config, use_backend

__all__ = [
    "CounterfactualLoss",
    "Router",
    "TaskInstructionEncoder",
    "__version__",
    "available_backends",
    "empty_cache",
    "functional",
    "profiler_ranges",
    "show_config",
    "use_backend",
]
