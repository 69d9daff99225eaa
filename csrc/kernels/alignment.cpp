// The causal target (TIGER eqs. 9-10) and its alignment with the routing weights (eqs. 11-13).
//
// Maths:   per row of M differences, c = delta - mean, n = c / (dev + eps), p = softmax(n / tau), and
//          JSD = 1/2 sum of p log(p / m) + alpha log(alpha / m), m = (p + alpha) / 2, each logarithm of a quotient, which
//          cannot overflow: a is held at 2^-126 inside it, so that its derivative stays finite.
// Bytes:   forward reads delta and alpha once; backward reads them again and writes the gradients that are needed.
// Layout:  a vector's lanes are rows: a tile of rows is transposed to M vectors, whatever the strides it came with.
#include "alignment.h"

#include "entry.h"
#include "rows.h"

namespace tiger_fast {
namespace TIGER_FAST_ISA {
namespace {

constexpr int kTile = 64;  // rows; whole vectors of every type

// Element m of row r at [m][r].
template <typename A>
struct Block {
  alignas(64) A values[kMaxExperts][kTile] = {};

  TF_INLINE Vec<A> get(int m, int r) const { return load(&values[m][r]); }
  TF_INLINE void put(int m, int r, Vec<A> x) { store(&values[m][r], x); }
};

// Walks along the rows of a grid, and gives the offsets of an operand's rows.
class Walk {
 public:
  TF_INLINE Walk(const RowGrid& grid, const RowOperand& operand, int64_t row) : grid_(grid), operand_(operand) {
    for (int i = grid.dims; i-- > 0;) {
      index_[i] = row % grid.sizes[i];
      row /= grid.sizes[i];
      base_ += index_[i] * operand.stride[i];
    }
  }

  // The next `count` rows: their offsets, and whether they lie one step of the last dimension apart.
  TF_INLINE void next(int count) {
    int last = grid_.dims - 1;
    int64_t step = operand_.stride[last];
    even = true;
    for (int done = 0;;) {
      int run = int(smaller<int64_t>(count - done, grid_.sizes[last] - index_[last]));
      for (int r = 0; r < run; ++r) offsets[done + r] = base_ + r * step;
      advance(run);
      done += run;
      if (done >= count) return;
      even = false;
    }
  }

  int64_t offsets[kTile];
  bool even = true;

 private:
  TF_INLINE void advance(int run) {
    int i = grid_.dims - 1;
    index_[i] += run;
    base_ += run * operand_.stride[i];
    for (; i > 0 && index_[i] == grid_.sizes[i]; --i) {
      base_ += operand_.stride[i - 1] - index_[i] * operand_.stride[i];
      index_[i] = 0;
      ++index_[i - 1];
    }
  }

  const RowGrid& grid_;
  const RowOperand& operand_;
  int64_t base_ = 0;
  int64_t index_[kMaxDims];
};

// Rows of M, one after the other, to a block.
template <typename A>
TF_INLINE void transpose(const A* dense, int members, int count, Block<A>& block) {
  auto run = [&](auto m) TF_LAMBDA {
    int fixed = decltype(m)::value ? decltype(m)::value : members;
    for (int r = 0; r < count; ++r)
      for (int k = 0; k < fixed; ++k) block.values[k][r] = dense[r * fixed + k];
  };
  switch (members) {
    case 2:
      return run(constant<2>{});
    case 3:
      return run(constant<3>{});
    case 4:
      return run(constant<4>{});
    default:
      return run(constant<0>{});
  }
}

// A tile of an operand to a block.
template <typename S, typename A>
TF_INLINE void read(const RowOperand& x, int members, const Walk& walk, int64_t step, int count, Block<A>& block) {
  const S* data = (const S*)x.data;
  if constexpr (sizeof(acc_t<S>) == sizeof(A)) {
    const S* first = data + walk.offsets[0];
    if (walk.even && step == members && x.member_stride == 1) {
      alignas(64) A scratch[kTile * kMaxExperts];
      return transpose(widened(first, int64_t(count) * members, false, scratch), members, count, block);
    }
    if (walk.even && step == 1) {
      for (int m = 0; m < members; ++m) {
        const S* from = first + m * x.member_stride;
        for (int r = 0; r < count; r += L<A>)
          store(&block.values[m][r], count - r < L<A> ? load(from + r, count - r) : load(from + r));
      }
      return;
    }
  }
  for (int r = 0; r < count; ++r)
    for (int m = 0; m < members; ++m) block.values[m][r] = A(value(data[walk.offsets[r] + m * x.member_stride]));
}

template <typename A>
void read(const RowGrid& grid, const RowOperand& x, Walk& walk, int count, Block<A>& block) {
  walk.next(count);
  by_type(x.type, [&](auto s) TF_LAMBDA {
    read<decltype(s)>(x, grid.members, walk, x.stride[grid.dims - 1], count, block);
  });
}

// A block to dense rows of storage type S.
template <typename A, typename S>
TF_INLINE void write_as(const Block<A>& block, int members, int count, S* out) {
  if constexpr (sizeof(acc_t<S>) == sizeof(A)) {
    alignas(64) A dense[kTile * kMaxExperts];
    auto run = [&](auto m) TF_LAMBDA {
      int fixed = decltype(m)::value ? decltype(m)::value : members;
      for (int r = 0; r < count; ++r)
        for (int k = 0; k < fixed; ++k) dense[r * fixed + k] = block.values[k][r];
    };
    members == 4 ? run(constant<4>{}) : run(constant<0>{});
    along<A>(int64_t(count) * members, [&](int64_t d, auto partial, int n) TF_LAMBDA {
      put(out, d, load(dense + d), partial, n);
    });
  } else {
    for (int r = 0; r < count; ++r)
      for (int k = 0; k < members; ++k) out[r * members + k] = rounded<S>(acc_t<S>(block.values[k][r]));
  }
}

template <typename A>
void write(const Block<A>& block, int members, int64_t row, int count, Type type, void* out) {
  by_type(type, [&](auto s) TF_LAMBDA { write_as(block, members, count, (decltype(s)*)out + row * members); });
}

// Divisions are slow: a row has few.
template <typename A>
struct Constants {
  A share;      // 1 / M
  A sharpness;  // 1 / tau, finite, so that 0 / tau stays 0
  A eps;

  TF_INLINE Constants(int members, double tau, double eps)
      : share(A(1) / A(members)), sharpness(A(smaller(1 / tau, sizeof(A) == 8 ? 0x1p1023 : 0x1p127))), eps(A(eps)) {}
};

// What eqs. 9-10 make of the differences of L rows.
template <typename A>
struct Target {
  Vec<A> n[kMaxExperts];  // normalised differences
  Vec<A> p[kMaxExperts];
  Vec<A> deviation, scale;  // scale = 1 / (deviation + eps)

  TF_INLINE Target(const Block<A>& delta, int members, int r, const Constants<A>& c) {
    // Differences from the first one: these are exactly 0 where all tie, and so are the mean's and the deviation's.
    Vec<A> first = delta.get(0, r), total = {}, squares = {};
    for (int m = 0; m < members; ++m) {
      n[m] = delta.get(m, r) - first;
      total += n[m];
    }
    Vec<A> mean = total * c.share;
    for (int m = 0; m < members; ++m) {
      n[m] -= mean;
      squares += n[m] * n[m];
    }
    deviation = root(squares * c.share);
    scale = A(1) / (deviation + c.eps);
    Vec<A> highest = n[0] = n[0] * scale;
    for (int m = 1; m < members; ++m) {
      n[m] *= scale;
      highest = vmax<A>(highest, n[m]);
    }
    total = Vec<A>{};
    for (int m = 0; m < members; ++m) {
      p[m] = exp((n[m] - highest) * c.sharpness);
      total += p[m];
    }
    Vec<A> inverse = A(1) / total;
    for (int m = 0; m < members; ++m) p[m] *= inverse;
  }

  // d delta from d p. Where the deviation is 0, so is its derivative.
  TF_INLINE void backward(const Vec<A>* dp, int members, int r, const Constants<A>& c, Block<A>& out) const {
    Vec<A> level = {}, along_n = {}, total = {}, dn[kMaxExperts];
    for (int m = 0; m < members; ++m) level += p[m] * dp[m];
    for (int m = 0; m < members; ++m) {
      dn[m] = p[m] * (dp[m] - level) * c.sharpness;
      along_n += dn[m] * n[m];
    }
    Vec<A> share = deviation == A(0) ? Vec<A>{} : along_n * c.share / deviation;
    for (int m = 0; m < members; ++m) {
      dn[m] = dn[m] * scale - n[m] * share;
      total += dn[m];
    }
    total *= c.share;
    for (int m = 0; m < members; ++m) out.put(m, r, dn[m] - total);
  }
};

constexpr float kTiny = 0x1p-126f;

// log(max(a, 2^-126) / m) given 2 m: twice the divergence's derivative for a.
template <typename A>
TF_INLINE Vec<A> log_ratio(Vec<A> a, Vec<A> twice) {
  return log((a < A(kTiny) ? splat(A(kTiny)) : a) * A(2) / twice);
}

// Calls step(first row, rows) for every tile of the chunk.
template <typename Step>
TF_INLINE void by_tile(const RowGrid& grid, int64_t chunk, Step step) {
  int64_t end = smaller(grid.rows, (chunk + 1) * kRowChunk);
  for (int64_t row = chunk * kRowChunk; row < end; row += kTile) step(row, int(smaller<int64_t>(kTile, end - row)));
}

template <typename A>
void target_forward(const CausalTarget& a, int64_t begin, int64_t end) {
  int members = a.grid.members;
  Constants<A> constants(members, a.tau, a.eps);
  Block<A> delta;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    Walk walk(a.grid, a.delta, chunk * kRowChunk);
    by_tile(a.grid, chunk, [&](int64_t row, int count) TF_LAMBDA {
      read(a.grid, a.delta, walk, count, delta);
      for (int r = 0; r < count; r += L<A>) {
        Target<A> target(delta, members, r, constants);
        for (int m = 0; m < members; ++m) delta.put(m, r, target.p[m]);
      }
      write(delta, members, row, count, sizeof(A) == 8 ? Type::f64 : Type::f32, a.out);
    });
  }
}

template <typename A>
void target_backward(const CausalTargetBackward& a, int64_t begin, int64_t end) {
  const CausalTarget& in = a.inputs;
  int members = in.grid.members;
  Constants<A> constants(members, in.tau, in.eps);
  Block<A> delta, grad;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    Walk walk(in.grid, in.delta, chunk * kRowChunk), walk_grad(in.grid, a.grad, chunk * kRowChunk);
    by_tile(in.grid, chunk, [&](int64_t row, int count) TF_LAMBDA {
      read(in.grid, in.delta, walk, count, delta);
      read(in.grid, a.grad, walk_grad, count, grad);
      for (int r = 0; r < count; r += L<A>) {
        Target<A> target(delta, members, r, constants);
        Vec<A> dp[kMaxExperts];
        for (int m = 0; m < members; ++m) dp[m] = grad.get(m, r);
        target.backward(dp, members, r, constants, delta);
      }
      write(delta, members, row, count, in.delta.type, a.grad_delta);
    });
  }
}

// 1 for a row that counts, 0 for another or for none.
template <typename A>
struct Counted {
  alignas(64) A values[kTile] = {};

  TF_INLINE void read(const AlignmentLoss& a, Walk& walk, int count) {
    if (a.mask.data) {
      walk.next(count);
      for (int r = 0; r < count; ++r) values[r] = ((const unsigned char*)a.mask.data)[walk.offsets[r]] ? A(1) : A(0);
    } else {
      for (int r = 0; r < count; ++r) values[r] = A(1);
    }
    for (int r = count; r < kTile; ++r) values[r] = A(0);
  }
  TF_INLINE Vec<A> get(int r) const { return load(values + r); }
};

template <typename A>
void loss_forward(const AlignmentLoss& a, int64_t begin, int64_t end) {
  int members = a.grid.members;
  Constants<A> constants(members, a.tau, a.eps);
  Block<A> delta, weights;
  Counted<A> counted;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    int64_t start = chunk * kRowChunk;
    Walk walk_delta(a.grid, a.delta, start), walk_weights(a.grid, a.weights, start), walk_mask(a.grid, a.mask, start);
    Vec<A> sums = {}, counts = {};
    by_tile(a.grid, chunk, [&](int64_t row, int count) TF_LAMBDA {
      read(a.grid, a.delta, walk_delta, count, delta);
      read(a.grid, a.weights, walk_weights, count, weights);
      counted.read(a, walk_mask, count);
      for (int r = 0; r < count; r += L<A>) {
        Target<A> target(delta, members, r, constants);
        Vec<A> divergence = {}, counts_here = counted.get(r);
        auto out_of_sum = counts_here == A(0);
        for (int m = 0; m < members; ++m) {
          Vec<A> p = target.p[m], alpha = weights.get(m, r), twice = p + alpha;
          auto zero = (p == A(0)) & (alpha == A(0));
          auto term = [&](Vec<A> x, Vec<A> ratio) TF_LAMBDA { return x * ratio + (x < A(kTiny) ? x : Vec<A>{}); };
          Vec<A> ratio = log_ratio<A>(alpha, twice);
          divergence += zero ? Vec<A>{} : term(p, log_ratio<A>(p, twice)) + term(alpha, ratio);
          if (a.slopes) weights.put(m, r, zero | out_of_sum ? Vec<A>{} : A(0.5) * ratio);
        }
        sums += out_of_sum ? Vec<A>{} : divergence;
        counts += counts_here;
      }
      if (a.slopes) write(weights, members, row, count, sizeof(A) == 8 ? Type::f64 : Type::f32, a.slopes);
    });
    a.sums[chunk] = double(sum(sums)) / 2;
    a.counts[chunk] = int64_t(sum(counts));
  }
}

template <typename A>
void loss_backward(const AlignmentLossBackward& a, int64_t begin, int64_t end) {
  const AlignmentLoss& in = a.inputs;
  int members = in.grid.members;
  Constants<A> constants(members, in.tau, in.eps);
  Block<A> delta, weights;
  Counted<A> counted;
  A half = A(a.scale / 2);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    int64_t start = chunk * kRowChunk;
    Walk walk_delta(in.grid, in.delta, start), walk_weights(in.grid, in.weights, start);
    Walk walk_mask(in.grid, in.mask, start);
    by_tile(in.grid, chunk, [&](int64_t row, int count) TF_LAMBDA {
      read(in.grid, in.delta, walk_delta, count, delta);
      read(in.grid, in.weights, walk_weights, count, weights);
      counted.read(in, walk_mask, count);
      for (int r = 0; r < count; r += L<A>) {
        Target<A> target(delta, members, r, constants);
        auto out_of_sum = counted.get(r) == A(0);
        Vec<A> dp[kMaxExperts];
        for (int m = 0; m < members; ++m) {
          Vec<A> p = target.p[m], alpha = weights.get(m, r), twice = p + alpha;
          auto zero = ((p == A(0)) & (alpha == A(0))) | out_of_sum;
          if (a.grad_weights) weights.put(m, r, zero ? Vec<A>{} : half * log_ratio<A>(alpha, twice));
          if (a.grad_delta) dp[m] = zero ? Vec<A>{} : half * log_ratio<A>(p, twice);
        }
        if (!a.grad_delta) continue;
        target.backward(dp, members, r, constants, delta);
        if (in.mask.data)
          for (int m = 0; m < members; ++m) delta.put(m, r, out_of_sum ? Vec<A>{} : delta.get(m, r));
      }
      if (a.grad_delta) write(delta, members, row, count, in.delta.type, a.grad_delta);
      if (a.grad_weights) write(weights, members, row, count, in.weights.type, a.grad_weights);
    });
  }
}

}  // namespace

void causal_target(const CausalTarget& a, int64_t begin, int64_t end) {
  a.wide ? target_forward<double>(a, begin, end) : target_forward<float>(a, begin, end);
}

void causal_target_backward(const CausalTargetBackward& a, int64_t begin, int64_t end) {
  a.inputs.wide ? target_backward<double>(a, begin, end) : target_backward<float>(a, begin, end);
}

void alignment_loss(const AlignmentLoss& a, int64_t begin, int64_t end) {
  a.wide ? loss_forward<double>(a, begin, end) : loss_forward<float>(a, begin, end);
}

void alignment_loss_backward(const AlignmentLossBackward& a, int64_t begin, int64_t end) {
  a.inputs.wide ? loss_backward<double>(a, begin, end) : loss_backward<float>(a, begin, end);
}

}  // namespace TIGER_FAST_ISA
}  // namespace tiger_fast
