// TAVER's adapter (sec. 3.1): products by torch's library, memory and threads around the kernels.
#include "host.h"

#include <tuple>

namespace tiger_fast {
namespace {

// A vector of parameters, dense and of the accumulator type.
Tensor parameter(const char* name, const Tensor& t, int64_t size, ScalarType wide) {
  expect(name, t, {size});
  return with_dense_rows(converted(t, wide));
}

struct Adapter {
  int64_t rows, channels, width;
  ScalarType type, wide;
  Tensor x;                                                     // (..., C), dense rows
  Tensor linear_weight, gate_weight;                            // (D, C) of the activation type
  Tensor in_weight, in_bias, linear_bias, gate_bias, out_weight, out_bias;  // of the accumulator type
  AdapterIn in{};
  AdapterOut out{};

  Adapter(const Tensor& x_, const Tensor& norm_in_weight, const Tensor& norm_in_bias, const Tensor& linear_weight_,
          const Tensor& linear_bias_, const Tensor& gate_weight_, const Tensor& gate_bias_,
          const Tensor& norm_out_weight, const Tensor& norm_out_bias, double eps) {
    STD_TORCH_CHECK(x_.dim() >= 1 && x_.dim() <= kMaxDims, "x must have 1 to ", kMaxDims, " dimensions, got ",
                    x_.dim());
    expect("x", x_, Sizes(size_t(x_.dim()), -1));
    expect("linear_weight", linear_weight_, {-1, -1});
    x = with_dense_rows(x_);
    type = x.scalar_type(), wide = accumulator_type(x);
    channels = x.size(-1), width = linear_weight_.size(0);
    STD_TORCH_CHECK(channels >= 1 && width >= 1, "C and D must be at least 1");
    expect("linear_weight", linear_weight_, {width, channels});
    expect("gate_weight", gate_weight_, {width, channels});
    in_weight = parameter("norm_in_weight", norm_in_weight, channels, wide);
    in_bias = parameter("norm_in_bias", norm_in_bias, channels, wide);
    linear_bias = parameter("linear_bias", linear_bias_, width, wide);
    gate_bias = parameter("gate_bias", gate_bias_, width, wide);
    out_weight = parameter("norm_out_weight", norm_out_weight, width, wide);
    out_bias = parameter("norm_out_bias", norm_out_bias, width, wide);
    linear_weight = converted(linear_weight_, type);
    gate_weight = converted(gate_weight_, type);

    in.type = out.type = type_of(x);
    in.width = channels;
    in.x = operand(x);
    in.grid = join(x, {&in.x});
    in.weight = in_weight.const_data_ptr();
    in.bias = in_bias.const_data_ptr();
    in.eps = out.eps = eps;
    rows = out.rows = in.grid.rows;
    out.width = width;
    out.linear_bias = linear_bias.const_data_ptr();
    out.gate_bias = gate_bias.const_data_ptr();
    out.weight = out_weight.const_data_ptr();
    out.bias = out_bias.const_data_ptr();
  }

  // LayerNorm(x), (rows, C).
  Tensor normalized() {
    Tensor y = allocate({rows, channels}, type);
    AdapterIn a = in;
    a.out = y.mutable_data_ptr();
    auto kernel = TF_KERNEL(adapter_in);
    parallel(rows, grain_of(channels * 4), TF_KERNEL(norm_scratch)(in.type, channels),
             [&](int64_t begin, int64_t end, void* scratch) { kernel(a, begin, end, scratch); });
    return y;
  }

  // y @ weight^T, (rows, D).
  Tensor project(const Tensor& y, const Tensor& weight) const {
    Tensor made = allocate({rows, width}, type);
    multiply(made, y, view(weight, {channels, width}, {weight.stride(1), weight.stride(0)}));
    return made;
  }
};

// The output, and the gate's product, which the backward wants.
std::tuple<Tensor, Tensor> adapter(Tensor x, Tensor norm_in_weight, Tensor norm_in_bias, Tensor linear_weight,
                                   Tensor linear_bias, Tensor gate_weight, Tensor gate_bias, Tensor norm_out_weight,
                                   Tensor norm_out_bias, double eps) {
  Adapter op(x, norm_in_weight, norm_in_bias, linear_weight, linear_bias, gate_weight, gate_bias, norm_out_weight,
             norm_out_bias, eps);
  Tensor linear, gate;
  {
    Tensor y = op.normalized();
    linear = op.project(y, op.linear_weight);
    gate = op.project(y, op.gate_weight);
  }
  Sizes sizes = sizes_of(x);
  sizes.back() = op.width;
  Tensor out = allocate(sizes, op.type);
  AdapterOut& a = op.out;
  a.linear = linear.const_data_ptr();
  a.gate = gate.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.past_caches = past_caches(out, op.width);
  auto kernel = TF_KERNEL(adapter_out);
  parallel(op.rows, grain_of(op.width * 8), TF_KERNEL(norm_scratch)(op.in.type, op.width),
           [&](int64_t begin, int64_t end, void* scratch) { kernel(a, begin, end, scratch); });
  return {out, gate};
}

enum Need {
  kX,
  kNormInWeight,
  kNormInBias,
  kLinearWeight,
  kLinearBias,
  kGateWeight,
  kGateBias,
  kNormOutWeight,
  kNormOutBias
};

// The gradients whose bits are set in `needs`, in the order of Need.
std::vector<Tensor> adapter_backward(Tensor grad, Tensor x, Tensor norm_in_weight, Tensor norm_in_bias,
                                     Tensor linear_weight, Tensor linear_bias, Tensor gate_weight, Tensor gate_bias,
                                     Tensor norm_out_weight, Tensor norm_out_bias, double eps, Tensor gate,
                                     int64_t needs) {
  Adapter op(x, norm_in_weight, norm_in_bias, linear_weight, linear_bias, gate_weight, gate_bias, norm_out_weight,
             norm_out_bias, eps);
  Sizes sizes = sizes_of(x);
  sizes.back() = op.width;
  expect("grad", grad, sizes, op.type);
  expect("gate", gate, {op.rows, op.width}, op.type);
  STD_TORCH_CHECK(gate.is_contiguous(), "gate must be as the forward op returned it");
  grad = with_dense_rows(grad);
  auto need = [&](int64_t bit) { return needed(needs, bit); };
  bool into_y = need(kX) || need(kNormInWeight) || need(kNormInBias);
  Chunks chunks(op.rows, 4 * op.width + 2 * op.channels);
  std::vector<Tensor> partial(9);
  auto sums = [&](int64_t bit, int64_t width) -> void* {
    if (!need(bit)) return nullptr;
    partial[size_t(bit)] = allocate({chunks.count, in_whole_vectors(width)}, op.wide);
    return partial[size_t(bit)].mutable_data_ptr();
  };

  Tensor y = op.normalized(), linear = op.project(y, op.linear_weight), into_gate;
  AdapterOutBackward b{};
  b.inputs = op.out;
  b.inputs.linear = linear.const_data_ptr();
  b.inputs.gate = gate.const_data_ptr();
  b.grad = operand(grad);
  b.grid = join(grad, {&b.grad});
  b.chunk = chunks.size;
  // Row by row the product makes room for its gradient.
  if (into_y || need(kLinearWeight)) b.into_linear = linear.mutable_data_ptr();
  if (into_y || need(kGateWeight)) {
    into_gate = allocate({op.rows, op.width}, op.type);
    b.into_gate = into_gate.mutable_data_ptr();
  }
  b.grad_linear_bias = sums(kLinearBias, op.width);
  b.grad_gate_bias = sums(kGateBias, op.width);
  b.grad_weight = sums(kNormOutWeight, op.width);
  b.grad_bias = sums(kNormOutBias, op.width);
  auto out_kernel = TF_KERNEL(adapter_out_backward);
  parallel(chunks.count, grain_of(chunks.size * op.width * 16), TF_KERNEL(norm_scratch)(op.in.type, op.width),
           [&](int64_t begin, int64_t end, void* scratch) { out_kernel(b, begin, end, scratch); });

  Tensor grad_x;
  if (into_y) {
    Tensor grad_y = allocate({op.rows, op.channels}, op.type);
    multiply(grad_y, linear, op.linear_weight);
    multiply(grad_y, into_gate, op.gate_weight, 1, true);
    AdapterInBackward c{};
    c.inputs = op.in;
    c.grad = grad_y.const_data_ptr();
    c.chunk = chunks.size;
    if (need(kX)) {
      grad_x = allocate(sizes_of(x), op.type);
      c.grad_x = grad_x.mutable_data_ptr();
      c.inputs.past_caches = past_caches(grad_x, op.channels);
    }
    c.grad_weight = sums(kNormInWeight, op.channels);
    c.grad_bias = sums(kNormInBias, op.channels);
    auto in_kernel = TF_KERNEL(adapter_in_backward);
    parallel(chunks.count, grain_of(chunks.size * op.channels * 4), TF_KERNEL(norm_scratch)(op.in.type, op.channels),
             [&](int64_t begin, int64_t end, void* scratch) { in_kernel(c, begin, end, scratch); });
  }

  std::vector<Tensor> grads;
  auto vector = [&](int64_t bit, const Tensor& like) {
    if (!need(bit)) return;
    Tensor total = summed(partial[size_t(bit)], 1, in_whole_vectors(like.size(0)), chunks, false, op.rows);
    grads.push_back(converted(view(total, {like.size(0)}, {1}), like.scalar_type()));
  };
  auto matrix = [&](int64_t bit, const Tensor& left, const Tensor& like) {
    if (!need(bit)) return;
    Tensor made = allocate({op.width, op.channels}, op.type);
    multiply(made, view(left, {op.width, op.rows}, {1, op.width}), y);
    grads.push_back(converted(made, like.scalar_type()));
  };
  if (need(kX)) grads.push_back(grad_x);
  vector(kNormInWeight, norm_in_weight);
  vector(kNormInBias, norm_in_bias);
  matrix(kLinearWeight, linear, linear_weight);
  vector(kLinearBias, linear_bias);
  matrix(kGateWeight, into_gate, gate_weight);
  vector(kGateBias, gate_bias);
  vector(kNormOutWeight, norm_out_weight);
  vector(kNormOutBias, norm_out_bias);
  return grads;
}

}  // namespace
}  // namespace tiger_fast

STABLE_TORCH_LIBRARY_IMPL(tiger_fast, CPU, m) {
  m.impl("adapter", TORCH_BOX(&tiger_fast::adapter));
  m.impl("adapter_backward", TORCH_BOX(&tiger_fast::adapter_backward));
}
