#include "host.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#if TIGER_FAST_HAS_V3_V4
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "memory.h"

namespace tiger_fast {
namespace {

bool poisoned = false;

#if TIGER_FAST_HAS_V3_V4
// Two of x86-64-v3's instructions that not every compiler's __builtin_cpu_supports knows.
bool has_lzcnt_and_movbe() {
  unsigned a, b, c, d;
  bool movbe = __get_cpuid(1, &a, &b, &c, &d) && c >> 22 & 1;
  return movbe && __get_cpuid(0x80000001, &a, &b, &c, &d) && c >> 5 & 1;
}

bool has(Level wanted) {
  if (wanted == Level::plain) return true;
  __builtin_cpu_init();
  bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
            __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") && has_lzcnt_and_movbe();
  if (wanted == Level::v3) return v3;
  return v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else
bool has(Level wanted) { return wanted == Level::plain; }
#endif

constexpr const char* kNames[] = {"plain", "v3", "v4"};

Level choose() {
  memory::limit_bytes();  // a wrong setting is an error of the first call, not of the first large one
  if (const char* asked = std::getenv("TIGER_FAST_CPU_LEVEL"); asked && *asked) {
    for (int i = 0; i < 3; ++i)
      if (!std::strcmp(asked, kNames[i])) {
        STD_TORCH_CHECK(has(Level(i)), "TIGER_FAST_CPU_LEVEL is ", asked, ", which this processor or build lacks");
        return Level(i);
      }
    STD_TORCH_CHECK(false, "TIGER_FAST_CPU_LEVEL must be plain, v3 or v4, got ", asked);
  }
  for (Level l : {Level::v4, Level::v3})
    if (has(l)) return l;
  return Level::plain;
}

Sizes dense_strides(const Sizes& sizes) {
  Sizes strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= sizes[i] > 0 ? sizes[i] : 1;
  }
  return strides;
}

size_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      STD_TORCH_CHECK(false, "tiger_fast's CPU kernels take float32, float64, bfloat16 and float16");
  }
}

}  // namespace

Level level() {
  static const Level chosen = choose();
  return chosen;
}

const char* level_name() { return kNames[int(level())]; }

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Type::f32;
    case ScalarType::Double:
      return Type::f64;
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::f16;
    default:
      STD_TORCH_CHECK(false, "tiger_fast's CPU kernels take float32, float64, bfloat16 and float16");
  }
}

ScalarType scalar_type(Type type) {
  constexpr ScalarType types[] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half};
  return types[int(type)];
}

ScalarType accumulator_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor allocate(const Sizes& sizes, ScalarType type) {
  size_t bytes = bytes_of(type);
  // Half of what 64 bits count, so that rounding up to whole pages stays within them too.
  for (int64_t s : sizes)
    STD_TORCH_CHECK(!__builtin_mul_overflow(bytes, size_t(s), &bytes) && bytes <= size_t(INT64_MAX),
                    "the result's size overflows 64 bits");
  Tensor made = [&] {
    if (bytes < memory::kSmallest)
      return torch::stable::empty(sizes, type, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
    size_t size = 0;
    void* data = memory::acquire(bytes, &size);
    Sizes strides = dense_strides(sizes);
    AtenTensorHandle handle = nullptr;
    AOTITorchError status = torch_from_blob(
        data, int64_t(sizes.size()), sizes.data(), strides.data(), 0,
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), aoti_torch_device_type_cpu(), -1, &handle,
        aoti_torch_layout_strided(), nullptr, 0,
        [](void* block, void* context) { memory::release(block, reinterpret_cast<size_t>(context)); },
        reinterpret_cast<void*>(size));
    if (status != AOTI_TORCH_SUCCESS) memory::release(data, size);
    TORCH_ERROR_CODE_CHECK(status);
    return Tensor(handle);
  }();
  if (poisoned && bytes) std::memset(made.mutable_data_ptr(), 0xff, bytes);
  return made;
}

Tensor zeros(const Sizes& sizes, ScalarType type) {
  Tensor made = allocate(sizes, type);
  torch::stable::zero_(made);
  return made;
}

Tensor view(const Tensor& t, const Sizes& sizes, const Sizes& strides, int64_t offset) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      t.get(), int64_t(sizes.size()), sizes.data(), strides.data(), offset, &handle));
  return Tensor(handle);
}

Tensor converted(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

Tensor with_dense_rows(const Tensor& t) {
  int64_t last = t.dim() - 1;
  return t.stride(last) == 1 || t.size(last) <= 1 ? t : torch::stable::contiguous(t);
}

Rows rows(const Tensor& t) {
  Rows r{t.const_data_ptr(), {}};
  for (int64_t i = 0; i + 1 < t.dim(); ++i) r.stride[i] = t.stride(i);
  return r;
}

Small small(const Tensor& t) {
  Small s{t.const_data_ptr(), type_of(t), {}};
  for (int64_t i = 0; i < t.dim(); ++i) s.stride[i] = t.stride(i);
  return s;
}

Sizes sizes_of(const Tensor& t) {
  Sizes sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return sizes;
}

RowOperand operand(const Tensor& t) {
  RowOperand x{t.const_data_ptr(), type_of(t), {}, t.stride(-1)};
  for (int64_t i = 0; i + 1 < t.dim(); ++i) x.stride[i] = t.stride(i);
  return x;
}

RowGrid join(const Tensor& like, std::initializer_list<RowOperand*> operands) {
  RowGrid grid{};
  grid.rows = 1;
  grid.members = int(like.size(-1));
  for (int64_t i = 0; i + 1 < like.dim(); ++i) {
    int64_t size = like.size(i);
    grid.rows *= size;
    if (size == 1) continue;
    int last = grid.dims - 1;
    bool even = grid.dims > 0;
    for (RowOperand* x : operands) even = even && x->stride[last] == x->stride[i] * size;
    if (!even) ++last, ++grid.dims;
    grid.sizes[last] = even ? grid.sizes[last] * size : size;
    for (RowOperand* x : operands) x->stride[last] = x->stride[i];
  }
  if (grid.dims == 0) {
    grid.dims = 1, grid.sizes[0] = 1;
    for (RowOperand* x : operands) x->stride[0] = 0;
  }
  return grid;
}

bool past_caches(const Tensor& t, int64_t width) {
  constexpr int64_t kLarge = int64_t(8) << 20;
  int64_t bytes = int64_t(t.element_size());
  return t.numel() * bytes >= kLarge && width * bytes % 64 == 0 &&
         reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 64 == 0;
}

void expect_sizes(const char* name, const Tensor& t, const Sizes& sizes) {
  STD_TORCH_CHECK(t.is_cpu() && t.layout() == torch::headeronly::Layout::Strided, name, " must be a CPU tensor");
  STD_TORCH_CHECK(t.dim() == int64_t(sizes.size()), name, " must have ", sizes.size(), " dimensions, got ", t.dim());
  for (size_t i = 0; i < sizes.size(); ++i)
    STD_TORCH_CHECK(sizes[i] < 0 || t.size(int64_t(i)) == sizes[i], name, " has size ", t.size(int64_t(i)),
                    " in dimension ", i, ", not ", sizes[i]);
}

void expect(const char* name, const Tensor& t, const Sizes& sizes, std::optional<ScalarType> type) {
  expect_sizes(name, t, sizes);
  ScalarType own = scalar_type(type_of(t));
  STD_TORCH_CHECK(!type || own == *type, name, " has another type than the inputs that it stands beside");
}

void expect_between(const char* name, int64_t value, int64_t most) {
  STD_TORCH_CHECK(value >= 1 && value <= most, name, " must be between 1 and ", most, ", got ", value);
}

void expect_experts(const std::vector<Tensor>& experts) {
  expect_between("the number of experts", int64_t(experts.size()), kMaxExperts);
  expect("experts", experts[0], {-1, -1, -1});
  Sizes sizes{experts[0].size(0), experts[0].size(1), experts[0].size(2)};
  for (const Tensor& e : experts) expect("experts", e, sizes, experts[0].scalar_type());
}

void multiply(Tensor& out, const Tensor& a, const Tensor& b, double alpha, bool add) {
  // The dispatcher's shim takes no Scalar arguments, hence this one, which also stays below autograd.
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), add ? 1.0 : 0.0, alpha));
}

Tensor flattened(const Tensor& t) {
  int64_t batch = t.size(0), tokens = t.size(1), width = t.size(2);
  bool viewable = t.stride(2) == 1 && (batch <= 1 || tokens <= 1 || t.stride(0) == tokens * t.stride(1));
  if (viewable) return view(t, {batch * tokens, width}, {tokens > 1 ? t.stride(1) : t.stride(0), 1});
  // A copy, or t itself where only steps that are never taken differ from a dense tensor's.
  return view(torch::stable::contiguous(t), {batch * tokens, width}, {width, 1});
}

Scratch::Scratch(int64_t bytes) {
  if (posix_memalign(&data_, 64, size_t(bytes))) throw std::bad_alloc();
  if (poisoned) std::memset(data_, 0xff, size_t(bytes));
}

Scratch::~Scratch() { std::free(data_); }

void Failure::keep() noexcept {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!first_) first_ = std::current_exception();
}

Tensor summed(const Tensor& partial, int64_t groups, int64_t size, const Chunks& chunks, bool per_sample,
              int64_t tokens, double scale) {
  Tensor out = allocate({groups, size}, partial.scalar_type());
  Sums a{partial.scalar_type() == ScalarType::Double,
         partial.const_data_ptr(),
         out.mutable_data_ptr(),
         size,
         chunks.count,
         chunks.size,
         per_sample,
         tokens,
         scale};
  auto kernel = TF_KERNEL(sums);
  parallel(groups * ((size + kSumBlock - 1) / kSumBlock), 8, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

Tensor scaled(const Tensor& t, double factor) {
  return summed(t, 1, t.numel(), Chunks(1, 1), false, 1, factor);  // sums of one chunk each
}

namespace {

void set_poison(bool on) { poisoned = on; }
std::string current_level() { return level_name(); }

}  // namespace
}  // namespace tiger_fast

STABLE_TORCH_LIBRARY_IMPL(tiger_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_empty_cache", TORCH_BOX(&tiger_fast::memory::empty_cache));
  m.impl("cpu_cached_bytes", TORCH_BOX(&tiger_fast::memory::cached_bytes));
  m.impl("cpu_cache_limit", TORCH_BOX(&tiger_fast::memory::limit_bytes));
  m.impl("cpu_level", TORCH_BOX(&tiger_fast::current_level));
  m.impl("cpu_set_poison", TORCH_BOX(&tiger_fast::set_poison));
}
