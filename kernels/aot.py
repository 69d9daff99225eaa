"""Compiles recorded launches ahead of time, with no GPU, and reads what the compiler says of them."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tiger_fast.kernels.config import ARCHITECTURES
from tiger_fast.kernels.launch import Launch


@dataclass(frozen=True)
class Report:
    """One kernel as compiled for one architecture. Bytes of stack and spills are a thread's.

    narrow_tiles: loads of tiles along a step (BLOCK_D, BLOCK_C) that are under 128 bits a thread, as Triton laid them out;
    for NVIDIA."""

    kernel: str
    arch: str
    config: dict
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    max_load_bits: int
    max_store_bits: int
    min_load_bits: int
    matrix_instructions: int
    narrow_tiles: list[str]
    resident_programs: int


def target(arch: str) -> GPUTarget:
    """Triton's name for an architecture of `config.ARCHITECTURES`."""
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


class _Driver:
    """Stands for a device that is not there, so that a kernel compiles for it."""

    def __init__(self, arch: str) -> None:
        self._target = target(arch)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return self._target.arch  # kernels are cached by device

    def get_current_stream(self, device: object) -> int:
        return 0


def assume(arch: str) -> None:
    """Makes Triton believe in a device of this architecture, from here on: use a process of its own."""
    driver.set_active(_Driver(arch))


def name_of(launch: Launch) -> str:
    """The kernel's module and name."""
    function = launch.kernel.fn
    return f"{function.__module__.rpartition('.')[2]}_{function.__name__.lstrip('_')}"


def specialization(launch: Launch, arch: str) -> tuple[list[tuple], dict]:
    """What Triton compiles a kernel for, as its own binder says: (type, specialised value) of each argument, options."""
    assume(arch)
    binder = launch.kernel.device_caches[driver.active.get_current_device()][-1]
    _, found, options = binder(*launch.arguments, debug=False, **launch.constants)
    return found, options


def key_of(launch: Launch, arch: str) -> tuple:
    """Equal for launches that run the same compiled kernel."""
    return name_of(launch), arch, repr(specialization(launch, arch))


def compiled(launch: Launch, arch: str) -> object:
    """Triton's compiled kernel of a launch. As `assume`, for a process of its own."""
    assume(arch)
    return launch.kernel.warmup(*launch.arguments, grid=(launch.programs,), **launch.constants)


def _of_cubin(kernel: object, arch: str) -> dict[str, int]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
        code = subprocess.run([tools / "nvdisasm", file.name], check=True, capture_output=True, text=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE)
    return {
        "registers": numbers["REG"],
        "stack_bytes": numbers["STACK"],
        # Local memory is the stack and nothing else in these kernels; each spilled store is four to sixteen bytes.
        "spill_bytes": sum(_bits(i) // 8 for i in instructions if i.startswith("STL")),
        "matrix_instructions": sum(i.startswith(("HMMA", "HGMMA", "UTCHMMA", "UTCMMA", "IMMA")) for i in instructions),
        **_widths(
            [_bits(i) for i in instructions if i.startswith(("LDG", "LDGSTS"))],
            [_bits(i) for i in instructions if i.startswith("STG")],
        ),
    }


def _bits(instruction: str) -> int:
    for name, bits in (("128", 128), ("64", 64), ("U16", 16), ("S16", 16), ("U8", 8), ("S8", 8)):
        if name in instruction.split("."):
            return bits
    return 32


def _of_hsaco(kernel: object, arch: str) -> dict[str, int]:
    code = kernel.asm["amdgcn"]
    found = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", code)}
    words = {
        "dwordx4": 128,
        "dwordx3": 96,
        "dwordx2": 64,
        "dword": 32,
        "ushort": 16,
        "short": 16,
        "ubyte": 8,
        "byte": 8,
    }

    def widths(verb: str) -> list[int]:
        pattern = rf"(?:global|buffer)_{verb}_(dwordx?\d?|u?short|u?byte)"
        return [words[word] for word in re.findall(pattern, code)]

    return {
        "registers": found["vgpr_count"],
        "stack_bytes": found["private_segment_fixed_size"],
        "spill_bytes": 4 * found["vgpr_spill_count"],
        "matrix_instructions": len(re.findall(r"\bv_mfma_", code)),
        **_widths(widths("load"), widths("store")),
    }


def _widths(loads: list[int], stores: list[int]) -> dict[str, int]:
    return {
        "max_load_bits": max(loads, default=0),
        "min_load_bits": min(loads, default=0),
        "max_store_bits": max(stores, default=0),
    }


_LOAD = re.compile(r"(?:tt\.load|async_copy_global_to_local)[^\n]*?tensor<(\d+)x(\d+)x!tt\.ptr<\w*?(\d+)>, (#\w+)>")
_LAYOUT = re.compile(r"(#\w+) = #ttg\.blocked<\{sizePerThread = \[(\d+), (\d+)\].*?order = \[(\d), \d\]")


def _narrow_tiles(kernel: object, constants: dict) -> list[str]:
    layouts = {
        name: (int(rows), int(columns))[int(first)]
        for name, rows, columns, first in _LAYOUT.findall(kernel.asm["ttgir"])
    }
    # A tile as wide as the tasks' would be taken for one of theirs, which lie T apart.
    steps = {constants.get(name) for name in ("BLOCK_D", "BLOCK_C")} - {constants.get("BLOCK_T")}
    found = set()
    for rows, columns, bits, layout in _LOAD.findall(kernel.asm["ttgir"]):
        width = layouts.get(layout, 0) * int(bits)
        if int(columns) in steps and width < 128:
            found.add(f"{rows} x {columns} of {bits} bits by {width}")
    return sorted(found)


def report(launch: Launch, arch: str) -> Report:
    """Compiles a launch for an architecture and reads the binary."""
    kernel = compiled(launch, arch)
    found = (_of_cubin if arch.startswith("sm_") else _of_hsaco)(kernel, arch)
    limits = ARCHITECTURES[arch]
    threads = launch.constants["num_warps"] * limits.warp
    registers = -(-max(found["registers"], 1) // 8) * 8 * threads
    by_shared = limits.shared // (kernel.metadata.shared + 1024)
    return Report(
        kernel=name_of(launch),
        arch=arch,
        config={key: value for key, value in launch.constants.items()},
        shared_bytes=kernel.metadata.shared,
        narrow_tiles=_narrow_tiles(kernel, launch.constants) if arch.startswith("sm_") else [],
        resident_programs=min(limits.registers // registers, by_shared, 2048 // threads, 32),
        **found,
    )
