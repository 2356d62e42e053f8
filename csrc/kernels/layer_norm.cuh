// What the CUDA kernels of layer_norm share: dropout by a given mask.
#pragma once

#include "layer_norm.h"
#include "row_norm.cuh"

namespace mamba_ssm::kernels {

/// dropout(v) at a channel of a row, by a mask that may be absent.
template <class Acc>
__device__ __forceinline__ Acc dropped(const LayerNormParams& p, const View<4>& mask,
                                       const RowIndex<int64_t>& at, int64_t channel, Acc v) {
  if (!given(mask)) return v;
  const bool kept = static_cast<const uint8_t*>(mask.data)[at(mask, channel)] != 0;
  return kept ? v * static_cast<Acc>(p.dropout_scale) : Acc(0);
}

}  // namespace mamba_ssm::kernels
