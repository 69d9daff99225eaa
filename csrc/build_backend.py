"""The build backend of pyproject.toml: setuptools', which also asks for torch where only its headers are missing."""

import build_native
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *build_native.requirements()]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *build_native.requirements()]
