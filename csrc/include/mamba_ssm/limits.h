/// @file
/// Constants that the kernels and their callers must agree on.
#pragma once

#include <cstdint>

namespace mamba_ssm {

/// Tokens between two states that selective_scan keeps for its backward.
inline constexpr int64_t kSelectiveScanChunk = 32;

}  // namespace mamba_ssm
