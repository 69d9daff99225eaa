"""Commands of profiling/ run in processes of their own, as from a checkout."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORDED = ROOT / "profiling" / "recorded"


def run(*command: object, **env: str) -> subprocess.CompletedProcess:
    """The command, ended; PYTHONPATH and PYTHON name the checkout and this interpreter."""
    # Nor what tells a pytest inside that it is a worker of this one's, where pytest-benchmark measures nothing.
    ours = ("TRITON_INTERPRET", "PYTEST_")
    variables = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    variables |= {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable} | env
    return subprocess.run([str(c) for c in command], cwd=ROOT, env=variables, capture_output=True, text=True)
