/// @file
/// The operations as C++ functions. Each calls the torch op of its name (torch.ops.mamba_ssm in
/// Python), so it works on CPU, CUDA and meta tensors, under autograd and under tracing.
///
/// Common rules. T is one floating type for all activations of a call: float32, float16, bfloat16
/// or float64; parameters (A, D, biases, weights) may each be float32, float16 or bfloat16, or
/// float64 with T = float64. Sums run in float32 (float64). Tensors may have any strides; empty
/// tensors give empty results. All tensors of a call are on one device. Wrong arguments raise an
/// error that names op, argument, expected and actual value, before anything is written. Results
/// are the same bits run to run.
///
/// seq_idx (batch, seqlen), int32 or int64, packs several sequences into a row: each id names one
/// run of tokens; nothing crosses from one id to the next; ids < 0 are padding, with output 0 and
/// no effect on states or gradients. Initial states belong to the first sequence of a row, final
/// states continue its last one.
#pragma once

#include <ATen/core/Tensor.h>
#include <mamba_ssm/export.h>

#include <optional>
#include <tuple>

namespace mamba_ssm {

/// Causal depthwise convolution:
///   out[b,c,t] = act(bias[c] + sum_k weight[c,k] x[b,c,t-(width-1)+k])
///
/// Shapes: x (batch, dim, seqlen); weight (dim, width), any width >= 1; bias (dim); initial_states
/// (batch, dim, width-1): the inputs before the first token, 0 when absent. `silu` applies
/// a * sigmoid(a). Returns out, of x's dtype, shape and (when x is dense) layout, and final_states
/// (batch, dim, width-1): what a next call takes as initial_states. Differentiable in x, weight,
/// bias, initial_states, through both results.
/// Source: Mamba (arXiv 2312.00752), section 3.4.
MAMBA_SSM_API std::tuple<at::Tensor, at::Tensor> causal_conv1d(
    const at::Tensor& x, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias = std::nullopt,
    const std::optional<at::Tensor>& seq_idx = std::nullopt,
    const std::optional<at::Tensor>& initial_states = std::nullopt, bool silu = false);

/// Decode step of causal_conv1d: x (batch, dim) or (batch, dim, seqlen) are new tokens, conv_state
/// (num_slots, dim, state_len >= width-1) holds past inputs, oldest first, and is updated in place.
///
/// With cache_seqlens (batch), int32 or int64, conv_state is a ring whose next column is
/// cache_seqlens[b] mod state_len. With conv_state_indices (batch) row b uses that slot; a negative
/// index is padding: its output is 0 and no state changes. An index >= num_slots raises on CPU and
/// is padding on CUDA. Returns out, like x. Not differentiable.
MAMBA_SSM_API at::Tensor causal_conv1d_update(
    const at::Tensor& x, const at::Tensor& conv_state, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias = std::nullopt,
    const std::optional<at::Tensor>& cache_seqlens = std::nullopt,
    const std::optional<at::Tensor>& conv_state_indices = std::nullopt, bool silu = false);

/// The last state_len tokens of every packed sequence, zeros to the left of a shorter one.
///
/// x (total_tokens, dim); cu_seqlens (num_sequences + 1), int32 or int64, non-decreasing from 0 to
/// total_tokens (checked on CPU, clamped on CUDA). Returns (num_sequences, dim, state_len).
MAMBA_SSM_API at::Tensor causal_conv1d_varlen_states(const at::Tensor& x,
                                                     const at::Tensor& cu_seqlens,
                                                     int64_t state_len);

/// Selective scan: h_t = exp(d_t A) h_{t-1} + d_t B_t u_t, y_t = C_t h_t + D u_t, out = y silu(z),
/// with d = delta + delta_bias, through softplus when delta_softplus.
///
/// Shapes: u, delta, z (batch, dim, seqlen); A (dim, dstate), real or complex; B, C (batch, dstate,
/// seqlen) or (batch, groups, dstate, seqlen) per time, or (dim, dstate) constant; D, delta_bias
/// (dim); initial_state (batch, dim, dstate), T or float32. With complex A, y is twice the real
/// part, constant B and C are complex, and B, C per time have 2 * seqlen columns, real and
/// imaginary part side by side. Returns out, of u's dtype and shape, and last_state (batch, dim,
/// dstate), float32 (float64, or complex with A). Differentiable in every floating argument,
/// through both results.
/// Source: Mamba (arXiv 2312.00752), algorithm 2.
MAMBA_SSM_API std::tuple<at::Tensor, at::Tensor> selective_scan(
    const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, const at::Tensor& B,
    const at::Tensor& C, const std::optional<at::Tensor>& D = std::nullopt,
    const std::optional<at::Tensor>& z = std::nullopt,
    const std::optional<at::Tensor>& delta_bias = std::nullopt,
    const std::optional<at::Tensor>& initial_state = std::nullopt,
    const std::optional<at::Tensor>& seq_idx = std::nullopt, bool delta_softplus = false);

/// Decode: one token for each row, or several in order. For each, s = exp(d A) s + d B x,
/// out = C s + D x, out *= silu(z), d = dt + dt_bias, through softplus when dt_softplus. `state` is
/// updated in place, to that after the last token.
///
/// Shapes without heads: state (num_slots, dim, dstate); x, dt, z (batch, [tokens,] dim); A (dim,
/// dstate); B, C (batch, [tokens,] dstate); D, dt_bias (dim). With heads: state (num_slots, nheads,
/// headdim, dstate); x, dt, z (batch, [tokens,] nheads, headdim); A (nheads, headdim, dstate); B, C
/// (batch, [tokens,] ngroups, dstate); D, dt_bias (nheads, headdim). The rank of x says whether
/// there is an axis of tokens. state may have any floating dtype, dt that of x or float32.
/// state_batch_indices (batch), int32 or int64, names the slot of each row, as conv_state_indices
/// does in causal_conv1d_update. With A_is_log, A is given as log(-A), as models keep it. Returns
/// out, like x. Not differentiable.
///
/// intermediate_states (batch, [tokens,] [nheads,] headdim, dstate), of any floating dtype that
/// state may have, receives the state after each token, so that a caller who rejects the last
/// tokens goes on from an earlier one; rows of padding in it are left as they are. The state is
/// float32 (float64) from token to token: several tokens equal calls of one token each, bit for bit
/// where state itself is float32 (float64), while one of 16 bits is rounded once, not after each
/// token.
/// Source: Mamba (arXiv 2312.00752), section 3.3.2.
MAMBA_SSM_API at::Tensor selective_state_update(
    const at::Tensor& state, const at::Tensor& x, const at::Tensor& dt, const at::Tensor& A,
    const at::Tensor& B, const at::Tensor& C, const std::optional<at::Tensor>& D = std::nullopt,
    const std::optional<at::Tensor>& z = std::nullopt,
    const std::optional<at::Tensor>& dt_bias = std::nullopt,
    const std::optional<at::Tensor>& state_batch_indices = std::nullopt, bool dt_softplus = false,
    const std::optional<at::Tensor>& intermediate_states = std::nullopt, bool A_is_log = false);

/// SSD chunk scan, the recurrence of Mamba-2: h_t = exp(d_t A) h_{t-1} + d_t x_t B_t^T,
/// y_t = h_t C_t + D x_t, out = y silu(z), with one decay per head and d = dt + dt_bias, through
/// softplus when dt_softplus, then clamped to [dt_min, dt_max] (no upper limit without dt_max);
/// d has no gradient where it was clamped. Chunks are an internal matter: the states between them
/// are float32 (float64).
///
/// Shapes: x, z (batch, seqlen, nheads, headdim); dt (batch, seqlen, nheads), T or float32; A
/// (nheads); B, C (batch, seqlen, ngroups, dstate), where ngroups divides nheads; D (nheads) or
/// (nheads, headdim); dt_bias (nheads); initial_states (num_sequences, nheads, headdim, dstate), T
/// or float32. The sequences are the rows of the batch or, with cu_seqlens, those that it
/// describes: (num_sequences + 1), int32 or int64, non-decreasing from 0 to seqlen (checked on CPU,
/// clamped on CUDA), with batch 1. Each of them has an initial state (a single one belongs to the
/// first) and a final state; that of an empty one is its initial state. cu_seqlens isolates
/// sequences by itself; seq_idx may be given as well and divides them further. Returns out,
/// contiguous, of x's dtype and shape, and final_states (num_sequences, nheads, headdim, dstate),
/// float32 (float64). Differentiable in every floating argument, through both results. A NaN or an
/// infinity never leaves its row and head (group, in B and C), and reaches back over one chunk at
/// most.
/// Source: Mamba-2 (arXiv 2405.21060), sections 6 and 7.
MAMBA_SSM_API std::tuple<at::Tensor, at::Tensor> ssd_chunk_scan(
    const at::Tensor& x, const at::Tensor& dt, const at::Tensor& A, const at::Tensor& B,
    const at::Tensor& C, const std::optional<at::Tensor>& D = std::nullopt,
    const std::optional<at::Tensor>& z = std::nullopt,
    const std::optional<at::Tensor>& dt_bias = std::nullopt,
    const std::optional<at::Tensor>& initial_states = std::nullopt,
    const std::optional<at::Tensor>& seq_idx = std::nullopt,
    const std::optional<at::Tensor>& cu_seqlens = std::nullopt, bool dt_softplus = false,
    double dt_min = 0.0, std::optional<double> dt_max = std::nullopt);

/// Gated normalization over groups of channels: out = norm(x) silu(z) with norm_before_gate, else
/// norm(x silu(z)); norm(s) = (s - mean) / sqrt(var + eps) weight + bias, with mean 0 for
/// is_rms_norm.
///
/// Shapes: x, z (..., channels), one type T; weight, bias (channels). The statistics are those of
/// each run of group_size channels (which divides channels; all of them when absent), the variance
/// is that of the run itself (divided by group_size). Without z it is a plain norm. Returns out,
/// contiguous, of x's dtype and shape. Differentiable in x, weight, bias, z.
/// Source: RMSNorm (arXiv 1910.07467); Mamba-2 (arXiv 2405.21060), section 7.1.
MAMBA_SSM_API at::Tensor rms_norm_gated(const at::Tensor& x, const at::Tensor& weight,
                                        const std::optional<at::Tensor>& bias = std::nullopt,
                                        const std::optional<at::Tensor>& z = std::nullopt,
                                        double eps = 1e-6,
                                        std::optional<int64_t> group_size = std::nullopt,
                                        bool norm_before_gate = true, bool is_rms_norm = true);

/// Residual addition and normalization of its sum: sum = dropout(rowscale x) + dropout1(x1) +
/// residual, out = norm(sum; weight, bias), out1 = norm(sum; weight1, bias1), norm as in
/// rms_norm_gated over all channels. The absent arguments take no part.
///
/// Shapes: x, x1 (..., channels), one type T; residual of that shape, T or float32; weight, bias,
/// weight1, bias1 (channels); rowscale (...), not with x1; dropout_mask, dropout_mask1 bool of x's
/// shape: what is true is kept and divided by 1 - dropout_p. Returns out; out1 with weight1; and
/// with prenorm residual_out, which is the sum in the type of residual, or without one in float32
/// if residual_in_fp32, else in T. residual_out is absent where it would be x. out is formed from
/// the sum before that is rounded; the gradients start from it as rounded. Results are contiguous.
/// Differentiable in x, weight, bias, residual, x1, weight1, bias1, through all results.
/// Source: LayerNorm (arXiv 1607.06450), RMSNorm (arXiv 1910.07467).
MAMBA_SSM_API std::tuple<at::Tensor, std::optional<at::Tensor>, std::optional<at::Tensor>>
layer_norm(const at::Tensor& x, const at::Tensor& weight,
           const std::optional<at::Tensor>& bias = std::nullopt,
           const std::optional<at::Tensor>& residual = std::nullopt,
           const std::optional<at::Tensor>& x1 = std::nullopt,
           const std::optional<at::Tensor>& weight1 = std::nullopt,
           const std::optional<at::Tensor>& bias1 = std::nullopt,
           const std::optional<at::Tensor>& rowscale = std::nullopt,
           const std::optional<at::Tensor>& dropout_mask = std::nullopt,
           const std::optional<at::Tensor>& dropout_mask1 = std::nullopt, double eps = 1e-6,
           double dropout_p = 0.0, bool prenorm = false, bool residual_in_fp32 = false,
           bool is_rms_norm = false);

/// Product of a decode step, with the normalization before it:
///   n = g / sqrt(mean(g^2) + eps) norm_weight   g = x, or x silu(z) with z
///   out[r,o] = sum_i n[r,i] weight[o,i] + bias[o]
/// Absent arguments take no part; without norm_weight n = x, and there is no z.
///
/// Shapes: x, z (rows, in_features); weight (out_features >= 1, in_features), of type T;
/// norm_weight (in_features); bias (out_features). Returns out (rows, out_features). n is not
/// rounded. Made for a few rows, where the time is that of reading the weight: up to four, or 64 of
/// a 16-bit type without a norm on CUDA devices of compute capability 9.0. A row's result does not
/// depend on the other rows, but on CUDA the order of its sum on how many there are. Not
/// differentiable.
/// Source: RMSNorm (arXiv 1910.07467); Mamba-2 (arXiv 2405.21060), section 7.1.
MAMBA_SSM_API at::Tensor decode_linear(const at::Tensor& x, const at::Tensor& weight,
                                       const std::optional<at::Tensor>& bias = std::nullopt,
                                       const std::optional<at::Tensor>& z = std::nullopt,
                                       const std::optional<at::Tensor>& norm_weight = std::nullopt,
                                       double eps = 1e-6);

/// decode_linear of a residual stream: residual_out = x + residual, and that in the place of x.
///
/// residual (rows, in_features), T or float32; without one residual_out = x. residual_out has the
/// type of residual, or without one float32 if residual_in_fp32, else T; out is formed from it
/// before it is rounded. Returns out and residual_out. Not differentiable.
MAMBA_SSM_API std::tuple<at::Tensor, at::Tensor> decode_linear_prenorm(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& residual, const at::Tensor& norm_weight, double eps = 1e-6,
    bool residual_in_fp32 = false);

/// decode_linear for x (..., in_features), by whatever is fastest: decode_linear itself for a few
/// rows on CUDA when nothing is recorded for a gradient, else rms_norm_gated and torch's product,
/// which round n. Differentiable.
MAMBA_SSM_API at::Tensor step_linear(const at::Tensor& x, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias = std::nullopt,
                                     const std::optional<at::Tensor>& z = std::nullopt,
                                     const std::optional<at::Tensor>& norm_weight = std::nullopt,
                                     double eps = 1e-6);

/// decode_linear_prenorm likewise, with layer_norm.
MAMBA_SSM_API std::tuple<at::Tensor, at::Tensor> step_linear_prenorm(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& residual, const at::Tensor& norm_weight, double eps = 1e-6,
    bool residual_in_fp32 = false);

/// Everything between in_proj and the end of a Mamba block: split xz in x and z, convolve and SiLU
/// x, project it to delta, B, C, scan with gate z, project out. One autograd node that keeps
/// neither the convolved x nor delta: the backward computes them again.
///
/// Shapes: xz (batch, 2 * dim, seqlen); conv1d_weight (dim, 1, width); conv1d_bias (dim);
/// x_proj_weight (dt_rank + 2 * dstate, dim), without the rows of a B or C that is given (complex
/// A: 2 real rows per state, real part first); delta_proj_weight (dim, dt_rank); out_proj_weight
/// (d_model, dim); out_proj_bias (d_model); A (dim, dstate); B, C as in selective_scan, computed
/// from x when absent; D, delta_bias (dim); B_proj_bias, C_proj_bias (rows of B, C); b_rms_weight,
/// c_rms_weight (rows of B, C) and dt_rms_weight (dim) normalise B, C over their rows and delta
/// over dim. Returns (batch, seqlen, d_model). checkpoint_lvl 0 keeps the convolved x and delta
/// instead. Under autocast the projection weights are cast to the autocast dtype.
/// Source: Mamba (arXiv 2312.00752), section 3.4.
MAMBA_SSM_API at::Tensor mamba_inner(
    const at::Tensor& xz, const at::Tensor& conv1d_weight,
    const std::optional<at::Tensor>& conv1d_bias, const at::Tensor& x_proj_weight,
    const at::Tensor& delta_proj_weight, const at::Tensor& out_proj_weight,
    const std::optional<at::Tensor>& out_proj_bias, const at::Tensor& A,
    const std::optional<at::Tensor>& B = std::nullopt,
    const std::optional<at::Tensor>& C = std::nullopt,
    const std::optional<at::Tensor>& D = std::nullopt,
    const std::optional<at::Tensor>& delta_bias = std::nullopt,
    const std::optional<at::Tensor>& B_proj_bias = std::nullopt,
    const std::optional<at::Tensor>& C_proj_bias = std::nullopt,
    const std::optional<at::Tensor>& b_rms_weight = std::nullopt,
    const std::optional<at::Tensor>& c_rms_weight = std::nullopt,
    const std::optional<at::Tensor>& dt_rms_weight = std::nullopt, bool delta_softplus = true,
    int64_t checkpoint_lvl = 1, double b_c_dt_rms_eps = 1e-6);

/// Everything between in_proj and the end of a Mamba-2 block: split zxbcdt in z0, x0, z, xBC and
/// dt, convolve xBC and split it in x, B, C, scan, gate with z, put silu(z0) x0 in front, project
/// out.
///
///   y   = ssd_chunk_scan(x, dt, A, B, C, D, dt_bias), dt through softplus and limits
///   y   = rms_norm_gated(y, norm_weight, z) over groups of dim / ngroups channels, or y silu(z)
///         without norm_weight
///   out = [silu(z0) x0, y] out_proj_weight^T + out_proj_bias
///
/// One autograd node that keeps zxbcdt and y before its norm: the backward computes the convolution
/// and the norm again.
///
/// Shapes, with dim = nheads * headdim: zxbcdt (batch, seqlen, 2 * d_nonssm + 2 * dim + 2 * ngroups
/// * dstate + nheads), in the order above, where d_nonssm is what is left over; conv1d_weight (dim
/// + 2
/// * ngroups * dstate, width) and conv1d_bias, with `silu` behind them; A, dt_bias (nheads); D
/// (nheads) or (nheads, headdim); norm_weight (dim); out_proj_weight (d_model, d_nonssm + dim), of
/// the type that the projection runs in; out_proj_bias (d_model); initial_states, seq_idx,
/// cu_seqlens as in ssd_chunk_scan. The packed sequences are apart in the convolution too, which
/// starts from 0. Returns out (batch, seqlen, d_model), without out_proj_weight (batch, seqlen,
/// d_nonssm + dim), and final_states (num_sequences, nheads, headdim, dstate), float32 (float64).
/// Differentiable in every floating argument, through both results. Under autocast the projection
/// runs in the autocast dtype.
/// Source: Mamba-2 (arXiv 2405.21060), section 7.
MAMBA_SSM_API std::tuple<at::Tensor, at::Tensor> mamba2_inner(
    const at::Tensor& zxbcdt, const at::Tensor& conv1d_weight,
    const std::optional<at::Tensor>& conv1d_bias, const at::Tensor& A, int64_t headdim,
    int64_t ngroups = 1, const std::optional<at::Tensor>& D = std::nullopt,
    const std::optional<at::Tensor>& dt_bias = std::nullopt,
    const std::optional<at::Tensor>& norm_weight = std::nullopt,
    const std::optional<at::Tensor>& out_proj_weight = std::nullopt,
    const std::optional<at::Tensor>& out_proj_bias = std::nullopt,
    const std::optional<at::Tensor>& initial_states = std::nullopt,
    const std::optional<at::Tensor>& seq_idx = std::nullopt,
    const std::optional<at::Tensor>& cu_seqlens = std::nullopt, bool silu = true,
    double norm_eps = 1e-6, bool norm_before_gate = true, double dt_min = 0.0,
    std::optional<double> dt_max = std::nullopt);

/// seq_idx of the sequences that cu_seqlens (num_sequences + 1) describes: (1, seqlen), int64. With
/// `seq_idx` its ids divide them further, and its padding stays padding. Not an op of its own: made
/// of torch's, on the device of cu_seqlens, which is not read.
MAMBA_SSM_API at::Tensor sequence_ids(const at::Tensor& cu_seqlens, const c10::SymInt& seqlen,
                                      const std::optional<at::Tensor>& seq_idx = std::nullopt);

}  // namespace mamba_ssm
