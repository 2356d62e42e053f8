// What the CUDA kernels of rms_norm_gated share: the place of the gate, known to the compiler.
#pragma once

#include "rms_norm_gated.h"
#include "row_norm.cuh"

namespace mamba_ssm::kernels {

enum class GatePlace { kNone, kBeforeNorm, kAfterNorm };

/// Calls f(std::integral_constant) with the place of the gate.
template <class F>
void for_gate_place(const RmsNormGatedParams& p, F f) {
  if (!given(p.z)) return f(std::integral_constant<GatePlace, GatePlace::kNone>{});
  if (p.norm_before_gate) {
    return f(std::integral_constant<GatePlace, GatePlace::kAfterNorm>{});
  }
  f(std::integral_constant<GatePlace, GatePlace::kBeforeNorm>{});
}

}  // namespace mamba_ssm::kernels
