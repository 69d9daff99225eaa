"""`python -m profiling.static_report`: every kernel as compiled for an architecture, with no GPU.

Launchers run on meta tensors and record what they would launch; each distinct kernel is compiled once, in a process of its
own with a time limit, and its binary is read. `--gate` fails where a row is not as a kernel has to be (see `problems`).
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from tiger_fast._examples import Call, calls, gpu_sizes
from tiger_fast.ops.triton import NATIVE, launcher
from tiger_fast.reference import TOKEN_LOSSES

try:
    from triton.runtime.jit import JITFunction

    from tiger_fast.kernels import aot, config
    from tiger_fast.kernels.launch import Launch, recording
except ModuleNotFoundError as problem:
    if __name__ != "__main__" or problem.name.partition(".")[0] != "triton":
        raise
    print("Triton is not installed, which compiles the kernels", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = Path(__file__).with_name("static")
OPS = tuple(NATIVE)


@dataclass(frozen=True)
class Case:
    """Sizes that differ from the default GPU shape, for the ops that they matter to (none: all), and other arguments.

    aligned: whether loads can be as wide as kernels are told."""

    name: str
    dtype: torch.dtype
    sizes: dict = field(default_factory=dict)
    ops: tuple[str, ...] = OPS
    parameters: torch.dtype | None = None
    aligned: bool = True
    arguments: dict = field(default_factory=dict)


TYPES = (torch.bfloat16, torch.float32)
_COUNTERFACTUAL = ("counterfactual_losses", "counterfactual_losses_from_projections")
_ATTENTION = ("group_attention", "group_attention_packed")
_FEATURES = ("route", "leave_one_out", *_COUNTERFACTUAL, "competency_aggregate")
_DIFFERENCES = ("causal_target", "alignment_loss")
_EXPERTS = (*_FEATURES, *_DIFFERENCES)
# The limits of the contract, and sizes that are no power of two, no vector, or one.
_LIMITS: dict[str, tuple[dict, tuple[str, ...]]] = {
    "M=1": ({"M": 1}, _FEATURES),
    "M=1 differences": ({"M": 1}, _DIFFERENCES),
    "M=8": ({"M": 8}, _EXPERTS),
    "M=16": ({"M": 16}, _EXPERTS),
    "T=1": ({"T": 1}, ("route", "leave_one_out", "alignment_loss", "causal_target")),
    "T=32": ({"T": 32}, ("route", "leave_one_out", "alignment_loss", "causal_target")),
    "T=32 M=16": ({"T": 32, "M": 16}, ("route", "leave_one_out")),
    "R=1": ({"R": 1}, ("route",)),
    "R=256": ({"R": 256}, ("route",)),
    "R=256 T=32 M=16": ({"R": 256, "T": 32, "M": 16}, ("route",)),
    "G=1": ({"G": 1}, _ATTENTION),
    "G=8": ({"G": 8}, _ATTENTION),
    "G=16": ({"G": 16}, _ATTENTION),
    "G=32": ({"G": 32}, _ATTENTION),
    "head 256": ({"heads": 3}, _ATTENTION),
    "head 256 G=32": ({"heads": 3, "G": 32}, _ATTENTION),
    "C=1000": ({"C": 1000}, _COUNTERFACTUAL),
    "C=1000 M=16": ({"C": 1000, "M": 16}, _COUNTERFACTUAL),
    "C=2": ({"C": 2}, _COUNTERFACTUAL),
    "D=1024": ({"D": 1024, "heads": 16}, OPS),
    "D=100": ({"D": 100, "heads": 4}, OPS),
    "D=1": ({"D": 1, "heads": 1}, OPS),
}
# Of these some rows, or heads within them, begin nowhere in particular, whatever else is aligned.
_NARROW_ROWS = ("M=1 differences", "R=1", "C=2", "D=100", "D=1")


def default_cases() -> Iterator[Case]:
    """The default GPU shape."""
    for dtype in TYPES:
        yield Case("default", dtype)
        yield Case("renormalised", dtype, ops=("leave_one_out",), arguments={"renormalize": True})


def all_cases() -> Iterator[Case]:
    """The default ones, float16, parameters in float32, the limits, every loss."""
    yield from default_cases()
    yield Case("default", torch.float16)
    yield Case("float32 parameters", torch.bfloat16, parameters=torch.float32)
    for dtype in TYPES:
        for name, (sizes, ops) in _LIMITS.items():
            yield Case(name, dtype, sizes, ops, aligned=name not in _NARROW_ROWS)
            if "leave_one_out" in ops:
                renormalised = {"renormalize": True}
                yield Case(f"renormalised {name}", dtype, sizes, ("leave_one_out",), arguments=renormalised)
        for loss in TOKEN_LOSSES:
            yield Case(loss, dtype, ops=_COUNTERFACTUAL, arguments={"loss": loss})
        differentiable = {"detach_target": False}
        yield Case("alignment of a target with a gradient", dtype, ops=("alignment_loss",), arguments=differentiable)


CASES: dict[str, Callable[[], Iterator[Case]]] = {"default": default_cases, "all": all_cases}


# --- launches -------------------------------------------------------------------------------------------------------


def launches_of(call: Call) -> list[Launch]:
    """What an operator's launcher would launch, on meta tensors."""
    with recording() as launches:
        launcher(call.name)(*call.arguments)
    return launches


@dataclass(frozen=True)
class Job:
    """A launch and where it came from."""

    op: str
    case: Case
    arch: str
    launch: Launch

    def head(self) -> dict:
        """The columns that are known before it is compiled."""
        dtype = str(self.case.dtype).removeprefix("torch.")
        found = {"op": self.op, "case": self.case.name, "dtype": dtype, "kernel": aot.name_of(self.launch)}
        # What loads of the rows can be as wide as: rows begin at multiples of so many elements (launch.alignment).
        elements = [value for name, value in self.launch.constants.items() if name.endswith("ALIGN")]
        bits = min(128, 8 * self.case.dtype.itemsize * max(elements, default=16)) if self.case.aligned else 0
        return found | {"arch": self.arch, "row_bits": bits}


def jobs(arch: str, chosen: Sequence[Case], ops: Sequence[str] = OPS) -> list[Job]:
    """The distinct kernels that the cases launch on an architecture, each with the first case that needs it."""
    config.assume(arch)
    found: dict[tuple, Job] = {}
    for case in chosen:
        for op in (op for op in ops if op in case.ops):
            sizes = gpu_sizes(op, **case.sizes)
            for call in calls(op, sizes, case.dtype, parameters=case.parameters, **case.arguments):
                for launch in launches_of(call):
                    found.setdefault(aot.key_of(launch, arch), Job(call.name, case, arch, launch))
    return list(found.values())


# --- compilation ----------------------------------------------------------------------------------------------------


def _compile(job: Job, results: Connection) -> None:
    begin = time.monotonic()
    try:
        found = asdict(aot.report(job.launch, job.arch))
    except Exception as problem:  # a row of its own: the other kernels are still to be compiled
        text = str(problem).strip().splitlines() or [""]
        found = {"error": f"{type(problem).__name__}: {text[-1]}"}  # the last line says what, the first where
    results.send(found | {"seconds": round(time.monotonic() - begin, 1)})


def compile_all(work: Sequence[Job], limit: float, processes: int, progress: Callable[[str], None]) -> list[dict]:
    """A row for each job, with its `problems`. One that takes longer than `limit` seconds has an error for its numbers."""
    # A child that had to import torch again would take longer than a compile.
    fork = multiprocessing.get_context("fork")
    waiting, running, rows = list(enumerate(work)), {}, {}
    while waiting or running:
        while waiting and len(running) < processes:
            index, job = waiting.pop(0)
            results, sender = fork.Pipe(duplex=False)
            child = fork.Process(target=_compile, args=(job, sender))
            child.start()
            sender.close()
            running[results] = index, child, time.monotonic()
        ready = set(wait(list(running), timeout=0.5))
        for results, (index, child, begin) in list(running.items()):
            late = time.monotonic() - begin > limit
            if results not in ready and not late:
                continue
            try:
                found = results.recv() if not late else {"error": f"not compiled within {limit:g} s"}
            except EOFError:
                child.join()
                found = {"error": f"the compiler ended with {child.exitcode}"}
            if late:
                child.kill()
            child.join()
            del running[results]
            rows[index] = work[index].head() | found
            row = rows[index]
            row["problems"] = problems(row, multiplies(work[index].launch.kernel))
            name = " ".join(row[part] for part in ("kernel", "arch", "dtype", "case"))
            result = "; ".join([*([f"{row['seconds']} s"] if "seconds" in row else []), *row["problems"]])
            progress(f"{len(rows)}/{len(work)} {name}: {result}")
    return [rows[index] for index in range(len(work))]


# --- the gate -------------------------------------------------------------------------------------------------------

# Kernels whose 16-bit tensors are so small, or so narrow, that loads under 32 bits cost nothing: why.
NARROW: dict[str, str] = {
    "route_factors": "shift (T, D) is read down its columns, once a launch",
    "route_forward": "scale (T, R), a row of it at a time and at any stride",
    "route_backward_gradients": "scale (T, R), as above",
    "counterfactual_tokens_from_experts": "the bias (C), fewer numbers than threads",
    "counterfactual_tokens_from_projections": "the bias, as above",
    "counterfactual_tokens_gradients": "the bias, as above",
}
# Kernels that may load tiles along a step with less than 128 bits a thread: why.
NARROW_TILES: dict[str, str] = {
    "route_factors": "shift (T, D), as above",
}
# Kernels all of whose loads may be under 128 bits: why.
SHORT: dict[str, str] = {
    "competency_aggregate_confidences": "confidences (B, M), some hundred numbers in all",
}


def multiplies(function: JITFunction) -> bool:
    """Whether a kernel's source, or that of a device function it calls, has tl.dot."""
    seen: set[int] = set()

    def look(one: JITFunction) -> bool:
        if id(one) in seen:
            return False
        seen.add(id(one))
        names = one.fn.__code__.co_names
        called = [one.fn.__globals__.get(name) for name in names]
        return "dot" in names or any(look(other) for other in called if isinstance(other, JITFunction))

    return look(function)


def problems(row: dict, multiplying: bool) -> list[str]:
    """What is wrong with a row: a stack, a spill, too much shared memory, narrow loads, products without matrix
    instructions."""
    if "error" in row:
        return [row["error"]]
    found = []
    limits = config.ARCHITECTURES[row["arch"]]
    narrow_type = row["dtype"] != "float32"
    if row["stack_bytes"]:
        found.append(f"a stack of {row['stack_bytes']} bytes")
    if row["spill_bytes"]:
        found.append(f"{row['spill_bytes']} bytes spilled")
    if row["shared_bytes"] > limits.shared_of_program:
        found.append(f"{row['shared_bytes']} bytes of shared memory, {limits.shared_of_program} are there")
    loads = row["max_load_bits"] > 0  # one expert's leave-one-out loads nothing
    if loads and row["max_load_bits"] < row["row_bits"] and row["kernel"] not in SHORT:
        found.append(f"no load wider than {row['max_load_bits']} bits")
    if row["row_bits"] == 128 and row["narrow_tiles"] and row["kernel"] not in NARROW_TILES:
        found.append(f"narrow loads: {', '.join(row['narrow_tiles'])}")
    if loads and narrow_type and row["min_load_bits"] < min(32, row["row_bits"]) and row["kernel"] not in NARROW:
        found.append(f"loads of {row['min_load_bits']} bits")
    if multiplying and narrow_type and not row["matrix_instructions"]:
        found.append("products without matrix instructions")
    return found


# --- output ---------------------------------------------------------------------------------------------------------

COLUMNS = {
    "kernel": "kernel",
    "dtype": "type",
    "case": "case",
    "registers": "registers",
    "stack_bytes": "stack",
    "spill_bytes": "spill",
    "shared_bytes": "shared",
    "max_load_bits": "load",
    "min_load_bits": "least load",
    "max_store_bits": "store",
    "matrix_instructions": "matrix",
    "resident_programs": "resident",
    "config": "tile",
}


def sources_hash() -> str:
    """Of kernels/*.py: what the committed table was made from. Lines that are a comment compile to nothing and do not
    count."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "kernels").glob("*.py")):
        lines = [line for line in file.read_bytes().splitlines() if not line.lstrip().startswith(b"#")]
        digest.update(file.name.encode() + b"\0" + b"\n".join(lines) + b"\0")
    return digest.hexdigest()


def _cell(row: dict, column: str) -> str:
    if column == "config":
        return " ".join(
            f"{k.lower()}={v}" for k, v in row["config"].items() if k.startswith(("BLOCK", "num_")) or k == "GROUP"
        )
    return str(row[column])


def table(rows: Sequence[dict]) -> str:
    """Rows as a Markdown table; stack and spill in bytes a thread, shared in bytes, loads and stores in bits."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    for row in sorted(rows, key=lambda r: (r["kernel"], r["dtype"], r["case"])):
        if "error" in row:
            cells = [row["kernel"], row["dtype"], row["case"], row["error"].replace("|", "/")]
            cells += [""] * (len(COLUMNS) - len(cells))
        else:
            cells = [_cell(row, column) for column in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_tables(rows: Sequence[dict], folder: Path) -> None:
    """A file an architecture, and SOURCES, the hash of what they were made from."""
    folder.mkdir(exist_ok=True)
    for arch in sorted({row["arch"] for row in rows}):
        own = [row for row in rows if row["arch"] == arch]
        wrong = [row for row in own if row["problems"]]
        text = [f"# {arch}", "", f"{len(own)} kernels, made by `make static`; what the columns are: ../README.md.", ""]
        text += [table(own), ""]
        text += ["## What the gate would refuse" if wrong else "The gate refuses nothing.", ""]
        text += [f"- {line_of(row)}" for row in wrong]
        (folder / f"{arch}.md").write_text("\n".join(text).rstrip() + "\n")
    (folder / "SOURCES").write_text(sources_hash() + "\n")


def line_of(row: dict) -> str:
    """A refused row in a line."""
    return f"{row['kernel']} {row['arch']} {row['dtype']}, {row['case']}: {'; '.join(row['problems'])}"


def run(archs: Sequence[str], chosen: Sequence[Case], ops: Sequence[str], limit: float, processes: int) -> list[dict]:
    """All rows; a line to standard error for each as it comes."""
    work = [job for arch in archs for job in jobs(arch, chosen, ops)]
    return compile_all(work, limit, processes, lambda line: print(line, file=sys.stderr, flush=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if the gate refuses something."""
    parser = argparse.ArgumentParser(prog="python -m profiling.static_report", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=config.ARCHITECTURES, default=["sm_90"])
    parser.add_argument("--cases", choices=CASES, default="default")
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--case", nargs="+", help="only the cases of these names")
    parser.add_argument("--json", type=Path, help="write every row to this file")
    parser.add_argument("--tables", type=Path, help="write a table an architecture into this folder")
    parser.add_argument("--gate", action="store_true", help="end with 1 if a row is not as a kernel has to be")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one kernel (default: 240)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set, under which Triton compiles nothing")
    chosen = [case for case in CASES[options.cases]() if options.case is None or case.name in options.case]
    rows = run(options.arch, chosen, options.op, options.limit, options.processes)
    if options.json:
        options.json.write_text(json.dumps({"sources": sources_hash(), "rows": rows}, indent=1) + "\n")
    if options.tables:
        write_tables(rows, options.tables)
    for arch in options.arch:
        print(f"{arch}\n\n{table([row for row in rows if row['arch'] == arch])}\n")
    refused = [line_of(row) for row in rows if row["problems"]]
    print("\n".join(["refused:", *refused]) if refused else "nothing refused")
    return int(bool(refused and options.gate))


if __name__ == "__main__":
    sys.exit(main())
