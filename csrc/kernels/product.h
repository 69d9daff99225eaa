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

// Columns of a panel, rounded up to whole vectors.
template <typename A>
constexpr int64_t padded(int64_t columns) {
  return (columns + L<A> - 1) / L<A> * L<A>;
}

// tile[i][j] = (add ? tile[i][j] : 0) + sum over k < depth of left(i, k) * right(k)[j], for ROWS x VECTORS vectors.
template <typename A, int ROWS, int VECTORS, typename Left, typename Right, typename Out>
TF_INLINE void product_tile(int64_t depth, int rows, bool add, Left left, Right right, Out out) {
  Vec<A> sums[ROWS][VECTORS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) sums[i][j] = add && i < rows ? load(out(i) + j * L<A>) : Vec<A>{};
  for (int64_t k = 0; k < depth; ++k) {
    const A* panel = right(k);
    Vec<A> b[VECTORS];
    for (int j = 0; j < VECTORS; ++j) b[j] = load(panel + j * L<A>);
    for (int i = 0; i < ROWS; ++i) {
      Vec<A> a = splat(left(i, k));
      for (int j = 0; j < VECTORS; ++j) sums[i][j] += a * b[j];
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j)
      if (i < rows) store(out(i) + j * L<A>, sums[i][j]);
}

// out(i)[0, columns) (+)= sum over k of left(i, k) * right(k)[0, columns), i < rows. `columns` is a multiple of L<A>.
// left(i, k) must be readable for i up to the next multiple of kTileRows: callers clamp i or pad.
template <typename A, typename Left, typename Right, typename Out>
TF_INLINE void product(int rows, int64_t columns, int64_t depth, bool add, Left left, Right right, Out out) {
  for (int i = 0; i < rows; i += kTileRows) {
    int64_t j = 0;
    auto run = [&](auto vectors) TF_LAMBDA {
      constexpr int V = decltype(vectors)::value;
      product_tile<A, kTileRows, V>(
          depth, rows - i, add, [&](int r, int64_t k) TF_LAMBDA { return left(i + r, k); },
          [&](int64_t k) TF_LAMBDA { return right(k) + j; }, [&](int r) TF_LAMBDA { return out(i + r) + j; });
      j += V * L<A>;
    };
    while (columns - j >= kTileVectors * L<A>) run(constant<kTileVectors>{});
    if (columns - j == 2 * L<A>) run(constant<2>{});
    if (columns - j == L<A>) run(constant<1>{});
  }
}

}  // namespace TIGER_FAST_ISA
}  // namespace tiger_fast
