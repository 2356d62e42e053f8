// selective_state_update: check, allocate, run. Contract: include/mamba_ssm/ops.h.
#include "selective_state_update.h"

#include <torch/csrc/stable/library.h>

#include "run.h"

namespace mamba_ssm::ops {
namespace {

using kernels::cpu_kernels;
using kernels::SelectiveStateUpdateParams;
using kernels::View;

/// `tensor` with a head axis of size 1 inserted at `axis` where the call came without heads.
template <int kRank>
View<kRank> view_with_heads(const Tensor& tensor, int axis, bool with_heads) {
  if (with_heads) return view<kRank>(tensor);
  const View<kRank - 1> flat = view<kRank - 1>(tensor);
  View<kRank> v;
  v.data = flat.data;
  v.dtype = flat.dtype;
  for (int i = 0; i < kRank; ++i)
    v.stride[i] = i < axis ? flat.stride[i] : i == axis ? 0 : flat.stride[i - 1];
  return v;
}

template <int kRank>
View<kRank> view_with_heads(const OptionalTensor& tensor, int axis, bool with_heads) {
  return tensor ? view_with_heads<kRank>(*tensor, axis, with_heads) : View<kRank>{};
}

Tensor selective_state_update(Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C,
                              OptionalTensor D, OptionalTensor z, OptionalTensor dt_bias,
                              OptionalTensor state_batch_indices, bool dt_softplus) {
  const StableChecks checks("selective_state_update", "state", state);
  const auto sizes = check_selective_state_update(checks, state, x, dt, A, B, C, D, z, dt_bias,
                                                  state_batch_indices);
  check_writable(checks, "state", state);
  check_index_below(checks, "state_batch_indices", state_batch_indices, sizes.num_slots);
  Tensor out = allocate_like(checks.op(), x);
  SelectiveStateUpdateParams p{};
  p.batch = sizes.batch;
  p.nheads = sizes.nheads;
  p.headdim = sizes.headdim;
  p.ngroups = sizes.ngroups;
  p.dstate = sizes.dstate;
  p.num_slots = sizes.num_slots;
  p.dt_softplus = dt_softplus;
  p.dtype = dtype_of(x.scalar_type());
  p.state = view_with_heads<4>(state, 1, sizes.with_heads);
  p.x = view_with_heads<3>(x, 1, sizes.with_heads);
  p.dt = view_with_heads<3>(dt, 1, sizes.with_heads);
  p.z = view_with_heads<3>(z, 1, sizes.with_heads);
  p.A = view_with_heads<3>(A, 0, sizes.with_heads);
  p.B = view_with_heads<3>(B, 1, sizes.with_heads);
  p.C = view_with_heads<3>(C, 1, sizes.with_heads);
  p.D = view_with_heads<2>(D, 0, sizes.with_heads);
  p.dt_bias = view_with_heads<2>(dt_bias, 0, sizes.with_heads);
  p.state_batch_indices = view<1>(state_batch_indices);
  p.out = view_with_heads<3>(out, 1, sizes.with_heads);
  if constexpr (kWithCuda) {
    if (x.is_cuda()) {
      const CudaScope scope(x);
      check_launch(checks.op(), kernels::selective_state_update_cuda(p, scope.stream()));
      return out;
    }
  }
  parallel(
      selective_state_update_items(p), p.batch * p.nheads * p.headdim * p.dstate,
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
