// Group attention (TIGER sec. 3.4): memory and threads around the kernels of the same name. The packed form differs
// from the other in where q, k and v begin, and in nothing else.
#include "host.h"

namespace tiger_fast {
namespace {

GroupAttention describe(const Tensor& like, int64_t width, int64_t heads) {
  GroupAttention a{};
  a.type = type_of(like);
  a.batch = like.size(0), a.members = like.size(1), a.tokens = like.size(2);
  expect_between("G, the members of a group,", a.members, kMaxGroup);
  STD_TORCH_CHECK(heads >= 1 && width % heads == 0, "the number of heads, ", heads, ", must divide D, ", width);
  a.heads = heads, a.head = width / heads;
  return a;
}

// Dense rows of q, k and v, which stay with the caller.
struct Apart {
  Tensor q, k, v;

  GroupAttention describe(int64_t heads) {
    expect("q", q, {-1, -1, -1, -1});
    Sizes sizes{q.size(0), q.size(1), q.size(2), q.size(3)};
    expect("k", k, sizes, q.scalar_type());
    expect("v", v, sizes, q.scalar_type());
    GroupAttention a = tiger_fast::describe(q, q.size(3), heads);
    q = with_dense_rows(q), k = with_dense_rows(k), v = with_dense_rows(v);
    a.q = rows(q), a.k = rows(k), a.v = rows(v);
    return a;
  }
};

// Element `offset` of each row, as its first.
Rows behind(const Tensor& t, int64_t offset) {
  Rows r = rows(t);
  r.data = static_cast<const char*>(r.data) + offset * int64_t(t.element_size());
  return r;
}

GroupAttention describe_packed(Tensor& qkv, int64_t heads) {
  expect("qkv", qkv, {-1, -1, -1, -1});
  STD_TORCH_CHECK(qkv.size(3) % 3 == 0, "qkv's last dimension must be 3 D, got ", qkv.size(3));
  int64_t width = qkv.size(3) / 3;
  GroupAttention a = describe(qkv, width, heads);
  qkv = with_dense_rows(qkv);
  a.q = behind(qkv, 0), a.k = behind(qkv, width), a.v = behind(qkv, 2 * width);
  return a;
}

Target target(Tensor& t, int64_t offset = 0) {
  char* data = static_cast<char*>(t.mutable_data_ptr()) + offset * int64_t(t.element_size());
  return {data, {t.stride(0), t.stride(1), t.stride(2)}};
}

Tensor run(GroupAttention a, const Tensor& like) {
  Tensor out = allocate({a.batch, a.members, a.tokens, a.heads * a.head}, like.scalar_type());
  if (out.numel() == 0) return out;
  a.out = target(out);
  a.past_caches = past_caches(out, a.head);
  auto kernel = TF_KERNEL(group_attention);
  parallel(a.batch * a.tokens, grain_of(4 * a.members * a.heads * a.head),
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

void run_backward(const GroupAttentionBackward& a) {
  const GroupAttention& in = a.inputs;
  auto kernel = TF_KERNEL(group_attention_backward);
  parallel(in.batch * in.tokens, grain_of(7 * in.members * in.heads * in.head),
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

void read_grad(Tensor& grad, GroupAttentionBackward& a, const Tensor& like) {
  const GroupAttention& in = a.inputs;
  expect("grad", grad, {in.batch, in.members, in.tokens, in.heads * in.head}, like.scalar_type());
  grad = with_dense_rows(grad);
  a.grad = rows(grad);
}

Tensor group_attention(Tensor q, Tensor k, Tensor v, int64_t heads) {
  Apart inputs{q, k, v};
  return run(inputs.describe(heads), q);
}

Tensor group_attention_packed(Tensor qkv, int64_t heads) {
  GroupAttention a = describe_packed(qkv, heads);
  return run(a, qkv);
}

// The gradients of q, k and v whose bits 0, 1 and 2 are set in `needs`.
std::vector<Tensor> group_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, int64_t heads, int64_t needs) {
  Apart inputs{q, k, v};
  GroupAttentionBackward a{};
  a.inputs = inputs.describe(heads);
  read_grad(grad, a, q);
  Target* targets[] = {&a.grad_q, &a.grad_k, &a.grad_v};
  std::vector<Tensor> grads;
  for (int i = 0; i < 3; ++i)
    if (needed(needs, i)) {
      grads.push_back(allocate({a.inputs.batch, a.inputs.members, a.inputs.tokens, q.size(3)}, q.scalar_type()));
      *targets[i] = target(grads.back());
      a.inputs.past_caches = past_caches(grads.back(), a.inputs.head);
    }
  if (!grads.empty() && grads[0].numel() > 0) run_backward(a);
  return grads;
}

Tensor group_attention_packed_backward(Tensor grad, Tensor qkv, int64_t heads) {
  GroupAttentionBackward a{};
  a.inputs = describe_packed(qkv, heads);
  read_grad(grad, a, qkv);
  int64_t width = a.inputs.heads * a.inputs.head;
  Tensor packed = allocate({a.inputs.batch, a.inputs.members, a.inputs.tokens, 3 * width}, qkv.scalar_type());
  if (packed.numel() == 0) return packed;
  a.grad_q = target(packed), a.grad_k = target(packed, width), a.grad_v = target(packed, 2 * width);
  a.inputs.past_caches = past_caches(packed, a.inputs.head);
  run_backward(a);
  return packed;
}

}  // namespace
}  // namespace tiger_fast

STABLE_TORCH_LIBRARY_IMPL(tiger_fast, CPU, m) {
  m.impl("group_attention", TORCH_BOX(&tiger_fast::group_attention));
  m.impl("group_attention_backward", TORCH_BOX(&tiger_fast::group_attention_backward));
  m.impl("group_attention_packed", TORCH_BOX(&tiger_fast::group_attention_packed));
  m.impl("group_attention_packed_backward", TORCH_BOX(&tiger_fast::group_attention_packed_backward));
}
