// What the host hands to the routing kernels.
#pragma once

#include "types.h"

namespace tiger_fast {

// "A" is the accumulator type, "S" the activation type. 1 / sqrt(D) is in base, z and conditions.
struct Route {
  Type type;
  int64_t batch, tokens, members, tasks, width, rank;
  Rows experts[kMaxExperts];  // (B, N, D) of S
  const void* base;           // (B N, D) of S: q W0
  const void* z;              // (B N, R) of S: q U
  const void* v;              // (D, padded R) of A
  const void* scale;          // (B or 1, T, padded R) of A
  int64_t scale_batch;        // its stride of b: 0 where shared
  const void* conditions;     // (B or 1, T, D) of A: b0 + shift
  int64_t conditions_batch;
  bool past_caches;  // the output is large and aligned: store it past the caches
  void* out;         // (B, T, N, D) of S
  void* weights;     // (B, T, N, M) of A
};

// (b0 + shift) / sqrt(D), a row for each task, and sample if it is per sample.
struct Conditions {
  bool wide;  // double, else float
  Small shift;
  int64_t batch, task, column;  // shift's strides, `batch` 0 where it is shared
  Small bias;                   // data null where there is none
  double root;                  // 1 / sqrt(D)
  int64_t tasks, width;
  void* out;
};

struct RouteBackward {
  Route inputs;              // `weights` as saved, no `out`; past_caches is that of the experts' gradients
  const void* v_transposed;  // (R, padded D) of A
  Rows grad_tokens;          // (B, T, N, D), null where absent
  Small grad_weights;        // (B, T, N, M), null where absent
  void* grad_experts[kMaxExperts];  // (B, N, D) of S; this and what follows null where nobody needs it
  void* grad_base;                  // (B N, D) of S
  void* grad_z;                     // (B N, R) of S

  // Sums over tokens, A: one slot a chunk, or, where the parameter is per sample, one for each pair of a sample and a
  // chunk that meet: b + c, which is different for each of them.
  int64_t chunk;        // tokens in each
  void* grad_v;         // (slots, R, padded D)
  void* grad_scale;     // (slots, T, padded R)
  void* grad_conditions;  // (slots, T, padded D)
};

}  // namespace tiger_fast
