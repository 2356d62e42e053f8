// Selective state update on CPU: work items. The kernel is in selective_state_update_cpu.cpp.
#include "selective_state_update_cpu.h"

namespace mamba_ssm::kernels {

int64_t selective_state_update_items(const SelectiveStateUpdateParams& p) {
  return p.batch * p.nheads * ((p.headdim + kUpdateChannels - 1) / kUpdateChannels);
}

}  // namespace mamba_ssm::kernels
