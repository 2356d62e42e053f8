// selective_state_update: C++ function, and what autograd and torch.compile need to know.
#include "ops/selective_state_update.h"

#include <mamba_ssm/ops.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "meta.h"

namespace mamba_ssm {

Tensor selective_state_update(const Tensor& state, const Tensor& x, const Tensor& dt,
                              const Tensor& A, const Tensor& B, const Tensor& C,
                              const OptionalTensor& D, const OptionalTensor& z,
                              const OptionalTensor& dt_bias,
                              const OptionalTensor& state_batch_indices, bool dt_softplus,
                              const OptionalTensor& intermediate_states, bool A_is_log) {
  static const auto op =
      find_op<decltype(selective_state_update)>("mamba_ssm::selective_state_update");
  return op.call(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dt_softplus,
                 intermediate_states, A_is_log);
}

namespace {

Tensor selective_state_update_meta(const Tensor& state, const Tensor& x, const Tensor& dt,
                                   const Tensor& A, const Tensor& B, const Tensor& C,
                                   const OptionalTensor& D, const OptionalTensor& z,
                                   const OptionalTensor& dt_bias,
                                   const OptionalTensor& state_batch_indices, bool,
                                   const OptionalTensor& intermediate_states, bool) {
  const MetaChecks checks("selective_state_update", "state", state);
  check_selective_state_update(checks, state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices,
                               intermediate_states);
  return at::empty_like(x);
}

}  // namespace

TORCH_LIBRARY_IMPL(mamba_ssm, Autograd, m) {
  m.impl("selective_state_update", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(mamba_ssm, Meta, m) {
  m.impl("selective_state_update", selective_state_update_meta);
}

}  // namespace mamba_ssm
