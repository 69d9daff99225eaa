// TAVER's adapter (sec. 3.1) around its two products: LayerNorm before them; biases, GELU, addition and LayerNorm behind.
//
// Maths:   GELU(x) = x Phi(x), its slope Phi(x) + x phi(x), with the exact normal distribution.
// Bytes:   in reads x and writes y; out reads both products and writes one row. Backward, out reads three rows and writes
//          two, in reads two and writes one.
// Layout:  a row at a time, in the first cache.
#include "adapter.h"

#include "entry.h"
#include "norm.h"

namespace tiger_fast {
namespace TIGER_FAST_ISA {
namespace {

// Phi(x), and e^(-x^2 / 2) on the way.
TF_INLINE vfloat normal(vfloat x, vfloat& bell) {
  // Phi(-a) e^(a^2 / 2) for a >= 0, as a polynomial in t = 1 / (1 + 0.26 a), relative error 3e-8.
  vfloat a = x < 0.f ? -x : x;
  vfloat t = 1.f / (a * 0.26f + 1.f);
  bell = exp(x * x * -0.5f);
  vfloat p = splat(0x1.f3cc90p-6f);
  p = p * t - 0x1.38ff58p-3f;
  p = p * t + 0x1.0187eap-2f;
  p = p * t - 0x1.3526d2p-3f;
  p = p * t + 0x1.49a05ep-3f;
  p = p * t + 0x1.a202b0p-5f;
  p = p * t + 0x1.a6034ep-4f;
  p = p * t + 0x1.a5f4dcp-4f;
  p = p * t + 0x1.a8ff42p-4f;
  vfloat tail = p * t * bell;
  return x < 0.f ? tail : 1.f - tail;
}

TF_INLINE vdouble normal(vdouble x, vdouble& bell) {
  bell = exp(x * x * -0.5);
  vdouble y = x;
  for (int i = 0; i < L<double>; ++i) y[i] = 0.5 * ::erfc(x[i] * -0.70710678118654752440);
  return y;
}

template <typename A>
TF_INLINE Vec<A> gelu(Vec<A> x) {
  Vec<A> bell;
  return x * normal(x, bell);
}

template <typename A>
TF_INLINE Vec<A> gelu_slope(Vec<A> x) {
  Vec<A> bell;
  Vec<A> phi = normal(x, bell);
  return phi + x * bell * A(0.39894228040143267794);
}

template <typename S>
TF_INLINE const S* row_of(const RowGrid& grid, const RowOperand& x, int64_t row) {
  return (const S*)x.data + offset_of(grid, x, row);
}

// Adds x to dst at d, or nothing if dst is null.
template <typename A>
TF_INLINE void add(A* dst, int64_t d, Vec<A> x) {
  if (dst) store(dst + d, load(dst + d) + x);
}

template <typename S>
void in_forward(const AdapterIn& a, int64_t begin, int64_t end, void* scratch) {
  using A = acc_t<S>;
  Pieces pieces{scratch};
  NormRows<A> own(pieces, a.width);
  for (int64_t r = begin; r < end; ++r) {
    const A* x = widened(row_of<S>(a.grid, a.x, r), a.width, a.width % L<A> != 0, own.x);
    Moments<A>(x, a.width, A(a.eps))
        .apply(x, (const A*)a.weight, (const A*)a.bias, a.width, (S*)a.out + r * a.width, a.past_caches);
  }
  fence();
}

template <typename S>
void in_backward(const AdapterInBackward& a, int64_t begin, int64_t end, void* scratch) {
  using A = acc_t<S>;
  const AdapterIn& in = a.inputs;
  Pieces pieces{scratch};
  NormRows<A> own(pieces, in.width);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    A* dweight = cleared<A>(a.grad_weight, chunk, in_whole_vectors(in.width));
    A* dbias = cleared<A>(a.grad_bias, chunk, in_whole_vectors(in.width));
    int64_t last = smaller((chunk + 1) * a.chunk, in.grid.rows);
    for (int64_t r = chunk * a.chunk; r < last; ++r) {
      const A* x = widened(row_of<S>(in.grid, in.x, r), in.width, in.width % L<A> != 0, own.x);
      Moments<A>(x, in.width, A(in.eps))
          .backward(x, (const S*)a.grad + r * in.width, (const A*)in.weight, in.width, dweight, dbias,
                    a.grad_x ? own.dx : nullptr);
      if (!a.grad_x) continue;
      S* out = (S*)a.grad_x + r * in.width;
      along<A>(in.width, [&](int64_t d, auto partial, int n) TF_LAMBDA {
        put(out, d, load(own.dx + d), partial, n, in.past_caches);
      });
    }
  }
  fence();
}

// Row r before its LayerNorm.
template <typename S>
TF_INLINE void add_up(const AdapterOut& a, int64_t r, acc_t<S>* out) {
  using A = acc_t<S>;
  const S *linear = (const S*)a.linear + r * a.width, *gate = (const S*)a.gate + r * a.width;
  const A *linear_bias = (const A*)a.linear_bias, *gate_bias = (const A*)a.gate_bias;
  along<A>(a.width, [&](int64_t d, auto partial, int n) TF_LAMBDA {
    Vec<A> open = gelu<A>(get(gate, d, partial, n) + get(gate_bias, d, partial, n));
    store(out + d, get(linear, d, partial, n) + get(linear_bias, d, partial, n) + open);
  });
}

template <typename S>
void out_forward(const AdapterOut& a, int64_t begin, int64_t end, void* scratch) {
  using A = acc_t<S>;
  Pieces pieces{scratch};
  NormRows<A> own(pieces, a.width);
  for (int64_t r = begin; r < end; ++r) {
    add_up<S>(a, r, own.x);
    Moments<A>(own.x, a.width, A(a.eps))
        .apply(own.x, (const A*)a.weight, (const A*)a.bias, a.width, (S*)a.out + r * a.width, a.past_caches);
  }
  fence();
}

template <typename S>
void out_backward(const AdapterOutBackward& a, int64_t begin, int64_t end, void* scratch) {
  using A = acc_t<S>;
  const AdapterOut& in = a.inputs;
  Pieces pieces{scratch};
  NormRows<A> own(pieces, in.width);
  A *x = own.x, *dx = own.dx;
  const A* gate_bias = (const A*)in.gate_bias;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    A* dlinear_bias = cleared<A>(a.grad_linear_bias, chunk, in_whole_vectors(in.width));
    A* dgate_bias = cleared<A>(a.grad_gate_bias, chunk, in_whole_vectors(in.width));
    A* dweight = cleared<A>(a.grad_weight, chunk, in_whole_vectors(in.width));
    A* dbias = cleared<A>(a.grad_bias, chunk, in_whole_vectors(in.width));
    bool through = a.into_linear || a.into_gate || dlinear_bias || dgate_bias;
    bool open = a.into_gate || dgate_bias;
    int64_t last = smaller((chunk + 1) * a.chunk, in.rows);
    for (int64_t r = chunk * a.chunk; r < last; ++r) {
      add_up<S>(in, r, x);
      Moments<A>(x, in.width, A(in.eps))
          .backward(x, row_of<S>(a.grid, a.grad, r), (const A*)in.weight, in.width, dweight, dbias,
                    through ? dx : nullptr);
      if (!through) continue;
      const S* gate = (const S*)in.gate + r * in.width;
      S* into_linear = a.into_linear ? (S*)a.into_linear + r * in.width : nullptr;
      S* into_gate = a.into_gate ? (S*)a.into_gate + r * in.width : nullptr;
      along<A>(in.width, [&](int64_t d, auto partial, int n) TF_LAMBDA {
        Vec<A> g = load(dx + d);
        if (into_linear) put(into_linear, d, g, partial, n);
        add(dlinear_bias, d, g);
        if (!open) return;
        g *= gelu_slope<A>(get(gate, d, partial, n) + get(gate_bias, d, partial, n));
        if (into_gate) put(into_gate, d, g, partial, n);
        add(dgate_bias, d, g);
      });
    }
  }
}

}  // namespace

void adapter_in(const AdapterIn& a, int64_t begin, int64_t end, void* scratch) {
  by_type(a.type, [&](auto s) { in_forward<decltype(s)>(a, begin, end, scratch); });
}

void adapter_in_backward(const AdapterInBackward& a, int64_t begin, int64_t end, void* scratch) {
  by_type(a.inputs.type, [&](auto s) { in_backward<decltype(s)>(a, begin, end, scratch); });
}

void adapter_out(const AdapterOut& a, int64_t begin, int64_t end, void* scratch) {
  by_type(a.type, [&](auto s) { out_forward<decltype(s)>(a, begin, end, scratch); });
}

void adapter_out_backward(const AdapterOutBackward& a, int64_t begin, int64_t end, void* scratch) {
  by_type(a.inputs.type, [&](auto s) { out_backward<decltype(s)>(a, begin, end, scratch); });
}

}  // namespace TIGER_FAST_ISA
}  // namespace tiger_fast
