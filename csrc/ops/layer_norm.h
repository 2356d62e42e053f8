// What a call of layer_norm must look like. Meaning: <mamba_ssm/ops.h>.
#pragma once

#include "checks.h"

namespace mamba_ssm::ops {

/// Parameters and masks, which forward and backward share. `rows`, called `rows_name`, has the
/// shape of x and its type.
template <class Access, class Tensor = typename Access::Tensor>
void check_layer_norm_parameters(
    const Checks<Access>& checks, const char* rows_name, const Tensor& rows, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& weight1,
    const std::optional<Tensor>& bias1, const std::optional<Tensor>& rowscale,
    const std::optional<Tensor>& dropout_mask, const std::optional<Tensor>& dropout_mask1,
    bool has_x1, double dropout_p) {
  checks.has_axis(rows_name, rows, "channels");
  checks.activation(rows_name, rows);
  const ScalarType T = rows.scalar_type();
  const auto channels = Access::size(rows, rows.dim() - 1);
  const auto parameter = [&](const char* name, const std::optional<Tensor>& tensor) {
    if (!tensor) return;
    checks.shape(name, *tensor, {{"channels", channels}});
    checks.parameter(name, *tensor, T);
  };
  const auto mask = [&](const char* name, const std::optional<Tensor>& tensor) {
    if (!tensor) return;
    checks.shape_of(name, *tensor, rows_name, rows);
    checks.dtype(name, *tensor, {ScalarType::Bool});
  };
  parameter("weight", weight);
  parameter("bias", bias);
  parameter("weight1", weight1);
  parameter("bias1", bias1);
  if (bias1 && !weight1) checks.fail("bias1 needs weight1, got None");
  if (rowscale) {
    checks.shape_of("rowscale", *rowscale, rows_name, rows, /*without_last=*/true);
    checks.parameter("rowscale", *rowscale, T);
    if (has_x1) checks.fail("rowscale must be None with x1, got " + checks.text_of(*rowscale));
  }
  mask("dropout_mask", dropout_mask);
  mask("dropout_mask1", dropout_mask1);
  if (dropout_mask1 && !has_x1) checks.fail("dropout_mask1 needs x1, got None");
  if (!(dropout_p >= 0 && dropout_p <= 1)) {
    checks.fail("dropout_p must be in [0, 1], got " + std::to_string(dropout_p));
  }
}

/// A call of the forward. Returns the type of residual_out, nothing if that would be x itself.
template <class Access, class Tensor = typename Access::Tensor>
std::optional<ScalarType> check_layer_norm(
    const Checks<Access>& checks, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& x1, const std::optional<Tensor>& weight1,
    const std::optional<Tensor>& bias1, const std::optional<Tensor>& rowscale,
    const std::optional<Tensor>& dropout_mask, const std::optional<Tensor>& dropout_mask1,
    double dropout_p, bool residual_in_fp32) {
  check_layer_norm_parameters(checks, "x", x, weight, bias, weight1, bias1, rowscale, dropout_mask,
                              dropout_mask1, x1.has_value(), dropout_p);
  const ScalarType T = x.scalar_type();
  if (residual) {
    checks.shape_of("residual", *residual, "x", x);
    checks.dtype("residual", *residual, {T, accumulate_type(T)});
  }
  if (x1) {
    checks.shape_of("x1", *x1, "x", x);
    checks.dtype("x1", *x1, {T});
  }
  if (residual) return residual->scalar_type();
  if (residual_in_fp32 && T != accumulate_type(T)) return accumulate_type(T);
  if (x1 || rowscale || dropout_mask) return T;
  return std::nullopt;
}

/// A call of the backward.
template <class Access, class Tensor = typename Access::Tensor>
void check_layer_norm_gradients(
    const Checks<Access>& checks, const Tensor& dout, const std::optional<Tensor>& dout1,
    const std::optional<Tensor>& dresidual_out, const Tensor& sum, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& weight1,
    const std::optional<Tensor>& bias1, const std::optional<Tensor>& rowscale,
    const std::optional<Tensor>& dropout_mask, const std::optional<Tensor>& dropout_mask1,
    double dropout_p, bool has_x1) {
  check_layer_norm_parameters(checks, "dout", dout, weight, bias, weight1, bias1, rowscale,
                              dropout_mask, dropout_mask1, has_x1, dropout_p);
  const ScalarType T = dout.scalar_type();
  checks.shape_of("sum", sum, "dout", dout);
  checks.dtype("sum", sum, {T, accumulate_type(T)});
  if (dout1) {
    checks.shape_of("dout1", *dout1, "dout", dout);
    checks.dtype("dout1", *dout1, {T});
    if (!weight1) checks.fail("dout1 needs weight1, got None");
  }
  if (dresidual_out) {
    checks.shape_of("dresidual_out", *dresidual_out, "dout", dout);
    checks.dtype("dresidual_out", *dresidual_out, {sum.scalar_type()});
  }
}

/// Whether the gradients of residual and x1 differ from that of x, so that they are tensors of
/// their own. `T`: type of x; `sum_type`: that of the residual.
struct LayerNormGradients {
  bool own_dresidual, own_dx1;

  LayerNormGradients(ScalarType T, ScalarType sum_type, bool has_rowscale, bool has_mask,
                     bool has_mask1, bool has_residual, bool has_x1)
      : own_dresidual(has_residual && (sum_type != T || has_rowscale || has_mask)),
        own_dx1(has_x1 && (has_mask || has_mask1)) {}
};

}  // namespace mamba_ssm::ops
