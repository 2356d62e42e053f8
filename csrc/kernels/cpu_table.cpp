// The kernels of the instruction set that this file is compiled for.
#include "cpu.h"

#define MAMBA_SSM_QUOTE(x) #x
#define MAMBA_SSM_NAME_OF(macro) MAMBA_SSM_QUOTE(macro)

namespace mamba_ssm::kernels::MAMBA_SSM_ISA {

void causal_conv1d_fwd_cpu(const CausalConv1dParams& p, int64_t begin, int64_t end) noexcept;
void causal_conv1d_bwd_cpu(const CausalConv1dParams& p, int64_t begin, int64_t end) noexcept;
void causal_conv1d_update_cpu(const CausalConv1dUpdateParams& p, int64_t begin,
                              int64_t end) noexcept;
void causal_conv1d_varlen_states_cpu(const CausalConv1dVarlenStatesParams& p, int64_t begin,
                                     int64_t end) noexcept;
void decode_linear_cpu(const DecodeLinearParams& p, int64_t begin, int64_t end) noexcept;
void selective_scan_fwd_cpu(const SelectiveScanParams& p, int64_t begin, int64_t end) noexcept;
void selective_scan_bwd_cpu(const SelectiveScanParams& p, void* workspace, int64_t begin,
                            int64_t end) noexcept;
void selective_scan_bwd_reduce_cpu(const SelectiveScanParams& p, void* workspace, int64_t begin,
                                   int64_t end) noexcept;
void selective_state_update_cpu(const SelectiveStateUpdateParams& p, int64_t begin,
                                int64_t end) noexcept;
void ssd_chunk_scan_fwd_cpu(const SsdChunkScanParams& p, int64_t begin, int64_t end) noexcept;
void ssd_chunk_scan_bwd_cpu(const SsdChunkScanParams& p, void* workspace, int64_t begin,
                            int64_t end) noexcept;
void ssd_chunk_scan_bwd_reduce_cpu(const SsdChunkScanParams& p, void* workspace, int64_t begin,
                                   int64_t end) noexcept;
void rms_norm_gated_fwd_cpu(const RmsNormGatedParams& p, int64_t begin, int64_t end) noexcept;
void rms_norm_gated_bwd_cpu(const RmsNormGatedParams& p, void* workspace, int64_t begin,
                            int64_t end) noexcept;
void rms_norm_gated_bwd_reduce_cpu(const RmsNormGatedParams& p, void* workspace, int64_t begin,
                                   int64_t end) noexcept;
void layer_norm_fwd_cpu(const LayerNormParams& p, int64_t begin, int64_t end) noexcept;
void layer_norm_bwd_cpu(const LayerNormParams& p, void* workspace, int64_t begin,
                        int64_t end) noexcept;
void layer_norm_bwd_reduce_cpu(const LayerNormParams& p, void* workspace, int64_t begin,
                               int64_t end) noexcept;

extern const CpuKernels kKernels;
const CpuKernels kKernels = {
    MAMBA_SSM_NAME_OF(MAMBA_SSM_ISA),
    causal_conv1d_fwd_cpu,
    causal_conv1d_bwd_cpu,
    causal_conv1d_update_cpu,
    causal_conv1d_varlen_states_cpu,
    decode_linear_cpu,
    selective_scan_fwd_cpu,
    selective_scan_bwd_cpu,
    selective_scan_bwd_reduce_cpu,
    selective_state_update_cpu,
    ssd_chunk_scan_fwd_cpu,
    ssd_chunk_scan_bwd_cpu,
    ssd_chunk_scan_bwd_reduce_cpu,
    rms_norm_gated_fwd_cpu,
    rms_norm_gated_bwd_cpu,
    rms_norm_gated_bwd_reduce_cpu,
    layer_norm_fwd_cpu,
    layer_norm_bwd_cpu,
    layer_norm_bwd_reduce_cpu,
};

}  // namespace mamba_ssm::kernels::MAMBA_SSM_ISA
