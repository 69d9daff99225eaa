"""Backends: which implementation of an op runs, and which ones this machine can run."""

from tiger_fast.ops.backends import BACKENDS, available_backends, select, show_config, use_backend
from tiger_fast.ops.cpu import empty_cache

__all__ = ["BACKENDS", "available_backends", "empty_cache", "select", "show_config", "use_backend"]
