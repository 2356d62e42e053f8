// Causal convolution on CPU: work items. The kernels are in causal_conv1d_cpu.cpp.
#include <algorithm>

#include "causal_conv1d_cpu.h"

namespace mamba_ssm::kernels {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

CausalConv1dBlocks blocks_of(const CausalConv1dParams& p, int channels) {
  CausalConv1dBlocks s;
  s.channels = channels;
  s.tokens = kConvTile / channels;
  s.units = ceil_div(p.dim, channels);
  s.span = p.seqlen;
  s.spans = 1;
  return s;
}

/// Tiles extend along the axis that is dense in memory.
CausalConv1dBlocks blocks_of(const CausalConv1dParams& p) {
  const bool tokens_dense = p.x.stride[2] == 1 && (p.x.stride[1] != 1 || p.dim == 1);
  return blocks_of(p, tokens_dense ? kConvMinUnit : kConvMaxUnit);
}

}  // namespace

CausalConv1dBlocks causal_conv1d_fwd_blocks(const CausalConv1dParams& p) {
  // Rows are cut in time where there are too few of them to keep many threads busy.
  constexpr int64_t kItems = 256, kMinTiles = 4;
  CausalConv1dBlocks s = blocks_of(p);
  const int64_t tiles = ceil_div(p.seqlen, s.tokens);
  const int64_t wanted = ceil_div(kItems, std::max<int64_t>(1, p.batch * s.units));
  const int64_t per_span = std::max(kMinTiles, ceil_div(tiles, wanted));
  s.span = per_span * s.tokens;
  s.spans = std::max<int64_t>(1, ceil_div(tiles, per_span));
  return s;
}

CausalConv1dBlocks causal_conv1d_bwd_blocks(const CausalConv1dParams& p) {
  // Units are all there is to divide: narrower ones where they are few.
  constexpr int64_t kUnits = 32;
  const CausalConv1dBlocks s = blocks_of(p);
  return s.channels == kConvMaxUnit && s.units < kUnits ? blocks_of(p, kConvMaxUnit / 2) : s;
}

int64_t causal_conv1d_fwd_items(const CausalConv1dParams& p) {
  const CausalConv1dBlocks blocks = causal_conv1d_fwd_blocks(p);
  return blocks.units * p.batch * blocks.spans;
}

int64_t causal_conv1d_bwd_items(const CausalConv1dParams& p) {
  return causal_conv1d_bwd_blocks(p).units;
}

int64_t causal_conv1d_update_items(const CausalConv1dUpdateParams& p) {
  return ceil_div(p.dim, kConvMaxUnit) * p.batch;
}

int64_t causal_conv1d_varlen_states_items(const CausalConv1dVarlenStatesParams& p) {
  return ceil_div(p.dim, kConvMaxUnit) * p.num_sequences;
}

}  // namespace mamba_ssm::kernels
