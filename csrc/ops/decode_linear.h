// What a call of decode_linear must look like. Meaning: <mamba_ssm/ops.h>.
#pragma once

#include <cstdint>

#include "checks.h"

/// Rows of a type that a CUDA device multiplies at a time by tiles; 0 if it does not. For the
/// library beside this one, which decides by it.
extern "C" __attribute__((visibility("default"))) int64_t mamba_ssm_decode_linear_tile_rows(
    int32_t device, int32_t dtype);

namespace mamba_ssm::ops {

template <class Size>
struct DecodeLinearSizes {
  Size rows, in_features, out_features;
};

template <class Access, class Tensor = typename Access::Tensor>
DecodeLinearSizes<typename Access::Size> check_decode_linear(
    const Checks<Access>& checks, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& z, const std::optional<Tensor>& norm_weight) {
  using Dim = typename Checks<Access>::Dim;
  checks.rank("x", x, {2}, "(rows, in_features)");
  checks.activation("x", x);
  const ScalarType T = x.scalar_type();
  checks.rank("weight", weight, {2}, "(out_features, in_features)");
  const Dim in_features{"in_features", Access::size(x, 1)};
  const Dim out_features{"out_features", Access::size(weight, 0)};
  checks.shape("weight", weight, {out_features, in_features});
  checks.dtype("weight", weight, {T});
  checks.at_least("weight", weight, "out_features", 0, 1);
  const auto parameter = [&](const char* name, const std::optional<Tensor>& tensor, Dim size) {
    if (!tensor) return;
    checks.shape(name, *tensor, {size});
    checks.parameter(name, *tensor, T);
  };
  parameter("bias", bias, out_features);
  parameter("norm_weight", norm_weight, in_features);
  if (residual) {
    checks.shape_of("residual", *residual, "x", x);
    checks.dtype("residual", *residual, {T, accumulate_type(T)});
  }
  if (z) {
    checks.shape_of("z", *z, "x", x);
    checks.dtype("z", *z, {T});
    if (!norm_weight) checks.fail("z needs norm_weight, got None");
  }
  return {Access::size(x, 0), in_features.size, out_features.size};
}

/// Type of residual_out.
template <class Tensor>
ScalarType residual_type(const Tensor& x, const std::optional<Tensor>& residual,
                         bool residual_in_fp32) {
  if (residual) return residual->scalar_type();
  return residual_in_fp32 ? accumulate_type(x.scalar_type()) : x.scalar_type();
}

}  // namespace mamba_ssm::ops
