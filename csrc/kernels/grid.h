// Rows under any number of leading dimensions, with any strides.
#pragma once

#include "types.h"

namespace tiger_fast {

constexpr int kMaxDims = 64;  // torch's own limit for pointwise operations

// Rows of M values; their leading dimensions, joined where every operand allows it, are shared by all operands.
struct RowGrid {
  int dims;  // at least 1; the last one is walked fastest
  int64_t sizes[kMaxDims];
  int64_t rows;  // their product
  int members;
};

// A tensor over a RowGrid, any strides.
struct RowOperand {
  const void* data;
  Type type;
  int64_t stride[kMaxDims];
  int64_t member_stride;
};

// Where a row begins.
inline __attribute__((always_inline)) int64_t offset_of(const RowGrid& grid, const RowOperand& x, int64_t row) {
  int64_t offset = 0;
  for (int i = grid.dims - 1; i > 0; --i) {
    offset += row % grid.sizes[i] * x.stride[i];
    row /= grid.sizes[i];
  }
  return offset + row * x.stride[0];
}

}  // namespace tiger_fast
