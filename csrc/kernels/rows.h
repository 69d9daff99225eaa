// Inner products of rows, and sums of rows: what every kernel does along the width D.
#pragma once

#include "simd.h"

namespace tiger_fast {
namespace TIGER_FAST_ISA {

// Where row (i, j, ...) of an input begins.
template <typename S>
TF_INLINE const S* row(const Rows& r, int64_t i, int64_t j) {
  return (const S*)r.data + i * r.stride[0] + j * r.stride[1];
}
template <typename S>
TF_INLINE const S* row(const Rows& r, int64_t i, int64_t j, int64_t k) {
  return row<S>(r, i, j) + k * r.stride[2];
}
template <typename S>
TF_INLINE const S* row(const Rows& r, int64_t i, int64_t j, int64_t k, int64_t l) {
  return row<S>(r, i, j, k) + l * r.stride[3];
}

// A row of `count` elements as accumulators: the row itself, or where it is of another type, or `copy`, a copy in `out` with
// zeros up to in_whole_vectors(count).
template <typename S>
TF_INLINE const acc_t<S>* widened(const S* p, int64_t count, bool copy, acc_t<S>* out) {
  using A = acc_t<S>;
  if constexpr (sizeof(S) == sizeof(A))
    if (!copy) return p;
  int64_t i = 0;
  for (; i + L<A> <= count; i += L<A>) store(out + i, load(p + i));
  if (i < count) store(out + i, load(p + i, int(count - i))), i += L<A>;
  for (; i < in_whole_vectors(count); i += L<A>) store(out + i, Vec<A>{});
  return out;
}

template <typename A>
TF_INLINE void clear(A* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = 0;
}

// Row `slot` of partial sums, cleared; null if nobody wants them.
template <typename A>
TF_INLINE A* cleared(void* sums, int64_t slot, int64_t size) {
  if (!sums) return nullptr;
  A* mine = (A*)sums + slot * size;
  clear(mine, size);
  return mine;
}

// Calls step(d, full) for every vector of a row of `width`: step(d, L) in the body, step(d, n < L) for the rest.
template <typename A, typename Step>
TF_INLINE void along(int64_t width, Step step) {
  int64_t d = 0;
  for (; d + L<A> <= width; d += L<A>) step(d, constant<0>{}, L<A>);
  if (d < width) step(d, constant<1>{}, int(width - d));
}

// load / store of one step of `along`.
template <typename S, typename Partial>
TF_INLINE Vec<acc_t<S>> get(const S* p, int64_t d, Partial, int n) {
  if constexpr (Partial::value)
    return load(p + d, n);
  else
    return load(p + d);
}
template <typename S, typename Partial>
TF_INLINE void put(S* p, int64_t d, Vec<acc_t<S>> x, Partial, int n, bool past_caches = false) {
  if constexpr (Partial::value)
    store(p + d, x, n);
  else if (past_caches)
    stream(p + d, x);
  else
    store(p + d, x);
}

// Functions of their own, not inlined: with every pair of sizes at every call the units would take minutes to compile.
template <int I, int J, typename S, typename U>
__attribute__((noinline)) void dots_tile(const S* const* left, const U* const* right, int64_t width, acc_t<S>* out,
                                         int64_t stride) {
  using A = acc_t<S>;
  Vec<A> sums[I][J] = {};
  along<A>(width, [&](int64_t d, auto partial, int n) TF_LAMBDA {
    Vec<A> b[J];
    for (int j = 0; j < J; ++j) b[j] = get(right[j], d, partial, n);
    for (int i = 0; i < I; ++i) {
      Vec<A> a = get(left[i], d, partial, n);
      for (int j = 0; j < J; ++j) sums[i][j] += a * b[j];
    }
  });
  for (int i = 0; i < I; ++i)
    for (int j = 0; j < J; ++j) out[i * stride + j] = sum(sums[i][j]);
}

// out[i * stride + j] = left(i) . right(j) for i < rows, j < columns; left gives pointers to S, right to U.
template <typename S, typename U, typename Left, typename Right>
TF_INLINE void dots(int rows, int columns, int64_t width, Left left, Right right, acc_t<S>* out, int64_t stride) {
  constexpr int I = kRegisters == 32 ? 4 : 2, J = 4;
  using Tile = void (*)(const S* const*, const U* const*, int64_t, acc_t<S>*, int64_t);
  // Rows past I are never asked for.
  constexpr int H = smaller(3, I);
  static constexpr Tile tiles[4][J] = {
      {dots_tile<1, 1, S, U>, dots_tile<1, 2, S, U>, dots_tile<1, 3, S, U>, dots_tile<1, 4, S, U>},
      {dots_tile<2, 1, S, U>, dots_tile<2, 2, S, U>, dots_tile<2, 3, S, U>, dots_tile<2, 4, S, U>},
      {dots_tile<H, 1, S, U>, dots_tile<H, 2, S, U>, dots_tile<H, 3, S, U>, dots_tile<H, 4, S, U>},
      {dots_tile<I, 1, S, U>, dots_tile<I, 2, S, U>, dots_tile<I, 3, S, U>, dots_tile<I, 4, S, U>}};
  for (int i = 0; i < rows; i += I) {
    const S* l[I];
    int height = smaller(I, rows - i);
    for (int x = 0; x < height; ++x) l[x] = left(i + x);
    for (int j = 0; j < columns; j += J) {
      const U* r[J];
      int breadth = smaller(J, columns - j);
      for (int x = 0; x < breadth; ++x) r[x] = right(j + x);
      tiles[height - 1][breadth - 1](l, r, width, out + i * stride + j, stride);
    }
  }
}

template <int COUNT, bool WHOLE, typename From, typename S>
__attribute__((noinline)) void mix_of(const From* const* rows, const acc_t<S>* shares, int count, int64_t width, S* out,
                                      [[maybe_unused]] bool past_caches) {
  along<acc_t<S>>(width, [&](int64_t d, auto partial, int n) TF_LAMBDA {
    Vec<acc_t<S>> total = {};
    for (int j = 0; j < (COUNT ? COUNT : count); ++j) total += shares[j] * get(rows[j], d, partial, n);
    if constexpr (WHOLE)
      store(out + d, total);
    else
      put(out, d, total, partial, n, past_caches);
  });
}

// out = sum over j < count of shares[j] * rows[j]. With WHOLE, zeros follow up to a whole vector.
template <bool WHOLE = false, typename From, typename S>
TF_INLINE void mix(const From* const* rows, const acc_t<S>* shares, int count, int64_t width, S* out,
                   bool past_caches) {
  switch (count) {
    case 1:
      return mix_of<1, WHOLE>(rows, shares, count, width, out, past_caches);
    case 2:
      return mix_of<2, WHOLE>(rows, shares, count, width, out, past_caches);
    case 3:
      return mix_of<3, WHOLE>(rows, shares, count, width, out, past_caches);
    case 4:
      return mix_of<4, WHOLE>(rows, shares, count, width, out, past_caches);
    default:
      return mix_of<0, WHOLE>(rows, shares, count, width, out, past_caches);
  }
}

}  // namespace TIGER_FAST_ISA
}  // namespace tiger_fast
