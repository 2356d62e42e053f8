// Causal depthwise convolution.
//
//   a[b,c,t]   = bias[c] + sum_{k<width} weight[c,k] * x[b,c,t-(width-1)+k]
//   out[b,c,t] = a or silu(a) = a * sigmoid(a)
//
// where x at -(width-1) <= t < 0 is initial_states[b,c,t+width-1], or 0 without initial_states.
// Sums run in float32 (float64 for float64), from the bias, taps in order; one rounding at the end.
//
// Packed rows (seq_idx): the tap at s contributes to t only if seq_idx[b,s] == seq_idx[b,t]; the
// columns of initial_states carry the id of the row's first token that is not padding. Tokens with
// seq_idx < 0 are padding: out is 0 there and they contribute to nothing. Each id names one run.
// final_states of a row continue its last real token: its last width-1 inputs, 0 for columns of
// another id.
//
//   tensor          shape                    dtype
//   x, out          (batch, dim, seqlen)     T: float32, float16, bfloat16, float64
//   weight          (dim, width)             float32, float16, bfloat16 (float64 with T = float64)
//   bias            (dim)                    as weight, chosen on its own; optional
//   seq_idx         (batch, seqlen)          int32 or int64; optional
//   initial_states  (batch, dim, width-1)    T; optional
//   final_states    (batch, dim, width-1)    T
//   gradients       as their tensors; dbias, dinitial_states null when not wanted
//
// All strides are arbitrary and independent of one another (gradients may be expanded).
// Source: Mamba (arXiv 2312.00752), section 3.4, figure 3.
#pragma once

#include <cstddef>

#include "types.h"

namespace mamba_ssm::kernels {

struct CausalConv1dParams {
  int64_t batch, dim, seqlen, width;
  bool silu;
  DType dtype;  // T
  View<3> x;
  View<2> weight;
  View<1> bias;
  View<2> seq_idx;
  View<3> initial_states;
  View<3> out;           // forward only
  View<3> final_states;  // forward only
  // Backward only.
  View<3> dout;
  View<3> dfinal_states;  // optional
  View<3> dx;
  View<2> dweight;
  View<1> dbias;            // optional
  View<3> dinitial_states;  // optional
};

/// One decode call: `seqlen` new tokens of each of `batch` rows against a cache of past inputs.
///
/// conv_state[slot] holds the last state_len >= width-1 inputs of a row, oldest first, and is
/// updated in place: afterwards it holds the last state_len columns of [old state, x]. With
/// cache_seqlens the columns are a ring: the next token is written at column
/// cache_seqlens[b] mod state_len (mathematical modulo).
///
///   x, out              (batch, dim, seqlen)            T
///   conv_state          (num_slots, dim, state_len)     T, updated in place through any stride
///   cache_seqlens       (batch)                         int32 or int64; optional
///   conv_state_indices  (batch)                         int32 or int64; optional: slot of each
///   row;
///                       without it row b uses slot b. Out of [0, num_slots): out row is 0, no
///                       state is touched.
struct CausalConv1dUpdateParams {
  int64_t batch, dim, seqlen, width, state_len, num_slots;
  bool silu;
  DType dtype;  // T
  View<3> x;
  View<3> conv_state;
  View<2> weight;
  View<1> bias;
  View<1> cache_seqlens;
  View<1> conv_state_indices;
  View<3> out;
};

/// The last state_len tokens of each packed sequence, right-aligned, zeros to the left of a shorter
/// one: states[i,c,state_len-j] = x[cu_seqlens[i+1]-j, c].
///
///   x           (total_tokens, dim)              T
///   cu_seqlens  (num_sequences + 1)              int32 or int64, clamped to [0, total_tokens]
///   states      (num_sequences, dim, state_len)  T
struct CausalConv1dVarlenStatesParams {
  int64_t total_tokens, dim, num_sequences, state_len;
  DType dtype;  // T
  View<2> x;
  View<1> cu_seqlens;
  View<3> states;
};

// CPU: number of independent work items of a call; the kernels themselves are in cpu.h.
int64_t causal_conv1d_fwd_items(const CausalConv1dParams& p);
int64_t causal_conv1d_bwd_items(const CausalConv1dParams& p);
int64_t causal_conv1d_update_items(const CausalConv1dUpdateParams& p);
int64_t causal_conv1d_varlen_states_items(const CausalConv1dVarlenStatesParams& p);

// CUDA: launch on `stream` of the current device. The workspace holds per-strip partial sums of
// dweight and dbias, so that they are summed in a fixed order, without atomics.
CudaStatus causal_conv1d_fwd_cuda(const CausalConv1dParams& p, CudaStream stream);
size_t causal_conv1d_bwd_cuda_workspace(const CausalConv1dParams& p);
CudaStatus causal_conv1d_bwd_cuda(const CausalConv1dParams& p, void* workspace, CudaStream stream);
CudaStatus causal_conv1d_update_cuda(const CausalConv1dUpdateParams& p, CudaStream stream);
CudaStatus causal_conv1d_varlen_states_cuda(const CausalConv1dVarlenStatesParams& p,
                                            CudaStream stream);

}  // namespace mamba_ssm::kernels
