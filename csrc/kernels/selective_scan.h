// Selective scan, the recurrence of Mamba-1.
//
//   d_t = delta_t + delta_bias;  with delta_softplus: d_t = log1p(exp(d_t)) where d_t <= 20
//   h_t = exp(d_t A) h_{t-1} + d_t B_t u_t         h_{-1} = initial_state or 0
//   y_t = sum_n C_t h_t      (complex A: 2 Re sum_n C_t h_t) + D u_t
//   out = y, or y * silu(z) with z
//
// per batch row and channel, over dstate states. Channel c reads group c / (dim / groups) of B and
// C; a B or C that is constant in time has one group per channel and strides 0 over batch and time.
//
// Packed rows (marks, see packed_sequences.h): a token marked kReset starts from h_{t-1} = 0; a
// token marked kPadding gives out = 0, leaves the state as it is and has no gradient.
//
//   tensor             shape                             dtype
//   u, delta, z, out   (batch, dim, seqlen)              T: float32, float16, bfloat16, float64
//   A                  (dim, dstate)                     float32, float16, bfloat16 (float64 with
//                                                        T = float64); may be complex
//   B, C per time      (batch, groups, dstate, seqlen)   T
//   B, C constant      (dim, dstate)                     as A, seen as (-, dim, dstate, -)
//   D, delta_bias      (dim)                             as A, real, each on its own; optional
//   initial_state      (batch, dim, dstate)              T or float32; complex with A; optional
//   last_state         (batch, dim, dstate)              S: float32 (float64); complex with A
//   states             (batch, chunks, dim, dstate)      S, contiguous, complex as pairs; optional
//                      state before the first token of every chunk of kSelectiveScanChunk tokens
//   marks              (batch, seqlen)                   uint8, contiguous; optional
//
// Strides are arbitrary. Gradients have the dtype and shape of their tensors; for complex tensors
// they follow torch: dL/dRe + i dL/dIm.
// Source: Mamba (arXiv 2312.00752), algorithm 2 and equation 2; complex A: S4D (arXiv 2206.11893).
#pragma once

#include <cstddef>

#include "types.h"

namespace mamba_ssm::kernels {

struct SelectiveScanParams {
  int64_t batch, dim, seqlen, dstate;
  int64_t groups_B, groups_C;
  bool constant_B, constant_C;  // (dim, dstate): dB, dC are sums over batch and time
  bool complex_A;
  bool delta_softplus;
  DType dtype;  // T
  View<3> u, delta, z;
  View<2> A;
  View<4> B, C;
  View<1> D, delta_bias;
  View<3> initial_state;
  const uint8_t* marks;
  View<3> out;         // forward only
  View<3> last_state;  // forward only
  void* states;        // forward: written if not null; backward: read
  // Backward only. Null where a gradient does not exist or is not wanted.
  View<3> dout;
  View<3> dlast_state;  // optional; S
  View<3> du, ddelta, dz;
  View<2> dA;
  View<4> dB, dC;
  View<1> dD, ddelta_bias;
  View<3> dinitial_state;
};

// CPU: number of independent work items of a call; the kernels themselves are in cpu.h. The
// backward has two phases: scan items that leave partial sums in the workspace, then reduce items
// that add these up in a fixed order.
int64_t selective_scan_fwd_items(const SelectiveScanParams& p);
int64_t selective_scan_bwd_items(const SelectiveScanParams& p);
int64_t selective_scan_bwd_reduce_items(const SelectiveScanParams& p);
size_t selective_scan_bwd_cpu_workspace(const SelectiveScanParams& p);

// CUDA: launch on `stream` of the current device. The forward's workspace holds the states handed
// from one segment of a row to the next when few rows have to fill the GPU (0 bytes otherwise).
size_t selective_scan_fwd_cuda_workspace(const SelectiveScanParams& p);
CudaStatus selective_scan_fwd_cuda(const SelectiveScanParams& p, void* workspace,
                                   CudaStream stream);
size_t selective_scan_bwd_cuda_workspace(const SelectiveScanParams& p);
CudaStatus selective_scan_bwd_cuda(const SelectiveScanParams& p, void* workspace,
                                   CudaStream stream);

}  // namespace mamba_ssm::kernels
