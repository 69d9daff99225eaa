// Leave-one-out mixtures (TIGER sec. 3.5): memory and threads around the kernels of the same name.
#include "host.h"

namespace tiger_fast {
namespace {

LeaveOneOut describe(std::vector<Tensor>& experts, const Tensor& weights, bool renormalize) {
  expect_experts(experts);
  expect("weights", weights, {experts[0].size(0), -1, experts[0].size(1), int64_t(experts.size())});
  expect_between("the number of tasks", weights.size(1), kMaxTasks);
  for (Tensor& e : experts) e = with_dense_rows(e);
  LeaveOneOut a{};
  a.type = type_of(experts[0]);
  a.batch = weights.size(0), a.tasks = weights.size(1), a.tokens = weights.size(2), a.members = weights.size(3);
  a.width = experts[0].size(2);
  for (size_t k = 0; k < experts.size(); ++k) a.experts[k] = rows(experts[k]);
  a.weights = small(weights);
  a.renormalize = renormalize;
  return a;
}

Tensor leave_one_out(std::vector<Tensor> experts, Tensor weights, bool renormalize) {
  LeaveOneOut a = describe(experts, weights, renormalize);
  if (a.members == 1) return zeros({a.batch, a.tasks, 1, a.tokens, a.width}, experts[0].scalar_type());
  Tensor out = allocate({a.batch, a.tasks, a.members, a.tokens, a.width}, experts[0].scalar_type());
  a.out = out.mutable_data_ptr();
  a.past_caches = past_caches(out, a.width);
  auto kernel = TF_KERNEL(leave_one_out);
  parallel(a.batch * a.tokens, grain_of(a.width * a.tasks * a.members),
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

// The gradients of those experts whose bit in `needs` is set, then, if bit M is, that of the weights.
std::vector<Tensor> leave_one_out_backward(Tensor grad, std::vector<Tensor> experts, Tensor weights, bool renormalize,
                                           int64_t needs) {
  LeaveOneOutBackward a{};
  a.inputs = describe(experts, weights, renormalize);
  const LeaveOneOut& in = a.inputs;
  expect("grad", grad, {in.batch, in.tasks, in.members, in.tokens, in.width}, experts[0].scalar_type());
  grad = with_dense_rows(grad);
  a.grad = rows(grad);
  std::vector<Tensor> grads;
  if (in.members == 1) {  // nothing is left where it is left out, and nothing depends on it
    if (needed(needs, 0)) grads.push_back(zeros(sizes_of(experts[0]), grad.scalar_type()));
    if (needed(needs, 1)) grads.push_back(zeros(sizes_of(weights), weights.scalar_type()));
    return grads;
  }
  for (int64_t k = 0; k < in.members; ++k)
    if (needed(needs, k)) {
      grads.push_back(allocate({in.batch, in.tokens, in.width}, grad.scalar_type()));
      a.grad_experts[k] = grads.back().mutable_data_ptr();
      a.inputs.past_caches = past_caches(grads.back(), in.width);
    }
  if (needed(needs, in.members)) {
    grads.push_back(allocate({in.batch, in.tasks, in.tokens, in.members}, accumulator_type(grad)));
    a.grad_weights = grads.back().mutable_data_ptr();
  }
  auto kernel = TF_KERNEL(leave_one_out_backward);
  parallel(in.batch * in.tokens, grain_of(in.width * in.tasks * in.members),
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  if (a.grad_weights) grads.back() = converted(grads.back(), weights.scalar_type());
  return grads;
}

}  // namespace
}  // namespace tiger_fast

STABLE_TORCH_LIBRARY_IMPL(tiger_fast, CPU, m) {
  m.impl("leave_one_out", TORCH_BOX(&tiger_fast::leave_one_out));
  m.impl("leave_one_out_backward", TORCH_BOX(&tiger_fast::leave_one_out_backward));
}
