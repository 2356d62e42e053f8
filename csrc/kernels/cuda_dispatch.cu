// From the element type of a call to the launcher compiled for it.
#include <cuda_runtime.h>

#include "launch.cuh"

namespace mamba_ssm::kernels {
namespace {

/// Calls f with a value of the element type that `dtype` names.
template <class F>
auto for_element(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat64:
      return f(double{});
    default:
      return f(float{});
  }
}

}  // namespace

CudaStatus causal_conv1d_fwd_cuda(const CausalConv1dParams& p, CudaStream stream) {
  return for_element(p.dtype,
                     [&](auto t) { return launch_causal_conv1d_fwd<decltype(t)>(p, stream); });
}

size_t causal_conv1d_bwd_cuda_workspace(const CausalConv1dParams& p) {
  return for_element(p.dtype, [&](auto t) { return workspace_causal_conv1d_bwd<decltype(t)>(p); });
}

CudaStatus causal_conv1d_bwd_cuda(const CausalConv1dParams& p, void* workspace, CudaStream stream) {
  return for_element(
      p.dtype, [&](auto t) { return launch_causal_conv1d_bwd<decltype(t)>(p, workspace, stream); });
}

CudaStatus causal_conv1d_update_cuda(const CausalConv1dUpdateParams& p, CudaStream stream) {
  return for_element(p.dtype,
                     [&](auto t) { return launch_causal_conv1d_update<decltype(t)>(p, stream); });
}

CudaStatus causal_conv1d_varlen_states_cuda(const CausalConv1dVarlenStatesParams& p,
                                            CudaStream stream) {
  return for_element(
      p.dtype, [&](auto t) { return launch_causal_conv1d_varlen_states<decltype(t)>(p, stream); });
}

CudaStatus decode_linear_cuda(const DecodeLinearParams& p, CudaStream stream) {
  return for_element(p.dtype, [&](auto t) { return launch_decode_linear<decltype(t)>(p, stream); });
}

int64_t decode_linear_cuda_tile_rows(DType dtype) {
  return for_element(dtype, [](auto t) { return decode_linear_tile_rows<decltype(t)>(); });
}

size_t selective_scan_fwd_cuda_workspace(const SelectiveScanParams& p) {
  return for_element(p.dtype, [&](auto t) { return workspace_selective_scan_fwd<decltype(t)>(p); });
}

CudaStatus selective_scan_fwd_cuda(const SelectiveScanParams& p, void* workspace,
                                   CudaStream stream) {
  return for_element(p.dtype, [&](auto t) {
    return launch_selective_scan_fwd<decltype(t)>(p, workspace, stream);
  });
}

size_t selective_scan_bwd_cuda_workspace(const SelectiveScanParams& p) {
  return for_element(p.dtype, [&](auto t) { return workspace_selective_scan_bwd<decltype(t)>(p); });
}

CudaStatus selective_scan_bwd_cuda(const SelectiveScanParams& p, void* workspace,
                                   CudaStream stream) {
  return for_element(p.dtype, [&](auto t) {
    return launch_selective_scan_bwd<decltype(t)>(p, workspace, stream);
  });
}

size_t ssd_chunk_scan_fwd_cuda_workspace(const SsdChunkScanParams& p) {
  return for_element(p.dtype, [&](auto t) { return workspace_ssd_chunk_scan_fwd<decltype(t)>(p); });
}

CudaStatus ssd_chunk_scan_fwd_cuda(const SsdChunkScanParams& p, void* workspace,
                                   CudaStream stream) {
  return for_element(p.dtype, [&](auto t) {
    return launch_ssd_chunk_scan_fwd<decltype(t)>(p, workspace, stream);
  });
}

size_t ssd_chunk_scan_bwd_cuda_workspace(const SsdChunkScanParams& p) {
  return for_element(p.dtype, [&](auto t) { return workspace_ssd_chunk_scan_bwd<decltype(t)>(p); });
}

CudaStatus ssd_chunk_scan_bwd_cuda(const SsdChunkScanParams& p, void* workspace,
                                   CudaStream stream) {
  return for_element(p.dtype, [&](auto t) {
    return launch_ssd_chunk_scan_bwd<decltype(t)>(p, workspace, stream);
  });
}

CudaStatus selective_state_update_cuda(const SelectiveStateUpdateParams& p, CudaStream stream) {
  return for_element(p.dtype,
                     [&](auto t) { return launch_selective_state_update<decltype(t)>(p, stream); });
}

CudaStatus rms_norm_gated_fwd_cuda(const RmsNormGatedParams& p, CudaStream stream) {
  return for_element(p.dtype,
                     [&](auto t) { return launch_rms_norm_gated_fwd<decltype(t)>(p, stream); });
}

size_t rms_norm_gated_bwd_cuda_workspace(const RmsNormGatedParams& p) {
  return for_element(p.dtype, [&](auto t) { return workspace_rms_norm_gated_bwd<decltype(t)>(p); });
}

CudaStatus rms_norm_gated_bwd_cuda(const RmsNormGatedParams& p, void* workspace,
                                   CudaStream stream) {
  return for_element(p.dtype, [&](auto t) {
    return launch_rms_norm_gated_bwd<decltype(t)>(p, workspace, stream);
  });
}

CudaStatus layer_norm_fwd_cuda(const LayerNormParams& p, CudaStream stream) {
  return for_element(p.dtype,
                     [&](auto t) { return launch_layer_norm_fwd<decltype(t)>(p, stream); });
}

size_t layer_norm_bwd_cuda_workspace(const LayerNormParams& p) {
  return for_element(p.dtype, [&](auto t) { return workspace_layer_norm_bwd<decltype(t)>(p); });
}

CudaStatus layer_norm_bwd_cuda(const LayerNormParams& p, void* workspace, CudaStream stream) {
  return for_element(
      p.dtype, [&](auto t) { return launch_layer_norm_bwd<decltype(t)>(p, workspace, stream); });
}

const char* cuda_error_string(CudaStatus status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

}  // namespace mamba_ssm::kernels
