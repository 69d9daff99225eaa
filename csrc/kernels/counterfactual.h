// What the host hands to the counterfactual losses' kernels.
#pragma once

#include "types.h"

namespace tiger_fast {

// In the order of tiger_fast.reference.TOKEN_LOSSES.
enum class TokenLoss : int { cross_entropy, l1, mse, bce, cosine };
constexpr int kTokenLosses = 5;

// Elements that rows of scratch and of padded copies are rounded up to: whole vectors of every instruction set.
constexpr int64_t kPad = 16;
inline __attribute__((always_inline)) int64_t in_whole_vectors(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

struct Counterfactual {
  Type type;
  TokenLoss loss;
  int64_t batch, members, tokens, width, classes;
  bool projected;                // `features` are projections (B, N, C), else experts (B, N, D)
  Rows features[kMaxExperts];
  Small weights;                 // (B, N, M)
  const void* head;              // (C, D) of the accumulator type, rows `head_stride` apart; null if projected
  int64_t head_stride;
  const void* panel;             // its transpose as `counterfactual_pack` lays it out; null: inner products row by row
  const void* bias;              // (C) of the accumulator type, or null
  Small target;                  // (B, N, C); unless cross_entropy
  const void* labels;            // (B, N) of int64 or int32; for cross_entropy
  bool wide_labels;
  int64_t label_stride[2];
  int64_t ignore_index;
  const uint8_t* valid;          // (B, N), or null
  int64_t valid_stride[2];
  void* full;                    // (B, N) of the accumulator type
  void* without;                 // (B, M, N) of the accumulator type
};

// Outputs are null where nobody needs them.
struct CounterfactualBackward {
  Counterfactual inputs;         // without `full` and `without`
  Small grad_full;               // (B, N); without data where the gradient is absent
  Small grad_without;            // (B, M, N); likewise
  const void* padded_head;       // (C, D) of the accumulator type, rows `padded_stride` apart, readable in whole vectors
  int64_t padded_stride;
  void* grad_features[kMaxExperts];  // token r of expert k begins at grad_features[k] + r's (b, n) by these strides
  int64_t grad_stride[2];
  bool past_caches;
  void* grad_weights;            // (B, N, M) of the accumulator type
  void* grad_target;             // (B, N, C) of the accumulator type
  int64_t chunk;                 // tokens that share a partial sum
  void* head_sums;               // (chunks, C, in_whole_vectors(D)) of the accumulator type
  void* bias_sums;               // (chunks, in_whole_vectors(C)) of the accumulator type
};

struct CounterfactualPack {
  bool wide;                     // double, else float
  int64_t width, classes;
  const void* head;              // (C, D), rows `head_stride` apart
  int64_t head_stride;
  void* panel;                   // counterfactual_panel_size elements
};

// Tokens that are projected together: enough rows of features for whole register tiles, few enough to stay in a cache.
inline __attribute__((always_inline)) int64_t counterfactual_tile(int64_t members) { return members >= 4 ? 8 : members >= 2 ? 16 : 32; }

// Bytes of scratch that a kernel wants for itself.
inline size_t counterfactual_scratch(const Counterfactual& a, bool backward) {
  int64_t rows = counterfactual_tile(a.members) * a.members, classes = in_whole_vectors(a.classes);
  int64_t width = in_whole_vectors(a.projected ? 1 : a.width);
  int64_t elements = (rows + a.members + 5) * classes + rows * width + (backward ? 8 * width : 0);
  return size_t(elements) * (a.type == Type::f64 ? 8 : 4);
}

// Elements of the packed head: at most these, for every instruction set.
inline int64_t counterfactual_panel_size(int64_t width, int64_t classes) { return width * (classes + 48); }

}  // namespace tiger_fast
