// Small products inside kernels: a few rows times a panel, accumulated in registers.
//
// "Matrix products belong to torch's library" holds for products of their own; these are the skinny ones (rank R, T tasks,
// C classes) whose other operand is a tile that the kernel has in cache anyway.
#pragma once

#include "simd.h"

namespace tiger_fast {
namespace TIGER_FAST_ISA {

// Rows and vectors of one register tile: with its operands it fills the registers.
constexpr int kTileRows = kRegisters == 32 ? 8 : 4;
constexpr int kTileVectors = 3;

// A register tile's width: VECTORS whole vectors, and half of one behind them if HALF. Processors that take a vector of 64
// bytes in two steps take half of one in a single step.
template <int VECTORS, bool HALF = false>
struct Width {
  static constexpr int vectors = VECTORS;
  static constexpr bool half = HALF;
};
constexpr bool kHalves = kBytes == 64;

template <typename A>
struct half_vector {
  typedef A type __attribute__((vector_size(kBytes / 2)));
  typedef A unaligned __attribute__((vector_size(kBytes / 2), aligned(alignof(A)), may_alias));
};

// out(i)[j] = (add ? out(i)[j] : 0) + sum over k < depth of left(i, k) * right(k)[j], for ROWS x W. Behind half a vector
// zeros are stored to its end.
template <typename A, int ROWS, typename W, typename Left, typename Right, typename Out>
TF_INLINE void product_tile(W, int64_t depth, int rows, bool add, Left left, Right right, Out out) {
  constexpr int V = W::vectors;
  using Half = typename half_vector<A>::type;
  using HalfInMemory = typename half_vector<A>::unaligned;
  Vec<A> sums[ROWS][V + 1];
  [[maybe_unused]] Half rest[ROWS];
  for (int i = 0; i < ROWS; ++i) {
    bool more = add && i < rows;
    for (int j = 0; j < V; ++j) sums[i][j] = more ? load(out(i) + j * L<A>) : Vec<A>{};
    if constexpr (W::half) rest[i] = more ? (Half) * (const HalfInMemory*)(out(i) + V * L<A>) : Half{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const A* panel = right(k);
    Vec<A> b[V + 1];
    [[maybe_unused]] Half b_rest;
    for (int j = 0; j < V; ++j) b[j] = load(panel + j * L<A>);
    if constexpr (W::half) b_rest = *(const HalfInMemory*)(panel + V * L<A>);
    for (int i = 0; i < ROWS; ++i) {
      A x = left(i, k);
      for (int j = 0; j < V; ++j) sums[i][j] += splat(x) * b[j];
      if constexpr (W::half) rest[i] += (x - Half{}) * b_rest;
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    if (i >= rows) break;
    for (int j = 0; j < V; ++j) store(out(i) + j * L<A>, sums[i][j]);
    if constexpr (W::half) {
      auto* behind = (HalfInMemory*)(out(i) + V * L<A>);
      behind[0] = rest[i];
      behind[1] = Half{};
    }
  }
}

// step(offset, Width) for each register tile of [0, columns), which is a multiple of L<A>, or with HALVES of half of it.
template <typename A, bool HALVES = false, typename Step>
TF_INLINE void by_tiles(int64_t columns, Step step) {
  int64_t j = 0;
  for (; columns - j >= kTileVectors * L<A>; j += kTileVectors * L<A>) step(j, Width<kTileVectors>{});
  int64_t halves = (columns - j) / (L<A> / 2);
  if constexpr (HALVES) {
    if (halves == 1) step(j, Width<0, true>{});
    if (halves == 3) step(j, Width<1, true>{});
    if (halves == 5) step(j, Width<2, true>{});
  }
  if (halves == 2) step(j, Width<1>{});
  if (halves == 4) step(j, Width<2>{});
}

// out(i)[0, columns) (+)= sum over k of left(i, k) * right(k)[0, columns), i < rows. `columns` is a multiple of L<A>.
// left(i, k) must be readable for i up to the next multiple of kTileRows: callers clamp i or pad.
template <typename A, typename Left, typename Right, typename Out>
TF_INLINE void product(int rows, int64_t columns, int64_t depth, bool add, Left left, Right right, Out out) {
  for (int i = 0; i < rows; i += kTileRows)
    by_tiles<A>(columns, [&](int64_t j, auto width) TF_LAMBDA {
      product_tile<A, kTileRows>(
          width, depth, rows - i, add, [&](int r, int64_t k) TF_LAMBDA { return left(i + r, k); },
          [&](int64_t k) TF_LAMBDA { return right(k) + j; }, [&](int r) TF_LAMBDA { return out(i + r) + j; });
    });
}

}  // namespace TIGER_FAST_ISA
}  // namespace tiger_fast
