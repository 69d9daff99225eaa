// The competency-weighted mixture (TAVER eqs. 2-3): memory and threads around its kernels.
#include "host.h"

#include <tuple>

namespace tiger_fast {
namespace {

struct Inputs {
  CompetencyAggregate a{};
  Tensor norm_weight, norm_bias;  // dense, of the accumulator type
};

Inputs describe(std::vector<Tensor>& experts, const Tensor& confidence, const Tensor& refined,
                const Tensor& norm_weight, const Tensor& norm_bias, double eps) {
  expect_experts(experts);
  Inputs in;
  CompetencyAggregate& a = in.a;
  a.type = type_of(experts[0]);
  a.batch = experts[0].size(0), a.tokens = experts[0].size(1), a.members = int64_t(experts.size());
  a.width = experts[0].size(2);
  STD_TORCH_CHECK(a.width >= 1, "D must be at least 1");
  expect("confidence", confidence, {a.batch, a.members});
  expect("refined_confidence", refined, {a.batch, a.members});
  expect("norm_weight", norm_weight, {a.width});
  expect("norm_bias", norm_bias, {a.width});
  for (Tensor& e : experts) e = with_dense_rows(e);
  for (size_t k = 0; k < experts.size(); ++k) a.experts[k] = rows(experts[k]);
  ScalarType wide = accumulator_type(experts[0]);
  in.norm_weight = with_dense_rows(converted(norm_weight, wide));
  in.norm_bias = with_dense_rows(converted(norm_bias, wide));
  a.weight = in.norm_weight.const_data_ptr();
  a.bias = in.norm_bias.const_data_ptr();
  a.eps = eps;
  return in;
}

int64_t work(const CompetencyAggregate& a) { return a.width * (a.members + 1); }

std::tuple<Tensor, Tensor> competency_aggregate(std::vector<Tensor> experts, Tensor confidence, Tensor refined,
                                                Tensor norm_weight, Tensor norm_bias, double eps) {
  Inputs in = describe(experts, confidence, refined, norm_weight, norm_bias, eps);
  CompetencyAggregate& a = in.a;
  Tensor weights = allocate({a.batch, a.members}, accumulator_type(experts[0]));
  CompetencyWeights w{a.type == Type::f64, a.members, small(confidence), small(refined), weights.mutable_data_ptr()};
  auto weigh = TF_KERNEL(competency_weights);
  parallel(a.batch, grain_of(a.members * 16), [&](int64_t begin, int64_t end) { weigh(w, begin, end); });
  Tensor out = allocate({a.batch, a.tokens, a.width}, experts[0].scalar_type());
  a.weights = weights.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.past_caches = past_caches(out, a.width);
  auto kernel = TF_KERNEL(competency_aggregate);
  parallel(a.batch * a.tokens, grain_of(work(a)), TF_KERNEL(norm_scratch)(a.type, a.width),
           [&](int64_t begin, int64_t end, void* scratch) { kernel(a, begin, end, scratch); });
  return {out, weights};
}

// The gradients whose bits are set in `needs`: of the experts, of both confidences, of the norm's weight and bias. Without
// `grad`, the features' gradient, only the confidences have any.
std::vector<Tensor> competency_aggregate_backward(std::optional<Tensor> grad, std::optional<Tensor> grad_weights,
                                                  std::vector<Tensor> experts, Tensor confidence, Tensor refined,
                                                  Tensor norm_weight, Tensor norm_bias, double eps, Tensor weights,
                                                  int64_t needs) {
  CompetencyAggregateBackward a{};
  Inputs inputs = describe(experts, confidence, refined, norm_weight, norm_bias, eps);
  a.inputs = inputs.a;
  CompetencyAggregate& in = a.inputs;
  ScalarType type = experts[0].scalar_type(), wide = accumulator_type(experts[0]);
  expect("weights", weights, {in.batch, in.members}, wide);
  weights = torch::stable::contiguous(weights);
  in.weights = weights.const_data_ptr();
  int64_t members = in.members;
  auto need = [&](int64_t bit) { return needed(needs, bit); };
  bool confidences = need(members) || need(members + 1);
  if (grad_weights) expect("grad_weights", *grad_weights, {in.batch, members});

  Chunks chunks(in.batch * in.tokens, 2 * in.width);
  std::vector<Tensor> grads;
  Tensor sums_weight, sums_bias, sums_mixture, mixture;
  if (grad) {
    expect("grad", *grad, {in.batch, in.tokens, in.width}, type);
    grad = with_dense_rows(*grad);
    a.grad = rows(*grad);
    a.chunk = chunks.size;
    for (int64_t k = 0; k < members; ++k)
      if (need(k)) {
        grads.push_back(allocate({in.batch, in.tokens, in.width}, type));
        a.grad_experts[k] = grads.back().mutable_data_ptr();
        in.past_caches = past_caches(grads.back(), in.width);
      }
    auto partial = [&](bool wanted, int64_t slots, int64_t size, Tensor& made, void*& data) {
      if (!wanted) return;
      made = allocate({slots, size}, wide);
      data = made.mutable_data_ptr();
    };
    partial(confidences, chunks.count + in.batch, members, sums_mixture, a.mixture);
    partial(need(members + 2), chunks.count, in_whole_vectors(in.width), sums_weight, a.norm_weight);
    partial(need(members + 3), chunks.count, in_whole_vectors(in.width), sums_bias, a.norm_bias);
    auto kernel = TF_KERNEL(competency_aggregate_backward);
    parallel(chunks.count, grain_of(chunks.size * work(in)), TF_KERNEL(norm_scratch)(in.type, in.width),
             [&](int64_t begin, int64_t end, void* scratch) { kernel(a, begin, end, scratch); });
    if (confidences) mixture = summed(sums_mixture, in.batch, members, chunks, true, in.tokens);
  } else {
    int64_t others = (int64_t(1) << members) - 1 + (int64_t(3) << (members + 2));
    STD_TORCH_CHECK(!(needs & others), "without grad only the confidences have gradients");
  }

  if (confidences) {
    Tensor logits = allocate({in.batch, members}, wide);
    CompetencyWeightsBackward w{in.type == Type::f64,
                                members,
                                weights.const_data_ptr(),
                                grad ? mixture.const_data_ptr() : nullptr,
                                grad_weights ? small(*grad_weights) : Small{},
                                logits.mutable_data_ptr()};
    auto weigh = TF_KERNEL(competency_weights_backward);
    parallel(in.batch, grain_of(members * 4), [&](int64_t begin, int64_t end) { weigh(w, begin, end); });
    if (need(members)) grads.push_back(converted(logits, confidence.scalar_type()));
    if (need(members + 1)) {
      bool taken = need(members) && confidence.scalar_type() == wide && refined.scalar_type() == wide;
      grads.push_back(taken ? torch::stable::clone(logits) : converted(logits, refined.scalar_type()));
    }
  }
  auto norm = [&](const Tensor& sums, const Tensor& like) {
    Tensor total = summed(sums, 1, in_whole_vectors(in.width), chunks, false, in.tokens);
    grads.push_back(converted(view(total, {in.width}, {1}), like.scalar_type()));
  };
  if (need(members + 2)) norm(sums_weight, norm_weight);
  if (need(members + 3)) norm(sums_bias, norm_bias);
  return grads;
}

}  // namespace
}  // namespace tiger_fast

STABLE_TORCH_LIBRARY_IMPL(tiger_fast, CPU, m) {
  m.impl("competency_aggregate", TORCH_BOX(&tiger_fast::competency_aggregate));
  m.impl("competency_aggregate_backward", TORCH_BOX(&tiger_fast::competency_aggregate_backward));
}
