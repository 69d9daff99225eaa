#include "sums.h"

#include "entry.h"
#include "rows.h"

namespace tiger_fast {
namespace TIGER_FAST_ISA {

namespace {

template <typename A>
void add_up(const Sums& a, int64_t begin, int64_t end) {
  int64_t blocks = (a.size + kSumBlock - 1) / kSumBlock;
  for (int64_t i = begin; i < end; ++i) {
    int64_t g = i / blocks, start = i % blocks * kSumBlock, stop = smaller(start + kSumBlock, a.size);
    int64_t first = 0, last = a.chunks;
    if (a.per_sample) {
      first = g + g * a.tokens / a.chunk;
      last = g + ((g + 1) * a.tokens - 1) / a.chunk + 1;
      if (a.tokens == 0) last = first;
    }
    const A* partial = (const A*)a.partial + start;
    A* out = (A*)a.out + g * a.size + start;
    along<A>(stop - start, [&](int64_t d, auto part, int n) TF_LAMBDA {
      Vec<A> total = {};
      for (int64_t s = first; s < last; ++s) total += get(partial + s * a.size, d, part, n);
      put(out, d, total * A(a.scale), part, n);
    });
  }
}

}  // namespace

void sums(const Sums& a, int64_t begin, int64_t end) {
  if (a.wide)
    add_up<double>(a, begin, end);
  else
    add_up<float>(a, begin, end);
}

}  // namespace TIGER_FAST_ISA
}  // namespace tiger_fast
