// LayerNorm of a row that stands in cache as accumulators, and its gradient.
#pragma once

#include <stdlib.h>

#include "rows.h"

namespace tiger_fast {
namespace TIGER_FAST_ISA {

// Memory of a thread's own: `rows` rows of at least `width` accumulators, each on a cache line.
template <typename A>
struct OwnRows {
  explicit OwnRows(int rows, int64_t width) : stride((width + 15) / 16 * 16) {
    data = (A*)aligned_alloc(64, size_t(rows * stride) * sizeof(A) + 64);
    if (!data) abort();
  }
  ~OwnRows() { free(data); }
  OwnRows(const OwnRows&) = delete;
  A* operator[](int i) const { return data + i * stride; }

  int64_t stride;
  A* data;
};

// The first n lanes, the others 0.
template <typename A>
TF_INLINE Vec<A> first_lanes(Vec<A> x, int n) {
  Vec<A> kept = {};
  for (int i = 0; i < L<A>; ++i) kept[i] = i < n ? x[i] : A(0);
  return kept;
}

template <typename A>
struct Moments {
  A mean, scale;  // scale = 1 / sqrt(variance + eps)

  // The variance in a second pass: a difference of squares would cancel.
  TF_INLINE Moments(const A* x, int64_t width, A eps) {
    Vec<A> total = {}, squares = {};
    along<A>(width, [&](int64_t d, auto partial, int n) TF_LAMBDA { total += get(x, d, partial, n); });
    mean = sum(total) / A(width);
    along<A>(width, [&](int64_t d, auto partial, int n) TF_LAMBDA {
      Vec<A> centred = get(x, d, partial, n) - mean;
      if constexpr (decltype(partial)::value) centred = first_lanes<A>(centred, n);
      squares += centred * centred;
    });
    Vec<A> variance = splat(sum(squares) / A(width) + eps);
    scale = A(1) / root(variance)[0];
  }

  // out = (x - mean) scale weight + bias
  template <typename S>
  TF_INLINE void apply(const A* x, const A* weight, const A* bias, int64_t width, S* out, bool past_caches) const {
    along<A>(width, [&](int64_t d, auto partial, int n) TF_LAMBDA {
      Vec<A> y = (get(x, d, partial, n) - mean) * scale * get(weight, d, partial, n) + get(bias, d, partial, n);
      put(out, d, y, partial, n, past_caches);
    });
  }

  // From the row x and its output's gradient `grad`: adds to the sums of the weight's and the bias's gradients, and puts
  // the row's own gradient into dx, another row; null where it is not wanted. With h the normalised row,
  //   dweight = grad h, dbias = grad, dx = scale (g - mean(g) - h mean(g h)), g = grad weight.
  template <typename S>
  TF_INLINE void backward(const A* x, const S* grad, const A* weight, int64_t width, A* dweight, A* dbias,
                          A* dx) const {
    Vec<A> level = {}, slope = {};
    along<A>(width, [&](int64_t d, auto partial, int n) TF_LAMBDA {
      Vec<A> h = (get(x, d, partial, n) - mean) * scale, g = get(grad, d, partial, n);
      if (dweight) put(dweight, d, get(dweight, d, partial, n) + g * h, partial, n);
      if (dbias) put(dbias, d, get(dbias, d, partial, n) + g, partial, n);
      if (!dx) return;
      g *= get(weight, d, partial, n);
      put(dx, d, g, partial, n);
      level += g;
      slope += g * h;
    });
    if (!dx) return;
    A mean_g = sum(level) / A(width), mean_gh = sum(slope) / A(width);
    along<A>(width, [&](int64_t d, auto partial, int n) TF_LAMBDA {
      // g as it was stored: multiplied anew it would be fused with the subtraction, and not cancel where it should.
      Vec<A> h = (get(x, d, partial, n) - mean) * scale;
      put(dx, d, (get(dx, d, partial, n) - mean_g - h * mean_gh) * scale, partial, n);
    });
  }
};

}  // namespace TIGER_FAST_ISA
}  // namespace tiger_fast
