"""The native library as it is built: the wheel's tag, what the library asks of torch and of the processor, and what happens
without a compiler.

The wheel is built once, in a copy of the repository that shares the checkout's compiled objects.
"""

import ctypes
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load_builder(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_native", root / "csrc" / "build_native.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


builder = load_builder(ROOT)

needs_compiler = pytest.mark.skipif(builder.find_compiler() is None, reason="no C++ compiler is installed")
needs_elf = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files, the format of Linux")


# ---- an ELF file, as far as the tests ask


@dataclass(frozen=True)
class Symbol:
    name: str
    weak: bool
    local: bool
    undefined: bool


@dataclass(frozen=True)
class Section:
    kind: int
    offset: int
    size: int
    link: int
    entry_size: int


SYMTAB, DYNAMIC, DYNSYM = 2, 6, 11
NEEDED, RPATH, RUNPATH = 1, 15, 29


class Elf:
    """Symbols and dynamic entries of a 64-bit little-endian file; no tool such as nm need be installed."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        assert self.data[:6] == b"\x7fELF\x02\x01", f"{path} is no 64-bit little-endian ELF file"
        (start,) = struct.unpack_from("<Q", self.data, 40)
        size, count = struct.unpack_from("<HH", self.data, 58)
        self.sections = []
        for i in range(count):
            fields = struct.unpack_from("<IIQQQQIIQQ", self.data, start + i * size)
            self.sections.append(Section(fields[1], fields[4], fields[5], fields[6], fields[9]))

    def entries(self, kind: int) -> Iterator[tuple[int, Section]]:
        for section in self.sections:
            if section.kind == kind:
                for offset in range(section.offset, section.offset + section.size, section.entry_size):
                    yield offset, self.sections[section.link]

    def text(self, strings: Section, offset: int) -> str:
        start = strings.offset + offset
        return self.data[start : self.data.index(b"\0", start)].decode()

    def symbols(self, kind: int) -> list[Symbol]:
        found = []
        for offset, strings in self.entries(kind):
            name, info, _, section = struct.unpack_from("<IBBH", self.data, offset)
            if name:
                found.append(Symbol(self.text(strings, name), info >> 4 == 2, info >> 4 == 0, section == 0))
        return found

    def dynamic(self, *tags: int) -> list[str]:
        entries = [(struct.unpack_from("<QQ", self.data, offset), strings) for offset, strings in self.entries(DYNAMIC)]
        return [self.text(strings, value) for (tag, value), strings in entries if tag in tags]


# ---- builds


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Runs a command, returns both its outputs, and fails with them if the command does."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{output}"
    return output


def pip_wheel(checkout: Path, folder: Path, **env: str) -> tuple[Path, str]:
    """Builds a wheel without isolation (so without a download); returns it and what pip printed."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-v", ".", "--no-deps")
    output = run(*pip, "--no-build-isolation", "--wheel-dir", folder, cwd=checkout, **env)
    (path,) = folder.glob("tiger_fast-*.whl")
    return path, output


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("native") / "repository"
    leftovers = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__", "lightning_logs"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=leftovers)
    builder.OBJECTS.mkdir(parents=True, exist_ok=True)
    (copy / "build").mkdir()
    (copy / "build" / "native").symlink_to(builder.OBJECTS)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pip_wheel(checkout, tmp_path_factory.mktemp("wheel"), TIGER_FAST_NATIVE="1")[0]


@pytest.fixture(scope="module")
def library(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract("tiger_fast/_native.abi3.so", tmp_path_factory.mktemp("library")))


# ---- the wheel


@needs_compiler
def test_wheel_with_native_code_is_for_every_python_on_this_platform_alone(wheel: Path) -> None:
    assert re.fullmatch(r"tiger_fast-[^-]+-cp310-abi3-(?!any)\w+\.whl", wheel.name), wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith((".so", ".o", ".cpp", ".h"))] == [
            "tiger_fast/_native.abi3.so"
        ]


@pytest.mark.parametrize("env", [{"CXX": "false", "CC": "false"}, {"TIGER_FAST_NATIVE": "0"}], ids=str)
def test_without_a_compiler_the_wheel_is_pure_python_and_a_line_says_so(
    checkout: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    path, output = pip_wheel(checkout, tmp_path, **{"TIGER_FAST_NATIVE": "", **env})
    assert path.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(path).namelist() if name.endswith(".so")]
    assert len(re.findall(r"tiger_fast: no native CPU kernels, .*", output)) == 1


def test_a_compile_that_fails_is_a_pure_wheel_and_an_error_where_native_code_is_asked_for(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\ncase "$1" in -dumpmachine|--version) echo x86_64-linux-gnu;; *) echo no >&2; exit 1;; esac\n'
    )
    compiler.chmod(0o755)
    objects = tmp_path / "objects"
    program = f"""
import build_native
from pathlib import Path
build_native.OBJECTS = Path({str(objects)!r})
stale = Path({str(tmp_path / "stale.so")!r})
stale.touch()
print(build_native.build_if_possible(stale), stale.exists())
"""
    command = (sys.executable, "-c", program)
    output = run(*command, cwd=ROOT / "csrc", CXX=str(compiler), TIGER_FAST_NATIVE="")
    assert "False False" in output.splitlines(), output
    assert "no native CPU kernels" in output and "failed on csrc/" in output
    with pytest.raises(AssertionError, match=r"BuildError: .*c\+\+ failed on csrc/"):
        run(*command, cwd=ROOT / "csrc", CXX=str(compiler), TIGER_FAST_NATIVE="1")


@needs_compiler
def test_objects_are_compiled_again_when_a_header_changes_and_only_then(tmp_path: Path) -> None:
    (tmp_path / "csrc" / "kernels").mkdir(parents=True)
    shutil.copy(ROOT / "csrc" / "build_native.py", tmp_path / "csrc")
    header = tmp_path / "csrc" / "kernels" / "answer.h"
    header.write_text("#define ANSWER 42\n")
    (tmp_path / "csrc" / "kernels" / "answer.cpp").write_text(
        '#include "answer.h"\nnamespace TIGER_FAST_ISA { int answer() { return ANSWER; } }\n'
    )
    own = load_builder(tmp_path)
    compiler, objects = own.find_compiler(), tmp_path / "objects"

    def compile_all() -> list[int]:
        return [path.stat().st_mtime_ns for path in own.compile_all(compiler, own.find_torch(), objects)]

    first = compile_all()
    assert compile_all() == first
    header.write_text("#define ANSWER 43\n")
    second = compile_all()
    assert all(new > old for new, old in zip(second, first))
    assert len(first) == (3 if compiler.is_x86_64 else 1)


@needs_compiler
def test_source_distribution_builds_the_same_wheel(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, "csrc")
import build_backend
print(build_backend.build_sdist({str(tmp_path)!r}))
"""
    run(sys.executable, "-c", program, cwd=checkout)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    (source / "build").mkdir()
    (source / "build" / "native").symlink_to(builder.OBJECTS)
    built, _ = pip_wheel(source, tmp_path / "wheel", TIGER_FAST_NATIVE="1")
    assert built.name == wheel.name
    assert set(zipfile.ZipFile(built).namelist()) == set(zipfile.ZipFile(wheel).namelist())


# ---- the library


@needs_compiler
@needs_elf
def test_library_asks_torch_for_its_stable_c_interface_alone(library: Path) -> None:
    elf = Elf(library)
    # What torch's C interface does not provide must be found in the C and C++ runtime.
    runtime = [ctypes.CDLL(name) for name in elf.dynamic(NEEDED) if name != "libtorch_cpu.so"]
    undefined = [symbol for symbol in elf.symbols(DYNSYM) if symbol.undefined]
    from_torch = [symbol.name for symbol in undefined if re.match(r"(aoti_)?torch_", symbol.name)]
    foreign = [
        symbol.name
        for symbol in undefined
        if symbol.name not in from_torch and not symbol.weak and not any(hasattr(lib, symbol.name) for lib in runtime)
    ]
    assert foreign == []
    assert "torch_library_impl" in from_torch  # or this read the wrong table


@needs_compiler
@needs_elf
def test_library_brings_no_second_openmp_and_no_search_path(library: Path) -> None:
    elf = Elf(library)
    needed = {re.sub(r"\.so.*|-.*", "", name) for name in elf.dynamic(NEEDED)}
    assert "libtorch_cpu" in needed
    assert needed <= {
        "libtorch_cpu",
        "libstdc++",
        "libc++",
        "libc++abi",
        "libgcc_s",
        "libm",
        "libc",
        "libpthread",
        "ld",
    }
    assert elf.dynamic(RPATH, RUNPATH) == []


@needs_compiler
@needs_elf
def test_no_function_of_one_instruction_set_can_stand_in_for_another(wheel: Path) -> None:
    # The linker keeps one of several weak definitions of a name. Were that name shared by the sets, the copy it keeps
    # might need AVX-512 and be called on a processor without.
    sets = list(builder.X86_SETS) if builder.find_compiler().is_x86_64 else ["plain"]
    for isa in sets:
        objects = [path for path in builder.OBJECTS.glob(f"*.{isa}.o") if source_of(path).exists()]
        assert len(objects) == len(list((ROOT / "csrc" / "kernels").glob("*.cpp")))
        for path in objects:
            defined = [symbol.name for symbol in Elf(path).symbols(SYMTAB) if not (symbol.undefined or symbol.local)]
            assert any(f"{len(isa)}{isa}" in name for name in defined), path.name
            # DW.ref.: a pointer for the unwinder, which is data.
            shared = [name for name in defined if f"{len(isa)}{isa}" not in name and not name.startswith("DW.ref.")]
            assert shared == [], path.name


def source_of(kernel_object: Path) -> Path:
    return ROOT / "csrc" / "kernels" / f"{kernel_object.name.split('.')[0]}.cpp"


@needs_compiler
def test_library_of_the_wheel_loads_beside_torch_and_registers_its_ops(library: Path, tmp_path: Path) -> None:
    program = "import tiger_fast; print(*tiger_fast.available_backends())"
    output = run(
        sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(ROOT), TIGER_FAST_NATIVE_LIBRARY=str(library)
    )
    assert "cpu" in output.split(), output


# ---- other processors


def test_compiles_for_aarch64_without_a_warning() -> None:
    command = "aarch64-linux-gnu-g++"
    if shutil.which(command) is None:
        pytest.skip(f"{command} is not installed (Debian's package g++-aarch64-linux-gnu)")
    torch = builder.find_torch()
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    compiler = builder.Compiler((command,), "aarch64-linux-gnu", version)
    # -O1: warnings that need the optimiser's analysis appear, in a third of -O3's time.
    objects = builder.compile_all(compiler, torch, ROOT / "build" / "native-aarch64", ("-O1",))
    assert len(objects) == len(list((ROOT / "csrc").glob("*.cpp")) + list((ROOT / "csrc" / "kernels").glob("*.cpp")))
    assert all(path.read_bytes()[18:20] == b"\xb7\x00" for path in objects)  # EM_AARCH64
