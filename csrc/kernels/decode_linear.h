// Products of a decode step: a few rows times a weight, with the normalization before it.
//
//   s = x (+ residual)                                      residual_out = s
//   n = s, or with norm_weight
//       g / sqrt(mean(g^2) + eps) norm_weight               g = s, or s silu(z) with z
//   out[r][o] = sum_i n[r][i] weight[o][i] (+ bias[o])
//
// in float32 (float64 for float64), with one rounding at the end. A row's result does not depend on
// the other rows; on CUDA it depends on how many there are, by the order of its sum alone.
//
//   tensor                  shape                         dtype
//   x, z                    (rows, in_features)           T: float32, float16, bfloat16, float64
//   residual, residual_out  (rows, in_features)           T or float32, each on its own
//   weight                  (out_features, in_features)   T
//   norm_weight             (in_features)                 float32, float16, bfloat16 (float64 with
//   bias                    (out_features)                T = float64), each on its own
//   out                     (rows, out_features)          T
//
// All but x, weight and out may be absent. Strides are arbitrary. On CPU blocks of kLinearOutputs
// outputs are the independent work items. Any number of rows is right, but only a few cost what
// reading the weight costs: on CUDA four, or decode_linear_cuda_tile_rows().
// Source: RMSNorm (arXiv 1910.07467); Mamba-2 (arXiv 2405.21060), section 7.1.
#pragma once

#include "types.h"

namespace mamba_ssm::kernels {

struct DecodeLinearParams {
  int64_t rows, in_features, out_features;
  double eps;
  DType dtype;  // T
  View<2> x, residual, z;
  View<1> norm_weight;
  View<2> weight;
  View<1> bias;
  View<2> out, residual_out;
};

constexpr int kLinearOutputs = 64;

CudaStatus decode_linear_cuda(const DecodeLinearParams& p, CudaStream stream);
/// Rows that the current device multiplies at a time by tiles; 0 if it does not.
int64_t decode_linear_cuda_tile_rows(DType dtype);

}  // namespace mamba_ssm::kernels
