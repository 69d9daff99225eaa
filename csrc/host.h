// What the host side of every op shares: tensors as kernels see them, outputs, products by torch's library, threads, and
// the choice of an instruction set. Torch is reached through its stable ABI alone.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <exception>
#include <initializer_list>
#include <mutex>
#include <optional>
#include <vector>

#include "kernels/entry.h"
#include "kernels/grid.h"
#include "kernels/types.h"

namespace tiger_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// ---- instruction sets

enum class Level : int { plain, v3, v4 };
// The best that the processor has, or what TIGER_FAST_CPU_LEVEL asks for (an error if the processor lacks it).
Level level();
const char* level_name();

#if TIGER_FAST_HAS_V3_V4
#define TF_KERNEL(name)                                       \
  (::tiger_fast::level() == ::tiger_fast::Level::v4   ? &::tiger_fast::v4::name \
   : ::tiger_fast::level() == ::tiger_fast::Level::v3 ? &::tiger_fast::v3::name \
                                                      : &::tiger_fast::plain::name)
#else
#define TF_KERNEL(name) (&::tiger_fast::plain::name)
#endif

// ---- types

Type type_of(const Tensor& t);
ScalarType scalar_type(Type type);
// float64 for float64, else float32: sums, weights, losses.
ScalarType accumulator_type(const Tensor& t);

// ---- tensors

// An uninitialised contiguous CPU tensor; a large one from tiger_fast's memory.
Tensor allocate(const Sizes& sizes, ScalarType type);
Tensor zeros(const Sizes& sizes, ScalarType type);
// A view: the same storage, `offset` elements behind t's first.
Tensor view(const Tensor& t, const Sizes& sizes, const Sizes& strides, int64_t offset = 0);
Tensor converted(const Tensor& t, ScalarType type);
// t itself if its last stride is 1 (or it has at most one element along it), else a contiguous copy.
Tensor with_dense_rows(const Tensor& t);

// What kernels are handed. `rows` wants dense rows; `small` takes any strides.
Rows rows(const Tensor& t);
Small small(const Tensor& t);

Sizes sizes_of(const Tensor& t);
// Rows under any leading dimensions, for kernels that take those: an operand, and the grid of the rows (..., M) of `like`.
// The operands' leading dimensions, which `like` shares, are joined where each of them is walked through in even steps.
RowOperand operand(const Tensor& t);
RowGrid join(const Tensor& like, std::initializer_list<RowOperand*> operands);

// Whether to store an output of this size past the caches: it is large, and its rows are aligned to whole vectors.
bool past_caches(const Tensor& t, int64_t width);

// ---- checks: the raw ops can be called with anything, and nothing wrong may reach a pointer

// A strided CPU tensor of these sizes (-1: any) and of this type (none: any floating one).
void expect(const char* name, const Tensor& t, const Sizes& sizes, std::optional<ScalarType> type = std::nullopt);
// The same of a tensor of any type, which the caller checks.
void expect_sizes(const char* name, const Tensor& t, const Sizes& sizes);
// 1 <= value <= most.
void expect_between(const char* name, int64_t value, int64_t most);
// The experts: 1 to 16 tensors (B, N, D) that agree in sizes and type.
void expect_experts(const std::vector<Tensor>& experts);

// Whether bit i of the gradients that are wanted is set.
inline bool needed(int64_t needs, int64_t i) { return needs >> i & 1; }

// ---- products, by torch's library

// out = alpha * a @ b, or that added to out; two-dimensional, any strides.
void multiply(Tensor& out, const Tensor& a, const Tensor& b, double alpha = 1, bool add = false);
// (B, N, D) as (B N, D): a view where the strides allow one, else a copy.
Tensor flattened(const Tensor& t);

// ---- threads, torch's own

// A thread's working memory, on a cache line. Raises std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

// f(begin, end) over ranges of [0, count), each at least about `grain` long.
template <typename F>
void parallel(int64_t count, int64_t grain, const F& f) {
  if (count > 0) torch::stable::parallel_for(0, count, grain < 1 ? 1 : grain, f);
}

// The first exception of any thread; torch's own parallel_for would say no more than that there was one.
class Failure {
 public:
  void keep() noexcept;  // of a catch block
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::mutex mutex_;
  std::exception_ptr first_;
};

// The same with `scratch` bytes of working memory for each range: f(begin, end, memory).
template <typename F>
void parallel(int64_t count, int64_t grain, int64_t scratch, const F& f) {
  Failure failure;
  parallel(count, grain, [&](int64_t begin, int64_t end) {
    try {
      Scratch memory(scratch);
      f(begin, end, memory.data());
    } catch (...) {
      failure.keep();
    }
  });
  failure.rethrow();
}

// `factor` times a dense tensor, of the accumulator type, as (1, elements).
Tensor scaled(const Tensor& t, double factor);

// `scale` times the sums of `partial`'s slots (see Sums): (groups, size) of the accumulator type.
Tensor summed(const Tensor& partial, int64_t groups, int64_t size, const Chunks& chunks, bool per_sample,
              int64_t tokens, double scale = 1);

// Units of `work` (about an element read or written) that make a thread worth waking.
constexpr int64_t kGrain = 32768;
inline int64_t grain_of(int64_t work) { return work >= kGrain ? 1 : kGrain / (work < 1 ? 1 : work); }

}  // namespace tiger_fast
