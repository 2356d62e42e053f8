/// @file
/// Constants that the kernels and their callers must agree on.
#pragma once

#include <cstdint>

namespace mamba_ssm {

/// Tokens between two states that selective_scan keeps for its backward.
inline constexpr int64_t kSelectiveScanChunk = 32;

/// Features that decode_linear normalizes by vectors on CUDA: their operands fit a block's shared
/// memory on every GPU.
inline constexpr int64_t kDecodeLinearNormed = 12 * 1024;

}  // namespace mamba_ssm
