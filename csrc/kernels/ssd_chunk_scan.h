// SSD chunk scan, the recurrence of Mamba-2: one decay per head and time step.
//
//   d_t = dt_t + dt_bias;  with dt_softplus: d_t = log1p(exp(d_t)) where d_t <= 20
//   d_t = min(max(d_t, dt_min), dt_max)
//   h_t = exp(d_t A) h_{t-1} + d_t x_t B_t^T       h_{-1} = initial state or 0, (headdim, dstate)
//   y_t = h_t C_t + D x_t
//   out = y, or y * silu(z) with z
//
// per row and head. Head h reads group h / (nheads / ngroups) of B and C. Kernels cut time into
// chunks of a size of their own: with c_t the sum of d A from the start of the chunk to t,
//
//   y_i = sum_{j <= i} exp(c_i - c_j) (C_i . B_j) d_j x_j + exp(c_i) C_i h_before + D x_i
//
// where states between chunks stay float32 (float64), so that the chunk size is not part of the
// result beyond rounding.
//
// Packed rows. marks (see packed_sequences.h): a token marked kReset starts from h_{t-1} = 0; a
// token marked kPadding gives out = 0, leaves the state as it is and has no gradient. cu_seqlens
// (batch 1): sequence r is the tokens [cu_seqlens[r], cu_seqlens[r+1]) with an initial and a final
// state of its own; an empty one hands its initial state on as final state. Without cu_seqlens the
// sequences of a call are its batch rows. Both may be given.
//
//   tensor             shape                                      dtype
//   x, z, out          (batch, seqlen, nheads, headdim)           T: float32, float16, bfloat16,
//                                                                 float64
//   dt                 (batch, seqlen, nheads)                    T or float32
//   A                  (nheads)                                   float32, float16, bfloat16
//                                                                 (float64 with T = float64)
//   B, C               (batch, seqlen, ngroups, dstate)           T
//   D                  (nheads, headdim), stride 0 over headdim   as A, on its own; optional
//                      for one number per head
//   dt_bias            (nheads)                                   as A, on its own; optional
//   initial_states     (num_initial_states, nheads, headdim,      T or float32; optional. 1 or
//                      dstate)                                    num_sequences; a single one among
//                                                                 several belongs to sequence 0
//   marks              (batch, seqlen)                            uint8, contiguous; optional
//   cu_seqlens         (num_sequences + 1)                        int32 or int64; optional; values
//                                                                 are clamped to [0, seqlen]
//   final_states       (num_sequences, nheads, headdim, dstate)   float32 (float64)
//
// Strides are arbitrary. Gradients have the dtype and shape of their tensors, except that dfinal_
// states has that of final_states. Where d_t was outside [dt_min, dt_max], ddt is 0.
// Source: Mamba-2 (arXiv 2405.21060), sections 6 and 7.
#pragma once

#include <cstddef>

#include "types.h"

namespace mamba_ssm::kernels {

struct SsdChunkScanParams {
  int64_t batch, seqlen, nheads, headdim, ngroups, dstate;
  int64_t num_sequences, num_initial_states;
  bool dt_softplus;
  bool D_per_channel;  // dD is (nheads, headdim); else (nheads), a sum over headdim
  double dt_min, dt_max;
  DType dtype;  // T
  View<4> x, z;
  View<3> dt;
  View<1> A;
  View<4> B, C;
  View<2> D;
  View<1> dt_bias;
  View<4> initial_states;
  const uint8_t* marks;
  View<1> cu_seqlens;
  View<4> out;           // forward only
  View<4> final_states;  // forward only
  // Backward only. Null where a gradient does not exist.
  View<4> dout;
  View<4> dfinal_states;  // optional; dtype of final_states
  View<4> dx, dz;
  View<3> ddt;
  View<1> dA;
  View<4> dB, dC;
  View<2> dD;  // stride 0 over headdim when not D_per_channel: written once per head
  View<1> ddt_bias;
  View<4> dinitial_states;  // of num_initial_states
};

// CPU: number of independent work items of a call; the kernels themselves are in cpu.h. The
// backward has two phases: scan items that leave partial sums in the workspace, then reduce items
// that add these up in a fixed order.
int64_t ssd_chunk_scan_fwd_items(const SsdChunkScanParams& p);
int64_t ssd_chunk_scan_bwd_items(const SsdChunkScanParams& p);
int64_t ssd_chunk_scan_bwd_reduce_items(const SsdChunkScanParams& p);
size_t ssd_chunk_scan_bwd_cpu_workspace(const SsdChunkScanParams& p);

// CUDA: launch on `stream` of the current device. Workspaces hold states between chunks or
// segments of a sequence, and partial sums of gradients, which are added up in a fixed order.
size_t ssd_chunk_scan_fwd_cuda_workspace(const SsdChunkScanParams& p);
CudaStatus ssd_chunk_scan_fwd_cuda(const SsdChunkScanParams& p, void* workspace, CudaStream stream);
size_t ssd_chunk_scan_bwd_cuda_workspace(const SsdChunkScanParams& p);
CudaStatus ssd_chunk_scan_bwd_cuda(const SsdChunkScanParams& p, void* workspace, CudaStream stream);

}  // namespace mamba_ssm::kernels
