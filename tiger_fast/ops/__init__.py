"""Backends: which implementation of an op runs, and which ones this machine can run."""

from tiger_fast.ops.backends import BACKENDS, available_backends, select, show_config, use_backend

__all__ = ["BACKENDS", "available_backends", "select", "show_config", "use_backend"]
