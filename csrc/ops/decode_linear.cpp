// decode_linear: check, allocate, run. Contract: include/mamba_ssm/ops.h.
#include "decode_linear.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "run.h"

namespace mamba_ssm::ops {
namespace {

using kernels::cpu_kernels;
using kernels::DecodeLinearParams;
using kernels::kLinearOutputs;

/// Runs a checked call; residual_out may be absent.
Tensor run(const StableChecks& checks, const DecodeLinearSizes<int64_t>& sizes, const Tensor& x,
           const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
           const OptionalTensor& z, const OptionalTensor& norm_weight, double eps,
           const OptionalTensor& residual_out) {
  Tensor out = allocate(checks.op(), x, {sizes.rows, sizes.out_features}, x.scalar_type());
  DecodeLinearParams p{};
  p.rows = sizes.rows;
  p.in_features = sizes.in_features;
  p.out_features = sizes.out_features;
  p.eps = eps;
  p.dtype = dtype_of(x.scalar_type());
  p.x = view<2>(x);
  p.residual = view<2>(residual);
  p.z = view<2>(z);
  p.norm_weight = view<1>(norm_weight);
  p.weight = view<2>(weight);
  p.bias = view<1>(bias);
  p.out = view<2>(out);
  p.residual_out = view<2>(residual_out);
  if (p.rows == 0) return out;
  if constexpr (kWithCuda) {
    if (x.is_cuda()) {
      const CudaScope scope(x);
      check_launch(checks.op(), kernels::decode_linear_cuda(p, scope.stream()));
      return out;
    }
  }
  parallel((p.out_features + kLinearOutputs - 1) / kLinearOutputs, p.rows * weight.numel(),
           [&](int64_t begin, int64_t end) { cpu_kernels().decode_linear(p, begin, end); });
  return out;
}

Tensor decode_linear(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor z,
                     OptionalTensor norm_weight, double eps) {
  const StableChecks checks("decode_linear", "x", x);
  const OptionalTensor none;
  const auto sizes = check_decode_linear(checks, x, weight, bias, none, z, norm_weight);
  return run(checks, sizes, x, weight, bias, none, z, norm_weight, eps, none);
}

std::tuple<Tensor, Tensor> decode_linear_prenorm(Tensor x, Tensor weight, OptionalTensor bias,
                                                 OptionalTensor residual, Tensor norm_weight_,
                                                 double eps, bool residual_in_fp32) {
  const StableChecks checks("decode_linear_prenorm", "x", x);
  const OptionalTensor none, norm_weight = norm_weight_;
  const auto sizes = check_decode_linear(checks, x, weight, bias, residual, none, norm_weight);
  const Tensor residual_out = allocate(checks.op(), x, {sizes.rows, sizes.in_features},
                                       residual_type(x, residual, residual_in_fp32));
  const Tensor out =
      run(checks, sizes, x, weight, bias, residual, none, norm_weight, eps, residual_out);
  return {out, residual_out};
}

void register_all(torch::stable::detail::StableLibrary& m) {
  m.impl("decode_linear", TORCH_BOX(&decode_linear));
  m.impl("decode_linear_prenorm", TORCH_BOX(&decode_linear_prenorm));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CPU, m) { register_all(m); }
#ifdef MAMBA_SSM_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CUDA, m) { register_all(m); }
#endif

}  // namespace mamba_ssm::ops

extern "C" int64_t mamba_ssm_decode_linear_tile_rows([[maybe_unused]] int32_t device,
                                                     [[maybe_unused]] int32_t dtype) {
  if constexpr (mamba_ssm::ops::kWithCuda) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    const auto type = static_cast<mamba_ssm::ops::ScalarType>(dtype);
    return mamba_ssm::kernels::decode_linear_cuda_tile_rows(mamba_ssm::ops::dtype_of(type));
  }
  return 0;
}
