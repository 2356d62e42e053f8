// layer_norm: C++ functions, gradients, and what torch.compile needs to know.
#include "ops/layer_norm.h"

#include <ATen/ops/zeros.h>
#include <mamba_ssm/ops.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "derivatives.h"
#include "meta.h"

namespace mamba_ssm {

std::tuple<Tensor, OptionalTensor, OptionalTensor> layer_norm(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& x1, const OptionalTensor& weight1,
    const OptionalTensor& bias1, const OptionalTensor& rowscale, const OptionalTensor& dropout_mask,
    const OptionalTensor& dropout_mask1, double eps, double dropout_p, bool prenorm,
    bool residual_in_fp32, bool is_rms_norm) {
  static const auto op = find_op<decltype(layer_norm)>("mamba_ssm::layer_norm");
  return op.call(x, weight, bias, residual, x1, weight1, bias1, rowscale, dropout_mask,
                 dropout_mask1, eps, dropout_p, prenorm, residual_in_fp32, is_rms_norm);
}

std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,
           OptionalTensor>
layer_norm_bwd(const Tensor& dout, const OptionalTensor& dout1, const OptionalTensor& dresidual_out,
               const Tensor& sum, const Tensor& weight, const OptionalTensor& bias,
               const OptionalTensor& weight1, const OptionalTensor& bias1,
               const OptionalTensor& rowscale, const OptionalTensor& dropout_mask,
               const OptionalTensor& dropout_mask1, double eps, double dropout_p, bool is_rms_norm,
               bool has_residual, bool has_x1) {
  static const auto op = find_op<decltype(layer_norm_bwd)>("mamba_ssm::layer_norm_bwd");
  return op.call(dout, dout1, dresidual_out, sum, weight, bias, weight1, bias1, rowscale,
                 dropout_mask, dropout_mask1, eps, dropout_p, is_rms_norm, has_residual, has_x1);
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Keeps the sum instead of its parts, and the parameters; the backward takes the statistics again.
struct LayerNorm : torch::autograd::Function<LayerNorm> {
  static constexpr bool is_traceable = true;

  /// The results that are there.
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& residual,
                               const OptionalTensor& x1, const OptionalTensor& weight1,
                               const OptionalTensor& bias1, const OptionalTensor& rowscale,
                               const OptionalTensor& dropout_mask,
                               const OptionalTensor& dropout_mask1, double eps, double dropout_p,
                               bool prenorm, bool residual_in_fp32, bool is_rms_norm) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, out1, residual_out] =
        layer_norm(x, weight, bias, residual, x1, weight1, bias1, rowscale, dropout_mask,
                   dropout_mask1, eps, dropout_p, /*prenorm=*/true, residual_in_fp32, is_rms_norm);
    ctx->save_for_backward({residual_out.value_or(x), weight, to_saved(bias), to_saved(weight1),
                            to_saved(bias1), to_saved(rowscale), to_saved(dropout_mask),
                            to_saved(dropout_mask1)});
    ctx->saved_data["type"] = x.scalar_type();
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["is_rms_norm"] = is_rms_norm;
    ctx->saved_data["has_residual"] = residual.has_value();
    ctx->saved_data["has_x1"] = x1.has_value();
    ctx->set_materialize_grads(false);
    variable_list results{out};
    if (out1) results.push_back(*out1);
    if (prenorm && residual_out) results.push_back(*residual_out);
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    auto& options = ctx->saved_data;
    const bool has_residual = options["has_residual"].toBool();
    const bool has_x1 = options["has_x1"].toBool();
    const bool has_out1 = saved[3].defined();
    const Tensor& sum = saved[0];
    const size_t last = has_out1 ? 2 : 1;  // residual_out, if it was a result
    OptionalTensor dout1, dresidual_out;
    if (has_out1) dout1 = from_saved(gradients[1]);
    if (gradients.size() > last) dresidual_out = from_saved(gradients[last]);
    Tensor dout = gradients[0];
    if (!dout.defined()) {
      const auto type = options["type"].toScalarType();
      dout = at::zeros({}, sum.options().dtype(type)).expand_symint(sum.sym_sizes());
    }
    auto [dx, dweight, dbias, dresidual, dx1, dweight1, dbias1] = layer_norm_bwd(
        dout, dout1, dresidual_out, sum, saved[1], from_saved(saved[2]), from_saved(saved[3]),
        from_saved(saved[4]), from_saved(saved[5]), from_saved(saved[6]), from_saved(saved[7]),
        options["eps"].toDouble(), options["dropout_p"].toDouble(), options["is_rms_norm"].toBool(),
        has_residual, has_x1);
    const Tensor none;
    return {dx,
            dweight,
            to_saved(dbias),
            has_residual ? dresidual.value_or(dx) : none,
            has_x1 ? dx1.value_or(dx) : none,
            to_saved(dweight1),
            to_saved(dbias1),
            none,
            none,
            none,
            none,
            none,
            none,
            none,
            none};
  }
};

/// out, out1 and residual_out from those of them that are there.
std::tuple<Tensor, OptionalTensor, OptionalTensor> with_absent(const variable_list& results,
                                                               bool has_out1) {
  const size_t last = has_out1 ? 2 : 1;
  OptionalTensor out1, residual_out;
  if (has_out1) out1 = results[1];
  if (results.size() > last) residual_out = results[last];
  return {results[0], out1, residual_out};
}

std::tuple<Tensor, OptionalTensor, OptionalTensor> layer_norm_autograd(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& x1, const OptionalTensor& weight1,
    const OptionalTensor& bias1, const OptionalTensor& rowscale, const OptionalTensor& dropout_mask,
    const OptionalTensor& dropout_mask1, double eps, double dropout_p, bool prenorm,
    bool residual_in_fp32, bool is_rms_norm) {
  if (!needs_gradient({x, weight, to_saved(bias), to_saved(residual), to_saved(x1),
                       to_saved(weight1), to_saved(bias1)})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return layer_norm(x, weight, bias, residual, x1, weight1, bias1, rowscale, dropout_mask,
                      dropout_mask1, eps, dropout_p, prenorm, residual_in_fp32, is_rms_norm);
  }
  return with_absent(
      LayerNorm::apply(x, weight, bias, residual, x1, weight1, bias1, rowscale, dropout_mask,
                       dropout_mask1, eps, dropout_p, prenorm, residual_in_fp32, is_rms_norm),
      weight1.has_value());
}

std::tuple<Tensor, OptionalTensor, OptionalTensor> layer_norm_meta(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& x1, const OptionalTensor& weight1,
    const OptionalTensor& bias1, const OptionalTensor& rowscale, const OptionalTensor& dropout_mask,
    const OptionalTensor& dropout_mask1, double, double dropout_p, bool prenorm,
    bool residual_in_fp32, bool) {
  const MetaChecks checks("layer_norm", "x", x);
  const auto residual_type =
      check_layer_norm(checks, x, weight, bias, residual, x1, weight1, bias1, rowscale,
                       dropout_mask, dropout_mask1, dropout_p, residual_in_fp32);
  OptionalTensor out1, residual_out;
  if (weight1) out1 = empty_rows(x, x.scalar_type());
  if (prenorm && residual_type) residual_out = empty_rows(x, *residual_type);
  return {empty_rows(x, x.scalar_type()), out1, residual_out};
}

std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,
           OptionalTensor>
layer_norm_bwd_meta(const Tensor& dout, const OptionalTensor& dout1,
                    const OptionalTensor& dresidual_out, const Tensor& sum, const Tensor& weight,
                    const OptionalTensor& bias, const OptionalTensor& weight1,
                    const OptionalTensor& bias1, const OptionalTensor& rowscale,
                    const OptionalTensor& dropout_mask, const OptionalTensor& dropout_mask1, double,
                    double dropout_p, bool, bool has_residual, bool has_x1) {
  const MetaChecks checks("layer_norm_bwd", "dout", dout);
  check_layer_norm_gradients(checks, dout, dout1, dresidual_out, sum, weight, bias, weight1, bias1,
                             rowscale, dropout_mask, dropout_mask1, dropout_p, has_x1);
  const auto T = dout.scalar_type();
  const ops::LayerNormGradients which(T, sum.scalar_type(), rowscale.has_value(),
                                      dropout_mask.has_value(), dropout_mask1.has_value(),
                                      has_residual, has_x1);
  OptionalTensor dresidual, dx1;
  if (which.own_dresidual) dresidual = empty_rows(dout, sum.scalar_type());
  if (which.own_dx1) dx1 = empty_rows(dout, T);
  return {empty_rows(dout, T), at::empty_like(weight), empty_like(bias), dresidual, dx1,
          empty_like(weight1), empty_like(bias1)};
}

}  // namespace

/// The results of layer_norm that are there.
variable_list layer_norm_traced(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& residual, const OptionalTensor& x1,
                                const OptionalTensor& weight1, const OptionalTensor& bias1,
                                const OptionalTensor& rowscale, const OptionalTensor& dropout_mask,
                                const OptionalTensor& dropout_mask1, double eps, double dropout_p,
                                bool prenorm, bool residual_in_fp32, bool is_rms_norm) {
  const auto [out, out1, residual_out] =
      layer_norm(x, weight, bias, residual, x1, weight1, bias1, rowscale, dropout_mask,
                 dropout_mask1, eps, dropout_p, prenorm, residual_in_fp32, is_rms_norm);
  variable_list results{out};
  if (out1) results.push_back(*out1);
  if (residual_out) results.push_back(*residual_out);
  return results;
}

/// layer_norm under torch.jit.trace, which records layer_norm_traced.
std::tuple<Tensor, OptionalTensor, OptionalTensor> layer_norm_tracer(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& x1, const OptionalTensor& weight1,
    const OptionalTensor& bias1, const OptionalTensor& rowscale, const OptionalTensor& dropout_mask,
    const OptionalTensor& dropout_mask1, double eps, double dropout_p, bool prenorm,
    bool residual_in_fp32, bool is_rms_norm) {
  static const auto op = find_op<decltype(layer_norm_traced)>("mamba_ssm::layer_norm_traced");
  return with_absent(op.call(x, weight, bias, residual, x1, weight1, bias1, rowscale, dropout_mask,
                             dropout_mask1, eps, dropout_p, prenorm, residual_in_fp32, is_rms_norm),
                     weight1.has_value());
}

TORCH_LIBRARY_FRAGMENT(mamba_ssm, m) {
  // torch.jit.trace knows no operation with optional results: a list of those that are there.
  const c10::FunctionSchema schema =
      c10::Dispatcher::singleton().findSchemaOrThrow("mamba_ssm::layer_norm", "").schema();
  m.def(schema.cloneWithName("mamba_ssm::layer_norm_traced", "")
            .cloneWithReturns({c10::Argument("", c10::ListType::ofTensors())}));
}

TORCH_LIBRARY_IMPL(mamba_ssm, CompositeImplicitAutograd, m) {
  m.impl("layer_norm_traced", layer_norm_traced);
}

TORCH_LIBRARY_IMPL(mamba_ssm, Tracer, m) { m.impl("layer_norm", layer_norm_tracer); }

TORCH_LIBRARY_IMPL(mamba_ssm, Autograd, m) {
  m.impl("layer_norm", layer_norm_autograd);
  m.impl("layer_norm_bwd", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(mamba_ssm, Meta, m) {
  m.impl("layer_norm", layer_norm_meta);
  m.impl("layer_norm_bwd", layer_norm_bwd_meta);
}

}  // namespace mamba_ssm
