// selective_scan: C++ functions, gradients, and what torch.compile needs to know.
#include "ops/selective_scan.h"

#include <ATen/ops/zeros.h>
#include <mamba_ssm/ops.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "derivatives.h"
#include "meta.h"

namespace mamba_ssm {

std::tuple<Tensor, Tensor> selective_scan(const Tensor& u, const Tensor& delta, const Tensor& A,
                                          const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                          const OptionalTensor& z, const OptionalTensor& delta_bias,
                                          const OptionalTensor& initial_state,
                                          const OptionalTensor& seq_idx, bool delta_softplus) {
  static const auto op = find_op<decltype(selective_scan)>("mamba_ssm::selective_scan");
  return op.call(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus);
}

std::tuple<Tensor, Tensor, Tensor> selective_scan_fwd(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
    const OptionalTensor& initial_state, const OptionalTensor& seq_idx, bool delta_softplus) {
  static const auto op = find_op<decltype(selective_scan_fwd)>("mamba_ssm::selective_scan_fwd");
  return op.call(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor,
           OptionalTensor>
selective_scan_bwd(const Tensor& dout, const OptionalTensor& dlast_state, const Tensor& states,
                   const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                   const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                   const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
                   const OptionalTensor& seq_idx, bool delta_softplus) {
  static const auto op = find_op<decltype(selective_scan_bwd)>("mamba_ssm::selective_scan_bwd");
  return op.call(dout, dlast_state, states, u, delta, A, B, C, D, z, delta_bias, initial_state,
                 seq_idx, delta_softplus);
}

void selective_scan_bwd_out(const Tensor& dout, const OptionalTensor& dlast_state,
                            const Tensor& states, const Tensor& u, const Tensor& delta,
                            const Tensor& A, const Tensor& B, const Tensor& C,
                            const OptionalTensor& D, const OptionalTensor& z,
                            const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
                            const OptionalTensor& seq_idx, bool delta_softplus, const Tensor& du,
                            const Tensor& ddelta, const Tensor& dA, const Tensor& dB,
                            const Tensor& dC, const OptionalTensor& dD, const OptionalTensor& dz,
                            const OptionalTensor& ddelta_bias,
                            const OptionalTensor& dinitial_state) {
  static const auto op =
      find_op<decltype(selective_scan_bwd_out)>("mamba_ssm::selective_scan_bwd_out");
  op.call(dout, dlast_state, states, u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx,
          delta_softplus, du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state);
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Keeps the arguments and the state before every chunk; the backward walks each chunk again from
/// its state, so no state per token is ever stored.
struct SelectiveScan : torch::autograd::Function<SelectiveScan> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& u, const Tensor& delta,
                               const Tensor& A, const Tensor& B, const Tensor& C,
                               const OptionalTensor& D, const OptionalTensor& z,
                               const OptionalTensor& delta_bias,
                               const OptionalTensor& initial_state, const OptionalTensor& seq_idx,
                               bool delta_softplus) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, last_state, states] = selective_scan_fwd(u, delta, A, B, C, D, z, delta_bias,
                                                        initial_state, seq_idx, delta_softplus);
    ctx->save_for_backward({states, u, delta, A, B, C, to_saved(D), to_saved(z),
                            to_saved(delta_bias), to_saved(initial_state), to_saved(seq_idx)});
    ctx->saved_data["delta_softplus"] = delta_softplus;
    ctx->set_materialize_grads(false);
    return {out, last_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& u = saved[1];
    Tensor dout = gradients[0];
    if (!dout.defined()) dout = at::zeros({}, u.options()).expand_symint(u.sym_sizes());
    auto [du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state] = selective_scan_bwd(
        dout, from_saved(gradients[1]), saved[0], u, saved[2], saved[3], saved[4], saved[5],
        from_saved(saved[6]), from_saved(saved[7]), from_saved(saved[8]), from_saved(saved[9]),
        from_saved(saved[10]), ctx->saved_data["delta_softplus"].toBool());
    return {du,
            ddelta,
            dA,
            dB,
            dC,
            to_saved(dD),
            to_saved(dz),
            to_saved(ddelta_bias),
            to_saved(dinitial_state),
            Tensor(),
            Tensor()};
  }
};

std::tuple<Tensor, Tensor> selective_scan_autograd(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
    const OptionalTensor& initial_state, const OptionalTensor& seq_idx, bool delta_softplus) {
  if (!needs_gradient({u, delta, A, B, C, to_saved(D), to_saved(z), to_saved(delta_bias),
                       to_saved(initial_state)})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx,
                          delta_softplus);
  }
  const variable_list results = SelectiveScan::apply(u, delta, A, B, C, D, z, delta_bias,
                                                     initial_state, seq_idx, delta_softplus);
  return {results[0], results[1]};
}

std::tuple<Tensor, Tensor, Tensor> selective_scan_fwd_meta(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
    const OptionalTensor& initial_state, const OptionalTensor& seq_idx, bool) {
  const MetaChecks checks("selective_scan", "u", u);
  const auto sizes =
      check_selective_scan(checks, u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx);
  const auto state_options = u.options().dtype(sizes.state_type);
  return {at::empty_like(u),
          at::empty_symint({sizes.batch, sizes.dim, sizes.dstate}, state_options),
          at::empty_symint({sizes.batch, sizes.chunks, sizes.dim, sizes.dstate}, state_options)};
}

std::tuple<Tensor, Tensor> selective_scan_meta(const Tensor& u, const Tensor& delta,
                                               const Tensor& A, const Tensor& B, const Tensor& C,
                                               const OptionalTensor& D, const OptionalTensor& z,
                                               const OptionalTensor& delta_bias,
                                               const OptionalTensor& initial_state,
                                               const OptionalTensor& seq_idx, bool delta_softplus) {
  auto [out, last_state, states] = selective_scan_fwd_meta(u, delta, A, B, C, D, z, delta_bias,
                                                           initial_state, seq_idx, delta_softplus);
  return {out, last_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor,
           OptionalTensor>
selective_scan_bwd_meta(const Tensor& dout, const OptionalTensor& dlast_state, const Tensor& states,
                        const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                        const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                        const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
                        const OptionalTensor& seq_idx, bool) {
  const MetaChecks checks("selective_scan_bwd", "u", u);
  const auto sizes =
      check_selective_scan(checks, u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx);
  check_selective_scan_gradients(checks, sizes, u, dout, dlast_state, states);
  return {at::empty_like(u), at::empty_like(delta),  at::empty_like(A),
          at::empty_like(B), at::empty_like(C),      empty_like(D),
          empty_like(z),     empty_like(delta_bias), empty_like(initial_state)};
}

void selective_scan_bwd_out_meta(
    const Tensor& dout, const OptionalTensor& dlast_state, const Tensor& states, const Tensor& u,
    const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
    const OptionalTensor& z, const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
    const OptionalTensor& seq_idx, bool, const Tensor& du, const Tensor& ddelta, const Tensor& dA,
    const Tensor& dB, const Tensor& dC, const OptionalTensor& dD, const OptionalTensor& dz,
    const OptionalTensor& ddelta_bias, const OptionalTensor& dinitial_state) {
  const MetaChecks checks("selective_scan_bwd_out", "u", u);
  const auto sizes =
      check_selective_scan(checks, u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx);
  check_selective_scan_bwd_results(checks, u, delta, A, B, C, D, z, delta_bias, initial_state, du,
                                   ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state);
  check_selective_scan_gradients(checks, sizes, u, dout, dlast_state, states);
}

}  // namespace

TORCH_LIBRARY_IMPL(mamba_ssm, Autograd, m) {
  m.impl("selective_scan", selective_scan_autograd);
  m.impl("selective_scan_fwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("selective_scan_bwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("selective_scan_bwd_out", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(mamba_ssm, Meta, m) {
  m.impl("selective_scan", selective_scan_meta);
  m.impl("selective_scan_fwd", selective_scan_fwd_meta);
  m.impl("selective_scan_bwd", selective_scan_bwd_meta);
  m.impl("selective_scan_bwd_out", selective_scan_bwd_out_meta);
}

}  // namespace mamba_ssm
