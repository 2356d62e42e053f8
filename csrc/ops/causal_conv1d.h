// What a call of causal_conv1d and of its decode ops must look like. Meaning: <mamba_ssm/ops.h>.
#pragma once

#include "checks.h"

namespace mamba_ssm::ops {

template <class Size>
struct CausalConv1dSizes {
  Size batch, dim, seqlen, width;
};

/// Arguments that forward and backward share.
template <class Access, class Tensor = typename Access::Tensor>
CausalConv1dSizes<typename Access::Size> check_causal_conv1d(
    const Checks<Access>& checks, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& seq_idx,
    const std::optional<Tensor>& initial_states) {
  checks.rank("x", x, {3}, "(batch, dim, seqlen)");
  checks.activation("x", x);
  const auto batch = Access::size(x, 0), dim = Access::size(x, 1), seqlen = Access::size(x, 2);
  checks.rank("weight", weight, {2}, "(dim, width)");
  const auto width = Access::size(weight, 1);
  checks.shape("weight", weight, {{"dim", dim}, {"width", width}});
  checks.at_least("weight", weight, "width", 1, 1);
  checks.parameter("weight", weight, x.scalar_type());
  if (bias) {
    checks.shape("bias", *bias, {{"dim", dim}});
    checks.parameter("bias", *bias, x.scalar_type());
  }
  if (seq_idx) {
    checks.shape("seq_idx", *seq_idx, {{"batch", batch}, {"seqlen", seqlen}});
    checks.index("seq_idx", *seq_idx);
  }
  if (initial_states) {
    checks.shape("initial_states", *initial_states,
                 {{"batch", batch}, {"dim", dim}, {"width - 1", width - 1}});
    checks.dtype("initial_states", *initial_states, {x.scalar_type()});
  }
  return {batch, dim, seqlen, width};
}

/// Incoming gradients of the backward.
template <class Access, class Tensor = typename Access::Tensor>
void check_causal_conv1d_gradients(const Checks<Access>& checks,
                                   const CausalConv1dSizes<typename Access::Size>& sizes,
                                   const Tensor& x, const Tensor& dout,
                                   const std::optional<Tensor>& dfinal_states) {
  checks.shape("dout", dout,
               {{"batch", sizes.batch}, {"dim", sizes.dim}, {"seqlen", sizes.seqlen}});
  checks.dtype("dout", dout, {x.scalar_type()});
  if (dfinal_states) {
    checks.shape("dfinal_states", *dfinal_states,
                 {{"batch", sizes.batch}, {"dim", sizes.dim}, {"width - 1", sizes.width - 1}});
    checks.dtype("dfinal_states", *dfinal_states, {x.scalar_type()});
  }
}

/// Results that the caller made.
template <class Access, class Tensor = typename Access::Tensor>
void check_causal_conv1d_results(const Checks<Access>& checks,
                                 const CausalConv1dSizes<typename Access::Size>& sizes,
                                 const Tensor& x, const Tensor& out, const Tensor& final_states) {
  checks.result("out", out, "x", x);
  checks.shape("final_states", final_states,
               {{"batch", sizes.batch}, {"dim", sizes.dim}, {"width - 1", sizes.width - 1}});
  checks.dtype("final_states", final_states, {x.scalar_type()});
  checks.writable("final_states", final_states);
}

/// Gradients that the caller made.
template <class Access, class Tensor = typename Access::Tensor>
void check_causal_conv1d_bwd_results(const Checks<Access>& checks, const Tensor& x,
                                     const Tensor& weight, const std::optional<Tensor>& bias,
                                     const std::optional<Tensor>& initial_states, const Tensor& dx,
                                     const Tensor& dweight, const std::optional<Tensor>& dbias,
                                     const std::optional<Tensor>& dinitial_states) {
  checks.result("dx", dx, "x", x);
  checks.result("dweight", dweight, "weight", weight);
  checks.result("dbias", dbias, "bias", bias);
  checks.result("dinitial_states", dinitial_states, "initial_states", initial_states);
}

template <class Size>
struct CausalConv1dUpdateSizes {
  Size batch, dim, seqlen, width, num_slots, state_len;
};

template <class Access, class Tensor = typename Access::Tensor>
CausalConv1dUpdateSizes<typename Access::Size> check_causal_conv1d_update(
    const Checks<Access>& checks, const Tensor& x, const Tensor& conv_state, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& cache_seqlens,
    const std::optional<Tensor>& conv_state_indices) {
  using Size = typename Access::Size;
  checks.rank("x", x, {2, 3}, "(batch, dim) or (batch, dim, seqlen)");
  checks.activation("x", x);
  const auto batch = Access::size(x, 0), dim = Access::size(x, 1);
  checks.rank("weight", weight, {2}, "(dim, width)");
  const auto width = Access::size(weight, 1);
  checks.shape("weight", weight, {{"dim", dim}, {"width", width}});
  checks.at_least("weight", weight, "width", 1, 1);
  checks.parameter("weight", weight, x.scalar_type());
  if (bias) {
    checks.shape("bias", *bias, {{"dim", dim}});
    checks.parameter("bias", *bias, x.scalar_type());
  }
  checks.rank("conv_state", conv_state, {3}, "(num_slots, dim, state_len)");
  const auto num_slots = conv_state_indices ? Access::size(conv_state, 0) : batch;
  const auto state_len = Access::size(conv_state, 2);
  checks.shape("conv_state", conv_state,
               {{conv_state_indices ? "num_slots" : "batch", num_slots},
                {"dim", dim},
                {"state_len", state_len}});
  checks.dtype("conv_state", conv_state, {x.scalar_type()});
  checks.at_least("conv_state", conv_state, "state_len", 2, width - 1);
  if (cache_seqlens) {
    checks.shape("cache_seqlens", *cache_seqlens, {{"batch", batch}});
    checks.index("cache_seqlens", *cache_seqlens);
    checks.at_least("conv_state", conv_state, "state_len", 2, 1);
  }
  if (conv_state_indices) {
    checks.shape("conv_state_indices", *conv_state_indices, {{"batch", batch}});
    checks.index("conv_state_indices", *conv_state_indices);
  }
  return {batch, dim, x.dim() == 3 ? Access::size(x, 2) : Size(1), width, num_slots, state_len};
}

template <class Access, class Tensor = typename Access::Tensor>
void check_causal_conv1d_varlen_states(const Checks<Access>& checks, const Tensor& x,
                                       const Tensor& cu_seqlens, int64_t state_len) {
  checks.rank("x", x, {2}, "(total_tokens, dim)");
  checks.activation("x", x);
  checks.rank("cu_seqlens", cu_seqlens, {1}, "(num_sequences + 1)");
  checks.index("cu_seqlens", cu_seqlens);
  checks.at_least("cu_seqlens", cu_seqlens, "num_sequences + 1", 0, 1);
  if (state_len < 0) {
    checks.fail("state_len must not be negative, got " + std::to_string(state_len));
  }
}

}  // namespace mamba_ssm::ops
