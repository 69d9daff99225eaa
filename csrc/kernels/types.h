// What host code and kernels share: element types, strided inputs and the limits of the contract. No torch here.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace tiger_fast {

constexpr int kMaxExperts = 16, kMaxTasks = 32, kMaxRank = 256, kMaxGroup = 32;

enum class Type : int { f32, f64, bf16, f16 };

// Rows of working memory and of packed operands are rounded up to whole vectors of every instruction set.
constexpr int64_t kPad = 16;
inline __attribute__((always_inline)) int64_t in_whole_vectors(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// Storage of the half types; arithmetic on them is done in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type that sums are kept in.
template <typename S>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};
template <typename S>
using acc_t = typename accumulator<S>::type;

// An input of the activation type: the strides of its dimensions but the last, whose stride is 1 (all in elements).
struct Rows {
  const void* data;
  int64_t stride[4];
};

// A small input of a type of its own, any strides (in elements; 0 where it broadcasts).
struct Small {
  const void* data;
  Type type;
  int64_t stride[4];
};

#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kGuard = 64;  // bytes behind each piece that nobody may touch
#endif

// Working memory, cut into pieces that begin on cache lines. From null they are only counted: the code that lays a kernel's
// pieces out is the code that says how many bytes the host has to bring.
struct Pieces {
  void* memory;
  int64_t bytes = 0;

  template <typename A>
  inline __attribute__((always_inline)) A* take(int64_t count) {
    A* piece = memory ? (A*)((char*)memory + bytes) : nullptr;
    bytes += in_whole_vectors(count) * int64_t(sizeof(A));
#if defined(__SANITIZE_ADDRESS__)
    if (memory) __asan_poison_memory_region((char*)memory + bytes, kGuard);
    bytes += kGuard;
#endif
    return piece;
  }
};

// Calls f with a value of the storage type that `type` names.
template <typename F>
inline __attribute__((always_inline)) void by_type(Type type, F&& f) {
  switch (type) {
    case Type::f32:
      return f(float{});
    case Type::f64:
      return f(double{});
    case Type::bf16:
      return f(bf16{});
    case Type::f16:
      return f(f16{});
  }
}

}  // namespace tiger_fast
