// The CPU kernels: the same source compiled once per instruction set, chosen at run time.
//
// Each entry works on items [begin, end) of the call's independent work items (X_items in X.h), so
// that the caller splits a call over its own threads. The result does not depend on the split.
// Nothing throws or allocates through torch; the arguments were checked before.
#pragma once

#include <cstdint>

#include "causal_conv1d.h"
#include "decode_linear.h"
#include "layer_norm.h"
#include "rms_norm_gated.h"
#include "selective_scan.h"
#include "selective_state_update.h"
#include "ssd_chunk_scan.h"

namespace mamba_ssm::kernels {

struct CpuKernels {
  const char* isa;  // "baseline", "avx2", "avx512"
  void (*causal_conv1d_fwd)(const CausalConv1dParams&, int64_t begin, int64_t end) noexcept;
  void (*causal_conv1d_bwd)(const CausalConv1dParams&, int64_t begin, int64_t end) noexcept;
  void (*causal_conv1d_update)(const CausalConv1dUpdateParams&, int64_t begin,
                               int64_t end) noexcept;
  void (*causal_conv1d_varlen_states)(const CausalConv1dVarlenStatesParams&, int64_t begin,
                                      int64_t end) noexcept;
  void (*decode_linear)(const DecodeLinearParams&, int64_t begin, int64_t end) noexcept;
  void (*selective_scan_fwd)(const SelectiveScanParams&, int64_t begin, int64_t end) noexcept;
  void (*selective_scan_bwd)(const SelectiveScanParams&, void* workspace, int64_t begin,
                             int64_t end) noexcept;
  void (*selective_scan_bwd_reduce)(const SelectiveScanParams&, void* workspace, int64_t begin,
                                    int64_t end) noexcept;
  void (*selective_state_update)(const SelectiveStateUpdateParams&, int64_t begin,
                                 int64_t end) noexcept;
  void (*ssd_chunk_scan_fwd)(const SsdChunkScanParams&, int64_t begin, int64_t end) noexcept;
  void (*ssd_chunk_scan_bwd)(const SsdChunkScanParams&, void* workspace, int64_t begin,
                             int64_t end) noexcept;
  void (*ssd_chunk_scan_bwd_reduce)(const SsdChunkScanParams&, void* workspace, int64_t begin,
                                    int64_t end) noexcept;
  void (*rms_norm_gated_fwd)(const RmsNormGatedParams&, int64_t begin, int64_t end) noexcept;
  void (*rms_norm_gated_bwd)(const RmsNormGatedParams&, void* workspace, int64_t begin,
                             int64_t end) noexcept;
  void (*rms_norm_gated_bwd_reduce)(const RmsNormGatedParams&, void* workspace, int64_t begin,
                                    int64_t end) noexcept;
  void (*layer_norm_fwd)(const LayerNormParams&, int64_t begin, int64_t end) noexcept;
  void (*layer_norm_bwd)(const LayerNormParams&, void* workspace, int64_t begin,
                         int64_t end) noexcept;
  void (*layer_norm_bwd_reduce)(const LayerNormParams&, void* workspace, int64_t begin,
                                int64_t end) noexcept;
};

/// The table for the widest instruction set of this machine.
const CpuKernels& cpu_kernels();

/// All tables this machine can run, widest last; `count` receives their number. For tests.
const CpuKernels* const* all_cpu_kernels(int* count);

}  // namespace mamba_ssm::kernels
