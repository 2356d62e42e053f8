// ssd_chunk_scan: C++ functions, gradients, and what torch.compile needs to know.
#include "ops/ssd_chunk_scan.h"

#include <ATen/ops/zeros.h>
#include <mamba_ssm/ops.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>

#include "derivatives.h"
#include "meta.h"

namespace mamba_ssm {

std::tuple<Tensor, Tensor> ssd_chunk_scan(const Tensor& x, const Tensor& dt, const Tensor& A,
                                          const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                          const OptionalTensor& z, const OptionalTensor& dt_bias,
                                          const OptionalTensor& initial_states,
                                          const OptionalTensor& seq_idx,
                                          const OptionalTensor& cu_seqlens, bool dt_softplus,
                                          double dt_min, std::optional<double> dt_max) {
  static const auto op = find_op<decltype(ssd_chunk_scan)>("mamba_ssm::ssd_chunk_scan");
  return op.call(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus,
                 dt_min, dt_max);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor,
           OptionalTensor>
ssd_chunk_scan_bwd(const Tensor& dout, const OptionalTensor& dfinal_states, const Tensor& x,
                   const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                   const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                   const OptionalTensor& initial_states, const OptionalTensor& seq_idx,
                   const OptionalTensor& cu_seqlens, bool dt_softplus, double dt_min,
                   std::optional<double> dt_max) {
  static const auto op = find_op<decltype(ssd_chunk_scan_bwd)>("mamba_ssm::ssd_chunk_scan_bwd");
  return op.call(dout, dfinal_states, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx,
                 cu_seqlens, dt_softplus, dt_min, dt_max);
}

void ssd_chunk_scan_bwd_out(const Tensor& dout, const OptionalTensor& dfinal_states,
                            const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                            const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                            const OptionalTensor& dt_bias, const OptionalTensor& initial_states,
                            const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens,
                            bool dt_softplus, double dt_min, std::optional<double> dt_max,
                            const Tensor& dx, const Tensor& ddt, const Tensor& dA, const Tensor& dB,
                            const Tensor& dC, const OptionalTensor& dD, const OptionalTensor& dz,
                            const OptionalTensor& ddt_bias, const OptionalTensor& dinitial_states) {
  static const auto op =
      find_op<decltype(ssd_chunk_scan_bwd_out)>("mamba_ssm::ssd_chunk_scan_bwd_out");
  op.call(dout, dfinal_states, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens,
          dt_softplus, dt_min, dt_max, dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states);
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Keeps nothing but the arguments: the backward computes the states between chunks again.
struct SsdChunkScan : torch::autograd::Function<SsdChunkScan> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& dt,
                               const Tensor& A, const Tensor& B, const Tensor& C,
                               const OptionalTensor& D, const OptionalTensor& z,
                               const OptionalTensor& dt_bias, const OptionalTensor& initial_states,
                               const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens,
                               bool dt_softplus, double dt_min, std::optional<double> dt_max) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, final_states] = ssd_chunk_scan(x, dt, A, B, C, D, z, dt_bias, initial_states,
                                              seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max);
    ctx->save_for_backward({x, dt, A, B, C, to_saved(D), to_saved(z), to_saved(dt_bias),
                            to_saved(initial_states), to_saved(seq_idx), to_saved(cu_seqlens)});
    ctx->saved_data["dt_softplus"] = dt_softplus;
    ctx->saved_data["dt_min"] = dt_min;
    ctx->saved_data["dt_max"] = dt_max;
    ctx->set_materialize_grads(false);
    return {out, final_states};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& x = saved[0];
    Tensor dout = gradients[0];
    if (!dout.defined()) dout = at::zeros({}, x.options()).expand_symint(x.sym_sizes());
    auto [dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states] = ssd_chunk_scan_bwd(
        dout, from_saved(gradients[1]), x, saved[1], saved[2], saved[3], saved[4],
        from_saved(saved[5]), from_saved(saved[6]), from_saved(saved[7]), from_saved(saved[8]),
        from_saved(saved[9]), from_saved(saved[10]), ctx->saved_data["dt_softplus"].toBool(),
        ctx->saved_data["dt_min"].toDouble(), ctx->saved_data["dt_max"].toOptional<double>());
    return {dx,
            ddt,
            dA,
            dB,
            dC,
            to_saved(dD),
            to_saved(dz),
            to_saved(ddt_bias),
            to_saved(dinitial_states),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

std::tuple<Tensor, Tensor> ssd_chunk_scan_autograd(
    const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
    const OptionalTensor& initial_states, const OptionalTensor& seq_idx,
    const OptionalTensor& cu_seqlens, bool dt_softplus, double dt_min,
    std::optional<double> dt_max) {
  if (!needs_gradient({x, dt, A, B, C, to_saved(D), to_saved(z), to_saved(dt_bias),
                       to_saved(initial_states)})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return ssd_chunk_scan(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens,
                          dt_softplus, dt_min, dt_max);
  }
  const variable_list results =
      SsdChunkScan::apply(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens,
                          dt_softplus, dt_min, dt_max);
  return {results[0], results[1]};
}

double upper_limit(std::optional<double> dt_max) {
  return dt_max.value_or(std::numeric_limits<double>::infinity());
}

std::tuple<Tensor, Tensor> ssd_chunk_scan_meta(
    const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
    const OptionalTensor& initial_states, const OptionalTensor& seq_idx,
    const OptionalTensor& cu_seqlens, bool, double dt_min, std::optional<double> dt_max) {
  const MetaChecks checks("ssd_chunk_scan", "x", x);
  const auto sizes = check_ssd_chunk_scan(checks, x, dt, A, B, C, D, z, dt_bias, initial_states,
                                          seq_idx, cu_seqlens, dt_min, upper_limit(dt_max));
  return {at::empty_symint(x.sym_sizes(), x.options()),
          at::empty_symint({sizes.num_sequences, sizes.nheads, sizes.headdim, sizes.dstate},
                           x.options().dtype(sizes.state_type))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor,
           OptionalTensor>
ssd_chunk_scan_bwd_meta(const Tensor& dout, const OptionalTensor& dfinal_states, const Tensor& x,
                        const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                        const OptionalTensor& D, const OptionalTensor& z,
                        const OptionalTensor& dt_bias, const OptionalTensor& initial_states,
                        const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens, bool,
                        double dt_min, std::optional<double> dt_max) {
  const MetaChecks checks("ssd_chunk_scan_bwd", "x", x);
  const auto sizes = check_ssd_chunk_scan(checks, x, dt, A, B, C, D, z, dt_bias, initial_states,
                                          seq_idx, cu_seqlens, dt_min, upper_limit(dt_max));
  check_ssd_chunk_scan_gradients(checks, sizes, x, dout, dfinal_states);
  return {at::empty_like(x), at::empty_like(dt),  at::empty_like(A),
          at::empty_like(B), at::empty_like(C),   empty_like(D),
          empty_like(z),     empty_like(dt_bias), empty_like(initial_states)};
}

void ssd_chunk_scan_bwd_out_meta(
    const Tensor& dout, const OptionalTensor& dfinal_states, const Tensor& x, const Tensor& dt,
    const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
    const OptionalTensor& z, const OptionalTensor& dt_bias, const OptionalTensor& initial_states,
    const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens, bool, double dt_min,
    std::optional<double> dt_max, const Tensor& dx, const Tensor& ddt, const Tensor& dA,
    const Tensor& dB, const Tensor& dC, const OptionalTensor& dD, const OptionalTensor& dz,
    const OptionalTensor& ddt_bias, const OptionalTensor& dinitial_states) {
  const MetaChecks checks("ssd_chunk_scan_bwd_out", "x", x);
  const auto sizes = check_ssd_chunk_scan(checks, x, dt, A, B, C, D, z, dt_bias, initial_states,
                                          seq_idx, cu_seqlens, dt_min, upper_limit(dt_max));
  check_ssd_chunk_scan_bwd_results(checks, x, dt, A, B, C, D, z, dt_bias, initial_states, dx, ddt,
                                   dA, dB, dC, dD, dz, ddt_bias, dinitial_states);
  check_ssd_chunk_scan_gradients(checks, sizes, x, dout, dfinal_states);
}

}  // namespace

TORCH_LIBRARY_IMPL(mamba_ssm, Autograd, m) {
  m.impl("ssd_chunk_scan", ssd_chunk_scan_autograd);
  m.impl("ssd_chunk_scan_bwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("ssd_chunk_scan_bwd_out", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(mamba_ssm, Meta, m) {
  m.impl("ssd_chunk_scan", ssd_chunk_scan_meta);
  m.impl("ssd_chunk_scan_bwd", ssd_chunk_scan_bwd_meta);
  m.impl("ssd_chunk_scan_bwd_out", ssd_chunk_scan_bwd_out_meta);
}

}  // namespace mamba_ssm
