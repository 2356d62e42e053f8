// How the CPU kernels of causal_conv1d divide a call into work items.
#pragma once

#include "causal_conv1d.h"

namespace mamba_ssm::kernels {

/// A tile is what a kernel holds in scratch: a few tokens of a unit of channels.
inline constexpr int kConvTile = 2048;  // elements
/// Channels of a unit: whole vectors of every instruction set.
inline constexpr int kConvMinUnit = 16, kConvMaxUnit = 64;
inline constexpr int kConvMaxTokens = kConvTile / kConvMinUnit;

/// A work item is a unit of channels of one row (backward: of all rows) for a span of time. Items
/// are numbered with the units outermost, so that neighbors share their weights.
struct CausalConv1dBlocks {
  int channels;   // of a unit
  int tokens;     // of a tile
  int64_t units;  // ceil(dim / channels)
  int64_t span;   // tokens, whole tiles
  int64_t spans;  // of a row, at least 1
};

CausalConv1dBlocks causal_conv1d_fwd_blocks(const CausalConv1dParams& p);
CausalConv1dBlocks causal_conv1d_bwd_blocks(const CausalConv1dParams& p);

}  // namespace mamba_ssm::kernels
