// rms_norm_gated: check, allocate, run. Contract: include/mamba_ssm/ops.h.
#include "rms_norm_gated.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "rows.h"
#include "run.h"

namespace mamba_ssm::ops {
namespace {

using kernels::cpu_kernels;
using kernels::RmsNormGatedParams;

/// Fills what forward and backward share, for tensors that passed the checks.
RmsNormGatedParams params(const Rows& rows, const OptionalTensor& x, const Tensor& weight,
                          const OptionalTensor& bias, const OptionalTensor& z, double eps,
                          int64_t group_size, bool norm_before_gate, bool is_rms_norm) {
  RmsNormGatedParams p{};
  p.axes = rows.axes();
  p.rows = rows.count();
  p.channels = weight.size(0);
  p.group_size = group_size;
  p.eps = eps;
  p.norm_before_gate = norm_before_gate;
  p.is_rms_norm = is_rms_norm;
  p.dtype = dtype_of(x->scalar_type());
  p.x = rows.view(x);
  p.z = rows.view(z);
  p.weight = view<1>(weight);
  p.bias = view<1>(bias);
  return p;
}

Tensor rms_norm_gated(Tensor x_, Tensor weight, OptionalTensor bias, OptionalTensor z, double eps,
                      std::optional<int64_t> group_size, bool norm_before_gate, bool is_rms_norm) {
  const StableChecks checks("rms_norm_gated", "x", x_);
  const int64_t group = check_rms_norm_gated(checks, x_, weight, bias, z, group_size);
  OptionalTensor x = x_;
  const Rows rows({&x, &z});
  RmsNormGatedParams p =
      params(rows, x, weight, bias, z, eps, group, norm_before_gate, is_rms_norm);
  Tensor out = allocate_rows(checks.op(), x_, x_.scalar_type());
  p.out = rows.view(out);
  if (out.numel() == 0) return out;
  if constexpr (kWithCuda) {
    if (out.is_cuda()) {
      const CudaScope scope(out);
      check_launch(checks.op(), kernels::rms_norm_gated_fwd_cuda(p, scope.stream()));
      return out;
    }
  }
  parallel(rms_norm_gated_fwd_items(p), out.numel(),
           [&](int64_t begin, int64_t end) { cpu_kernels().rms_norm_gated_fwd(p, begin, end); });
  return out;
}

using Gradients = std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor>;

/// Runs a checked backward, with groups of `group` channels, into `gradients`.
void backward(const StableChecks& checks, const Tensor& dout_, const Tensor& x_,
              const Tensor& weight, const OptionalTensor& bias, OptionalTensor z, double eps,
              int64_t group, bool norm_before_gate, bool is_rms_norm, const Gradients& gradients) {
  check_rms_norm_gated_gradient(checks, x_, dout_);
  const auto& [dx, dweight, dbias, dz_] = gradients;
  OptionalTensor x = x_, dout = dout_, dx_rows = dx, dz = dz_;
  const Rows rows({&x, &z, &dout, &dx_rows, &dz});
  RmsNormGatedParams p =
      params(rows, x, weight, bias, z, eps, group, norm_before_gate, is_rms_norm);
  p.dout = rows.view(dout);
  p.dx = rows.view(dx_rows);
  p.dz = rows.view(dz);
  p.dweight = view<1>(dweight);
  p.dbias = view<1>(dbias);
  if (p.channels == 0) return;
  if constexpr (kWithCuda) {
    if (dx.is_cuda()) {
      const CudaScope scope(dx);
      const Workspace workspace(checks.op(), dx, kernels::rms_norm_gated_bwd_cuda_workspace(p));
      check_launch(checks.op(),
                   kernels::rms_norm_gated_bwd_cuda(p, workspace.data(), scope.stream()));
      return;
    }
  }
  const Workspace workspace(checks.op(), dx, kernels::rms_norm_gated_bwd_cpu_workspace(p));
  parallel(rms_norm_gated_bwd_items(p), 3 * dx.numel(), [&](int64_t begin, int64_t end) {
    cpu_kernels().rms_norm_gated_bwd(p, workspace.data(), begin, end);
  });
  parallel(rms_norm_gated_bwd_reduce_items(p), p.channels * rms_norm_gated_bwd_items(p),
           [&](int64_t begin, int64_t end) {
             cpu_kernels().rms_norm_gated_bwd_reduce(p, workspace.data(), begin, end);
           });
}

Gradients rms_norm_gated_bwd(Tensor dout, Tensor x, Tensor weight, OptionalTensor bias,
                             OptionalTensor z, double eps, std::optional<int64_t> group_size,
                             bool norm_before_gate, bool is_rms_norm) {
  const StableChecks checks("rms_norm_gated_bwd", "x", x);
  const int64_t group = check_rms_norm_gated(checks, x, weight, bias, z, group_size);
  OptionalTensor dz;
  if (z) dz = allocate_rows(checks.op(), x, x.scalar_type());
  Gradients gradients{allocate_rows(checks.op(), x, x.scalar_type()),
                      allocate_like(checks.op(), weight), allocate_like(checks.op(), bias), dz};
  backward(checks, dout, x, weight, bias, z, eps, group, norm_before_gate, is_rms_norm, gradients);
  return gradients;
}

void rms_norm_gated_bwd_out(Tensor dout, Tensor x, Tensor weight, OptionalTensor bias,
                            OptionalTensor z, double eps, std::optional<int64_t> group_size,
                            bool norm_before_gate, bool is_rms_norm, Tensor dx, Tensor dweight,
                            OptionalTensor dbias, OptionalTensor dz) {
  const StableChecks checks("rms_norm_gated_bwd_out", "x", x);
  const int64_t group = check_rms_norm_gated(checks, x, weight, bias, z, group_size);
  check_rms_norm_gated_bwd_results(checks, x, weight, bias, z, dx, dweight, dbias, dz);
  backward(checks, dout, x, weight, bias, z, eps, group, norm_before_gate, is_rms_norm,
           {dx, dweight, dbias, dz});
}

void register_all(torch::stable::detail::StableLibrary& m) {
  m.impl("rms_norm_gated", TORCH_BOX(&rms_norm_gated));
  m.impl("rms_norm_gated_bwd", TORCH_BOX(&rms_norm_gated_bwd));
  m.impl("rms_norm_gated_bwd_out", TORCH_BOX(&rms_norm_gated_bwd_out));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CPU, m) { register_all(m); }
#ifdef MAMBA_SSM_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CUDA, m) { register_all(m); }
#endif

}  // namespace mamba_ssm::ops
