"""The kernels' own arithmetic, csrc/kernels/simd.h, in every instruction set that this processor has: exp and log over the
whole range of float32, and the 16-bit types bit by bit."""

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_native_build import builder, needs_compiler
from torch import Tensor

pytestmark = needs_compiler

SOURCE = """
#include "simd.h"
using namespace tiger_fast;
using namespace tiger_fast::TIGER_FAST_ISA;

template <typename S, typename F>
static void each(const S* in, S* out, long count, F f) {
  constexpr int lanes = L<acc_t<S>>;
  long i = 0;
  for (; i + lanes <= count; i += lanes) store(out + i, f(load(in + i)));
  if (i < count) store(out + i, f(load(in + i, int(count - i))), int(count - i));
}

extern "C" {
void exp_f32(const float* in, float* out, long count) { each(in, out, count, [](vfloat x) { return exp(x); }); }
void log_f32(const float* in, float* out, long count) { each(in, out, count, [](vfloat x) { return log(x); }); }
void widen_bf16(const bf16* in, float* out, long count) { for (long i = 0; i < count; ++i) out[i] = value(in[i]); }
void widen_f16(const f16* in, float* out, long count) { for (long i = 0; i < count; ++i) out[i] = value(in[i]); }
void narrow_bf16(const float* in, bf16* out, long count) { for (long i = 0; i < count; ++i) out[i] = rounded<bf16>(in[i]); }
void narrow_f16(const float* in, f16* out, long count) { for (long i = 0; i < count; ++i) out[i] = rounded<f16>(in[i]); }
}
"""
HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}

Function = Callable[[Tensor, torch.dtype], Tensor]


@pytest.fixture(scope="module", params=builder.X86_SETS)
def arithmetic(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Function]:
    """A function of SOURCE by its name, compiled as the kernels are."""
    compiler = builder.find_compiler()
    if not compiler.is_x86_64 and request.param != "plain":
        pytest.skip("instruction sets of x86-64")
    if request.param != "plain":
        flags = Path("/proc/cpuinfo").read_text()
        if ("avx512vl" if request.param == "v4" else "avx2") not in flags:
            pytest.skip(f"this processor has no {request.param}")
    folder = tmp_path_factory.mktemp("arithmetic")
    source, library = folder / "unit.cpp", folder / "unit.so"
    source.write_text(SOURCE)
    march = builder.X86_SETS[request.param] if compiler.is_x86_64 else ()
    flags = (
        *builder.COMMON,
        "-O3",
        "-fvisibility=default",
        *builder.KERNEL,
        *march,
        f"-DTIGER_FAST_ISA={request.param}",
    )
    flags += ("-Wno-psabi",) if compiler.is_gcc else ()
    kernels = builder.ROOT / "csrc" / "kernels"
    subprocess.run([*compiler.command, *flags, f"-I{kernels}", "-shared", str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))

    def function(name: str) -> Function:
        def run(values: Tensor, dtype: torch.dtype) -> Tensor:
            out = torch.empty(values.shape, dtype=dtype)
            pointers = (ctypes.c_void_p(t.data_ptr()) for t in (values, out))
            getattr(loaded, name)(*pointers, ctypes.c_long(values.numel()))
            return out

        return run

    return function


def floats(first: int, last: int, step: int) -> Tensor:
    """Every step-th float32 by its bits."""
    return torch.arange(first, last, step, dtype=torch.int64).to(torch.int32).view(torch.float32)


def units_off(found: Tensor, exact: Tensor) -> float:
    """The largest distance of float32 numbers from float64 ones, in units of the last place of the latter."""
    spacing = torch.maximum(exact.abs(), torch.tensor(2.0**-126).double())
    spacing = 2.0 ** (spacing.log2().floor() - 23)
    return ((found.double() - exact).abs() / spacing).max().item()


INF, NAN = float("inf"), float("nan")


def test_exp_is_within_two_units_of_the_last_place(arithmetic):
    exp = arithmetic("exp_f32")
    values = torch.cat([floats(0, 0x42B17218, 997), -floats(0, 0x42CE0000, 997), torch.linspace(-104, 88.7, 300_001)])
    assert units_off(exp(values, torch.float32), values.double().exp()) <= 2
    ends = torch.tensor([0.0, -0.0, -104.0, -105.0, -1e30, -INF, 88.8, 1e30, INF, NAN])
    expected = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, INF, INF, INF, NAN])
    torch.testing.assert_close(exp(ends, torch.float32), expected, rtol=0, atol=2.0**-148, equal_nan=True)


def test_log_is_within_two_units_of_the_last_place(arithmetic):
    log = arithmetic("log_f32")
    values = torch.cat([floats(1, 0x7F800000, 9973), floats(0x3F7F0000, 0x3F810000, 1)])
    assert units_off(log(values, torch.float32), values.double().log()) <= 2
    ends = torch.tensor([0.0, -0.0, 1.0, INF, -1.0, -1e-40, -INF, NAN])
    expected = torch.tensor([-INF, -INF, 0.0, INF, NAN, NAN, NAN, NAN])
    torch.testing.assert_close(log(ends, torch.float32), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", HALVES)
def test_sixteen_bit_numbers_widen_and_narrow_as_torch_does(arithmetic, kind):
    dtype = HALVES[kind]
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    wide = arithmetic(f"widen_{kind}")(every, torch.float32)
    assert torch.equal(wide.view(torch.int32)[~every.isnan()], every.float().view(torch.int32)[~every.isnan()])
    assert wide.isnan().equal(every.isnan())
    # All numbers of 32 bits in strides, and those half way between two of 16.
    near = every.float()[every.isfinite()]
    half_way = torch.cat([(near[:-1] + near[1:]) / 2, torch.nextafter(near, torch.tensor(INF))])
    values = torch.cat([floats(-(2**31), 2**31, 40_009), half_way])
    narrow = arithmetic(f"narrow_{kind}")(values, dtype)
    expected = values.to(dtype)
    assert narrow.isnan().equal(expected.isnan())
    assert torch.equal(narrow.view(torch.int16)[~expected.isnan()], expected.view(torch.int16)[~expected.isnan()])
