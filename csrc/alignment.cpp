// The causal target and its alignment loss (TIGER eqs. 9-13): checks, threads and sums over chunks around the kernels.
#include "host.h"

#include <tuple>

namespace tiger_fast {
namespace {

// delta (..., M), and what its rows have beside it.
void expect_delta(const Tensor& delta) {
  STD_TORCH_CHECK(delta.dim() >= 1 && delta.dim() <= kMaxDims, "delta must have 1 to ", kMaxDims, " dimensions, got ",
                  delta.dim());
  expect("delta", delta, Sizes(size_t(delta.dim()), -1));
  expect_between("the number of experts", delta.size(-1), kMaxExperts);
}

// A bool tensor that broadcasts to delta's rows.
RowOperand mask_operand(const Tensor& mask, const Tensor& delta) {
  STD_TORCH_CHECK(mask.is_cpu() && mask.layout() == torch::headeronly::Layout::Strided &&
                      mask.scalar_type() == ScalarType::Bool && mask.dim() < delta.dim(),
                  "mask must be a bool CPU tensor that broadcasts to delta's rows");
  RowOperand x{mask.const_data_ptr(), Type::f32, {}, 0};
  int64_t missing = delta.dim() - 1 - mask.dim();
  for (int64_t i = 0; i < mask.dim(); ++i) {
    int64_t size = mask.size(i), rows = delta.size(missing + i);
    STD_TORCH_CHECK(size == 1 || size == rows, "mask has size ", size, " in dimension ", i, ", not ", rows);
    x.stride[missing + i] = size == rows ? mask.stride(i) : 0;
  }
  return x;
}

int64_t chunks_of(const RowGrid& grid) { return (grid.rows + kRowChunk - 1) / kRowChunk; }

// An exponential or a logarithm costs as much as a dozen elements that are only read.
int64_t grain_of(const RowGrid& grid) { return tiger_fast::grain_of(kRowChunk * grid.members * 12); }

bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

CausalTarget describe(const Tensor& delta, double tau, double eps) {
  expect_delta(delta);
  CausalTarget a{};
  a.wide = is_double(delta);
  a.tau = tau, a.eps = eps;
  a.delta = operand(delta);
  return a;
}

Tensor causal_target(Tensor delta, double tau, double eps) {
  CausalTarget a = describe(delta, tau, eps);
  a.grid = join(delta, {&a.delta});
  Tensor out = allocate(sizes_of(delta), accumulator_type(delta));
  a.out = out.mutable_data_ptr();
  auto kernel = TF_KERNEL(causal_target);
  parallel(chunks_of(a.grid), grain_of(a.grid), [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

Tensor causal_target_backward(Tensor grad, Tensor delta, double tau, double eps) {
  CausalTargetBackward a{};
  a.inputs = describe(delta, tau, eps);
  expect("grad", grad, sizes_of(delta), accumulator_type(delta));
  a.grad = operand(grad);
  a.inputs.grid = join(delta, {&a.inputs.delta, &a.grad});
  Tensor out = allocate(sizes_of(delta), delta.scalar_type());
  a.grad_delta = out.mutable_data_ptr();
  auto kernel = TF_KERNEL(causal_target_backward);
  parallel(chunks_of(a.inputs.grid), grain_of(a.inputs.grid),
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

AlignmentLoss describe(const Tensor& delta, const Tensor& weights, double tau, double eps,
                       const std::optional<Tensor>& mask) {
  expect_delta(delta);
  expect("weights", weights, sizes_of(delta));
  AlignmentLoss a{};
  a.wide = is_double(delta) || is_double(weights);
  a.tau = tau, a.eps = eps;
  a.delta = operand(delta);
  a.weights = operand(weights);
  if (mask) a.mask = mask_operand(*mask, delta);
  a.grid = join(delta, {&a.delta, &a.weights, &a.mask});
  return a;
}

// The loss; the number of rows that count, at least 1, by which the backward divides too; and, if `keep`, the derivative
// of each row's divergence by its weights, which spares the backward all but a scaling where the target is held fixed.
std::tuple<Tensor, Tensor, Tensor> alignment_loss(Tensor delta, Tensor weights, double tau, double eps,
                                                  std::optional<Tensor> mask, bool keep) {
  AlignmentLoss a = describe(delta, weights, tau, eps, mask);
  int64_t chunks = chunks_of(a.grid);
  std::vector<double> sums(static_cast<size_t>(chunks));
  std::vector<int64_t> counts(static_cast<size_t>(chunks));
  a.sums = sums.data(), a.counts = counts.data();
  Tensor slopes = allocate(keep ? sizes_of(weights) : Sizes{0}, a.wide ? ScalarType::Double : ScalarType::Float);
  if (keep) a.slopes = slopes.mutable_data_ptr();
  auto kernel = TF_KERNEL(alignment_loss);
  parallel(chunks, grain_of(a.grid), [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  double sum = 0;
  int64_t count = 0;
  for (double s : sums) sum += s;
  for (int64_t c : counts) count += c;
  if (count < 1) count = 1;
  Tensor loss = allocate({}, a.wide ? ScalarType::Double : ScalarType::Float);
  if (a.wide)
    *static_cast<double*>(loss.mutable_data_ptr()) = sum / double(count);
  else
    *static_cast<float*>(loss.mutable_data_ptr()) = float(sum / double(count));
  Tensor counted = allocate({}, ScalarType::Double);
  *static_cast<double*>(counted.mutable_data_ptr()) = double(count);
  return {loss, counted, slopes};
}

// The gradient of delta if bit 0 of `needs` is set, then, if bit 1 is, that of the weights.
std::vector<Tensor> alignment_loss_backward(Tensor grad, Tensor delta, Tensor weights, double tau, double eps,
                                            std::optional<Tensor> mask, Tensor counted, std::optional<Tensor> slopes,
                                            int64_t needs) {
  AlignmentLossBackward a{};
  a.inputs = describe(delta, weights, tau, eps, mask);
  expect("grad", grad, {}, a.inputs.wide ? ScalarType::Double : ScalarType::Float);
  expect("counted", counted, {}, ScalarType::Double);
  a.scale = a.inputs.wide ? *static_cast<const double*>(grad.const_data_ptr())
                          : double(*static_cast<const float*>(grad.const_data_ptr()));
  a.scale /= *static_cast<const double*>(counted.const_data_ptr());
  if (slopes && needs == 2) {
    expect("slopes", *slopes, sizes_of(weights), grad.scalar_type());
    STD_TORCH_CHECK(slopes->is_contiguous(), "slopes must be as the forward op returned them");
    Sizes strides;
    for (int64_t i = 0; i < slopes->dim(); ++i) strides.push_back(slopes->stride(i));
    return {converted(view(scaled(*slopes, a.scale), sizes_of(weights), strides), weights.scalar_type())};
  }
  std::vector<Tensor> grads;
  if (needed(needs, 0)) {
    grads.push_back(allocate(sizes_of(delta), delta.scalar_type()));
    a.grad_delta = grads.back().mutable_data_ptr();
  }
  if (needed(needs, 1)) {
    grads.push_back(allocate(sizes_of(delta), weights.scalar_type()));
    a.grad_weights = grads.back().mutable_data_ptr();
  }
  auto kernel = TF_KERNEL(alignment_loss_backward);
  parallel(chunks_of(a.inputs.grid), grain_of(a.inputs.grid),
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return grads;
}

}  // namespace
}  // namespace tiger_fast

STABLE_TORCH_LIBRARY_IMPL(tiger_fast, CPU, m) {
  m.impl("causal_target", TORCH_BOX(&tiger_fast::causal_target));
  m.impl("causal_target_backward", TORCH_BOX(&tiger_fast::causal_target_backward));
  m.impl("alignment_loss", TORCH_BOX(&tiger_fast::alignment_loss));
  m.impl("alignment_loss_backward", TORCH_BOX(&tiger_fast::alignment_loss_backward));
}
