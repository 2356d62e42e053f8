// selective_state_update: check, allocate, run. Contract: include/mamba_ssm/ops.h.
#include "selective_state_update.h"

#include <torch/csrc/stable/library.h>

#include "run.h"

namespace mamba_ssm::ops {
namespace {

using kernels::cpu_kernels;
using kernels::SelectiveStateUpdateParams;
using kernels::View;

/// `tensor` with an axis of size 1 wherever `present` is false.
template <int kRank>
View<kRank> view_with_axes(const Tensor& tensor, const bool (&present)[kRank]) {
  View<kRank> v;
  v.data = tensor.data_ptr();
  v.dtype = dtype_of(tensor.scalar_type());
  int64_t axis = 0;
  for (int i = 0; i < kRank; ++i) v.stride[i] = present[i] ? tensor.stride(axis++) : 0;
  return v;
}

template <int kRank>
View<kRank> view_with_axes(const OptionalTensor& tensor, const bool (&present)[kRank]) {
  return tensor ? view_with_axes(*tensor, present) : View<kRank>{};
}

Tensor selective_state_update(Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C,
                              OptionalTensor D, OptionalTensor z, OptionalTensor dt_bias,
                              OptionalTensor state_batch_indices, bool dt_softplus,
                              OptionalTensor intermediate_states, bool A_is_log) {
  const StableChecks checks("selective_state_update", "state", state);
  const auto sizes = check_selective_state_update(checks, state, x, dt, A, B, C, D, z, dt_bias,
                                                  state_batch_indices, intermediate_states);
  checks.writable("state", state);
  if (intermediate_states) checks.writable("intermediate_states", *intermediate_states);
  check_index_below(checks, "state_batch_indices", state_batch_indices, sizes.num_slots);
  Tensor out = allocate_like(checks.op(), x);
  SelectiveStateUpdateParams p{};
  p.batch = sizes.batch;
  p.tokens = sizes.tokens;
  p.nheads = sizes.nheads;
  p.headdim = sizes.headdim;
  p.ngroups = sizes.ngroups;
  p.dstate = sizes.dstate;
  p.num_slots = sizes.num_slots;
  p.dt_softplus = dt_softplus;
  p.A_is_log = A_is_log;
  p.dtype = dtype_of(x.scalar_type());
  const bool tokens = sizes.with_tokens, heads = sizes.with_heads;
  const bool row[] = {true, tokens, heads, true};
  p.state = view_with_axes<4>(state, {true, heads, true, true});
  p.x = view_with_axes(x, row);
  p.dt = view_with_axes(dt, row);
  p.z = view_with_axes(z, row);
  p.A = view_with_axes<3>(A, {heads, true, true});
  p.B = view_with_axes(B, row);
  p.C = view_with_axes(C, row);
  p.D = view_with_axes<2>(D, {heads, true});
  p.dt_bias = view_with_axes<2>(dt_bias, {heads, true});
  p.state_batch_indices = view<1>(state_batch_indices);
  p.out = view_with_axes(out, row);
  p.intermediate_states = view_with_axes<5>(intermediate_states, {true, tokens, heads, true, true});
  if constexpr (kWithCuda) {
    if (x.is_cuda()) {
      const CudaScope scope(x);
      check_launch(checks.op(), kernels::selective_state_update_cuda(p, scope.stream()));
      return out;
    }
  }
  parallel(
      selective_state_update_items(p), p.batch * p.tokens * p.nheads * p.headdim * p.dstate,
      [&](int64_t begin, int64_t end) { cpu_kernels().selective_state_update(p, begin, end); });
  return out;
}

void register_all(torch::stable::detail::StableLibrary& m) {
  m.impl("selective_state_update", TORCH_BOX(&selective_state_update));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CPU, m) { register_all(m); }
#ifdef MAMBA_SSM_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CUDA, m) { register_all(m); }
#endif

}  // namespace mamba_ssm::ops
