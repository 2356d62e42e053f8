// layer_norm: check, allocate, run. Contract: include/mamba_ssm/ops.h.
#include "layer_norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "rows.h"
#include "run.h"

namespace mamba_ssm::ops {
namespace {

using kernels::cpu_kernels;
using kernels::LayerNormParams;

/// Fills what forward and backward share, for tensors that passed the checks.
LayerNormParams params(const Rows& rows, ScalarType T, const Tensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& weight1,
                       const OptionalTensor& bias1, const OptionalTensor& rowscale,
                       const OptionalTensor& dropout_mask, const OptionalTensor& dropout_mask1,
                       double eps, double dropout_p, bool is_rms_norm) {
  LayerNormParams p{};
  p.axes = rows.axes();
  p.rows = rows.count();
  p.channels = weight.size(0);
  p.eps = eps;
  p.dropout_scale = dropout_p < 1 ? 1 / (1 - dropout_p) : 0;
  p.is_rms_norm = is_rms_norm;
  p.dtype = dtype_of(T);
  p.rowscale = rows.view(rowscale);
  p.dropout_mask = rows.view(dropout_mask);
  p.dropout_mask1 = rows.view(dropout_mask1);
  p.weight = view<1>(weight);
  p.bias = view<1>(bias);
  p.weight1 = view<1>(weight1);
  p.bias1 = view<1>(bias1);
  return p;
}

std::tuple<Tensor, OptionalTensor, OptionalTensor> layer_norm(
    Tensor x_, Tensor weight, OptionalTensor bias, OptionalTensor residual, OptionalTensor x1,
    OptionalTensor weight1, OptionalTensor bias1, OptionalTensor rowscale,
    OptionalTensor dropout_mask, OptionalTensor dropout_mask1, double eps, double dropout_p,
    bool prenorm, bool residual_in_fp32, bool is_rms_norm) {
  const StableChecks checks("layer_norm", "x", x_);
  const std::optional<ScalarType> residual_type =
      check_layer_norm(checks, x_, weight, bias, residual, x1, weight1, bias1, rowscale,
                       dropout_mask, dropout_mask1, dropout_p, residual_in_fp32);
  const ScalarType T = x_.scalar_type();
  OptionalTensor x = x_;
  const Rows rows({&x, &residual, &x1, &rowscale, &dropout_mask, &dropout_mask1});
  LayerNormParams p = params(rows, T, weight, bias, weight1, bias1, rowscale, dropout_mask,
                             dropout_mask1, eps, dropout_p, is_rms_norm);
  Tensor out = allocate_rows(checks.op(), x_, T);
  OptionalTensor out1, residual_out;
  if (weight1) out1 = allocate_rows(checks.op(), x_, T);
  if (prenorm && residual_type) residual_out = allocate_rows(checks.op(), x_, *residual_type);
  p.x = rows.view(x);
  p.residual = rows.view(residual);
  p.x1 = rows.view(x1);
  p.out = rows.view(out);
  p.out1 = rows.view(out1);
  p.residual_out = rows.view(residual_out);
  if (out.numel() == 0) return {out, out1, residual_out};
  if constexpr (kWithCuda) {
    if (out.is_cuda()) {
      const CudaScope scope(out);
      check_launch(checks.op(), kernels::layer_norm_fwd_cuda(p, scope.stream()));
      return {out, out1, residual_out};
    }
  }
  parallel(layer_norm_fwd_items(p), out.numel(),
           [&](int64_t begin, int64_t end) { cpu_kernels().layer_norm_fwd(p, begin, end); });
  return {out, out1, residual_out};
}

using Gradients = std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor,
                             OptionalTensor, OptionalTensor>;

Gradients layer_norm_bwd(Tensor dout_, OptionalTensor dout1, OptionalTensor dresidual_out,
                         Tensor sum_, Tensor weight, OptionalTensor bias, OptionalTensor weight1,
                         OptionalTensor bias1, OptionalTensor rowscale, OptionalTensor dropout_mask,
                         OptionalTensor dropout_mask1, double eps, double dropout_p,
                         bool is_rms_norm, bool has_residual, bool has_x1) {
  const StableChecks checks("layer_norm_bwd", "dout", dout_);
  check_layer_norm_gradients(checks, dout_, dout1, dresidual_out, sum_, weight, bias, weight1,
                             bias1, rowscale, dropout_mask, dropout_mask1, dropout_p, has_x1);
  const ScalarType T = dout_.scalar_type();
  const LayerNormGradients which(T, sum_.scalar_type(), rowscale.has_value(),
                                 dropout_mask.has_value(), dropout_mask1.has_value(), has_residual,
                                 has_x1);
  OptionalTensor dout = dout_, sum = sum_;
  const Rows rows({&dout, &dout1, &dresidual_out, &sum, &rowscale, &dropout_mask, &dropout_mask1});
  LayerNormParams p = params(rows, T, weight, bias, weight1, bias1, rowscale, dropout_mask,
                             dropout_mask1, eps, dropout_p, is_rms_norm);
  Tensor dx = allocate_rows(checks.op(), dout_, T);
  OptionalTensor dresidual, dx1;
  if (which.own_dresidual) dresidual = allocate_rows(checks.op(), dout_, sum_.scalar_type());
  if (which.own_dx1) dx1 = allocate_rows(checks.op(), dout_, T);
  const auto like = [&](const OptionalTensor& tensor) {
    return tensor ? OptionalTensor(allocate_like(checks.op(), *tensor)) : OptionalTensor();
  };
  Tensor dweight = *like(weight);
  OptionalTensor dbias = like(bias), dweight1 = like(weight1), dbias1 = like(bias1);
  p.sum = rows.view(sum);
  p.dout = rows.view(dout);
  p.dout1 = rows.view(dout1);
  p.dresidual_out = rows.view(dresidual_out);
  p.dx = rows.view(dx);
  p.dresidual = rows.view(dresidual);
  p.dx1 = rows.view(dx1);
  p.dweight = view<1>(dweight);
  p.dbias = view<1>(dbias);
  p.dweight1 = view<1>(dweight1);
  p.dbias1 = view<1>(dbias1);
  Gradients gradients{dx, dweight, dbias, dresidual, dx1, dweight1, dbias1};
  if (p.channels == 0) return gradients;
  if constexpr (kWithCuda) {
    if (dx.is_cuda()) {
      const CudaScope scope(dx);
      const Workspace workspace(checks.op(), dx, kernels::layer_norm_bwd_cuda_workspace(p));
      check_launch(checks.op(), kernels::layer_norm_bwd_cuda(p, workspace.data(), scope.stream()));
      return gradients;
    }
  }
  const Workspace workspace(checks.op(), dx, kernels::layer_norm_bwd_cpu_workspace(p));
  parallel(layer_norm_bwd_items(p), 3 * dx.numel(), [&](int64_t begin, int64_t end) {
    cpu_kernels().layer_norm_bwd(p, workspace.data(), begin, end);
  });
  parallel(layer_norm_bwd_reduce_items(p), p.channels * layer_norm_bwd_items(p),
           [&](int64_t begin, int64_t end) {
             cpu_kernels().layer_norm_bwd_reduce(p, workspace.data(), begin, end);
           });
  return gradients;
}

void register_all(torch::stable::detail::StableLibrary& m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CPU, m) { register_all(m); }
#ifdef MAMBA_SSM_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CUDA, m) { register_all(m); }
#endif

}  // namespace mamba_ssm::ops
