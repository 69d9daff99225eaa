// Vectors of the instruction set that this unit is compiled for, and the arithmetic that all kernels share.
//
// Kernel units are compiled once per instruction set, with TIGER_FAST_ISA (plain, v3, v4) naming the namespace, so every
// function here belongs to one set alone. They call nothing inline from the standard library: the linker would keep one
// copy of it, perhaps the one that the processor cannot run.
#pragma once

#include <math.h>

#include "types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 warns of what its own header leaves undefined on purpose (__m512 __Y = __Y), wherever it is inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#endif

namespace tiger_fast {
namespace TIGER_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kBytes = 16;
constexpr int kRegisters = 32;
#else
constexpr int kBytes = 16;
constexpr int kRegisters = 16;
#endif

#define TF_INLINE inline __attribute__((always_inline))
#define TF_LAMBDA __attribute__((always_inline))

// A number as a type, so that a lambda can take it at compile time.
template <int N>
struct constant {
  static constexpr int value = N;
};

template <typename A>
struct vector {
  typedef A type __attribute__((vector_size(kBytes)));
  typedef A unaligned __attribute__((vector_size(kBytes), aligned(alignof(A)), may_alias));
};
// A vector of an accumulator type (float or double); L is how many it holds.
template <typename A>
using Vec = typename vector<A>::type;
template <typename A>
constexpr int L = kBytes / int(sizeof(A));

// Elements rounded up to whole vectors of this set.
template <typename A>
constexpr int64_t padded(int64_t count) {
  return (count + L<A> - 1) / L<A> * L<A>;
}

using vint = Vec<int32_t>;
using vuint = Vec<uint32_t>;
using vfloat = Vec<float>;
using vdouble = Vec<double>;
// Half as many bytes: what a load or store of a 16-bit type moves.
typedef uint16_t vhalf __attribute__((vector_size(kBytes / 2)));
typedef uint16_t vhalf_unaligned __attribute__((vector_size(kBytes / 2), aligned(2), may_alias));

template <typename A>
TF_INLINE Vec<A> splat(A x) {
  return x - Vec<A>{};  // a broadcast: x - 0 is x, also for -0 and NaN; lane by lane gcc makes 16 masked moves
}

template <typename A>
constexpr TF_INLINE A smaller(A a, A b) {
  return b < a ? b : a;
}
template <typename A>
constexpr TF_INLINE A larger(A a, A b) {
  return a < b ? b : a;
}
// NaN in either gives NaN, as torch's max does.
template <typename A>
TF_INLINE Vec<A> vmax(Vec<A> a, Vec<A> b) {
  return (a > b) | (a != a) ? a : b;
}

// ---- 16-bit types

TF_INLINE vfloat widen(vhalf h, bf16) {
  return (vfloat)(__builtin_convertvector(h, vuint) << 16);
}

TF_INLINE vhalf narrow(vfloat x, bf16) {
  // Round to nearest even; a NaN stays a NaN.
  vuint u = (vuint)x;
  vuint rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vuint quiet = (u >> 16) | 0x40;
  return __builtin_convertvector(x == x ? rounded : quiet, vhalf);
}

TF_INLINE vfloat widen(vhalf h, f16) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (vfloat)_mm256_cvtph_ps((__m128i)h);
#else
  // Exponent and mantissa moved into place and rescaled by 2^112, which mends subnormals too; inf and NaN apart.
  vuint u = __builtin_convertvector(h, vuint);
  vuint magnitude = (u & 0x7fff) << 13;
  vfloat scaled = (vfloat)magnitude * 0x1p112f;
  vuint special = (vuint)(magnitude >= (uint32_t)0x0f800000) & (magnitude | 0x7f800000);
  vuint ordinary = ~(vuint)(magnitude >= (uint32_t)0x0f800000) & (vuint)scaled;
  return (vfloat)(special | ordinary | ((u & 0x8000) << 16));
#endif
}

TF_INLINE vhalf narrow(vfloat x, f16) {
#if defined(__AVX512F__)
  return (vhalf)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (vhalf)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  // Normal results round in the integer domain; subnormal ones by adding 0.5, whose unit in the last place is theirs.
  vuint u = (vuint)x;
  vuint sign = (u >> 16) & 0x8000;
  vuint magnitude = u & 0x7fffffff;
  vuint normal = (magnitude + 0xc8000fff + ((magnitude >> 13) & 1)) >> 13;
  vuint subnormal = (vuint)((vfloat)magnitude + 0.5f) - 0x3f000000;
  vuint nan = vuint{} + 0x7e00, inf = vuint{} + 0x7c00;
  vuint result = magnitude < (uint32_t)0x38800000 ? subnormal : normal;
  result = magnitude >= (uint32_t)0x477ff000 ? inf : result;
  result = magnitude > (uint32_t)0x7f800000 ? nan : result;
  return __builtin_convertvector(result | sign, vhalf);
#endif
}

// ---- loads and stores: memory of a storage type S, values of its accumulator type

template <typename S>
TF_INLINE Vec<acc_t<S>> load(const S* p) {
  if constexpr (sizeof(S) == 2) {
    return widen((vhalf) * (const vhalf_unaligned*)p, S{});
  } else {
    return *(const typename vector<S>::unaligned*)p;
  }
}

template <typename S>
TF_INLINE void store(S* p, Vec<acc_t<S>> x) {
  if constexpr (sizeof(S) == 2) {
    *(vhalf_unaligned*)p = narrow(x, S{});
  } else {
    *(typename vector<S>::unaligned*)p = x;
  }
}

// The first n < L elements; the others are zero.
template <typename S>
TF_INLINE Vec<acc_t<S>> load(const S* p, int n) {
#if defined(__AVX512F__)
  unsigned lanes = (1u << n) - 1;
  if constexpr (sizeof(S) == 8)
    return (vdouble)_mm512_maskz_loadu_pd((__mmask8)lanes, p);
  else if constexpr (sizeof(S) == 4)
    return (vfloat)_mm512_maskz_loadu_ps((__mmask16)lanes, p);
  else
    return widen((vhalf)_mm256_maskz_loadu_epi16((__mmask16)lanes, p), S{});
#else
  S buffer[L<acc_t<S>>] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
#endif
}

template <typename S>
TF_INLINE void store(S* p, Vec<acc_t<S>> x, int n) {
#if defined(__AVX512F__)
  unsigned lanes = (1u << n) - 1;
  if constexpr (sizeof(S) == 8)
    _mm512_mask_storeu_pd(p, (__mmask8)lanes, (__m512d)x);
  else if constexpr (sizeof(S) == 4)
    _mm512_mask_storeu_ps(p, (__mmask16)lanes, (__m512)x);
  else
    _mm256_mask_storeu_epi16(p, (__mmask16)lanes, (__m256i)narrow(x, S{}));
#else
  S buffer[L<acc_t<S>>];
  store(buffer, x);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
#endif
}

// A store past the caches, for outputs that do not fit them; p must be aligned to the vector's bytes (half of them for
// a 16-bit type). `fence` orders such stores before what the thread does next.
template <typename S>
TF_INLINE void stream(S* p, Vec<acc_t<S>> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 2) {
    _mm256_stream_si256((__m256i*)p, (__m256i)narrow(x, S{}));
  } else {
    _mm512_stream_si512((__m512i*)p, (__m512i)x);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 2) {
    _mm_stream_si128((__m128i*)p, (__m128i)narrow(x, S{}));
  } else {
    _mm256_stream_si256((__m256i*)p, (__m256i)x);
  }
#elif defined(__x86_64__)
  if constexpr (sizeof(S) == 2) {
    store(p, x);
  } else {
    _mm_stream_si128((__m128i*)p, (__m128i)x);
  }
#else
  store(p, x);
#endif
}

TF_INLINE void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// One element as its accumulator type.
template <typename S>
TF_INLINE acc_t<S> value(S x) {
  if constexpr (sizeof(S) == 2) {
    return widen(vhalf{x.bits}, S{})[0];
  } else {
    return x;
  }
}

template <typename S>
TF_INLINE S rounded(acc_t<S> x) {
  if constexpr (sizeof(S) == 2) {
    return S{narrow(vfloat{x}, S{})[0]};
  } else {
    return x;
  }
}

// Element of a small input of any type.
template <typename A>
TF_INLINE A at(const Small& s, int64_t offset) {
  switch (s.type) {
    case Type::f32:
      return A(((const float*)s.data)[offset]);
    case Type::f64:
      return A(((const double*)s.data)[offset]);
    case Type::bf16:
      return A(value(((const bf16*)s.data)[offset]));
    case Type::f16:
      return A(value(((const f16*)s.data)[offset]));
  }
  return A(0);
}

// The first n lanes, the others 0.
template <typename A>
TF_INLINE Vec<A> first_lanes(Vec<A> x, int n) {
  for (int i = 0; i < L<A>; ++i) x[i] = i < n ? x[i] : A(0);
  return x;
}

// ---- sums over lanes, in one fixed order

#if defined(__x86_64__)
TF_INLINE float sum4(__m128 x) {
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
TF_INLINE double sum2(__m128d x) { return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x))); }
#endif

TF_INLINE float sum(vfloat x) {
#if defined(__AVX512F__)
  __m256 y = _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
  return sum4(_mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
#elif defined(__AVX2__)
  return sum4(_mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1)));
#elif defined(__x86_64__)
  return sum4((__m128)x);
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

TF_INLINE double sum(vdouble x) {
#if defined(__AVX512F__)
  __m256d y = _mm256_add_pd(_mm512_castpd512_pd256((__m512d)x), _mm512_extractf64x4_pd((__m512d)x, 1));
  return sum2(_mm_add_pd(_mm256_castpd256_pd128(y), _mm256_extractf128_pd(y, 1)));
#elif defined(__AVX2__)
  return sum2(_mm_add_pd(_mm256_castpd256_pd128((__m256d)x), _mm256_extractf128_pd((__m256d)x, 1)));
#else
  return x[0] + x[1];
#endif
}

// ---- square root

TF_INLINE vfloat root(vfloat x) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vfloat)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (vfloat)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < L<float>; ++i) x[i] = ::sqrtf(x[i]);
  return x;
#endif
}

TF_INLINE vdouble root(vdouble x) {
#if defined(__AVX512F__)
  return (vdouble)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  return (vdouble)_mm256_sqrt_pd((__m256d)x);
#elif defined(__x86_64__)
  return (vdouble)_mm_sqrt_pd((__m128d)x);
#else
  for (int i = 0; i < L<double>; ++i) x[i] = ::sqrt(x[i]);
  return x;
#endif
}

// ---- exp and log: within 2 units in the last place for float; libm, lane by lane, for double

TF_INLINE vfloat exp(vfloat x) {
  // x = n ln 2 + r, |r| <= ln 2 / 2; e^r by its series; 2^n in two factors, so that subnormal results come out too.
  // Below -104 the result is 0 without arithmetic on subnormal numbers, which takes processors over a hundred cycles:
  // -inf is common, it fills what is masked or behind a row's end.
  vint none = (vint)(x < -104.f);
  x = none ? vfloat{} : x;
  x = x > 89.f ? splat(89.f) : x;
  vfloat shifted = x * 0x1.715476p0f + 0x1.8p23f;  // the addition rounds to an integer
  vfloat n = shifted - 0x1.8p23f;
  // Unsigned, here and in log, where a NaN's bits may overflow and a shift may meet a negative number.
  vint i = (vint)((vuint)shifted - 0x4b400000u);
  vfloat r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
  vfloat p = splat(0x1.6850e4p-10f);
  p = p * r + 0x1.123bccp-7f;
  p = p * r + 0x1.555b98p-5f;
  p = p * r + 0x1.55548ep-3f;
  p = p * r + 0x1.fffff8p-2f;
  p = (p * r * r + r) + 1.f;
  vint first = i >> 1;
  vuint low = (vuint)first + 127u, high = (vuint)i - (vuint)first + 127u;
  vfloat result = p * (vfloat)(low << 23) * (vfloat)(high << 23);
  return none ? vfloat{} : result;
}

TF_INLINE vfloat log(vfloat x) {
  // x = 2^e m with m in [sqrt(1/2), sqrt(2)); log m by the series of atanh in s = (m - 1) / (m + 1).
  vint tiny = (vint)(x < 0x1p-126f);
  vfloat y = tiny ? x * 0x1p24f : x;
  vuint bits = (vuint)y;
  vint e = (vint)(bits - 0x3f3504f3u) >> 23;
  vfloat m = (vfloat)(bits - ((vuint)e << 23));
  vfloat n = __builtin_convertvector(e + (tiny & -24), vfloat);
  vfloat f = m - 1.f;
  vfloat s = f / (f + 2.f);
  vfloat z = s * s;
  vfloat w = z * (0.6666666269302368f + z * (0.4000097215175629f + z * (0.2849878668785095f + z * 0.2427907884120941f)));
  vfloat half = f * f * 0.5f;
  vfloat result = n * 0x1.62e4p-1f + (f - (half - (s * (half + w) + n * 0x1.7f7d1cp-20f)));
  result = x == 0.f ? splat(-INFINITY) : result;
  result = x < 0.f ? splat(NAN) : result;
  // inf and NaN as they came.
  return ((vint)x & 0x7f800000) == 0x7f800000 && (x > 0.f || x != x) ? x : result;
}

TF_INLINE vdouble exp(vdouble x) {
  for (int i = 0; i < L<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

TF_INLINE vdouble log(vdouble x) {
  for (int i = 0; i < L<double>; ++i) x[i] = ::log(x[i]);
  return x;
}

}  // namespace TIGER_FAST_ISA
}  // namespace tiger_fast
