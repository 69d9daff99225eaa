"""The package as it is installed: what a wheel holds, what importing it needs, and how tiger_fast.kernels is found.

The builds run in a copy of the repository with a probe module in kernels/, so that nothing is left in the checkout.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tiger_fast

ROOT = Path(__file__).resolve().parents[1]
PROBE_WEIGHTS = ("tiger_fast/experts/weights/probe.safetensors", "tiger_fast/models/weights/probe.safetensors")

# Put at the front of a program: only the standard library, torch with what it requires, and we can be imported.
ONLY_TORCH = """
ALLOWED = {"torch", "torchgen", "functorch", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe",
           "fsspec", "filelock", "setuptools", "_distutils_hack", "pkg_resources", "tiger_fast"}

class OnlyTorch:
    def find_spec(self, name, path=None, target=None):
        if path is None and name not in ALLOWED and name not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)

sys.meta_path.insert(0, OnlyTorch())
"""


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Runs a command, returns its standard output, and fails with both outputs if the command does."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def isolated(program: str, *, cwd: Path) -> str:
    """Runs a program that sees the installed packages as plain folders: no .pth file of an editable install is read."""
    folders = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    return run(sys.executable, "-I", "-S", "-c", f"import sys\nsys.path += {folders!r}\n{program}", cwd=cwd)


def from_root(program: str, *, root: Path) -> str:
    """Runs a program in the root of a checkout, with PYTHONPATH=."""
    return run(sys.executable, "-c", program, cwd=root, env={**os.environ, "PYTHONPATH": "."})


def pip(*arguments: str | Path, cwd: Path) -> None:
    # Without native code: tests/test_native_build.py is about that.
    env = {**os.environ, "TIGER_FAST_NATIVE": "0"}
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, "--no-deps", cwd=cwd, env=env)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, symbolic links kept, with a module in kernels/ and weights to ship."""
    copy = tmp_path_factory.mktemp("checkout") / "repository"
    leftovers = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__", "lightning_logs"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=leftovers)
    (copy / "kernels" / "probe.py").write_text("ANSWER = 42\n")
    for name in PROBE_WEIGHTS:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(b"")
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", ".", "--no-build-isolation", "--wheel-dir", folder, cwd=checkout)
    (path,) = folder.glob("tiger_fast-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--target", target, wheel, cwd=target)
    return target


def test_wheel_holds_the_package_and_only_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"tiger_fast/__init__.py", "tiger_fast/py.typed", "tiger_fast/kernels/probe.py", *PROBE_WEIGHTS}
    assert expected <= names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tiger_fast").rglob("*.py")}
    assert modules <= names
    assert {name.split("/")[0] for name in names} == {"tiger_fast", f"tiger_fast-{tiger_fast.__version__}.dist-info"}


def test_metadata_has_the_version_and_requires_torch_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"tiger_fast-{tiger_fast.__version__}.dist-info/METADATA").decode()
    assert re.search(r"^Version: (.+)$", metadata, re.M).group(1) == tiger_fast.__version__
    required = re.findall(r"^Requires-Dist: (.+)$", metadata, re.M)
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.11"]
    extras = set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.M))
    assert extras == {"triton", "experts", "train", "attention", "dev"}


def test_installed_wheel_needs_torch_alone(installed: Path, tmp_path: Path) -> None:
    program = f"""{ONLY_TORCH}
sys.path.insert(0, {str(installed)!r})
import torch, tiger_fast
from importlib.metadata import version
from tiger_fast.kernels import probe

assert tiger_fast.__file__.startswith({str(installed)!r}), tiger_fast.__file__
assert version("tiger_fast") == tiger_fast.__version__, version("tiger_fast")
assert not (torch.distributed.is_available() and torch.distributed.is_initialized())
assert not torch.cuda.is_initialized()
print(probe.ANSWER)
"""
    assert isolated(program, cwd=tmp_path).strip() == "42"


def test_import_loads_torch_and_nothing_else_that_is_installed(installed: Path, tmp_path: Path) -> None:
    program = f"""
import torch
before = set(sys.modules)
sys.path.insert(0, {str(installed)!r})
import tiger_fast
print(*sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names)))
"""
    loaded = set(isolated(program, cwd=tmp_path).split())
    # Parts of torch that it loads on first use may bring what torch requires. Triton is not among it.
    assert loaded <= {"tiger_fast", "torch", "torchgen", "sympy", "mpmath", "networkx", "numpy"}


def test_editable_install_finds_kernels_and_does_not_put_the_root_on_the_path(checkout: Path, tmp_path: Path) -> None:
    # --ignore-installed: leave an installation that these tests run from where it is.
    options = ("--no-build-isolation", "--ignore-installed", "--prefix", tmp_path / "prefix")
    pip("install", *options, "--editable", checkout, cwd=tmp_path)
    (info,) = (tmp_path / "prefix").rglob("tiger_fast-*.dist-info")
    program = f"""
import site
sys.path.insert(0, {str(info.parent)!r})  # before a finder of the same name that these tests may run from
site.addsitedir({str(info.parent)!r})
import tiger_fast
from tiger_fast.kernels import probe

assert tiger_fast.__file__.startswith({str(checkout)!r}), tiger_fast.__file__
assert {str(checkout)!r} not in sys.path, sys.path
print(probe.ANSWER)
"""
    assert isolated(program, cwd=tmp_path).strip() == "42"


def test_repository_root_finds_kernels_without_an_install(checkout: Path) -> None:
    program = "from tiger_fast.kernels import probe; print(probe.ANSWER, probe.__name__)"
    assert from_root(program, root=checkout).split() == ["42", "tiger_fast.kernels.probe"]


def test_repository_root_does_not_shadow_the_package_called_kernels(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.0.stand-in'\n")
    program = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.__version__)"
    assert from_root(program, root=checkout).strip() == "0.0.stand-in"


def test_transformers_in_the_repository_root_does_not_take_our_kernels_for_a_package(checkout: Path) -> None:
    pytest.importorskip("transformers", reason='transformers is not installed: pip install "tiger_fast[dev]"')
    if "kernels" in importlib.metadata.packages_distributions():
        pytest.skip("the PyPI package called kernels is installed, so transformers is right to find it")
    program = """
import sys
import transformers.integrations.hub_kernels
from transformers.utils import is_kernels_available

assert not is_kernels_available()
namespace = sys.modules.get("kernels")
assert getattr(namespace, "__file__", None) is None and not hasattr(namespace, "get_kernel"), namespace
assert "kernels.probe" not in sys.modules
"""
    from_root(program, root=checkout)
