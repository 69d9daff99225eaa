"""Checks of the compiled CPU kernels that need a process of their own: what the environment decides once, what may only
end by a crash, and what forks.

    python tests/native_children.py SCENARIO ...      runs them and prints one JSON line each: name, status, output

Each runs in a fork of this process, made before any kernel ran, so torch is imported once for all of them.
"""

import json
import multiprocessing
import os
import resource
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from helpers import ACTIVATIONS, CASES, call, leaves, make, replaced, tensors, transform
from native import NATIVE_CASES, NATIVE_PLAIN, TYPES, check, guarded, raw_calls
from torch import Tensor

import tiger_fast
from tiger_fast import functional

ops = torch.ops.tiger_fast
MIB = 1 << 20


# --- instruction sets -----------------------------------------------------------------------------------------------


def runs_at(level: str) -> Callable[[], None]:
    """Every case in every type agrees with the reference, and reads nothing behind its inputs."""

    def scenario() -> None:
        os.environ["TIGER_FAST_CPU_LEVEL"] = level
        try:
            assert ops.cpu_level() == level
        except RuntimeError as lacking:
            assert "processor" in str(lacking) and level in str(lacking)
            print(f"this processor or build has no {level}")
            return
        ops.cpu_set_poison(True)
        for name in NATIVE_CASES:
            for dtype in TYPES:
                narrow = {} if "D" in CASES[name].sizes or "num_heads" in CASES[name].keywords else {"D": 37}
                check(name, transform(guarded, make(name, dtype, **narrow)))
        for name in NATIVE_PLAIN:  # whole vectors, and more heads than members
            more = {"num_heads": 8} if "num_heads" in CASES[name].keywords else {}
            check(name, transform(guarded, make(name, torch.float32, D=128, C=40, N=9)) | more)
            for width in (8, 24, 40):  # whole vectors of some sets, and short of the width that products pad to
                for dtype in (torch.float32, torch.float64):
                    check(name, transform(guarded, make(name, dtype, D=width)))

    return scenario


def unknown_level() -> None:
    os.environ["TIGER_FAST_CPU_LEVEL"] = "v5"
    for _ in range(2):  # not only the first time
        try:
            functional.leave_one_out(**make("leave_one_out"), backend="cpu")
        except RuntimeError as error:
            assert "TIGER_FAST_CPU_LEVEL must be plain, v3 or v4, got v5" in str(error), error
        else:
            raise AssertionError("TIGER_FAST_CPU_LEVEL=v5 was accepted")


# --- memory ---------------------------------------------------------------------------------------------------------


def large(seed: int = 0) -> dict:
    """Arguments of leave_one_out whose output takes 3 MiB."""
    return make("leave_one_out", torch.float32, seed=seed, B=1, T=1, M=2, N=1536, D=256)


def keeps_at_most(mebibytes: int) -> Callable[[], None]:
    """The limit holds after every step, whatever is given back."""

    def scenario() -> None:
        os.environ["TIGER_FAST_CACHE_MIB"] = str(mebibytes)
        assert ops.cpu_cache_limit() == mebibytes * MIB
        assert f"at most {mebibytes} MiB" in tiger_fast.show_config()
        kept = set()
        expected = functional.leave_one_out(**large(), backend="reference")
        for count in (1, 3, 2):
            outputs = [functional.leave_one_out(**large(), backend="cpu") for _ in range(count)]
            assert all(torch.allclose(o, expected, atol=1e-5) for o in outputs)
            while outputs:
                outputs.pop()
                kept.add(ops.cpu_cached_bytes())
        assert max(kept) <= mebibytes * MIB
        assert (max(kept) > 0) == (mebibytes > 0), kept
        tiger_fast.empty_cache()
        assert ops.cpu_cached_bytes() == 0

    return scenario


def keeps_the_rest() -> None:
    """A block above the limit goes back to the system alone."""
    os.environ["TIGER_FAST_CACHE_MIB"] = "16"
    sizes = {mebibytes: [torch.ones(1, mebibytes * MIB // 16, 2)] * 2 for mebibytes in (12, 24)}
    kept = []
    for experts in (sizes[12], sizes[24]):
        weights = torch.ones(1, 1, experts[0].shape[1], 2)
        functional.leave_one_out(experts, weights, backend="cpu")
        kept.append(ops.cpu_cached_bytes())
    assert kept[0] >= 12 * MIB and kept[1] == kept[0], kept


def no_memory_for_a_thread() -> None:
    """Working memory that cannot be had is an exception that says so, whichever thread asked, and not the process's end."""
    # The output's block is kept from the first call; the working memory, two rows of 64 MiB, is not.
    arguments = make("competency_aggregate", torch.float32, B=1, N=1, M=1, D=1 << 24)
    functional.competency_aggregate(**arguments, backend="cpu")
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 32 * MIB, before[1]))
    try:
        functional.competency_aggregate(**arguments, backend="cpu")
    except (MemoryError, RuntimeError) as error:
        assert isinstance(error, MemoryError) or "bad_alloc" in str(error), error
    else:
        raise AssertionError("the working memory was to be had")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    functional.competency_aggregate(**arguments, backend="cpu")


def peaks() -> None:
    """No call takes memory of the size of its M features beyond its results."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))

    name = "counterfactual_losses cross_entropy"
    arguments, wanted = leaves(make(name, torch.float32, B=1, N=4096, M=4, D=512, C=24))
    small, small_wanted = leaves(make(name, torch.float32, B=1, N=40, M=4, D=512, C=24))
    features = sum(t.numel() * t.element_size() for t in arguments["experts"])

    def both(values: dict, needed: dict) -> tuple:
        full, without = call(name, values, backend="cpu")
        return full, without, *torch.autograd.grad(full.sum() + without.sum(), list(needed.values()))

    both(small, small_wanted)  # what is loaded with the first call
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    results = both(arguments, wanted)
    taken = status("VmHWM") - before
    returned = sum(t.numel() * t.element_size() for t in results)
    assert returned <= taken + 4 * MIB, (returned, taken)
    assert taken < returned + features / 3, f"{taken >> 20} MiB at the peak, of which results {returned >> 20}"


def unreadable_limit() -> None:
    """A limit that is no number of mebibytes is an error, and none at all the default."""
    for wrong in ("-1", "4GiB", "1e3", " 4", "99999999999999999999"):
        os.environ["TIGER_FAST_CACHE_MIB"] = wrong
        try:
            ops.cpu_cache_limit()
        except RuntimeError as error:
            assert "TIGER_FAST_CACHE_MIB" in str(error) or "cpu_cache_limit" in str(error), error
        else:
            raise AssertionError(wrong)
    os.environ["TIGER_FAST_CACHE_MIB"] = ""
    assert ops.cpu_cache_limit() > 0


def forks() -> None:
    """A child made by fork, as a data loader's worker is, runs the kernels, and nothing that it does shows here."""
    arguments = large()
    held = functional.leave_one_out(**arguments, backend="cpu")
    expected = held.clone()
    functional.leave_one_out(**arguments, backend="cpu")  # one block is kept when the child starts
    kept = ops.cpu_cached_bytes()
    assert kept

    def child() -> None:
        torch.set_num_threads(1)  # torch's own rule for forked workers
        for seed in range(3):
            check("leave_one_out", large(seed))
        held.zero_()
        tiger_fast.empty_cache()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0, process.exitcode
    assert torch.equal(held, expected) and ops.cpu_cached_bytes() == kept


def forks_beside_threads() -> None:
    """A fork while other threads hold and release blocks leaves the child a usable cache."""
    stop = threading.Event()

    def churn() -> None:
        arguments = large()
        while not stop.is_set():
            ops.leave_one_out(arguments["experts"], arguments["weights"], False)

    def child() -> None:
        ops.cpu_empty_cache()
        assert ops.cpu_cached_bytes() == 0
        tensor = ops.leave_one_out(large()["experts"], large()["weights"], False)
        del tensor
        assert ops.cpu_cached_bytes() > 0

    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            process = multiprocessing.get_context("fork").Process(target=child)
            process.start()
            process.join(30)
            assert process.exitcode == 0, process.exitcode
    finally:
        stop.set()
        for thread in threads:
            thread.join()


# --- bad input ------------------------------------------------------------------------------------------------------


def wrong_tensors(value: Tensor) -> Iterator[tuple[str, object]]:
    """Replacements of a tensor, each with what was done to it."""
    yield "one more dimension", value[None]
    yield "flattened", value.flatten() if value.dim() != 1 else value[:, None]
    yield "no dimension", value.new_zeros(())
    for dim in range(value.dim()):
        size = value.shape[dim]
        yield f"one less along {dim}", value.narrow(dim, 0, size - 1)
        yield f"none along {dim}", value.narrow(dim, 0, 0)
        yield f"one more along {dim}", guarded(torch.cat([value, value.narrow(dim, 0, 1)], dim))
        yield (
            f"33 along {dim}",
            value.narrow(dim, 0, 1).expand([33 if i == dim else s for i, s in enumerate(value.shape)]),
        )
        yield (
            f"2^50 along {dim}",
            value.narrow(dim, 0, 1).expand([1 << 50 if i == dim else s for i, s in enumerate(value.shape)]),
        )
    for dtype in (*TYPES, torch.int64, torch.int32, torch.bool, torch.complex64, torch.uint8):
        if dtype != value.dtype:
            yield f"as {dtype}", value.to(dtype)
    yield "on meta", value.to("meta")
    yield "sparse", value.to_sparse()
    yield "None", None
    yield "a number", 3
    if value.is_floating_point():
        yield "NaN", torch.full_like(value, float("nan"))
    elif value.dtype != torch.bool:
        for extreme in (-1, -(1 << 31), (1 << 31) - 1, 1 << 40):
            yield (
                f"all {extreme}",
                torch.full_like(value, 0 if abs(extreme) >> 31 > 1 and value.itemsize < 8 else extreme),
            )


def wrong_values(value: object) -> Iterator[tuple[str, object]]:
    """Replacements of one argument of an operator."""
    if isinstance(value, Tensor):
        yield from wrong_tensors(value)
    elif isinstance(value, list):
        yield "empty list", []
        yield "17 of them", [value[0]] * 17
        yield "1000 of them", [value[0]] * 1000
        yield "only the first", value[:1]
        for what, wrong in wrong_tensors(value[-1]):
            yield f"last one {what}", [*value[:-1], wrong]
        for what, wrong in wrong_tensors(value[0]):
            yield f"first one {what}", [wrong, *value[1:]]
    elif isinstance(value, bool):
        yield "negated", not value
    elif isinstance(value, int):
        for wrong in (-1, 0, 1, 2, 5, 7, 33, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 63) - 1, -(1 << 63)):
            yield str(wrong), wrong
    elif isinstance(value, float):
        for wrong in (0.0, -1.0, float("nan"), float("inf"), 1e-45):
            yield str(wrong), wrong
    elif isinstance(value, str):
        for wrong in ("", "nonsense", "x" * 10000):
            yield wrong[:10], wrong
    else:
        for wrong in (torch.zeros(1), torch.zeros(7, 7), torch.zeros((), dtype=torch.int64)):
            yield f"{wrong.dtype} {tuple(wrong.shape)}", wrong


ALWAYS_REFUSED = (
    "one more dimension",
    "as torch.complex64",
    "as torch.uint8",
    "meta",
    "sparse",
    "a number",
    "empty",
    "17 of",
)


# Operators that take rows of any leading dimensions.
ANY_ROWS = ("causal_target", "adapter")


def bad_input() -> None:
    """The raw operators with every argument wrong in every way: an exception or a result, and never a crash.

    The inputs end where memory may not be read, so that a size that is believed is not survived."""
    torch.set_num_threads(1)
    tried = refused = 0
    seen = set()
    for name in NATIVE_CASES:
        if "one " in name or "width" in name:
            continue
        for operator, arguments in raw_calls(name, transform(guarded, make(name, torch.float32, B=2, N=3))):
            arguments = [
                transform(guarded, {"": value})[""] if isinstance(value, (Tensor, list)) else value
                for value in arguments
            ]
            for i, value in enumerate(arguments):
                for what, wrong in wrong_values(value):
                    print(operator, i, what, flush=True)  # the last line before a crash
                    try:
                        found = operator(*arguments[:i], wrong, *arguments[i + 1 :])
                    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, MemoryError):
                        refused += 1
                    else:
                        found = found if isinstance(found, (list, tuple)) else [found]
                        if "meta" in what and all(isinstance(t, Tensor) and t.is_meta for t in found):
                            continue  # the shape function's answer, where no other tensor came with it
                        if what == "one more dimension" and any(op in str(operator) for op in ANY_ROWS):
                            continue
                        assert not any(word in what for word in ALWAYS_REFUSED), f"{operator} took argument {i} {what}"
                    tried += 1
            seen.add(operator)
    assert tried > 100 * len(seen) / 2 and refused > tried / 4, (tried, refused)
    print(f"{tried} calls of {len(seen)} operators, {refused} refused")


def impossible_sizes() -> None:
    """Arguments that agree, and whose results no memory holds, or no integer counts: an error."""
    for name in NATIVE_PLAIN:
        if not ACTIVATIONS[CASES[name].function]:
            continue  # one that makes nothing large would run for as long as it reads
        for power in (45, 55, 60):
            arguments = make(name, torch.float32, B=1, N=1)
            wide = {
                key: t
                for key, t in tensors(arguments).items()
                if t.dim() > 1 and t.shape != tensors(make(name, B=3, N=1))[key].shape
            }
            try:
                values = {key: t.expand((1 << power) - 1, *t.shape[1:]) for key, t in wide.items()}
            except RuntimeError:
                continue  # torch counts no further either
            print(name, power, flush=True)
            try:
                call(name, replaced(arguments, values), backend="cpu")
            except (RuntimeError, MemoryError):
                continue
            raise AssertionError(f"{name} made a result of 2^{power} samples")


# --- the program ----------------------------------------------------------------------------------------------------

SCENARIOS: dict[str, Callable[[], None]] = {
    **{f"level {level}": runs_at(level) for level in ("plain", "v3", "v4")},
    "unknown level": unknown_level,
    **{f"cache of {mebibytes} MiB": keeps_at_most(mebibytes) for mebibytes in (0, 4, 8)},
    "block above the limit": keeps_the_rest,
    "unreadable limit": unreadable_limit,
    "no memory for a thread": no_memory_for_a_thread,
    "peak": peaks,
    "fork": forks,
    "fork beside threads": forks_beside_threads,
    "bad input": bad_input,
    "impossible sizes": impossible_sizes,
}


def in_a_fork(scenario: Callable[[], None]) -> tuple[int, str]:
    """The exit status (negative: the signal that ended it) and what it printed."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            status = 1
            try:
                scenario()
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()


if __name__ == "__main__":
    for name in sys.argv[1:] or SCENARIOS:
        status, output = in_a_fork(SCENARIOS[name])
        print(json.dumps([name, status, output]), flush=True)
