// Sums over chunks of tokens, in order: what makes a sum over tokens the same at any number of threads.
#pragma once

#include "types.h"

namespace tiger_fast {

// How [0, count) tokens are cut into chunks: by their number alone, never by the threads there are.
struct Chunks {
  int64_t size, count;
  explicit Chunks(int64_t tokens) {
    constexpr int64_t kMost = 64, kSmallest = 32;  // partial sums and threads to feed; tokens that repay a partial sum
    size = (tokens + kMost - 1) / kMost;
    size = size < kSmallest ? kSmallest : size;
    count = (tokens + size - 1) / size;
  }
};

// out[g] = sum of partial[s] over the slots s of group g, each of `size` elements of the accumulator type. One group has
// the slots [0, chunks); where there is a group for each sample, sample b has a slot b + c for each chunk c that it meets.
struct Sums {
  bool wide;  // double, else float
  const void* partial;
  void* out;
  int64_t size;
  int64_t chunks, chunk;  // how many, and the tokens in each
  bool per_sample;
  int64_t tokens;  // N
  double scale;    // of every sum
};

}  // namespace tiger_fast
