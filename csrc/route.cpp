// Task-conditioned routing (TIGER eqs. 4-7): the products by torch's library, memory and threads around the kernels.
#include <cmath>

#include "host.h"

namespace tiger_fast {
namespace {

// Every argument of the op, checked, and what the kernels want to have packed. With A the accumulator type:
struct Packed {
  Route a{};
  double root;        // 1 / sqrt(D)
  Tensor query;       // (B N, D)
  Tensor base_weight;  // of the activation type, as u
  Tensor u;
  Tensor v, scale, conditions;  // A: (D, padded R), (B or 1, T, padded R), (B or 1, T, D)
  std::vector<Tensor> experts;  // dense rows
};

// t (..., C) as a dense tensor (..., padded C) of `type`, filled up with zeros.
Tensor padded(const Tensor& t, ScalarType type) {
  Sizes sizes = sizes_of(t), strides;
  int64_t columns = sizes.back();
  bool ready = t.scalar_type() == type && columns % kPad == 0 && t.is_contiguous();
  if (ready) return t;
  Sizes wide = sizes;
  wide.back() = in_whole_vectors(columns);
  Tensor made = columns % kPad ? zeros(wide, type) : allocate(wide, type);
  for (int64_t i = 0; i < made.dim(); ++i) strides.push_back(made.stride(i));
  Tensor inner = view(made, sizes, strides);
  torch::stable::copy_(inner, t);
  return made;
}

// (b0 + shift) / sqrt(D).
Tensor conditions_of(const Tensor& shift, const std::optional<Tensor>& base_bias, ScalarType type, double root) {
  Sizes sizes = sizes_of(shift);
  int64_t width = sizes.back();
  Tensor made = allocate(sizes, type);
  Small from = small(shift), bias = base_bias ? small(*base_bias) : Small{};
  // Addressed as (B, T, D).
  int64_t batch = shift.dim() == 3 ? sizes[0] : 1, tasks = sizes[sizes.size() - 2];
  int64_t lead = shift.dim() == 3 ? from.stride[0] : 0;
  const int64_t* inner = from.stride + (shift.dim() == 3 ? 1 : 0);
  Conditions c{type == ScalarType::Double, from, lead, inner[0], inner[1], bias, root, tasks, width,
               made.mutable_data_ptr()};
  auto kernel = TF_KERNEL(conditions);
  parallel(batch * tasks, grain_of(width), [&](int64_t begin, int64_t end) { kernel(c, begin, end); });
  return made;
}

Packed pack(const Tensor& query, std::vector<Tensor> experts, const Tensor& base_weight,
            const std::optional<Tensor>& base_bias, const Tensor& u, const Tensor& v, const Tensor& scale,
            const Tensor& shift) {
  expect_experts(experts);
  int64_t batch = experts[0].size(0), tokens = experts[0].size(1), width = experts[0].size(2);
  ScalarType type = experts[0].scalar_type();
  expect("query", query, {batch, tokens, width}, type);
  STD_TORCH_CHECK(width >= 1, "D must be at least 1");
  expect("base_weight", base_weight, {width, width});
  if (base_bias) expect("base_bias", *base_bias, {width});
  expect("u", u, {width, -1});
  int64_t rank = u.size(1);
  expect_between("the rank", rank, kMaxRank);
  expect("v", v, {width, rank});
  bool scales = scale.dim() == 3, shifts = shift.dim() == 3;
  int64_t tasks = scale.dim() >= 2 ? scale.size(scale.dim() - 2) : 0;
  expect_between("the number of tasks", tasks, kMaxTasks);
  expect("scale", scale, scales ? Sizes{batch, tasks, rank} : Sizes{tasks, rank});
  expect("shift", shift, shifts ? Sizes{batch, tasks, width} : Sizes{tasks, width});

  ScalarType wide = accumulator_type(query);
  Packed p;
  p.root = 1 / std::sqrt(double(width));
  p.query = flattened(query);
  p.base_weight = converted(base_weight, type);
  p.u = converted(u, type);
  p.v = padded(v, wide);
  p.scale = padded(scale, wide);
  p.conditions = conditions_of(shift, base_bias, wide, p.root);
  Route& a = p.a;
  a.type = type_of(query);
  a.batch = batch, a.tokens = tokens, a.members = int64_t(experts.size()), a.tasks = tasks;
  a.width = width, a.rank = rank;
  for (size_t k = 0; k < experts.size(); ++k) {
    experts[k] = with_dense_rows(experts[k]);
    a.experts[k] = rows(experts[k]);
  }
  p.experts = std::move(experts);
  a.v = p.v.const_data_ptr();
  a.scale = p.scale.const_data_ptr();
  a.scale_batch = scales ? tasks * in_whole_vectors(rank) : 0;
  a.conditions = p.conditions.const_data_ptr();
  a.conditions_batch = shifts ? tasks * width : 0;
  return p;
}

int64_t work(const Route& a) { return a.width * (a.members * (1 + a.rank / 16) + a.tasks); }

std::tuple<Tensor, Tensor, Tensor, Tensor> route(Tensor query, std::vector<Tensor> experts, Tensor base_weight,
                                                 std::optional<Tensor> base_bias, Tensor u, Tensor v, Tensor scale,
                                                 Tensor shift) {
  Packed p = pack(query, std::move(experts), base_weight, base_bias, u, v, scale, shift);
  Route& a = p.a;
  ScalarType type = query.scalar_type();
  // Scaled inside the products: a float16 logit may pass 65504 on the way.
  Tensor base = allocate({a.batch, a.tokens, a.width}, type), z = allocate({a.batch, a.tokens, a.rank}, type);
  Tensor base_rows = view(base, {a.batch * a.tokens, a.width}, {a.width, 1});
  Tensor z_rows = view(z, {a.batch * a.tokens, a.rank}, {a.rank, 1});
  multiply(base_rows, p.query, p.base_weight, p.root);
  multiply(z_rows, p.query, p.u, p.root);
  Tensor out = allocate({a.batch, a.tasks, a.tokens, a.width}, type);
  Tensor weights = allocate({a.batch, a.tasks, a.tokens, a.members}, accumulator_type(query));
  a.base = base.const_data_ptr();
  a.z = z.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.weights = weights.mutable_data_ptr();
  a.past_caches = past_caches(out, a.width);
  auto kernel = TF_KERNEL(route);
  parallel(a.batch * a.tokens, grain_of(work(a)), TF_KERNEL(route_scratch)(a),
           [&](int64_t begin, int64_t end, void* scratch) { kernel(a, begin, end, scratch); });
  return {out, weights, base, z};
}

// A sum of the accumulator type, (..., padded C) with its columns first, as a dense tensor like `t`.
Tensor shaped(const Tensor& sum, const Tensor& t, const Sizes& strides) {
  Sizes sizes = sizes_of(t);
  Tensor made = allocate(sizes, t.scalar_type());
  torch::stable::copy_(made, view(sum, sizes, strides));
  return made;
}

enum Need { kQuery, kBaseWeight, kBaseBias, kU, kV, kScale, kShift, kExperts };

// The gradients whose bits are set in `needs`, in the order of Need, the experts last.
std::vector<Tensor> route_backward(std::optional<Tensor> grad_tokens, std::optional<Tensor> grad_weights, Tensor query,
                                   std::vector<Tensor> experts, Tensor base_weight, std::optional<Tensor> base_bias,
                                   Tensor u, Tensor v, Tensor scale, Tensor shift, Tensor weights, Tensor base,
                                   Tensor z, int64_t needs) {
  Packed p = pack(query, std::move(experts), base_weight, base_bias, u, v, scale, shift);
  RouteBackward b{};
  b.inputs = p.a;
  Route& a = b.inputs;
  ScalarType type = query.scalar_type(), wide = accumulator_type(query);
  Sizes small_sizes{a.batch, a.tasks, a.tokens, a.members};
  expect("weights", weights, small_sizes, wide);
  expect("base", base, {a.batch, a.tokens, a.width}, type);
  expect("z", z, {a.batch, a.tokens, a.rank}, type);
  STD_TORCH_CHECK(weights.is_contiguous() && base.is_contiguous() && z.is_contiguous(),
                  "weights, base and z must be as the forward op returned them");
  a.weights = weights.mutable_data_ptr();
  a.base = base.const_data_ptr();
  a.z = z.const_data_ptr();
  if (grad_tokens) {
    expect("grad_tokens", *grad_tokens, {a.batch, a.tasks, a.tokens, a.width}, type);
    grad_tokens = with_dense_rows(*grad_tokens);
    b.grad_tokens = rows(*grad_tokens);
  }
  if (grad_weights) {
    expect("grad_weights", *grad_weights, small_sizes);
    b.grad_weights = small(*grad_weights);
  }
  auto need = [&](int64_t bit) { return needed(needs, bit); };
  STD_TORCH_CHECK(base_bias || !need(kBaseBias), "base_bias is absent, so it has no gradient");
  int64_t count = a.batch * a.tokens, columns = in_whole_vectors(a.rank), row = in_whole_vectors(a.width);
  Chunks chunks(count, (a.rank + a.tasks) * row);
  b.chunk = chunks.size;

  std::vector<Tensor> grad_experts;
  Tensor v_transposed;
  for (int64_t k = 0; k < a.members; ++k)
    if (need(kExperts + k)) {
      grad_experts.push_back(allocate({a.batch, a.tokens, a.width}, type));
      b.grad_experts[k] = grad_experts.back().mutable_data_ptr();
      a.past_caches = past_caches(grad_experts.back(), a.width);
    }
  if (!grad_experts.empty()) {
    v_transposed = padded(view(p.v, {a.rank, a.width}, {1, columns}), wide);
    b.v_transposed = v_transposed.const_data_ptr();
  }
  bool into_base = need(kQuery) || need(kBaseWeight), into_z = need(kQuery) || need(kU);
  bool into_conditions = need(kShift) || need(kBaseBias);
  bool shifts = a.conditions_batch != 0, scales = a.scale_batch != 0;
  Tensor grad_base, grad_z, sum_v, sum_scale, sum_conditions;
  auto slots = [&](bool per_sample) { return chunks.count + (per_sample ? a.batch : 0); };
  if (into_base) {
    grad_base = allocate({count, a.width}, type);
    b.grad_base = grad_base.mutable_data_ptr();
  }
  if (into_z) {
    grad_z = allocate({count, a.rank}, type);
    b.grad_z = grad_z.mutable_data_ptr();
  }
  if (need(kV)) {
    sum_v = allocate({slots(false), a.rank * row}, wide);
    b.grad_v = sum_v.mutable_data_ptr();
  }
  if (need(kScale)) {
    sum_scale = allocate({slots(scales), a.tasks * columns}, wide);
    b.grad_scale = sum_scale.mutable_data_ptr();
  }
  if (into_conditions) {
    sum_conditions = allocate({slots(shifts), a.tasks * row}, wide);
    b.grad_conditions = sum_conditions.mutable_data_ptr();
  }
  auto kernel = TF_KERNEL(route_backward);
  parallel(chunks.count, 1, TF_KERNEL(route_backward_scratch)(b),
           [&](int64_t begin, int64_t end, void* scratch) { kernel(b, begin, end, scratch); });

  std::vector<Tensor> grads;
  if (need(kQuery)) {
    grads.push_back(allocate({a.batch, a.tokens, a.width}, type));
    Tensor out = view(grads.back(), {count, a.width}, {a.width, 1});
    multiply(out, grad_base, view(p.base_weight, {a.width, a.width}, {p.base_weight.stride(1), p.base_weight.stride(0)}),
             p.root);
    multiply(out, grad_z, view(p.u, {a.rank, a.width}, {p.u.stride(1), p.u.stride(0)}), p.root, true);
  }
  Tensor query_transposed = view(p.query, {a.width, count}, {1, p.query.stride(0)});
  auto product = [&](const Tensor& right, const Tensor& like) {
    Tensor out = allocate({like.size(0), like.size(1)}, type);
    multiply(out, query_transposed, right, p.root);
    grads.push_back(converted(out, like.scalar_type()));
  };
  if (need(kBaseWeight)) product(grad_base, base_weight);
  // conditions = (b0 + shift) / sqrt(D), so their gradients hold that factor once more.
  Tensor conditions;
  int64_t samples = shifts ? a.batch : 1;
  if (into_conditions) conditions = summed(sum_conditions, samples, a.tasks * row, chunks, shifts, a.tokens, p.root);
  if (need(kBaseBias)) {
    Tensor all = view(conditions, {samples * a.tasks, a.width}, {row, 1});
    int64_t dims[] = {0};
    Tensor total = torch::stable::sum(all, torch::headeronly::IntHeaderOnlyArrayRef(dims, 1));
    grads.push_back(converted(total, base_bias->scalar_type()));
  }
  if (need(kU)) product(grad_z, u);
  if (need(kV)) grads.push_back(shaped(summed(sum_v, 1, a.rank * row, chunks, false, a.tokens), v, {1, row}));
  if (need(kScale)) {
    Tensor sum = summed(sum_scale, scales ? a.batch : 1, a.tasks * columns, chunks, scales, a.tokens);
    grads.push_back(shaped(sum, scale, scales ? Sizes{a.tasks * columns, columns, 1} : Sizes{columns, 1}));
  }
  if (need(kShift)) grads.push_back(shaped(conditions, shift, shifts ? Sizes{a.tasks * row, row, 1} : Sizes{row, 1}));
  for (Tensor& g : grad_experts) grads.push_back(std::move(g));
  return grads;
}

}  // namespace
}  // namespace tiger_fast

STABLE_TORCH_LIBRARY_IMPL(tiger_fast, CPU, m) {
  m.impl("route", TORCH_BOX(&tiger_fast::route));
  m.impl("route_backward", TORCH_BOX(&tiger_fast::route_backward));
}
