// Counterfactual losses (TIGER eq. 8): checks, memory and threads around the kernels of the same name.
#include <tuple>

#include "host.h"

namespace tiger_fast {
namespace {

using Optional = std::optional<Tensor>;

// What the kernels are handed, and the tensors behind it that the caller does not hold.
struct Inputs {
  Counterfactual a{};
  std::vector<Tensor> features;
  Tensor head, panel, bias;
  int64_t count() const { return a.batch * a.tokens; }
  int64_t work() const { return 16 + a.members * a.classes * (4 + a.width / 8); }
};

// What both forms share; type, features and sizes are set.
void describe(Inputs& in, const Tensor& weights, const Optional& bias, const Tensor& target, int64_t loss,
              const Optional& valid, int64_t ignore_index) {
  Counterfactual& a = in.a;
  const Tensor& like = in.features[0];
  a.type = type_of(like);
  expect_between("C (the classes)", a.classes, INT32_MAX);
  STD_TORCH_CHECK(loss >= 0 && loss < kTokenLosses, "loss must be between 0 and ", kTokenLosses - 1, ", got ", loss);
  a.loss = TokenLoss(loss);
  expect("weights", weights, {a.batch, a.tokens, a.members});
  a.weights = small(weights);
  if (bias) {
    expect("head_bias", *bias, {a.classes});
    in.bias = torch::stable::contiguous(converted(*bias, accumulator_type(like)));
    a.bias = in.bias.const_data_ptr();
  }
  if (a.loss == TokenLoss::cross_entropy) {
    bool wide = target.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(wide || target.scalar_type() == ScalarType::Int, "target must be int64 or int32");
    expect_sizes("target", target, {a.batch, a.tokens});
    a.labels = target.const_data_ptr();
    a.wide_labels = wide;
    a.label_stride[0] = target.stride(0), a.label_stride[1] = target.stride(1);
    a.ignore_index = ignore_index;
  } else {
    expect("target", target, {a.batch, a.tokens, a.classes});
    a.target = small(target);
  }
  if (valid) {
    STD_TORCH_CHECK(valid->scalar_type() == ScalarType::Bool, "valid must be bool");
    expect_sizes("valid", *valid, {a.batch, a.tokens});
    a.valid = static_cast<const uint8_t*>(valid->const_data_ptr());
    a.valid_stride[0] = valid->stride(0), a.valid_stride[1] = valid->stride(1);
  }
}

CounterfactualPack packed(const Counterfactual& a) {
  return {a.type == Type::f64, a.width, a.classes, const_cast<void*>(a.head), a.head_stride, nullptr, nullptr};
}

Inputs describe(std::vector<Tensor> experts, const Tensor& weights, const Tensor& head, const Optional& bias,
                const Tensor& target, int64_t loss, const Optional& valid, int64_t ignore_index, const Optional& kept) {
  Inputs in;
  Counterfactual& a = in.a;
  expect_experts(experts);
  a.batch = experts[0].size(0), a.tokens = experts[0].size(1), a.width = experts[0].size(2);
  a.members = int64_t(experts.size());
  expect("head_weight", head, {-1, a.width});
  a.classes = head.size(0);
  for (Tensor& e : experts) e = with_dense_rows(e);
  in.features = std::move(experts);
  for (int64_t k = 0; k < a.members; ++k) a.features[k] = rows(in.features[k]);
  describe(in, weights, bias, target, loss, valid, ignore_index);
  ScalarType type = accumulator_type(in.features[0]);
  in.head = with_dense_rows(converted(head, type));
  a.head = in.head.const_data_ptr();
  a.head_stride = in.head.stride(0);
  if (kept) {
    expect("kept", *kept, {a.batch, a.tokens, a.members, a.classes}, type);
    STD_TORCH_CHECK(kept->is_contiguous(), "kept must be contiguous");
    a.kept = kept->mutable_data_ptr();
  }
  // A few rows do not repay packing the head, nor does a head of a few classes, which would leave most lanes empty.
  if (in.count() * a.members >= 32 && a.classes > 4 && a.width > 0 && !kept) {
    in.panel = allocate({a.width * in_columns(a.classes)}, type);
    CounterfactualPack p = packed(a);
    p.panel = in.panel.mutable_data_ptr();
    auto kernel = TF_KERNEL(counterfactual_panel);
    parallel(a.width, grain_of(a.classes), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
    a.panel = p.panel;
  }
  return in;
}

Inputs describe(const Tensor& projections, const Tensor& weights, const Optional& bias, const Tensor& target,
                int64_t loss, const Optional& valid, int64_t ignore_index) {
  Inputs in;
  Counterfactual& a = in.a;
  expect("projections", projections, {-1, -1, -1, -1});
  expect_between("the number of experts", projections.size(1), kMaxExperts);
  Tensor dense = with_dense_rows(projections);
  a.projected = true;
  a.batch = dense.size(0), a.members = dense.size(1), a.tokens = dense.size(2), a.classes = dense.size(3);
  for (int64_t k = 0; k < a.members && dense.numel(); ++k) {
    const char* base = static_cast<const char*>(dense.const_data_ptr());
    a.features[k].data = base + k * dense.stride(1) * int64_t(dense.element_size());
    a.features[k].stride[0] = dense.stride(0), a.features[k].stride[1] = dense.stride(2);
  }
  in.features = {dense};
  describe(in, weights, bias, target, loss, valid, ignore_index);
  return in;
}

std::tuple<Tensor, Tensor> losses(Inputs in) {
  Counterfactual& a = in.a;
  ScalarType type = accumulator_type(in.features[0]);
  Tensor full = allocate({a.batch, a.tokens}, type);
  Tensor without = allocate({a.batch, a.members, a.tokens}, type);
  a.full = full.mutable_data_ptr();
  a.without = without.mutable_data_ptr();
  auto kernel = TF_KERNEL(counterfactual);
  parallel(in.count(), grain_of(in.work()), TF_KERNEL(counterfactual_scratch)(a),
           [&](int64_t begin, int64_t end, void* scratch) { kernel(a, begin, end, scratch); });
  return {full, without};
}

// What the gradients are wanted of, in this order; a `head` that is not wanted is absent.
struct Wanted {
  int64_t features;  // bits
  bool weights, head, bias, target;
};

std::vector<Tensor> gradients(Inputs in, const Optional& grad_full, const Optional& grad_without, const Wanted& wanted,
                              const Tensor& weights, const Tensor* head, const Optional& bias, const Tensor& target) {
  CounterfactualBackward a{};
  const Counterfactual& of = in.a;
  const Tensor& like = in.features[0];
  ScalarType type = accumulator_type(like);
  if (grad_full) {
    expect("grad_full", *grad_full, {of.batch, of.tokens}, type);
    a.grad_full = small(*grad_full);
  }
  if (grad_without) {
    expect("grad_without", *grad_without, {of.batch, of.members, of.tokens}, type);
    a.grad_without = small(*grad_without);
  }
  std::vector<Tensor> found;
  if (of.projected && wanted.features) {
    found.push_back(allocate({of.batch, of.members, of.tokens, of.classes}, like.scalar_type()));
    char* base = static_cast<char*>(found.back().mutable_data_ptr());
    for (int64_t k = 0; k < of.members; ++k)
      a.grad_features[k] = base + k * of.tokens * of.classes * int64_t(like.element_size());
    a.grad_stride[0] = of.members * of.tokens * of.classes, a.grad_stride[1] = of.classes;
  } else if (!of.projected) {
    for (int64_t k = 0; k < of.members; ++k)
      if (needed(wanted.features, k)) {
        found.push_back(allocate({of.batch, of.tokens, of.width}, like.scalar_type()));
        a.grad_features[k] = found.back().mutable_data_ptr();
        a.past_caches = past_caches(found.back(), of.width);
      }
    a.grad_stride[0] = of.tokens * of.width, a.grad_stride[1] = of.width;
  }
  Tensor columns;
  if (!of.projected && wanted.features) {
    columns = allocate({of.classes * in_columns(of.width)}, type);
    CounterfactualPack p = packed(of);
    p.columns = columns.mutable_data_ptr();
    auto pack = TF_KERNEL(counterfactual_columns);
    parallel(of.classes, grain_of(of.width), [&](int64_t begin, int64_t end) { pack(p, begin, end); });
    a.head_columns = p.columns;
  }
  Tensor grad_weights, grad_target;
  if (wanted.weights) {
    grad_weights = allocate({of.batch, of.tokens, of.members}, type);
    a.grad_weights = grad_weights.mutable_data_ptr();
  }
  if (wanted.target) {
    grad_target = allocate({of.batch, of.tokens, of.classes}, type);
    a.grad_target = grad_target.mutable_data_ptr();
  }
  int64_t head_size = of.classes * in_columns(of.width), bias_size = in_whole_vectors(of.classes);
  Chunks chunks(in.count(), head_size + bias_size);
  a.chunk = chunks.size;
  Tensor head_sums, bias_sums;
  if (wanted.head) {
    head_sums = allocate({chunks.count, head_size}, type);
    a.head_sums = head_sums.mutable_data_ptr();
  }
  if (wanted.bias) {
    bias_sums = allocate({chunks.count, bias_size}, type);
    a.bias_sums = bias_sums.mutable_data_ptr();
  }
  a.inputs = of;
  auto kernel = TF_KERNEL(counterfactual_backward);
  parallel(chunks.count, grain_of(in.work() * chunks.size), TF_KERNEL(counterfactual_scratch)(of),
           [&](int64_t begin, int64_t end, void* scratch) { kernel(a, begin, end, scratch); });
  if (wanted.weights) found.push_back(converted(grad_weights, weights.scalar_type()));
  if (wanted.head) {
    Tensor total = summed(head_sums, 1, head_size, chunks, false, of.tokens);
    Tensor dense = allocate({of.classes, of.width}, type);
    CounterfactualPack p = packed(of);
    p.columns = total.mutable_data_ptr();
    p.head = dense.mutable_data_ptr();
    p.head_stride = of.width;
    auto unpack = TF_KERNEL(counterfactual_rows);
    parallel(of.classes, grain_of(of.width), [&](int64_t begin, int64_t end) { unpack(p, begin, end); });
    found.push_back(converted(dense, head->scalar_type()));
  }
  if (wanted.bias) {
    Tensor total = summed(bias_sums, 1, bias_size, chunks, false, of.tokens);
    Tensor inner = allocate({of.classes}, type);
    torch::stable::copy_(inner, view(total, {of.classes}, {1}));
    found.push_back(converted(inner, bias->scalar_type()));
  }
  if (wanted.target) found.push_back(converted(grad_target, target.scalar_type()));
  return found;
}

// With `keep` the third is P (B, N, M, C), for the backward; else it is empty.
std::tuple<Tensor, Tensor, Tensor> counterfactual_losses(std::vector<Tensor> experts, Tensor weights, Tensor head,
                                                         Optional bias, Tensor target, int64_t loss, Optional valid,
                                                         int64_t ignore_index, bool keep) {
  Inputs in = describe(std::move(experts), weights, head, bias, target, loss, valid, ignore_index, std::nullopt);
  Sizes sizes{in.a.batch, in.a.tokens, in.a.members, in.a.classes};
  Tensor kept = allocate(keep ? sizes : Sizes{0}, accumulator_type(in.features[0]));
  if (keep) in.a.kept = kept.mutable_data_ptr();
  auto [full, without] = losses(std::move(in));
  return {full, without, kept};
}

std::tuple<Tensor, Tensor> from_projections(Tensor projections, Tensor weights, Optional bias, Tensor target,
                                            int64_t loss, Optional valid, int64_t ignore_index) {
  return losses(describe(projections, weights, bias, target, loss, valid, ignore_index));
}

// `kept` is what forward kept, if it did. `needs`: a bit for each expert, then for weights, head_weight, head_bias and
// target.
std::vector<Tensor> counterfactual_losses_backward(Optional grad_full, Optional grad_without,
                                                   Optional kept, std::vector<Tensor> experts, Tensor weights,
                                                   Tensor head, Optional bias, Tensor target, int64_t loss,
                                                   Optional valid,
                                                   int64_t ignore_index, int64_t needs) {
  int64_t members = int64_t(experts.size());
  Inputs in = describe(std::move(experts), weights, head, bias, target, loss, valid, ignore_index, kept);
  Wanted wanted{needs & ((int64_t(1) << members) - 1), needed(needs, members), needed(needs, members + 1),
                needed(needs, members + 2) && bias, needed(needs, members + 3) && in.a.loss != TokenLoss::cross_entropy};
  return gradients(std::move(in), grad_full, grad_without, wanted, weights, &head, bias, target);
}

// `needs`: a bit each for projections, weights, head_bias and target.
std::vector<Tensor> from_projections_backward(Optional grad_full, Optional grad_without, Tensor projections,
                                              Tensor weights, Optional bias, Tensor target, int64_t loss,
                                              Optional valid, int64_t ignore_index, int64_t needs) {
  Inputs in = describe(projections, weights, bias, target, loss, valid, ignore_index);
  Wanted wanted{needs & 1, needed(needs, 1), false, needed(needs, 2) && bias,
                needed(needs, 3) && in.a.loss != TokenLoss::cross_entropy};
  return gradients(std::move(in), grad_full, grad_without, wanted, weights, nullptr, bias, target);
}

}  // namespace
}  // namespace tiger_fast

STABLE_TORCH_LIBRARY_IMPL(tiger_fast, CPU, m) {
  m.impl("counterfactual_losses", TORCH_BOX(&tiger_fast::counterfactual_losses));
  m.impl("counterfactual_losses_backward", TORCH_BOX(&tiger_fast::counterfactual_losses_backward));
  m.impl("counterfactual_losses_from_projections", TORCH_BOX(&tiger_fast::from_projections));
  m.impl("counterfactual_losses_from_projections_backward", TORCH_BOX(&tiger_fast::from_projections_backward));
}
