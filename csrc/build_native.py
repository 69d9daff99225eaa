"""Compiles csrc/ into tiger_fast/_native.abi3.so. setup.py calls it; by itself it is a quick rebuild in place:

    python csrc/build_native.py
    python csrc/build_native.py --sanitize address --output build/asan/_native.so

Host units (csrc/*.cpp) use torch's stable ABI and are compiled once. Kernel units (csrc/kernels/*.cpp) include no torch
header and are compiled once per instruction set, which host code chooses from at run time. Only the standard library is
needed here, and torch is not imported: an isolated build has its headers only.
"""

import argparse
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path("tiger_fast", "_native.abi3.so")
OBJECTS = ROOT / "build" / "native"

# The stable ABI of this torch: the library runs on it and on every later one.
OLDEST_TORCH = (2, 11)
TARGET_VERSION = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"

COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra", "-Werror")
# Contraction lets a multiply and an add become one instruction; -ffast-math would break NaN and inf, so it is not used.
KERNEL = ("-ffp-contract=fast", "-fno-math-errno")
X86_SETS = {
    "plain": ("-march=x86-64",),
    "v3": ("-march=x86-64-v3",),
    "v4": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
}
SANITIZERS = {
    "address": ("-fsanitize=address",),
    "undefined": ("-fsanitize=undefined", "-fno-sanitize-recover=all"),
}


class BuildError(Exception):
    """Why there is no native library: a line, then what the compiler said, if it was asked."""


@dataclass(frozen=True)
class Compiler:
    command: tuple[str, ...]
    target: str  # x86_64-linux-gnu
    version: str

    @property
    def is_x86_64(self) -> bool:
        return self.target.startswith(("x86_64", "amd64"))

    @property
    def is_gcc(self) -> bool:
        return "clang" not in self.version.lower()


@dataclass(frozen=True)
class Unit:
    source: Path
    name: str  # of the object, without its suffix
    flags: tuple[str, ...]
    includes_torch: bool


def find_compiler() -> Compiler | None:
    """$CXX, or else the first C++ compiler on the path; None where there is none that runs."""
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["c++", "g++", "clang++"]:
        command = shlex.split(candidate)
        if not shutil.which(command[0]) or os.name == "nt":
            continue
        answers = [
            subprocess.run([*command, ask], capture_output=True, text=True) for ask in ("-dumpmachine", "--version")
        ]
        target, version = (answer.stdout.strip() for answer in answers)
        if not any(answer.returncode for answer in answers) and target and version:
            return Compiler(tuple(command), target, version)
    return None


def find_torch() -> Path | None:
    """The folder of a torch that is new enough, without importing it.

    An isolated build does not see the environment that it builds for on sys.path, but sysconfig and site name its folders.
    """
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent.parent] if spec and spec.origin else []
    folders += [Path(path) for path in (sysconfig.get_path("platlib"), sysconfig.get_path("purelib"))]
    folders += [Path(site.getusersitepackages())] if site.ENABLE_USER_SITE else []
    for folder in folders:
        header = version_header(folder / "torch")
        if header.exists():
            version = [
                int(number) for number in re.findall(r"define TORCH_VERSION_(?:MAJOR|MINOR) (\d+)", header.read_text())
            ]
            if tuple(version) >= OLDEST_TORCH:
                return folder / "torch"
    return None


def version_header(torch: Path) -> Path:
    return torch / "include" / "torch" / "headeronly" / "version.h"


def requirements() -> list[str]:
    """What a build needs and does not find: torch, where there is a compiler for its headers."""
    if setting() == "0" or find_compiler() is None or find_torch() is not None:
        return []
    return [f"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"]


def setting() -> str:
    """TIGER_FAST_NATIVE: "0" builds nothing, "1" makes a failure an error, "" (unset) builds where it can."""
    value = os.environ.get("TIGER_FAST_NATIVE", "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"TIGER_FAST_NATIVE is {value!r}; expected 0 (do not build), 1 (build or fail), or unset")
    return value


def units(compiler: Compiler) -> list[Unit]:
    """Every compilation, the kernels first, since they take longest."""
    sets = X86_SETS if compiler.is_x86_64 else {"plain": ()}
    # GCC notes that vectors wider than the baseline's pass differently; only always-inline functions pass them here.
    common = (*COMMON, *(["-Wno-psabi"] if compiler.is_gcc else []))
    kernels = [
        Unit(source, f"{source.stem}.{name}", (*common, "-O3", *KERNEL, *march, f"-DTIGER_FAST_ISA={name}"), False)
        for source in sorted((ROOT / "csrc" / "kernels").glob("*.cpp"))
        for name, march in sets.items()
    ]
    host_flags = (*common, "-O2", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}")
    host_flags += ("-DTIGER_FAST_HAS_V3_V4=1",) if compiler.is_x86_64 else ()
    hosts = [Unit(source, source.stem, host_flags, True) for source in sorted((ROOT / "csrc").glob("*.cpp"))]
    return kernels + hosts


def compile_unit(
    compiler: Compiler, torch: Path, unit: Unit, objects: Path, extra: tuple[str, ...], headers: bytes
) -> Path:
    """Compiles one unit into `objects`, unless the object there was made from the very same things."""
    # Paths stay out of the key, and the source is named relative to the root, so that objects serve another checkout too.
    torch_version = version_header(torch).read_bytes() if unit.includes_torch else b""
    parts = (compiler.version, *compiler.command, *unit.flags, *extra)
    content = b"\0".join([*(part.encode() for part in parts), torch_version, unit.source.read_bytes(), headers])
    key = hashlib.sha256(content).hexdigest()
    object_file, key_file = objects / f"{unit.name}.o", objects / f"{unit.name}.key"
    if object_file.exists() and key_file.exists() and key_file.read_text() == key:
        return object_file
    include = ("-isystem", str(torch / "include")) if unit.includes_torch else ()
    source = str(unit.source.relative_to(ROOT))
    key_file.unlink(missing_ok=True)
    run_tool(source, object_file, *compiler.command, *unit.flags, *extra, *include, "-c", source)
    key_file.write_text(key)
    return object_file


def run_tool(what: str, output: Path, *command: str) -> None:
    """Runs a compiler; the output appears whole or not at all, even where another process uses the old one."""
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(partial)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        partial.unlink(missing_ok=True)
        raise BuildError(f"{command[0]} failed on {what}\n{shlex.join(command)}\n{done.stdout}{done.stderr}")
    os.replace(partial, output)


def compile_all(compiler: Compiler, torch: Path, objects: Path, extra: tuple[str, ...] = ()) -> list[Path]:
    """Compiles every unit with `extra` flags last, as many at a time as there are processors."""
    objects.mkdir(parents=True, exist_ok=True)
    headers = b"\0".join(path.read_bytes() for path in sorted((ROOT / "csrc").rglob("*.h")))
    todo = units(compiler)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compile_unit, compiler, torch, unit, objects, extra, headers) for unit in todo]
        try:
            return [job.result() for job in jobs]
        except BuildError:
            pool.shutdown(cancel_futures=True)
            raise


def build(output: Path, sanitize: str | None = None) -> None:
    """Builds the library.

    Raises:
        BuildError: without a compiler, without torch's headers, or where the compiler fails.
    """
    compiler, torch = find_compiler(), find_torch()
    if compiler is None:
        raise BuildError("no C++ compiler was found (CXX names one)")
    if torch is None:
        raise BuildError("the headers of torch {}.{} or newer were not found".format(*OLDEST_TORCH))
    objects, extra = OBJECTS, ()
    if sanitize:
        # No optimisation: it multiplies the time that the instrumented kernels take to compile, and drops faulty loads
        # whose value is not used before the sanitizer sees them.
        objects, extra = output.parent, ("-O0", "-g1", "-fno-omit-frame-pointer", *SANITIZERS[sanitize])
    print(f"tiger_fast: compiling csrc/ with {compiler.version.splitlines()[0]}, minutes the first time", flush=True)
    made = compile_all(compiler, torch, objects, extra)
    # Python loads torch's libraries for itself alone (RTLD_LOCAL), so the library has to name the one it needs. By then
    # that one is loaded and is found by its name, so no search path is written into the library on Linux.
    link = ["-shared", "-pthread", *extra, f"-L{torch / 'lib'}", "-ltorch_cpu"]
    if "darwin" in compiler.target:
        link += ["-Wl,-rpath,@loader_path/../torch/lib"]
    elif not sanitize:  # a sanitizer's own symbols come with the process
        link += ["-Wl,-z,defs"]
    output.parent.mkdir(parents=True, exist_ok=True)
    run_tool("linking", output, *compiler.command, *map(str, made), *link)
    print(f"tiger_fast: native CPU kernels in {output}", flush=True)


def build_if_possible(output: Path) -> bool:
    """Builds the library as TIGER_FAST_NATIVE says; where it is not built, removes an older one and says so in a line.

    Raises:
        BuildError: where TIGER_FAST_NATIVE=1 and it cannot be built.
    """
    try:
        if setting() == "0":
            raise BuildError("TIGER_FAST_NATIVE=0")
        build(output)
        return True
    except BuildError as error:
        if setting() == "1":
            raise
        output.unlink(missing_ok=True)
        why = str(error).splitlines()[0]
        hint = "" if setting() == "0" else "; TIGER_FAST_NATIVE=1 makes this an error and shows it whole"
        print(f"tiger_fast: no native CPU kernels, the reference backend runs instead: {why}{hint}", file=sys.stderr)
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile csrc/ into a library.")
    parser.add_argument("--output", type=Path, default=ROOT / LIBRARY)
    parser.add_argument("--sanitize", choices=sorted(SANITIZERS))
    parser.add_argument("--optional", action="store_true", help="where it cannot be built, say so and succeed")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    try:
        if arguments.optional:
            build_if_possible(output)
        else:
            build(output, arguments.sanitize)
    except BuildError as error:
        sys.exit(f"tiger_fast: {error}")


if __name__ == "__main__":
    main()
