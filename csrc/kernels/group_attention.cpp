// Group attention (TIGER sec. 3.4): at every token on its own, the G members attend to each other.
//
// Maths:   P = softmax over j of (q_i / sqrt(head)) . k_j, out_i = sum over j of P_ij v_j, for each head.
//          dP_ij = dout_i . v_j, dS_ij = P_ij (dP_ij - sum over l of P_il dP_il),
//          dq_i = sum over j of dS_ij k_j / sqrt(head), dk_j = sum over i of dS_ij q_i / sqrt(head),
//          dv_j = sum over i of P_ij dout_i. P is computed again rather than saved.
// Bytes:   forward reads 3 G and writes G units of B N D elements; backward reads 4 G and writes 3 G.
// Layout:  a token and a block of its heads at a time. Scores are kept as scores[j][x] with x = h G + i, so that in the
//          softmax every lane is a row of its own. Heads of whole vectors in groups of up to 8 are read where they are.
//          Others go through a tile of accumulators in the first cache, padded with zeros to whole vectors: partial
//          vectors are then dealt with once, and large groups, whose rows lie a multiple of 4 KiB apart and would push
//          each other out of a cache, are read again from the tile.
#include "group_attention.h"

#include "entry.h"
#include "rows.h"

namespace tiger_fast {
namespace TIGER_FAST_ISA {
namespace {

// The largest group whose rows are read where they are: each is then read at most twice for its scores, which costs
// less than copying it (measured at G = 4: forward 12 ms with copies, 7 without; backward 14 and 10).
constexpr int kInPlace = 8;
// Elements of all tiles of a block: 16 KiB of floats. The least that holds a vector of each of 4 G rows is 2048.
constexpr int kTile = 4096;
// Rows (h, i) of scores in a block; stores of four lanes may reach 3 further.
constexpr int kScoreRows = 64, kScoreStride = 80;

// How a head block is cut: `heads` of them at a time and `width` channels of each, or parts of one head.
struct Cut {
  int heads;
  int64_t width;   // channels taken at a time: all of a head, or a multiple of the vector
  int64_t padded;  // those, rounded up to whole vectors

  template <typename A>
  static TF_INLINE Cut of(const GroupAttention& a, int rows) {
    int64_t whole = tiger_fast::TIGER_FAST_ISA::padded<A>(a.head);
    if (whole * rows > kTile) {
      int64_t part = kTile / rows / L<A> * L<A>;
      return {1, part, part};
    }
    int64_t most = kTile / (whole * rows), scores = kScoreRows / a.members;
    most = smaller(smaller(most, scores), a.heads);
    int64_t blocks = (a.heads + most - 1) / most;
    return {int((a.heads + blocks - 1) / blocks), a.head, whole};
  }
};

// Rows of a head block: head h of member g begins at data + g * stride + h * head.
template <typename From>
struct Block {
  const From* data;
  int64_t stride, head;
};

template <typename A>
struct Scores {
  alignas(kBytes) A at[kMaxGroup * kScoreStride] = {};
};

// The members' rows of one head block, `heads` times `width` channels, to tile[(g * heads + h) * padded].
template <typename S>
TF_INLINE void gather(const S* from, int64_t stride, int members, int heads, int64_t width, int64_t padded,
                      int64_t behind, acc_t<S>* tile) {
  using A = acc_t<S>;
  for (int g = 0; g < members; ++g, from += stride) {
    if (width == padded) {
      for (int64_t d = 0; d < heads * width; d += L<A>, tile += L<A>) store(tile, load(from + d));
      continue;
    }
    for (int h = 0; h < heads; ++h)
      for (int64_t d = 0; d < width; d += L<A>, tile += L<A>) {
        const S* p = from + h * width + d;
        int n = int(smaller<int64_t>(width - d, L<A>));
        // Whole vectors as long as the row (of which `behind` elements follow this block) has them.
        bool whole = (heads - h) * width - d + behind >= L<A>;
        store(tile, whole ? first_lanes<A>(load(p), n) : load(p, n));
      }
  }
}

// Lane-wise totals of four vectors, to out[0..4).
TF_INLINE void totals(const vfloat* v, float* out) {
#if defined(__x86_64__)
#if defined(__AVX2__)
  __m256 h[4];
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    h[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i]), _mm512_extractf32x8_ps((__m512)v[i], 1));
#else
    h[i] = (__m256)v[i];
#endif
  }
  __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(h[0], h[1]), _mm256_unpackhi_ps(h[0], h[1]));
  __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(h[2], h[3]), _mm256_unpackhi_ps(h[2], h[3]));
  __m256 all = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  __m128 ab = _mm_add_ps(_mm_unpacklo_ps((__m128)v[0], (__m128)v[1]), _mm_unpackhi_ps((__m128)v[0], (__m128)v[1]));
  __m128 cd = _mm_add_ps(_mm_unpacklo_ps((__m128)v[2], (__m128)v[3]), _mm_unpackhi_ps((__m128)v[2], (__m128)v[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x44), _mm_shuffle_ps(ab, cd, 0xee)));
#endif
#else
  for (int i = 0; i < 4; ++i) out[i] = sum(v[i]);
#endif
}

TF_INLINE void totals(const vdouble* v, double* out) {
  for (int i = 0; i < 4; ++i) out[i] = sum(v[i]);
}

// out[j * kScoreStride + i] (+)= (factor * left row i) . right row j for i < I <= 4, j < J; four lanes i are written.
template <int I, int J, typename From>
TF_INLINE void score_tile(int64_t padded, const From* left, int64_t left_stride, const From* right,
                          int64_t right_stride, acc_t<From> factor, bool add, acc_t<From>* out) {
  using A = acc_t<From>;
  Vec<A> sums[J][4] = {};
  for (int64_t d = 0; d < padded; d += L<A>) {
    Vec<A> b[J];
    for (int j = 0; j < J; ++j) b[j] = load(right + j * right_stride + d);
    for (int i = 0; i < I; ++i) {
      Vec<A> a = load(left + i * left_stride + d) * factor;
      for (int j = 0; j < J; ++j) sums[j][i] += a * b[j];
    }
  }
  for (int j = 0; j < J; ++j) {
    A* to = out + j * kScoreStride;
    A total[4];
    totals(sums[j], add ? total : to);
    if (add)
      for (int i = 0; i < I; ++i) to[i] += total[i];
  }
}

// Calls run(constant<count>), 1 <= count <= 4.
template <typename Run>
TF_INLINE void by_count(int count, Run run) {
  switch (count) {
    case 1:
      return run(constant<1>{});
    case 2:
      return run(constant<2>{});
    case 3:
      return run(constant<3>{});
    default:
      return run(constant<4>{});
  }
}

// Calls run(begin, constant<count>) for [0, members) in even parts of at most four.
template <typename Run>
TF_INLINE void in_parts(int members, Run run) {
  int parts = (members + 3) / 4, i = 0;
  for (; parts > 0; --parts) {
    int count = (members - i + parts - 1) / parts;
    by_count(count, [&](auto c) TF_LAMBDA { run(i, c); });
    i += count;
  }
}

// The scores of a block: scores[j][h G + i] (+)= (factor * left(i, h)) . right(j, h).
template <typename From>
void score(int members, int heads, int64_t padded, Block<From> left, Block<From> right, acc_t<From> factor, bool add,
           acc_t<From>* scores) {
  for (int h = 0; h < heads; ++h)
    in_parts(members, [&](int i, auto rows) TF_LAMBDA {
      constexpr int I = decltype(rows)::value;
      // Sixteen sums fill the registers with their operands; eight where there are half as many registers.
      in_parts(members, [&](int j, auto columns) TF_LAMBDA {
        constexpr int J = decltype(columns)::value, FIRST = kRegisters == 32 || J < 3 ? J : 2;
        const From* l = left.data + i * left.stride + h * left.head;
        const From* r = right.data + j * right.stride + h * right.head;
        auto* out = scores + j * kScoreStride + h * members + i;
        score_tile<I, FIRST>(padded, l, left.stride, r, right.stride, factor, add, out);
        if constexpr (FIRST < J)
          score_tile<I, J - FIRST>(padded, l, left.stride, r + FIRST * right.stride, right.stride, factor, add,
                                   out + FIRST * kScoreStride);
      });
    });
}

// In place, a row a lane.
template <typename A>
void softmax(int members, int rows, A* scores) {
  for (int x = 0; x < rows; x += L<A>) {
    A* column = scores + x;
    Vec<A> top = load(column);
    for (int j = 1; j < members; ++j) top = vmax<A>(top, load(column + j * kScoreStride));
    Vec<A> total = {};
    for (int j = 0; j < members; ++j) {
      Vec<A> e = exp(load(column + j * kScoreStride) - top);
      total += e;
      store(column + j * kScoreStride, e);
    }
    for (int j = 0; j < members; ++j) store(column + j * kScoreStride, load(column + j * kScoreStride) / total);
  }
}

// dP becomes dS.
template <typename A>
void softmax_backward(int members, int rows, const A* weights, A* grads) {
  for (int x = 0; x < rows; x += L<A>) {
    Vec<A> level = {};
    for (int j = 0; j < members; ++j)
      level += load(weights + j * kScoreStride + x) * load(grads + j * kScoreStride + x);
    for (int j = 0; j < members; ++j) {
      int at = j * kScoreStride + x;
      store(grads + at, load(weights + at) * (load(grads + at) - level));
    }
  }
}

// out(i) = factor * sum over j of shares[i * own + j * other] * row j, for I rows and C vectors.
template <int I, int C, typename S, typename From>
TF_INLINE void mix_tile(int members, const acc_t<S>* shares, int own, int other, const From* rows, int64_t stride,
                        acc_t<S> factor, S* out, int64_t out_stride, int64_t width, int64_t behind, bool past_caches) {
  using A = acc_t<S>;
  Vec<A> sums[I][C] = {};
  for (int j = 0; j < members; ++j) {
    Vec<A> b[C];
    for (int c = 0; c < C; ++c) b[c] = load(rows + j * stride + c * L<A>);
    for (int i = 0; i < I; ++i) {
      Vec<A> share = splat(shares[i * own + j * other]);
      for (int c = 0; c < C; ++c) sums[i][c] += share * b[c];
    }
  }
  for (int i = 0; i < I; ++i)
    for (int c = 0; c < C; ++c) {
      S* to = out + i * out_stride + c * L<A>;
      int64_t left = width - c * L<A>;
      Vec<A> x = sums[i][c] * factor;
      // What a whole vector writes too much belongs to the next head of the row, which is written later.
      if (past_caches)
        stream(to, x);
      else if (left + behind >= L<A>)
        store(to, x);
      else
        store(to, x, int(left));
    }
}

// Where the heads of a block are written: the row of member 0, the stride to the next member, and how many elements of
// the row lie behind the block.
template <typename S>
struct Out {
  S* data;
  int64_t stride, behind;
};

// out(i, h) = factor * sum over j of share(h, i, j) * row(j, h), where share is scores[j][h G + i] or, transposed,
// scores[i][h G + j].
template <typename S, typename From>
void mix(int members, int heads, int64_t width, int64_t padded, const acc_t<S>* scores, bool transposed,
         Block<From> rows, acc_t<S> factor, Out<S> out, bool past_caches) {
  using A = acc_t<S>;
  constexpr int C = kRegisters == 32 ? 4 : 2;
  int own = transposed ? kScoreStride : 1, other = transposed ? 1 : kScoreStride;
  for (int h = 0; h < heads; ++h)
    in_parts(members, [&](int i, auto count) TF_LAMBDA {
      constexpr int I = decltype(count)::value;
      int64_t d = 0;
      auto run = [&](auto vectors) TF_LAMBDA {
        constexpr int V = decltype(vectors)::value;
        mix_tile<I, V>(members, scores + h * members + i * own, own, other, rows.data + h * rows.head + d, rows.stride,
                       factor, out.data + i * out.stride + h * width + d, out.stride, width - d,
                          (heads - 1 - h) * width + out.behind, past_caches);
        d += V * L<A>;
      };
      while (padded - d >= C * L<A>) run(constant<C>{});
      while (padded - d > 0) run(constant<1>{});
    });
}

// One token's rows as the kernels walk them.
template <typename S>
struct Walk {
  const GroupAttention& a;
  int64_t b, n;
  int members;
  Cut cut;

  // The block of `heads` heads from h on, and of each the channels [c, c + width).
  template <typename F>
  TF_INLINE void blocks(F f) const {
    for (int64_t h = 0; h < a.heads; h += cut.heads) f(h, int(smaller<int64_t>(cut.heads, a.heads - h)));
  }
  template <typename F>
  TF_INLINE void parts(F f) const {
    for (int64_t c = 0; c < a.head; c += cut.width) {
      int64_t width = smaller(cut.width, a.head - c);
      f(c, width, padded<acc_t<S>>(width));
    }
  }
  TF_INLINE int64_t behind(int64_t h, int heads, int64_t c, int64_t width) const {
    return (a.heads - h - heads) * a.head + a.head - c - width;
  }
  // The rows where they are.
  TF_INLINE Block<S> in_place(const Rows& r, int64_t h) const {
    return {row<S>(r, b, 0, n) + h * a.head, r.stride[1], a.head};
  }
  // The rows in a tile.
  TF_INLINE Block<acc_t<S>> read(const Rows& r, int64_t h, int heads, int64_t c, int64_t width, int64_t padded,
                                 acc_t<S>* tile) const {
    gather(row<S>(r, b, 0, n) + h * a.head + c, r.stride[1], members, heads, width, padded, behind(h, heads, c, width),
           tile);
    return {tile, heads * padded, padded};
  }
  TF_INLINE Out<S> to(const Target& t, int64_t h, int heads, int64_t c, int64_t width) const {
    return {(S*)t.data + b * t.stride[0] + n * t.stride[2] + h * a.head + c, t.stride[1], behind(h, heads, c, width)};
  }
};

// A group of one attends to itself: its weight is 1, or NaN where its score is not finite.
template <typename A>
TF_INLINE A weight_alone(A score) {
  return score - score + 1;
}

// (factor * a) . b
template <typename S>
TF_INLINE acc_t<S> dot(const S* a, const S* b, int64_t width, acc_t<S> factor) {
  using A = acc_t<S>;
  Vec<A> sums = {};
  along<A>(width, [&](int64_t d, auto partial, int n) TF_LAMBDA {
    sums += get(a, d, partial, n) * factor * get(b, d, partial, n);
  });
  return sum(sums);
}

// out = factor * x
template <typename S>
TF_INLINE void scaled(const S* x, acc_t<S> factor, int64_t width, S* out, bool past_caches) {
  along<acc_t<S>>(width, [&](int64_t d, auto partial, int n) TF_LAMBDA {
    put(out, d, factor * get(x, d, partial, n), partial, n, past_caches);
  });
}

template <typename S>
TF_INLINE S* place(const Target& t, int64_t b, int64_t n) {
  return (S*)t.data + b * t.stride[0] + n * t.stride[2];
}

template <typename S>
void forward_alone(const GroupAttention& a, int64_t begin, int64_t end) {
  acc_t<S> scale = acc_t<S>(1 / ::sqrt(double(a.head)));
  for (int64_t r = begin; r < end; ++r) {
    int64_t b = r / a.tokens, n = r % a.tokens;
    const S *q = row<S>(a.q, b, 0, n), *k = row<S>(a.k, b, 0, n), *v = row<S>(a.v, b, 0, n);
    S* out = place<S>(a.out, b, n);
    for (int64_t c = 0; c < a.heads * a.head; c += a.head)
      scaled(v + c, weight_alone(dot(q + c, k + c, a.head, scale)), a.head, out + c, a.past_caches);
  }
  fence();
}

template <typename S>
void backward_alone(const GroupAttentionBackward& a, int64_t begin, int64_t end) {
  using A = acc_t<S>;
  const GroupAttention& in = a.inputs;
  A scale = A(1 / ::sqrt(double(in.head)));
  for (int64_t r = begin; r < end; ++r) {
    int64_t b = r / in.tokens, n = r % in.tokens;
    const S *q = row<S>(in.q, b, 0, n), *k = row<S>(in.k, b, 0, n), *v = row<S>(in.v, b, 0, n);
    const S* grad = row<S>(a.grad, b, 0, n);
    for (int64_t c = 0; c < in.heads * in.head; c += in.head) {
      A weight = weight_alone(dot(q + c, k + c, in.head, scale)), slope = 0;
      if (a.grad_q.data || a.grad_k.data) {
        A through = dot(grad + c, v + c, in.head, A(1));
        slope = weight * (through - through);  // 0, or NaN where something is not finite
      }
      auto write = [&](const Target& t, const S* x, A factor) TF_LAMBDA {
        if (t.data) scaled(x + c, factor, in.head, place<S>(t, b, n) + c, in.past_caches);
      };
      write(a.grad_q, k, slope);
      write(a.grad_k, q, slope);
      write(a.grad_v, grad, weight);
    }
  }
  fence();
}

template <typename S>
void forward(const GroupAttention& a, int64_t begin, int64_t end) {
  using A = acc_t<S>;
  if (a.members == 1) return forward_alone<S>(a, begin, end);
  int members = int(a.members);
  bool direct = a.head % L<A> == 0 && members <= kInPlace;
  Cut cut = Cut::of<A>(a, direct ? 1 : 3 * members);
  A scale = A(1) / A(::sqrt(double(a.head)));
  alignas(64) A tile[kTile];
  Scores<A> scores;
  for (int64_t r = begin; r < end; ++r) {
    Walk<S> walk{a, r / a.tokens, r % a.tokens, members, cut};
    walk.blocks([&](int64_t h, int heads) TF_LAMBDA {
      if (direct) {
        score(members, heads, a.head, walk.in_place(a.q, h), walk.in_place(a.k, h), scale, false, scores.at);
        softmax(members, heads * members, scores.at);
        mix(members, heads, a.head, a.head, scores.at, false, walk.in_place(a.v, h), A(1),
            walk.to(a.out, h, heads, 0, a.head), a.past_caches);
        return;
      }
      walk.parts([&](int64_t c, int64_t width, int64_t padded) TF_LAMBDA {
        auto q = walk.read(a.q, h, heads, c, width, padded, tile);
        auto k = walk.read(a.k, h, heads, c, width, padded, tile + members * q.stride);
        score(members, heads, padded, q, k, scale, c > 0, scores.at);
      });
      softmax(members, heads * members, scores.at);
      walk.parts([&](int64_t c, int64_t width, int64_t padded) TF_LAMBDA {
        auto v = walk.read(a.v, h, heads, c, width, padded, tile);
        mix(members, heads, width, padded, scores.at, false, v, A(1), walk.to(a.out, h, heads, c, width),
            a.past_caches);
      });
    });
  }
  fence();
}

template <typename S>
void backward(const GroupAttentionBackward& a, int64_t begin, int64_t end) {
  using A = acc_t<S>;
  const GroupAttention& in = a.inputs;
  if (in.members == 1) return backward_alone<S>(a, begin, end);
  int members = int(in.members);
  bool through_scores = a.grad_q.data || a.grad_k.data;
  bool direct = in.head % L<A> == 0 && members <= kInPlace;
  Cut cut = Cut::of<A>(in, direct ? 1 : 4 * members);
  bool whole = cut.width == in.head;  // the tiles of the first pass are those of the second
  A scale = A(1) / A(::sqrt(double(in.head)));
  alignas(64) A tile[kTile];
  Scores<A> weights, grads;
  for (int64_t r = begin; r < end; ++r) {
    Walk<S> walk{in, r / in.tokens, r % in.tokens, members, cut};
    walk.blocks([&](int64_t h, int heads) TF_LAMBDA {
      if (direct) {
        Block<S> q = walk.in_place(in.q, h), k = walk.in_place(in.k, h), v = walk.in_place(in.v, h);
        Block<S> grad = walk.in_place(a.grad, h);
        int rows = heads * members;
        int64_t head = in.head;
        score(members, heads, head, q, k, scale, false, weights.at);
        softmax(members, rows, weights.at);
        if (through_scores) {
          score(members, heads, head, grad, v, A(1), false, grads.at);
          softmax_backward(members, rows, weights.at, grads.at);
        }
        auto to = [&](const Target& t) TF_LAMBDA { return walk.to(t, h, heads, 0, head); };
        if (a.grad_q.data)
          mix(members, heads, head, head, grads.at, false, k, scale, to(a.grad_q), in.past_caches);
        if (a.grad_k.data)
          mix(members, heads, head, head, grads.at, true, q, scale, to(a.grad_k), in.past_caches);
        if (a.grad_v.data)
          mix(members, heads, head, head, weights.at, true, grad, A(1), to(a.grad_v), in.past_caches);
        return;
      }
      auto read = [&](const Rows& from, int place, int64_t c, int64_t width, int64_t padded, bool again) TF_LAMBDA {
        A* to = tile + place * members * heads * padded;
        return again ? walk.read(from, h, heads, c, width, padded, to) : Block<A>{to, heads * padded, padded};
      };
      walk.parts([&](int64_t c, int64_t width, int64_t padded) TF_LAMBDA {
        auto q = read(in.q, 0, c, width, padded, true), k = read(in.k, 1, c, width, padded, true);
        score(members, heads, padded, q, k, scale, c > 0, weights.at);
        if (through_scores) {
          auto v = read(in.v, 2, c, width, padded, true), grad = read(a.grad, 3, c, width, padded, true);
          score(members, heads, padded, grad, v, A(1), c > 0, grads.at);
        }
      });
      softmax(members, heads * members, weights.at);
      if (through_scores) softmax_backward(members, heads * members, weights.at, grads.at);
      walk.parts([&](int64_t c, int64_t width, int64_t padded) TF_LAMBDA {
        if (a.grad_q.data)
          mix(members, heads, width, padded, grads.at, false, read(in.k, 1, c, width, padded, !whole), scale,
              walk.to(a.grad_q, h, heads, c, width), in.past_caches);
        if (a.grad_k.data)
          mix(members, heads, width, padded, grads.at, true, read(in.q, 0, c, width, padded, !whole), scale,
              walk.to(a.grad_k, h, heads, c, width), in.past_caches);
        if (a.grad_v.data)
          mix(members, heads, width, padded, weights.at, true,
              read(a.grad, 3, c, width, padded, !whole || !through_scores), A(1),
              walk.to(a.grad_v, h, heads, c, width), in.past_caches);
      });
    });
  }
  fence();
}

}  // namespace

void group_attention(const GroupAttention& a, int64_t begin, int64_t end) {
  by_type(a.type, [&](auto s) { forward<decltype(s)>(a, begin, end); });
}

void group_attention_backward(const GroupAttentionBackward& a, int64_t begin, int64_t end) {
  by_type(a.inputs.type, [&](auto s) { backward<decltype(s)>(a, begin, end); });
}

}  // namespace TIGER_FAST_ISA
}  // namespace tiger_fast
