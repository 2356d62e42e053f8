// One decode step of a selective state space, Mamba-1 (nheads = ngroups = 1) and Mamba-2.
//
//   d = dt + dt_bias;  with dt_softplus: d = log1p(exp(d)) where d <= 20
//   s = exp(d A) s + d B x;   out = sum_n C s (+ D x);   out *= silu(z) with z
//
// in float32 (float64 for float64); s is rounded to its own type after out was formed.
//
//   tensor               shape                                  dtype
//   state                (num_slots, nheads, headdim, dstate)   float32, float16, bfloat16, float64;
//                                                               updated in place through any stride
//   x, z, out            (batch, nheads, headdim)               T: as state, on its own
//   dt                   (batch, nheads, headdim)               T or float32
//   A                    (nheads, headdim, dstate)              float32, float16, bfloat16 (float64)
//   B, C                 (batch, ngroups, dstate)               T; head h reads group
//                                                               h / (nheads / ngroups)
//   D, dt_bias           (nheads, headdim)                      as A, each on its own; optional
//   state_batch_indices  (batch)                                int32 or int64; optional: slot of
//                        each row; without it row b uses slot b. Out of [0, num_slots): out row is
//                        0, no state is touched.
//
// Strides are arbitrary; stride 0 over headdim (and dstate for A) in A, dt and dt_bias means one
// decay per head, computed once.
// Source: Mamba (arXiv 2312.00752), section 3.3.2; Mamba-2 (arXiv 2405.21060), section 2.
#pragma once

#include "types.h"

namespace mamba_ssm::kernels {

struct SelectiveStateUpdateParams {
  int64_t batch, nheads, headdim, ngroups, dstate, num_slots;
  bool dt_softplus;
  DType dtype;  // T
  View<4> state;
  View<3> x, dt, z;
  View<3> A;
  View<3> B, C;
  View<2> D, dt_bias;
  View<1> state_batch_indices;
  View<3> out;
};

int64_t selective_state_update_items(const SelectiveStateUpdateParams& p);  // CPU work items
CudaStatus selective_state_update_cuda(const SelectiveStateUpdateParams& p, CudaStream stream);

}  // namespace mamba_ssm::kernels
