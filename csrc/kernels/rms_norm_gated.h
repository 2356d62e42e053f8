// Gated normalization over groups of channels.
//
//   s    = x, or x silu(z) unless norm_before_gate
//   norm = (s - mean) / sqrt(var + eps) * weight + bias
//   out  = norm, or norm silu(z) with norm_before_gate
//
// where mean and var = mean((s - mean)^2) are taken over each run of group_size channels of a row,
// and mean is 0 for is_rms_norm. In float32 (float64 for float64), with one rounding at the end.
//
//   tensor        shape               dtype
//   x, z, out     (rows, channels)    T: float32, float16, bfloat16, float64; z optional
//   weight, bias  (channels)          float32, float16, bfloat16 (float64 with T = float64), each
//                                     on its own; bias optional
//   gradients     as their tensors; dbias null without bias, dz without z
//
// Strides are arbitrary. The backward takes the statistics again from s, so that the forward keeps
// nothing for it.
// Source: RMSNorm (arXiv 1910.07467); LayerNorm (arXiv 1607.06450); Mamba-2 (arXiv 2405.21060),
// section 7.1.
#pragma once

#include "row_norm.h"

namespace mamba_ssm::kernels {

struct RmsNormGatedParams {
  RowAxes axes;
  int64_t rows, channels, group_size;  // group_size divides channels
  double eps;
  bool norm_before_gate, is_rms_norm;
  DType dtype;  // T
  View<4> x, z;
  View<1> weight, bias;
  View<4> out;  // forward only
  // Backward only.
  View<4> dout, dx, dz;
  View<1> dweight, dbias;
};

// CPU: independent work items of a call, and bytes of the workspace that holds the sums of dweight
// and dbias over blocks of rows; the kernels themselves are in cpu.h. The blocks depend on the
// sizes alone, and are added in order.
int64_t rms_norm_gated_fwd_items(const RmsNormGatedParams& p);
int64_t rms_norm_gated_bwd_items(const RmsNormGatedParams& p);
int64_t rms_norm_gated_bwd_reduce_items(const RmsNormGatedParams& p);
size_t rms_norm_gated_bwd_cpu_workspace(const RmsNormGatedParams& p);

// CUDA: launch on `stream` of the current device. The workspace holds partial sums of dweight and
// dbias, which a second kernel adds in a fixed order.
CudaStatus rms_norm_gated_fwd_cuda(const RmsNormGatedParams& p, CudaStream stream);
size_t rms_norm_gated_bwd_cuda_workspace(const RmsNormGatedParams& p);
CudaStatus rms_norm_gated_bwd_cuda(const RmsNormGatedParams& p, void* workspace, CudaStream stream);

}  // namespace mamba_ssm::kernels
