// What the host hands to the counterfactual losses' kernels.
#pragma once

#include "types.h"

namespace tiger_fast {

// In the order of tiger_fast.reference.TOKEN_LOSSES.
enum class TokenLoss : int { cross_entropy, l1, mse, bce, cosine };
constexpr int kTokenLosses = 5;

struct Counterfactual {
  Type type;
  TokenLoss loss;
  int64_t batch, members, tokens, width, classes;
  bool projected;                // `features` are projections (B, N, C), else experts (B, N, D)
  Rows features[kMaxExperts];
  Small weights;                 // (B, N, M)
  const void* head;              // (C, D) of the accumulator type, rows `head_stride` apart; null if projected
  int64_t head_stride;
  const void* panel;             // its transpose in columns of classes; null: inner products row by row
  const void* bias;              // (C) of the accumulator type, or null
  Small target;                  // (B, N, C); unless cross_entropy
  const void* labels;            // (B, N) of int64 or int32; for cross_entropy
  bool wide_labels;
  int64_t label_stride[2];
  int64_t ignore_index;
  const uint8_t* valid;          // (B, N), or null
  int64_t valid_stride[2];
  void* kept;                    // (B N, M, C) of the accumulator type: P, which forward leaves to backward; or null
  void* full;                    // (B, N) of the accumulator type
  void* without;                 // (B, M, N) of the accumulator type
};

// Outputs are null where nobody needs them.
struct CounterfactualBackward {
  Counterfactual inputs;         // without `full` and `without`
  Small grad_full;               // (B, N); without data where the gradient is absent
  Small grad_without;            // (B, M, N); likewise
  const void* head_columns;      // the head in columns of D
  void* grad_features[kMaxExperts];  // token r of expert k begins at grad_features[k] + r's (b, n) by these strides
  int64_t grad_stride[2];
  bool past_caches;
  void* grad_weights;            // (B, N, M) of the accumulator type
  void* grad_target;             // (B, N, C) of the accumulator type
  int64_t chunk;                 // tokens that share a partial sum
  void* head_sums;               // (chunks, C and D in columns of D) of the accumulator type
  void* bias_sums;               // (chunks, in_whole_vectors(C)) of the accumulator type
};

// The head's layouts for products: (C, D) in columns of D is (D / kColumn, C, kColumn), and its transpose in columns of
// classes (C / kColumn, D, kColumn), both rounded up, with zeros behind the last.
constexpr int64_t kColumn = 48;  // whole register tiles of every instruction set
inline __attribute__((always_inline)) int64_t in_columns(int64_t n) { return (n + kColumn - 1) / kColumn * kColumn; }

struct CounterfactualPack {
  bool wide;                     // double, else float
  int64_t width, classes;
  void* head;                    // (C, D), rows `head_stride` apart
  int64_t head_stride;
  void* panel;                   // the transpose in columns of classes
  void* columns;                 // in columns of D
};

}  // namespace tiger_fast
