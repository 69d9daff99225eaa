// What the host hands to the kernels of the causal target and of its alignment loss.
#pragma once

#include "grid.h"

namespace tiger_fast {

// Kernels work in double if `wide`, else in float. Their units are chunks of kRowChunk rows.
constexpr int64_t kRowChunk = 1024;

struct CausalTarget {
  bool wide;
  double tau, eps;
  RowGrid grid;
  RowOperand delta;
  void* out;  // (..., M) of the accumulator type
};

struct CausalTargetBackward {
  CausalTarget inputs;  // without `out`
  RowOperand grad;
  void* grad_delta;  // (..., M) of delta's type
};

struct AlignmentLoss {
  bool wide;
  double tau, eps;
  RowGrid grid;
  RowOperand delta, weights;
  RowOperand mask;  // one byte a row, `data` null if every row counts
  double* sums;     // of the divergences, and
  int64_t* counts;  // of the rows that count, by chunk
  // (..., M) of the accumulator type: the derivative of each row's divergence by its weights; null where it is not kept.
  void* slopes;
};

struct AlignmentLossBackward {
  AlignmentLoss inputs;  // without `sums`, `counts` and `slopes`
  double scale;          // the loss's gradient over the rows that count
  void* grad_delta;      // (..., M) of delta's type, or null
  void* grad_weights;    // (..., M) of the weights' type, or null
};

}  // namespace tiger_fast
