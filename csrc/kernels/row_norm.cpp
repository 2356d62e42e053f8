// The norms on CPU: work items and workspace. The kernels are in *_norm*_cpu.cpp.
#include <algorithm>

#include "layer_norm.h"
#include "rms_norm_gated.h"
#include "row_norm_cpu.h"

namespace mamba_ssm::kernels {
namespace {

int64_t reduce_items(int64_t channels) {
  return (channels + kReduceChannels - 1) / kReduceChannels;
}

/// `vectors`: how many parameters have a partial sum in every block.
size_t workspace(int64_t rows, int64_t channels, int64_t vectors, DType dtype) {
  const size_t element = dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  return static_cast<size_t>(row_blocks(rows) * vectors * partial_pitch(channels)) * element;
}

}  // namespace

int64_t row_blocks(int64_t rows) { return std::min(rows, kMostRowBlocks); }

int64_t partial_pitch(int64_t channels) {
  constexpr int64_t kMostLanes = 16;
  return channels + kMostLanes;
}

int64_t rms_norm_gated_fwd_items(const RmsNormGatedParams& p) { return p.rows; }
int64_t rms_norm_gated_bwd_items(const RmsNormGatedParams& p) { return row_blocks(p.rows); }
int64_t rms_norm_gated_bwd_reduce_items(const RmsNormGatedParams& p) {
  return reduce_items(p.channels);
}
size_t rms_norm_gated_bwd_cpu_workspace(const RmsNormGatedParams& p) {
  return workspace(p.rows, p.channels, 2, p.dtype);
}

int64_t layer_norm_fwd_items(const LayerNormParams& p) { return p.rows; }
int64_t layer_norm_bwd_items(const LayerNormParams& p) { return row_blocks(p.rows); }
int64_t layer_norm_bwd_reduce_items(const LayerNormParams& p) { return reduce_items(p.channels); }
size_t layer_norm_bwd_cpu_workspace(const LayerNormParams& p) {
  return workspace(p.rows, p.channels, 4, p.dtype);
}

}  // namespace mamba_ssm::kernels
