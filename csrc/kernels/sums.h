// Sums over chunks of tokens, in order: what makes a sum over tokens the same at any number of threads.
#pragma once

#include "types.h"

namespace tiger_fast {

// How [0, count) tokens are cut into chunks: by the sizes alone, never by the threads there are.
struct Chunks {
  int64_t size, count;
  // `elements` of partial sums are kept for each chunk, whether or not all are wanted: what is wanted must not change bits.
  Chunks(int64_t tokens, int64_t elements) {
    constexpr int64_t kMost = 64, kFewest = 4;     // chunks, to feed threads; fewer where their sums are large
    constexpr int64_t kElements = int64_t(8) << 20;  // of all partial sums
    constexpr int64_t kSmallest = 32;              // tokens that repay a partial sum
    int64_t most = elements > 0 ? kElements / elements : kMost;
    most = most < kFewest ? kFewest : most > kMost ? kMost : most;
    size = (tokens + most - 1) / most;
    size = size < kSmallest ? kSmallest : size;
    count = (tokens + size - 1) / size;
  }
};

constexpr int64_t kSumBlock = 1024;  // elements of one unit of work; each group has its own

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
