// How the CPU kernels of the norms divide a call into work items.
#pragma once

#include "row_norm.h"

namespace mamba_ssm::kernels {

/// Most blocks of rows of a backward: enough for many threads, few enough to add.
inline constexpr int64_t kMostRowBlocks = 64;
/// Channels that a work item of the final addition takes.
inline constexpr int64_t kReduceChannels = 256;

/// Blocks of rows, nearly equal ones: block i is rows [i * rows / count, (i + 1) * rows / count).
int64_t row_blocks(int64_t rows);

/// Elements from one partial sum to the next: vectors may reach past the last channel.
int64_t partial_pitch(int64_t channels);

}  // namespace mamba_ssm::kernels
