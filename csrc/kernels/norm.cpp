#include "norm.h"

#include "entry.h"

namespace tiger_fast {
namespace TIGER_FAST_ISA {

int64_t norm_scratch(Type type, int64_t width) {
  Pieces pieces{};
  by_type(type, [&](auto s) { NormRows<acc_t<decltype(s)>>(pieces, width); });
  return pieces.bytes;
}

}  // namespace TIGER_FAST_ISA
}  // namespace tiger_fast
