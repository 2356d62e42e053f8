// causal_conv1d: C++ functions, gradients, and what torch.compile needs to know.
#include "ops/causal_conv1d.h"

#include <ATen/ops/zeros.h>
#include <mamba_ssm/ops.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "derivatives.h"
#include "meta.h"

namespace mamba_ssm {

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight,
                                         const OptionalTensor& bias, const OptionalTensor& seq_idx,
                                         const OptionalTensor& initial_states, bool silu) {
  static const auto op = find_op<decltype(causal_conv1d)>("mamba_ssm::causal_conv1d");
  return op.call(x, weight, bias, seq_idx, initial_states, silu);
}

void causal_conv1d_out(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& seq_idx, const OptionalTensor& initial_states,
                       bool silu, const Tensor& out, const Tensor& final_states) {
  static const auto op = find_op<decltype(causal_conv1d_out)>("mamba_ssm::causal_conv1d_out");
  op.call(x, weight, bias, seq_idx, initial_states, silu, out, final_states);
}

std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor> causal_conv1d_bwd(
    const Tensor& dout, const OptionalTensor& dfinal_states, const Tensor& x, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& seq_idx, const OptionalTensor& initial_states,
    bool silu) {
  static const auto op = find_op<decltype(causal_conv1d_bwd)>("mamba_ssm::causal_conv1d_bwd");
  return op.call(dout, dfinal_states, x, weight, bias, seq_idx, initial_states, silu);
}

void causal_conv1d_bwd_out(const Tensor& dout, const OptionalTensor& dfinal_states, const Tensor& x,
                           const Tensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& seq_idx, const OptionalTensor& initial_states,
                           bool silu, const Tensor& dx, const Tensor& dweight,
                           const OptionalTensor& dbias, const OptionalTensor& dinitial_states) {
  static const auto op =
      find_op<decltype(causal_conv1d_bwd_out)>("mamba_ssm::causal_conv1d_bwd_out");
  op.call(dout, dfinal_states, x, weight, bias, seq_idx, initial_states, silu, dx, dweight, dbias,
          dinitial_states);
}

Tensor causal_conv1d_update(const Tensor& x, const Tensor& conv_state, const Tensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& cache_seqlens,
                            const OptionalTensor& conv_state_indices, bool silu) {
  static const auto op = find_op<decltype(causal_conv1d_update)>("mamba_ssm::causal_conv1d_update");
  return op.call(x, conv_state, weight, bias, cache_seqlens, conv_state_indices, silu);
}

Tensor causal_conv1d_varlen_states(const Tensor& x, const Tensor& cu_seqlens, int64_t state_len) {
  static const auto op =
      find_op<decltype(causal_conv1d_varlen_states)>("mamba_ssm::causal_conv1d_varlen_states");
  return op.call(x, cu_seqlens, state_len);
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Both results are linear in (x, weight, bias, initial_states) up to the activation, whose input
/// the backward computes again: nothing but the arguments is kept.
struct CausalConv1d : torch::autograd::Function<CausalConv1d> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& seq_idx,
                               const OptionalTensor& initial_states, bool silu) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, final_states] = causal_conv1d(x, weight, bias, seq_idx, initial_states, silu);
    ctx->save_for_backward(
        {x, weight, to_saved(bias), to_saved(seq_idx), to_saved(initial_states)});
    ctx->saved_data["silu"] = silu;
    ctx->set_materialize_grads(false);
    return {out, final_states};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& x = saved[0];
    Tensor dout = gradients[0];
    if (!dout.defined()) dout = at::zeros({}, x.options()).expand_symint(x.sym_sizes());
    auto [dx, dweight, dbias, dinitial_states] = causal_conv1d_bwd(
        dout, from_saved(gradients[1]), x, saved[1], from_saved(saved[2]), from_saved(saved[3]),
        from_saved(saved[4]), ctx->saved_data["silu"].toBool());
    return {dx, dweight, to_saved(dbias), Tensor(), to_saved(dinitial_states), Tensor()};
  }
};

std::tuple<Tensor, Tensor> causal_conv1d_autograd(const Tensor& x, const Tensor& weight,
                                                  const OptionalTensor& bias,
                                                  const OptionalTensor& seq_idx,
                                                  const OptionalTensor& initial_states, bool silu) {
  if (!needs_gradient({x, weight, to_saved(bias), to_saved(initial_states)})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return causal_conv1d(x, weight, bias, seq_idx, initial_states, silu);
  }
  const variable_list results = CausalConv1d::apply(x, weight, bias, seq_idx, initial_states, silu);
  return {results[0], results[1]};
}

std::tuple<Tensor, Tensor> causal_conv1d_meta(const Tensor& x, const Tensor& weight,
                                              const OptionalTensor& bias,
                                              const OptionalTensor& seq_idx,
                                              const OptionalTensor& initial_states, bool) {
  const MetaChecks checks("causal_conv1d", "x", x);
  const auto sizes = check_causal_conv1d(checks, x, weight, bias, seq_idx, initial_states);
  return {at::empty_like(x), empty_columns(x, sizes.batch, sizes.dim, sizes.width - 1)};
}

void causal_conv1d_out_meta(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& seq_idx, const OptionalTensor& initial_states,
                            bool, const Tensor& out, const Tensor& final_states) {
  const MetaChecks checks("causal_conv1d_out", "x", x);
  const auto sizes = check_causal_conv1d(checks, x, weight, bias, seq_idx, initial_states);
  check_causal_conv1d_results(checks, sizes, x, out, final_states);
}

std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor> causal_conv1d_bwd_meta(
    const Tensor& dout, const OptionalTensor& dfinal_states, const Tensor& x, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& seq_idx, const OptionalTensor& initial_states,
    bool) {
  const MetaChecks checks("causal_conv1d_bwd", "x", x);
  const auto sizes = check_causal_conv1d(checks, x, weight, bias, seq_idx, initial_states);
  check_causal_conv1d_gradients(checks, sizes, x, dout, dfinal_states);
  OptionalTensor dinitial_states;
  if (initial_states) {
    dinitial_states = empty_columns(x, sizes.batch, sizes.dim, sizes.width - 1);
  }
  return {at::empty_like(x), at::empty_like(weight), empty_like(bias), dinitial_states};
}

void causal_conv1d_bwd_out_meta(const Tensor& dout, const OptionalTensor& dfinal_states,
                                const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& seq_idx, const OptionalTensor& initial_states,
                                bool, const Tensor& dx, const Tensor& dweight,
                                const OptionalTensor& dbias,
                                const OptionalTensor& dinitial_states) {
  const MetaChecks checks("causal_conv1d_bwd_out", "x", x);
  const auto sizes = check_causal_conv1d(checks, x, weight, bias, seq_idx, initial_states);
  check_causal_conv1d_bwd_results(checks, x, weight, bias, initial_states, dx, dweight, dbias,
                                  dinitial_states);
  check_causal_conv1d_gradients(checks, sizes, x, dout, dfinal_states);
}

Tensor causal_conv1d_update_meta(const Tensor& x, const Tensor& conv_state, const Tensor& weight,
                                 const OptionalTensor& bias, const OptionalTensor& cache_seqlens,
                                 const OptionalTensor& conv_state_indices, bool) {
  const MetaChecks checks("causal_conv1d_update", "x", x);
  check_causal_conv1d_update(checks, x, conv_state, weight, bias, cache_seqlens,
                             conv_state_indices);
  return at::empty_like(x);
}

Tensor causal_conv1d_varlen_states_meta(const Tensor& x, const Tensor& cu_seqlens,
                                        int64_t state_len) {
  const MetaChecks checks("causal_conv1d_varlen_states", "x", x);
  check_causal_conv1d_varlen_states(checks, x, cu_seqlens, state_len);
  return empty_columns(x, cu_seqlens.sym_size(0) - 1, x.sym_size(1), state_len);
}

}  // namespace

TORCH_LIBRARY_IMPL(mamba_ssm, Autograd, m) {
  m.impl("causal_conv1d", causal_conv1d_autograd);
  m.impl("causal_conv1d_out", torch::autograd::autogradNotImplementedFallback());
  m.impl("causal_conv1d_bwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("causal_conv1d_bwd_out", torch::autograd::autogradNotImplementedFallback());
  m.impl("causal_conv1d_update", torch::autograd::autogradNotImplementedFallback());
  m.impl("causal_conv1d_varlen_states", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(mamba_ssm, Meta, m) {
  m.impl("causal_conv1d", causal_conv1d_meta);
  m.impl("causal_conv1d_out", causal_conv1d_out_meta);
  m.impl("causal_conv1d_bwd", causal_conv1d_bwd_meta);
  m.impl("causal_conv1d_bwd_out", causal_conv1d_bwd_out_meta);
  m.impl("causal_conv1d_update", causal_conv1d_update_meta);
  m.impl("causal_conv1d_varlen_states", causal_conv1d_varlen_states_meta);
}

}  // namespace mamba_ssm
