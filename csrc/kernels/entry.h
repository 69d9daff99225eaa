// The kernels' entry points: each exists once per instruction set, and works on the range [begin, end) of its units.
// A kernel that takes `scratch` is handed working memory of this range alone: NAME_scratch says how many bytes, of kernels with
// a norm norm_scratch.
#pragma once

#include "group_attention.h"
#include "adapter.h"
#include "alignment.h"
#include "competency.h"
#include "counterfactual.h"
#include "leave_one_out.h"
#include "route.h"
#include "sums.h"

#define TF_ENTRIES                                                    \
  void group_attention(const GroupAttention&, int64_t begin, int64_t end); \
  void group_attention_backward(const GroupAttentionBackward&, int64_t begin, int64_t end); \
  void adapter_in(const AdapterIn&, int64_t begin, int64_t end, void* scratch); \
  void adapter_in_backward(const AdapterInBackward&, int64_t begin, int64_t end, void* scratch); \
  void adapter_out(const AdapterOut&, int64_t begin, int64_t end, void* scratch); \
  void adapter_out_backward(const AdapterOutBackward&, int64_t begin, int64_t end, void* scratch); \
  void causal_target(const CausalTarget&, int64_t begin, int64_t end); \
  void causal_target_backward(const CausalTargetBackward&, int64_t begin, int64_t end); \
  void alignment_loss(const AlignmentLoss&, int64_t begin, int64_t end); \
  void alignment_loss_backward(const AlignmentLossBackward&, int64_t begin, int64_t end); \
  void competency_weights(const CompetencyWeights&, int64_t begin, int64_t end); \
  void competency_weights_backward(const CompetencyWeightsBackward&, int64_t begin, int64_t end); \
  void competency_aggregate(const CompetencyAggregate&, int64_t begin, int64_t end, void* scratch); \
  void competency_aggregate_backward(const CompetencyAggregateBackward&, int64_t begin, int64_t end, void* scratch); \
  void counterfactual(const Counterfactual&, int64_t begin, int64_t end, void* scratch); \
  void counterfactual_backward(const CounterfactualBackward&, int64_t begin, int64_t end, void* scratch); \
  void counterfactual_panel(const CounterfactualPack&, int64_t begin, int64_t end); \
  void counterfactual_columns(const CounterfactualPack&, int64_t begin, int64_t end); \
  void counterfactual_rows(const CounterfactualPack&, int64_t begin, int64_t end); \
  void leave_one_out(const LeaveOneOut&, int64_t begin, int64_t end); \
  void leave_one_out_backward(const LeaveOneOutBackward&, int64_t begin, int64_t end); \
  int64_t norm_scratch(Type, int64_t width); \
  int64_t counterfactual_scratch(const Counterfactual&); \
  int64_t route_scratch(const Route&); \
  int64_t route_backward_scratch(const RouteBackward&); \
  void route(const Route&, int64_t begin, int64_t end, void* scratch);               \
  void conditions(const Conditions&, int64_t begin, int64_t end);     \
  void route_backward(const RouteBackward&, int64_t begin, int64_t end, void* scratch); \
  void sums(const Sums&, int64_t begin, int64_t end);

namespace tiger_fast {
namespace plain {
TF_ENTRIES
}
namespace v3 {
TF_ENTRIES
}
namespace v4 {
TF_ENTRIES
}
}  // namespace tiger_fast
