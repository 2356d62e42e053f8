#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <mamba_ssm/nn/block.h>
#include <mamba_ssm/ops.h>

#include <type_traits>
#include <utility>

#include "parts.h"

namespace mamba_ssm {

using at::Tensor;

NormImpl::NormImpl(int64_t size_, bool rms_norm_, double epsilon_)
    : size(size_), rms_norm(rms_norm_), epsilon(epsilon_) {
  reset();
}

void NormImpl::reset() {
  weight = register_parameter("weight", at::ones({size}));
  if (!rms_norm) bias = register_parameter("bias", at::zeros({size}));
}

Tensor NormImpl::forward(const Tensor& hidden, Tensor& residual, bool residual_in_fp32) {
  const auto [out, out1, sum] = layer_norm(hidden, weight, if_defined(bias), if_defined(residual),
                                           /*x1=*/{}, /*weight1=*/{}, /*bias1=*/{},
                                           /*rowscale=*/{}, /*dropout_mask=*/{},
                                           /*dropout_mask1=*/{}, epsilon, /*dropout_p=*/0.0,
                                           /*prenorm=*/true, residual_in_fp32, rms_norm);
  residual = sum.value_or(hidden);
  return out;
}

BlockImpl::BlockImpl(BlockOptions options_) : options(std::move(options_)) { reset(); }

void BlockImpl::reset() {
  const auto make = [&](const auto& mixer_options) {
    using Options = std::decay_t<decltype(mixer_options)>;
    using Mixer = std::conditional_t<std::is_same_v<Options, MambaOptions>, Mamba, Mamba2>;
    norm = Norm(mixer_options.d_model(), options.rms_norm(), options.norm_epsilon());
    if (mixer_options.dtype()) norm->to(*mixer_options.dtype());
    if (mixer_options.device()) norm->to(*mixer_options.device());
    register_module("norm", norm);
    mixer = register_module("mixer", Mixer(mixer_options));
  };
  std::visit(make, options.mixer());
}

Tensor BlockImpl::forward(const Tensor& hidden_states, Tensor& residual, MambaState* state,
                          const std::optional<Tensor>& seq_idx) {
  // A step starts with one product, which takes the norm along.
  if (state != nullptr && hidden_states.size(1) == 1 && !seq_idx && norm->rms_norm) {
    const auto step = [&](auto& module) {
      const auto& in_proj = module->in_proj;
      const auto [projected, sum] = step_linear_prenorm(
          hidden_states, in_proj->weight, if_defined(in_proj->bias), if_defined(residual),
          norm->weight, norm->epsilon, options.residual_in_fp32());
      residual = sum;
      return module->step_projected(projected.squeeze(1), state->conv_state, state->ssm_state);
    };
    return std::visit(step, mixer);
  }
  const Tensor normed = norm->forward(hidden_states, residual, options.residual_in_fp32());
  return std::visit([&](auto& module) { return module->forward(normed, state, seq_idx); }, mixer);
}

MambaState BlockImpl::allocate_inference_cache(int64_t batch_size, int64_t max_seqlen,
                                               std::optional<at::ScalarType> dtype,
                                               std::optional<at::ScalarType> state_dtype) const {
  const auto allocate = [&](const auto& module) {
    return module->allocate_inference_cache(batch_size, max_seqlen, dtype, state_dtype);
  };
  return std::visit(allocate, mixer);
}

}  // namespace mamba_ssm
