// Leave-one-out mixtures (TIGER sec. 3.5), all left-out experts from one read of the experts.
//
// Maths:   out_tk = sum over j != k of w_tj F_j / den_tk, den_tk = 1, or sum over j != k of w_tj (0 / 0 is 0).
// Bytes:   forward reads M and writes T M units of B N D elements; backward reads M + T M and writes M.
// Layout:  a token at a time: its M rows stay in the first cache while the T M rows of the output are written one by one.
#include "leave_one_out.h"

#include "entry.h"
#include "rows.h"

namespace tiger_fast {
namespace TIGER_FAST_ISA {

namespace {

// The weights of one token, and what they are divided by.
template <typename A>
struct Token {
  A weights[kMaxTasks][kMaxExperts];
  A sums[kMaxTasks][kMaxExperts];  // den_tk

  TF_INLINE void read(const LeaveOneOut& a, int64_t b, int64_t n) {
    int members = int(a.members);
    for (int t = 0; t < a.tasks; ++t) {
      int64_t offset = b * a.weights.stride[0] + t * a.weights.stride[1] + n * a.weights.stride[2];
      for (int k = 0; k < members; ++k) weights[t][k] = at<A>(a.weights, offset + k * a.weights.stride[3]);
      for (int k = 0; k < members; ++k) {
        A others = 0;
        for (int j = 0; j < members; ++j)
          if (j != k) others += weights[t][j];
        sums[t][k] = a.renormalize ? others : A(1);
      }
    }
  }

  // w / den_tk, and 0 where den_tk is.
  TF_INLINE A share(int t, int k, A w) const { return sums[t][k] == 0 ? A(0) : w / sums[t][k]; }
};

template <typename S>
void forward(const LeaveOneOut& a, int64_t begin, int64_t end) {
  using A = acc_t<S>;
  int members = int(a.members);
  Token<A> token;
  for (int64_t r = begin; r < end; ++r) {
    int64_t b = r / a.tokens, n = r % a.tokens;
    token.read(a, b, n);
    for (int t = 0; t < a.tasks; ++t)
      for (int k = 0; k < members; ++k) {
        const S* rows[kMaxExperts];
        A shares[kMaxExperts];
        int others = 0;
        for (int j = 0; j < members; ++j)
          if (j != k) {
            rows[others] = row<S>(a.experts[j], b, n);
            shares[others++] = token.share(t, k, token.weights[t][j]);
          }
        S* out = (S*)a.out + (((b * a.tasks + t) * members + k) * a.tokens + n) * a.width;
        mix(rows, shares, others, a.width, out, a.past_caches);
      }
  }
  fence();
}

// With G the output's gradient:
//   dF_j = sum over t and k != j of w_tj / den_tk G_tk,
//   dw_tj = sum over k != j of (F_j . G_tk - out_tk . G_tk) / den_tk, the second term if renormalised, where
//   out_tk . G_tk = sum over i != k of w_ti / den_tk F_i . G_tk.
template <typename S>
void backward(const LeaveOneOutBackward& a, int64_t begin, int64_t end) {
  using A = acc_t<S>;
  const LeaveOneOut& in = a.inputs;
  int members = int(in.members);
  bool any = false;
  for (int j = 0; j < members; ++j) any |= a.grad_experts[j] != nullptr;
  Token<A> token;
  for (int64_t r = begin; r < end; ++r) {
    int64_t b = r / in.tokens, n = r % in.tokens;
    token.read(in, b, n);
    auto grad = [&](int t, int k) TF_LAMBDA { return row<S>(a.grad, b, t, k, n); };
    if (a.grad_weights)
      for (int t = 0; t < in.tasks; ++t) {
        A products[kMaxExperts * kMaxExperts];  // G_tk . F_j
        dots<S, S>(
            members, members, in.width, [&](int k) TF_LAMBDA { return grad(t, k); },
            [&](int j) TF_LAMBDA { return row<S>(in.experts[j], b, n); }, products, members);
        A* out = (A*)a.grad_weights + ((b * in.tasks + t) * in.tokens + n) * members;
        for (int j = 0; j < members; ++j) out[j] = 0;
        for (int k = 0; k < members; ++k) {
          A level = 0;
          if (in.renormalize)
            for (int i = 0; i < members; ++i)
              if (i != k) level += token.share(t, k, token.weights[t][i]) * products[k * members + i];
          for (int j = 0; j < members; ++j)
            if (j != k) out[j] += token.share(t, k, products[k * members + j] - level);
        }
      }
    if (!any) continue;
    for (int j = 0; j < members; ++j) {
      if (!a.grad_experts[j]) continue;
      const S* rows[kMaxTasks * kMaxExperts];
      A shares[kMaxTasks * kMaxExperts];
      int count = 0;
      for (int t = 0; t < in.tasks; ++t)
        for (int k = 0; k < members; ++k)
          if (k != j) {
            rows[count] = grad(t, k);
            shares[count++] = token.share(t, k, token.weights[t][j]);
          }
      mix(rows, shares, count, in.width, (S*)a.grad_experts[j] + r * in.width, in.past_caches);
    }
  }
  fence();
}

}  // namespace

void leave_one_out(const LeaveOneOut& a, int64_t begin, int64_t end) {
  by_type(a.type, [&](auto s) { forward<decltype(s)>(a, begin, end); });
}

void leave_one_out_backward(const LeaveOneOutBackward& a, int64_t begin, int64_t end) {
  by_type(a.inputs.type, [&](auto s) { backward<decltype(s)>(a, begin, end); });
}

}  // namespace TIGER_FAST_ISA
}  // namespace tiger_fast
