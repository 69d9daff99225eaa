// What the host hands to the kernels of the competency-weighted mixture.
#pragma once

#include "types.h"

namespace tiger_fast {

struct CompetencyWeights {
  bool wide;  // double, else float
  int64_t members;
  Small confidence, refined;  // (B, M)
  void* weights;              // (B, M) of the accumulator type, as all that follows
};

struct CompetencyWeightsBackward {
  bool wide;
  int64_t members;
  const void* weights;       // (B, M)
  const void* through_rows;  // (B, M): the weights' gradient through the mixture, or null
  Small grad;                // (B, M): the weights' own gradient, `data` null if there is none
  void* out;                 // (B, M): the gradient of either confidence
};

struct CompetencyAggregate {
  Type type;
  int64_t batch, tokens, members, width;
  Rows experts[kMaxExperts];     // (B, N, D)
  const void* weights;           // (B, M) of the accumulator type
  const void *weight, *bias;     // (D) of the accumulator type: the norm's
  double eps;
  bool past_caches;
  void* out;  // (B, N, D)
};

struct CompetencyAggregateBackward {
  CompetencyAggregate inputs;  // without `bias` and `out`; past_caches is the gradients'
  Rows grad;                   // (B, N, D)
  int64_t chunk;               // tokens in each
  void* grad_experts[kMaxExperts];  // (B, N, D), or null where nobody needs it
  // Partial sums of the accumulator type, or null: by chunk, rows of D in whole vectors for the norm's weight and bias; and by
  // sample and chunk (see Sums), the mixture weights'.
  void *norm_weight, *norm_bias, *mixture;
};

}  // namespace tiger_fast
