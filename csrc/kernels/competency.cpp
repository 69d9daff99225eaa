// Experts mixed by competency, then LayerNorm (TAVER eqs. 2-3), in one pass.
//
// Maths:   w_b = softmax(confidence_b + refined_b), x = sum_k w_bk F_k, out = LayerNorm(x).
//          Backward, with dx the norm's: dF_k = w_bk dx, dw_bk = sum over tokens of F_k . dx.
// Bytes:   forward reads M and writes 1 unit of B N D elements; backward reads M + 1 and writes M: x is computed again.
// Layout:  a token at a time: its mixture stays in the first cache.
#include "competency.h"

#include "entry.h"
#include "norm.h"

namespace tiger_fast {
namespace TIGER_FAST_ISA {
namespace {

TF_INLINE float exponential(float x) { return ::expf(x); }
TF_INLINE double exponential(double x) { return ::exp(x); }

template <typename A>
void weigh(const CompetencyWeights& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    A* out = (A*)a.weights + b * a.members;
    A highest = -INFINITY, total = 0;
    for (int64_t k = 0; k < a.members; ++k) {
      out[k] = at<A>(a.confidence, b * a.confidence.stride[0] + k * a.confidence.stride[1]) +
               at<A>(a.refined, b * a.refined.stride[0] + k * a.refined.stride[1]);
      if (out[k] > highest) highest = out[k];
    }
    for (int64_t k = 0; k < a.members; ++k) total += out[k] = exponential(out[k] - highest);
    for (int64_t k = 0; k < a.members; ++k) out[k] /= total;
  }
}

template <typename A>
void weigh_backward(const CompetencyWeightsBackward& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const A* weights = (const A*)a.weights + b * a.members;
    A* out = (A*)a.out + b * a.members;
    A level = 0;
    for (int64_t k = 0; k < a.members; ++k) {
      out[k] = a.through_rows ? ((const A*)a.through_rows)[b * a.members + k] : A(0);
      if (a.grad.data) out[k] += at<A>(a.grad, b * a.grad.stride[0] + k * a.grad.stride[1]);
      level += out[k] * weights[k];
    }
    for (int64_t k = 0; k < a.members; ++k) out[k] = (out[k] - level) * weights[k];
  }
}

// Token (b, n)'s rows, and their mixture.
template <typename S>
struct Mixture {
  const S* rows[kMaxExperts];
  const acc_t<S>* weights;

  TF_INLINE void read(const CompetencyAggregate& a, int64_t b, int64_t n, acc_t<S>* out) {
    weights = (const acc_t<S>*)a.weights + b * a.members;
    for (int k = 0; k < a.members; ++k) rows[k] = row<S>(a.experts[k], b, n);
    mix<true>(rows, weights, int(a.members), a.width, out, false);
  }
};

template <typename S>
void forward(const CompetencyAggregate& a, int64_t begin, int64_t end, void* scratch) {
  using A = acc_t<S>;
  Pieces pieces{scratch};
  NormRows<A> own(pieces, a.width);
  Mixture<S> mixture;
  int64_t b = begin / a.tokens, n = begin % a.tokens;
  for (int64_t r = begin; r < end; ++r, ++n) {
    if (n == a.tokens) ++b, n = 0;
    mixture.read(a, b, n, own.x);
    Moments<A>(own.x, a.width, A(a.eps))
        .apply(own.x, (const A*)a.weight, (const A*)a.bias, a.width, (S*)a.out + r * a.width, a.past_caches);
  }
  fence();
}

template <typename S>
void backward(const CompetencyAggregateBackward& a, int64_t begin, int64_t end, void* scratch) {
  using A = acc_t<S>;
  const CompetencyAggregate& in = a.inputs;
  int members = int(in.members);
  bool any = a.mixture != nullptr;
  for (int k = 0; k < members; ++k) any |= a.grad_experts[k] != nullptr;
  Pieces pieces{scratch};
  NormRows<A> own(pieces, in.width);
  A *x = own.x, *dx = own.dx;
  Mixture<S> mixture;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    A* dweight = cleared<A>(a.norm_weight, chunk, in_whole_vectors(in.width));
    A* dbias = cleared<A>(a.norm_bias, chunk, in_whole_vectors(in.width));
    int64_t first = chunk * a.chunk, last = smaller(first + a.chunk, in.batch * in.tokens);
    int64_t b = first / in.tokens, n = first % in.tokens;
    for (int64_t r = first; r < last; ++r, ++n) {
      if (n == in.tokens) ++b, n = 0;
      mixture.read(in, b, n, x);
      Moments<A>(x, in.width, A(in.eps))
          .backward(x, row<S>(a.grad, b, n), (const A*)in.weight, in.width, dweight, dbias, any ? dx : nullptr);
      if (a.mixture) {
        A products[kMaxExperts];
        dots<S, A>(
            members, 1, in.width, [&](int k) TF_LAMBDA { return mixture.rows[k]; }, [&](int) TF_LAMBDA { return dx; },
            products, 1);
        A* sums = (A*)a.mixture + (b + chunk) * members;
        for (int k = 0; k < members; ++k) sums[k] = (r == first || n == 0 ? A(0) : sums[k]) + products[k];
      }
      for (int k = 0; k < members; ++k) {
        if (!a.grad_experts[k]) continue;
        A w = mixture.weights[k];
        S* out = (S*)a.grad_experts[k] + r * in.width;
        along<A>(in.width, [&](int64_t d, auto partial, int count) TF_LAMBDA {
          put(out, d, w * load(dx + d), partial, count, in.past_caches);
        });
      }
    }
  }
  fence();
}

}  // namespace

void competency_weights(const CompetencyWeights& a, int64_t begin, int64_t end) {
  a.wide ? weigh<double>(a, begin, end) : weigh<float>(a, begin, end);
}

void competency_weights_backward(const CompetencyWeightsBackward& a, int64_t begin, int64_t end) {
  a.wide ? weigh_backward<double>(a, begin, end) : weigh_backward<float>(a, begin, end);
}

void competency_aggregate(const CompetencyAggregate& a, int64_t begin, int64_t end, void* scratch) {
  by_type(a.type, [&](auto s) { forward<decltype(s)>(a, begin, end, scratch); });
}

void competency_aggregate_backward(const CompetencyAggregateBackward& a, int64_t begin, int64_t end, void* scratch) {
  by_type(a.inputs.type, [&](auto s) { backward<decltype(s)>(a, begin, end, scratch); });
}

}  // namespace TIGER_FAST_ISA
}  // namespace tiger_fast
