// What the host hands to the leave-one-out kernels.
#pragma once

#include "types.h"

namespace tiger_fast {

struct LeaveOneOut {
  Type type;
  int64_t batch, tasks, members, tokens, width;
  Rows experts[kMaxExperts];  // (B, N, D)
  Small weights;              // (B, T, N, M)
  bool renormalize;
  bool past_caches;  // the outputs are large and aligned: store them past the caches
  void* out;         // (B, T, M, N, D)
};

struct LeaveOneOutBackward {
  LeaveOneOut inputs;  // without `out`; past_caches is the gradients'
  Rows grad;           // (B, T, M, N, D)
  void* grad_experts[kMaxExperts];  // (B, N, D), or null where nobody needs it
  void* grad_weights;               // (B, T, N, M) of the accumulator type, or null
};

}  // namespace tiger_fast
