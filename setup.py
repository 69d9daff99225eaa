"""Which files make the package, the native library among them; its metadata is in pyproject.toml."""

import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import build_native  # noqa: E402


class BuildNative(build_ext):
    """Compiles csrc/, or goes on without: the package works on the reference backend alone."""

    def get_ext_filename(self, fullname: str) -> str:
        # One name under every Python: the library is no module of theirs and is loaded by its path.
        return fullname.replace(".", "/") + "".join(build_native.LIBRARY.suffixes)

    def build_extension(self, ext: Extension) -> None:
        if build_native.build_if_possible(Path(self.get_ext_fullpath(ext.name)).resolve()):
            return
        if self.editable_mode:
            (ROOT / build_native.LIBRARY).unlink(missing_ok=True)
        self.extensions = self.distribution.ext_modules = []


class Wheel(bdist_wheel):
    """Tagged after what is in it, which is known once it is built."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


# The library includes no Python header, so one serves every Python. A free-threaded Python knows no abi3 tag.
limited = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp310"}}

setup(
    # kernels/ stands at the top of the repository, has no __init__.py, and is installed as tiger_fast.kernels; its
    # README says why. Running from a checkout relies on the link tiger_fast/kernels; with package_dir a wheel does not,
    # so it is right too when built from a checkout that cannot hold links.
    packages=[*find_packages(include=["tiger_fast", "tiger_fast.*"]), "tiger_fast.kernels"],
    package_dir={"tiger_fast.kernels": "kernels"},
    include_package_data=False,
    package_data={"tiger_fast": ["py.typed", "experts/weights/*.safetensors", "models/weights/*.safetensors"]},
    ext_modules=[Extension("tiger_fast._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    options=limited,
)
