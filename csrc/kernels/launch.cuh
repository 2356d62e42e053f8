// The CUDA launchers, one per op, direction and element type T.
//
// X_fwd.cu and X_bwd.cu define these templates and are compiled once per T: the build sets
// MAMBA_SSM_ELEMENT, and the file ends by instantiating its launcher for it.
#pragma once

#include "causal_conv1d.h"
#include "decode_linear.h"
#include "device.cuh"
#include "layer_norm.h"
#include "rms_norm_gated.h"
#include "selective_scan.h"
#include "selective_state_update.h"
#include "ssd_chunk_scan.h"

namespace mamba_ssm::kernels {

template <class T>
CudaStatus launch_causal_conv1d_fwd(const CausalConv1dParams& p, CudaStream stream);
template <class T>
size_t workspace_causal_conv1d_bwd(const CausalConv1dParams& p);
template <class T>
CudaStatus launch_causal_conv1d_bwd(const CausalConv1dParams& p, void* workspace,
                                    CudaStream stream);
template <class T>
CudaStatus launch_causal_conv1d_update(const CausalConv1dUpdateParams& p, CudaStream stream);
template <class T>
CudaStatus launch_causal_conv1d_varlen_states(const CausalConv1dVarlenStatesParams& p,
                                              CudaStream stream);

template <class T>
size_t workspace_selective_scan_fwd(const SelectiveScanParams& p);
template <class T>
CudaStatus launch_selective_scan_fwd(const SelectiveScanParams& p, void* workspace,
                                     CudaStream stream);
template <class T>
size_t workspace_selective_scan_bwd(const SelectiveScanParams& p);
template <class T>
CudaStatus launch_selective_scan_bwd(const SelectiveScanParams& p, void* workspace,
                                     CudaStream stream);

template <class T>
size_t workspace_ssd_chunk_scan_fwd(const SsdChunkScanParams& p);
template <class T>
CudaStatus launch_ssd_chunk_scan_fwd(const SsdChunkScanParams& p, void* workspace,
                                     CudaStream stream);

template <class T>
size_t workspace_ssd_chunk_scan_bwd(const SsdChunkScanParams& p);
template <class T>
CudaStatus launch_ssd_chunk_scan_bwd(const SsdChunkScanParams& p, void* workspace,
                                     CudaStream stream);

template <class T>
CudaStatus launch_selective_state_update(const SelectiveStateUpdateParams& p, CudaStream stream);

template <class T>
CudaStatus launch_decode_linear(const DecodeLinearParams& p, CudaStream stream);
template <class T>
int64_t decode_linear_tile_rows();

template <class T>
CudaStatus launch_rms_norm_gated_fwd(const RmsNormGatedParams& p, CudaStream stream);
template <class T>
size_t workspace_rms_norm_gated_bwd(const RmsNormGatedParams& p);
template <class T>
CudaStatus launch_rms_norm_gated_bwd(const RmsNormGatedParams& p, void* workspace,
                                     CudaStream stream);

template <class T>
CudaStatus launch_layer_norm_fwd(const LayerNormParams& p, CudaStream stream);
template <class T>
size_t workspace_layer_norm_bwd(const LayerNormParams& p);
template <class T>
CudaStatus launch_layer_norm_bwd(const LayerNormParams& p, void* workspace, CudaStream stream);

}  // namespace mamba_ssm::kernels
