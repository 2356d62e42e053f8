// How the CPU kernel of selective_state_update divides a call into work items.
#pragma once

#include "selective_state_update.h"

namespace mamba_ssm::kernels {

/// A work item is one batch row, one head, and so many of its channels.
inline constexpr int kUpdateChannels = 64;

}  // namespace mamba_ssm::kernels
