// Residual addition and normalization of its sum, with up to two heads.
//
//   sum  = dropout(rowscale x) + dropout1(x1) + residual     absent parts left out
//   out  = (sum - mean) / sqrt(var + eps) * weight + bias
//   out1 = the same with weight1 and bias1
//
// where dropout(v) is v / (1 - dropout_p) at channels whose mask is true and 0 elsewhere, mean and
// var = mean((sum - mean)^2) are taken over the channels of a row, and mean is 0 for is_rms_norm.
// In float32 (float64 for float64): out is formed from the sum before it is rounded to
// residual_out.
//
//   tensor                        shape               dtype
//   x, x1, out, out1              (rows, channels)    T: float32, float16, bfloat16, float64
//   residual, residual_out        (rows, channels)    T or float32, each on its own
//   rowscale                      (rows)              float32, float16, bfloat16 (float64 with T)
//   dropout_mask, dropout_mask1   (rows, channels)    bool: bytes, whatever the view's dtype says
//   weight, bias, weight1, bias1  (channels)          as rowscale, each on its own
//
// All but x, weight and out may be absent. The backward starts from residual_out, or from x where
// nothing was added, as `sum`:
//
//   dsum = (g - mean(g) - n mean(n g)) / sqrt(var + eps) + dresidual_out
//
// with n the normalized sum, g = dout weight + dout1 weight1 and without the second term for
// is_rms_norm. dresidual is dsum, dx and dx1 are dsum as dropout and rowscale pass it on. Strides
// are arbitrary.
// Source: LayerNorm (arXiv 1607.06450), RMSNorm (arXiv 1910.07467).
#pragma once

#include "row_norm.h"

namespace mamba_ssm::kernels {

struct LayerNormParams {
  RowAxes axes;
  int64_t rows, channels;
  double eps;
  double dropout_scale;  // 1 / (1 - dropout_p), 0 where that is infinite
  bool is_rms_norm;
  DType dtype;  // T
  View<4> x, residual, x1;
  View<4> rowscale, dropout_mask, dropout_mask1;
  View<1> weight, bias, weight1, bias1;
  View<4> out, out1, residual_out;  // forward only
  // Backward only; it reads neither x, residual nor x1.
  View<4> sum, dout, dout1, dresidual_out;  // the last two optional
  View<4> dx, dresidual, dx1;               // the last two null when not wanted
  View<1> dweight, dbias, dweight1, dbias1;
};

// CPU: as those of rms_norm_gated.
int64_t layer_norm_fwd_items(const LayerNormParams& p);
int64_t layer_norm_bwd_items(const LayerNormParams& p);
int64_t layer_norm_bwd_reduce_items(const LayerNormParams& p);
size_t layer_norm_bwd_cpu_workspace(const LayerNormParams& p);

// CUDA: as those of rms_norm_gated.
CudaStatus layer_norm_fwd_cuda(const LayerNormParams& p, CudaStream stream);
size_t layer_norm_bwd_cuda_workspace(const LayerNormParams& p);
CudaStatus layer_norm_bwd_cuda(const LayerNormParams& p, void* workspace, CudaStream stream);

}  // namespace mamba_ssm::kernels
