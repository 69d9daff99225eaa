// What the host hands to the adapter's kernels: what stands around its two products.
#pragma once

#include "grid.h"

namespace tiger_fast {

// Parameters are of the accumulator type. `x` and `grad` have dense rows under any leading strides; all else is dense.

// y = LayerNorm(x)
struct AdapterIn {
  Type type;
  int64_t width;  // C
  RowGrid grid;
  RowOperand x;
  const void *weight, *bias;  // (C)
  double eps;
  bool past_caches;
  void* out;  // (rows, C)
};

struct AdapterInBackward {
  AdapterIn inputs;  // without `out`; past_caches is grad_x's
  const void* grad;  // (rows, C)
  int64_t chunk;     // rows in each
  void* grad_x;      // (rows, C), or null
  // (chunks, C in whole vectors) partial sums of the accumulator type, or null.
  void *grad_weight, *grad_bias;
};

// out = LayerNorm(linear + linear_bias + GELU(gate + gate_bias))
struct AdapterOut {
  Type type;
  int64_t rows, width;                  // width = D
  const void *linear, *gate;            // (rows, D): the products
  const void *linear_bias, *gate_bias;  // (D)
  const void *weight, *bias;            // (D)
  double eps;
  bool past_caches;
  void* out;  // (rows, D)
};

struct AdapterOutBackward {
  AdapterOut inputs;  // without `bias` and `out`
  RowGrid grid;
  RowOperand grad;  // (rows, D)
  int64_t chunk;
  void *into_linear, *into_gate;  // (rows, D), or null: the products' gradients; into_linear may be `linear` itself
  // (chunks, D in whole vectors) partial sums of the accumulator type, or null.
  void *grad_linear_bias, *grad_gate_bias, *grad_weight, *grad_bias;
};

}  // namespace tiger_fast
