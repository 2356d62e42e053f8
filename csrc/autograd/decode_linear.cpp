// decode_linear: C++ function, what autograd and torch.compile need to know; and step_linear, which
// decides between it and the operations that it joins.
#include "ops/decode_linear.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/linear.h>
#include <mamba_ssm/limits.h>
#include <mamba_ssm/ops.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "meta.h"

namespace mamba_ssm {

Tensor decode_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& z, const OptionalTensor& norm_weight, double eps) {
  static const auto op = find_op<decltype(decode_linear)>("mamba_ssm::decode_linear");
  return op.call(x, weight, bias, z, norm_weight, eps);
}

std::tuple<Tensor, Tensor> decode_linear_prenorm(const Tensor& x, const Tensor& weight,
                                                 const OptionalTensor& bias,
                                                 const OptionalTensor& residual,
                                                 const Tensor& norm_weight, double eps,
                                                 bool residual_in_fp32) {
  static const auto op =
      find_op<decltype(decode_linear_prenorm)>("mamba_ssm::decode_linear_prenorm");
  return op.call(x, weight, bias, residual, norm_weight, eps, residual_in_fp32);
}

namespace {

Tensor decode_linear_meta(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& z, const OptionalTensor& norm_weight, double) {
  const MetaChecks checks("decode_linear", "x", x);
  const auto sizes = check_decode_linear(checks, x, weight, bias, /*residual=*/{}, z, norm_weight);
  return at::empty_symint({sizes.rows, sizes.out_features}, x.options());
}

std::tuple<Tensor, Tensor> decode_linear_prenorm_meta(const Tensor& x, const Tensor& weight,
                                                      const OptionalTensor& bias,
                                                      const OptionalTensor& residual,
                                                      const Tensor& norm_weight, double,
                                                      bool residual_in_fp32) {
  const MetaChecks checks("decode_linear_prenorm", "x", x);
  const auto sizes =
      check_decode_linear(checks, x, weight, bias, residual, /*z=*/{}, OptionalTensor(norm_weight));
  return {at::empty_symint({sizes.rows, sizes.out_features}, x.options()),
          empty_rows(x, ops::residual_type(x, residual, residual_in_fp32))};
}

/// True where decode_linear is the faster one. Measured with bfloat16, 2026-11-26: one row is
/// faster at every size; without tiles (H100) four rows are at 4.7 MB and are not at 26 MB; with
/// tiles (H200, 64 rows among the kernels of a decode step) 26 MB take 11.3 us where cuBLAS
/// takes 15.5, and 52 MB make a layer 1 us slower. A norm is made anew for each row, and beyond
/// kDecodeLinearNormed features it has no fast kernel. The numbers of features and rows must be
/// known, since a graph for all sizes can hold one answer only.
bool prefers_decode_linear(const Tensor& x, const Tensor& weight, bool normed) {
  constexpr int64_t kVectorRows = 4, kVectorElements = 8 << 20, kTileElements = 16 << 20;
  if (!x.is_cuda() || x.dim() == 0 || weight.dim() != 2) return false;
  if (x.scalar_type() != weight.scalar_type()) return false;
  if (at::autocast::is_autocast_enabled(at::kCUDA)) return false;
  const auto size = x.sym_numel().maybe_as_int(), elements = weight.sym_numel().maybe_as_int();
  const auto in_features = x.sym_size(-1).maybe_as_int();
  if (!size || !elements || !in_features || *size == 0 || *elements == 0) return false;
  const int64_t rows = *size / *in_features;
  if (normed) return rows == 1 && *in_features <= kDecodeLinearNormed;
  if (rows == 1) return true;
  if (rows <= kVectorRows && *elements <= kVectorElements) return true;
  constexpr int64_t kVector = 8;  // elements of 16 bits, as tiles are read
  return rows > 2 && *elements < kTileElements && *in_features % kVector == 0 &&
         rows <= mamba_ssm_decode_linear_tile_rows(x.get_device(),
                                                   static_cast<int32_t>(x.scalar_type()));
}

/// (..., n) as (rows, n).
Tensor as_rows(const Tensor& tensor) { return tensor.reshape({-1, tensor.size(-1)}); }
OptionalTensor as_rows(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(as_rows(*tensor)) : std::nullopt;
}

/// The rows of a result in the place of those of x.
Tensor in_place_of(const Tensor& x, const Tensor& rows) {
  auto sizes = x.sizes().vec();
  sizes.back() = rows.size(1);
  return rows.view(sizes);
}

}  // namespace

Tensor step_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& z, const OptionalTensor& norm_weight, double eps) {
  if (prefers_decode_linear(x, weight, norm_weight.has_value()) &&
      !needs_gradient({x, weight, to_saved(bias), to_saved(z), to_saved(norm_weight)})) {
    return in_place_of(x, decode_linear(as_rows(x), weight, bias, as_rows(z), norm_weight, eps));
  }
  if (!norm_weight) return at::linear(x, weight, bias);
  const Tensor normed = rms_norm_gated(x, *norm_weight, /*bias=*/std::nullopt, z, eps,
                                       /*group_size=*/std::nullopt, /*norm_before_gate=*/false);
  return step_linear(normed, weight, bias);
}

std::tuple<Tensor, Tensor> step_linear_prenorm(const Tensor& x, const Tensor& weight,
                                               const OptionalTensor& bias,
                                               const OptionalTensor& residual,
                                               const Tensor& norm_weight, double eps,
                                               bool residual_in_fp32) {
  if (prefers_decode_linear(x, weight, /*normed=*/true) &&
      !needs_gradient({x, weight, to_saved(bias), to_saved(residual), norm_weight})) {
    const auto [out, residual_out] = decode_linear_prenorm(
        as_rows(x), weight, bias, as_rows(residual), norm_weight, eps, residual_in_fp32);
    return {in_place_of(x, out), in_place_of(x, residual_out)};
  }
  const auto [normed, out1, residual_out] = layer_norm(
      x, norm_weight, /*bias=*/std::nullopt, residual, /*x1=*/std::nullopt,
      /*weight1=*/std::nullopt, /*bias1=*/std::nullopt, /*rowscale=*/std::nullopt,
      /*dropout_mask=*/std::nullopt, /*dropout_mask1=*/std::nullopt, eps, /*dropout_p=*/0.0,
      /*prenorm=*/true, residual_in_fp32, /*is_rms_norm=*/true);
  return {step_linear(normed, weight, bias), residual_out ? *residual_out : x.clone()};
}

TORCH_LIBRARY_FRAGMENT(mamba_ssm, m) {
  m.def(
      "step_linear(Tensor x, Tensor weight, Tensor? bias=None, *, Tensor? z=None, "
      "Tensor? norm_weight=None, float eps=1e-6) -> Tensor");
  m.def(
      "step_linear_prenorm(Tensor x, Tensor weight, Tensor? bias=None, *, Tensor? residual=None, "
      "Tensor norm_weight, float eps=1e-6, bool residual_in_fp32=False) -> "
      "(Tensor out, Tensor residual_out)");
}

TORCH_LIBRARY_IMPL(mamba_ssm, Autograd, m) {
  m.impl("decode_linear", torch::autograd::autogradNotImplementedFallback());
  m.impl("decode_linear_prenorm", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(mamba_ssm, CompositeImplicitAutograd, m) {
  m.impl("step_linear", step_linear);
  m.impl("step_linear_prenorm", step_linear_prenorm);
}

TORCH_LIBRARY_IMPL(mamba_ssm, Meta, m) {
  m.impl("decode_linear", decode_linear_meta);
  m.impl("decode_linear_prenorm", decode_linear_prenorm_meta);
}

}  // namespace mamba_ssm
