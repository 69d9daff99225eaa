// What the host hands to the group attention kernels.
#pragma once

#include "types.h"

namespace tiger_fast {

// An output of the activation type: the strides of its dimensions but the last, whose stride is 1 (all in elements).
struct Target {
  void* data;
  int64_t stride[3];
};

struct GroupAttention {
  Type type;
  int64_t batch, members, tokens;
  int64_t heads, head;  // how many, and the channels of each
  Rows q, k, v;         // (B, G, N, D), D = heads * head
  bool past_caches;     // the outputs are large, and each head is aligned: store them past the caches
  Target out;           // (B, G, N, D)
};

struct GroupAttentionBackward {
  GroupAttention inputs;          // without `out`; past_caches is the gradients'
  Rows grad;                      // (B, G, N, D)
  Target grad_q, grad_k, grad_v;  // (B, G, N, D), data null where nobody needs it
};

}  // namespace tiger_fast
