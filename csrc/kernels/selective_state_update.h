// Decode steps of a selective state space, Mamba-1 (nheads = ngroups = 1) and Mamba-2: one token
// for each batch row or several in order, each from the state that the one before it left.
//
//   d = dt + dt_bias;  with dt_softplus: d = log1p(exp(d)) where d <= 20
//   s = exp(d A) s + d B x;   out = sum_n C s (+ D x);   out *= silu(z) with z
//
// in float32 (float64 for float64), in which the state stays from token to token. It is rounded to
// its own type once, after the last of them.
//
//   tensor               shape                                  dtype
//   state                (num_slots, nheads, headdim, dstate)   float32, float16, bfloat16,
//   float64;
//                                                               updated in place through any stride
//   x, z, out            (batch, tokens, nheads, headdim)       T: as state, on its own
//   dt                   (batch, tokens, nheads, headdim)       T or float32
//   A                    (nheads, headdim, dstate)              float32, float16, bfloat16
//   (float64);
//                                                               with A_is_log: log(-A), as models
//                                                               keep it
//   B, C                 (batch, tokens, ngroups, dstate)       T; head h reads group
//                                                               h / (nheads / ngroups)
//   D, dt_bias           (nheads, headdim)                      as A, each on its own; optional
//   state_batch_indices  (batch)                                int32 or int64; optional: slot of
//                        each row; without it row b uses slot b. Out of [0, num_slots): out rows
//                        are 0, nothing else is touched.
//   intermediate_states  (batch, tokens, nheads, headdim,       as state, on its own; optional,
//                        dstate)                                receives the state after each token
//
// Strides are arbitrary; stride 0 over headdim (and dstate for A) in A, dt and dt_bias means one
// decay per head, computed once.
// Source: Mamba (arXiv 2312.00752), section 3.3.2; Mamba-2 (arXiv 2405.21060), section 2.
#pragma once

#include "types.h"

namespace mamba_ssm::kernels {

struct SelectiveStateUpdateParams {
  int64_t batch, tokens, nheads, headdim, ngroups, dstate, num_slots;
  bool dt_softplus, A_is_log;
  DType dtype;  // T
  View<4> state;
  View<4> x, dt, z;
  View<3> A;
  View<4> B, C;
  View<2> D, dt_bias;
  View<1> state_batch_indices;
  View<4> out;
  View<5> intermediate_states;
};

int64_t selective_state_update_items(const SelectiveStateUpdateParams& p);  // CPU work items
CudaStatus selective_state_update_cuda(const SelectiveStateUpdateParams& p, CudaStream stream);

}  // namespace mamba_ssm::kernels
