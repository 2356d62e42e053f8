// rms_norm_gated: C++ functions, gradients, and what torch.compile needs to know.
#include "ops/rms_norm_gated.h"

#include <mamba_ssm/ops.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "derivatives.h"
#include "meta.h"

namespace mamba_ssm {

Tensor rms_norm_gated(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& z, double eps, std::optional<int64_t> group_size,
                      bool norm_before_gate, bool is_rms_norm) {
  static const auto op = find_op<decltype(rms_norm_gated)>("mamba_ssm::rms_norm_gated");
  return op.call(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm);
}

std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor> rms_norm_gated_bwd(
    const Tensor& dout, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& z, double eps, std::optional<int64_t> group_size, bool norm_before_gate,
    bool is_rms_norm) {
  static const auto op = find_op<decltype(rms_norm_gated_bwd)>("mamba_ssm::rms_norm_gated_bwd");
  return op.call(dout, x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm);
}

void rms_norm_gated_bwd_out(const Tensor& dout, const Tensor& x, const Tensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& z, double eps,
                            std::optional<int64_t> group_size, bool norm_before_gate,
                            bool is_rms_norm, const Tensor& dx, const Tensor& dweight,
                            const OptionalTensor& dbias, const OptionalTensor& dz) {
  static const auto op =
      find_op<decltype(rms_norm_gated_bwd_out)>("mamba_ssm::rms_norm_gated_bwd_out");
  op.call(dout, x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm, dx, dweight,
          dbias, dz);
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Keeps the arguments alone: the backward takes the statistics again.
struct RmsNormGated : torch::autograd::Function<RmsNormGated> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& z, double eps,
                        std::optional<int64_t> group_size, bool norm_before_gate,
                        bool is_rms_norm) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight, to_saved(bias), to_saved(z)});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["group_size"] = group_size;
    ctx->saved_data["norm_before_gate"] = norm_before_gate;
    ctx->saved_data["is_rms_norm"] = is_rms_norm;
    return rms_norm_gated(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    auto& options = ctx->saved_data;
    auto [dx, dweight, dbias, dz] = rms_norm_gated_bwd(
        gradients[0], saved[0], saved[1], from_saved(saved[2]), from_saved(saved[3]),
        options["eps"].toDouble(), options["group_size"].toOptional<int64_t>(),
        options["norm_before_gate"].toBool(), options["is_rms_norm"].toBool());
    return {dx, dweight, to_saved(dbias), to_saved(dz), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor rms_norm_gated_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& z, double eps,
                               std::optional<int64_t> group_size, bool norm_before_gate,
                               bool is_rms_norm) {
  if (!needs_gradient({x, weight, to_saved(bias), to_saved(z)})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return rms_norm_gated(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm);
  }
  return RmsNormGated::apply(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm);
}

Tensor rms_norm_gated_meta(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& z, double, std::optional<int64_t> group_size, bool,
                           bool) {
  const MetaChecks checks("rms_norm_gated", "x", x);
  check_rms_norm_gated(checks, x, weight, bias, z, group_size);
  return empty_rows(x, x.scalar_type());
}

std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor> rms_norm_gated_bwd_meta(
    const Tensor& dout, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& z, double, std::optional<int64_t> group_size, bool, bool) {
  const MetaChecks checks("rms_norm_gated_bwd", "x", x);
  check_rms_norm_gated(checks, x, weight, bias, z, group_size);
  check_rms_norm_gated_gradient(checks, x, dout);
  OptionalTensor dz;
  if (z) dz = empty_rows(x, x.scalar_type());
  return {empty_rows(x, x.scalar_type()), at::empty_like(weight), empty_like(bias), dz};
}

void rms_norm_gated_bwd_out_meta(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                 const OptionalTensor& bias, const OptionalTensor& z, double,
                                 std::optional<int64_t> group_size, bool, bool, const Tensor& dx,
                                 const Tensor& dweight, const OptionalTensor& dbias,
                                 const OptionalTensor& dz) {
  const MetaChecks checks("rms_norm_gated_bwd_out", "x", x);
  check_rms_norm_gated(checks, x, weight, bias, z, group_size);
  check_rms_norm_gated_bwd_results(checks, x, weight, bias, z, dx, dweight, dbias, dz);
  check_rms_norm_gated_gradient(checks, x, dout);
}

}  // namespace

TORCH_LIBRARY_IMPL(mamba_ssm, Autograd, m) {
  m.impl("rms_norm_gated", rms_norm_gated_autograd);
  m.impl("rms_norm_gated_bwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("rms_norm_gated_bwd_out", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(mamba_ssm, Meta, m) {
  m.impl("rms_norm_gated", rms_norm_gated_meta);
  m.impl("rms_norm_gated_bwd", rms_norm_gated_bwd_meta);
  m.impl("rms_norm_gated_bwd_out", rms_norm_gated_bwd_out_meta);
}

}  // namespace mamba_ssm
