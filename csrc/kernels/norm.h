// LayerNorm of a row that stands in cache as accumulators, and its gradient.
//
// Such rows, and sums of rows, are kept in whole vectors, zeros behind the row: what a masked store wrote must reach the
// cache before it can be loaded again, which takes longer than the arithmetic of a short row.
#pragma once

#include "rows.h"

namespace tiger_fast {
namespace TIGER_FAST_ISA {

// What a kernel with a norm works in: a row, and its gradient. norm_scratch says how many bytes.
template <typename A>
struct NormRows {
  A *x, *dx;

  TF_INLINE NormRows(Pieces& pieces, int64_t width) : x(pieces.take<A>(width)), dx(pieces.take<A>(width)) {}
};

template <typename A>
struct Moments {
  A mean, scale;  // scale = 1 / sqrt(variance + eps)

  // The variance in a second pass: a difference of squares would cancel.
  TF_INLINE Moments(const A* x, int64_t width, A eps) {
    Vec<A> total = {}, squares = {};
    A share = A(1) / A(width);  // of every row the same: one division for all of them
    along<A>(width, [&](int64_t d, auto, int) TF_LAMBDA { total += load(x + d); });
    mean = sum(total) * share;
    along<A>(width, [&](int64_t d, auto partial, int n) TF_LAMBDA {
      Vec<A> centred = load(x + d) - mean;
      if constexpr (decltype(partial)::value) centred = first_lanes<A>(centred, n);
      squares += centred * centred;
    });
    Vec<A> variance = splat(sum(squares) * share + eps);
    scale = A(1) / root(variance)[0];
  }

  // out = (x - mean) scale weight + bias
  template <typename S>
  TF_INLINE void apply(const A* x, const A* weight, const A* bias, int64_t width, S* out, bool past_caches) const {
    along<A>(width, [&](int64_t d, auto partial, int n) TF_LAMBDA {
      Vec<A> y = (load(x + d) - mean) * scale * get(weight, d, partial, n) + get(bias, d, partial, n);
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
      Vec<A> h = (load(x + d) - mean) * scale, g = get(grad, d, partial, n);
      if (dweight) store(dweight + d, load(dweight + d) + g * h);
      if (dbias) store(dbias + d, load(dbias + d) + g);
      if (!dx) return;
      g *= get(weight, d, partial, n);
      store(dx + d, g);
      level += g;
      slope += g * h;
    });
    if (!dx) return;
    A share = A(1) / A(width), mean_g = sum(level) * share, mean_gh = sum(slope) * share;
    along<A>(width, [&](int64_t d, auto, int) TF_LAMBDA {
      // g as it was stored: multiplied anew it would be fused with the subtraction, and not cancel where it should.
      Vec<A> h = (load(x + d) - mean) * scale;
      store(dx + d, (load(dx + d) - mean_g - h * mean_gh) * scale);
    });
  }
};

}  // namespace TIGER_FAST_ISA
}  // namespace tiger_fast
