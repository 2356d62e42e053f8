// What a call of rms_norm_gated must look like. Meaning: <mamba_ssm/ops.h>.
#pragma once

#include "checks.h"

namespace mamba_ssm::ops {

/// Arguments that forward and backward share. Returns the channels of a group.
template <class Access, class Tensor = typename Access::Tensor>
typename Access::Size check_rms_norm_gated(const Checks<Access>& checks, const Tensor& x,
                                           const Tensor& weight, const std::optional<Tensor>& bias,
                                           const std::optional<Tensor>& z,
                                           std::optional<int64_t> group_size) {
  using Size = typename Access::Size;
  checks.has_axis("x", x, "channels");
  checks.activation("x", x);
  const ScalarType T = x.scalar_type();
  const Size channels = Access::size(x, x.dim() - 1);
  checks.shape("weight", weight, {{"channels", channels}});
  checks.parameter("weight", weight, T);
  if (bias) {
    checks.shape("bias", *bias, {{"channels", channels}});
    checks.parameter("bias", *bias, T);
  }
  if (z) {
    checks.shape_of("z", *z, "x", x);
    checks.dtype("z", *z, {T});
  }
  if (!group_size) return channels;
  if (*group_size < 1 || channels % Size(*group_size) != 0) {
    std::ostringstream text;
    text << "group_size must divide channels = " << channels << ", got " << *group_size;
    checks.fail(text.str());
  }
  return Size(*group_size);
}

/// Incoming gradient of the backward.
template <class Access, class Tensor = typename Access::Tensor>
void check_rms_norm_gated_gradient(const Checks<Access>& checks, const Tensor& x,
                                   const Tensor& dout) {
  checks.shape_of("dout", dout, "x", x);
  checks.dtype("dout", dout, {x.scalar_type()});
}

/// Gradients that the caller made. The kernels walk at most three axes of rows; with more, inputs
/// are copied, which a result cannot be.
template <class Access, class Tensor = typename Access::Tensor>
void check_rms_norm_gated_bwd_results(const Checks<Access>& checks, const Tensor& x,
                                      const Tensor& weight, const std::optional<Tensor>& bias,
                                      const std::optional<Tensor>& z, const Tensor& dx,
                                      const Tensor& dweight, const std::optional<Tensor>& dbias,
                                      const std::optional<Tensor>& dz) {
  checks.result("dx", dx, "x", x);
  checks.result("dweight", dweight, "weight", weight);
  checks.result("dbias", dbias, "bias", bias);
  checks.result("dz", dz, "z", z);
  if (dx.dim() > 4) checks.fail("dx must have at most 4 axes, got " + checks.text_of(dx));
}

}  // namespace mamba_ssm::ops
