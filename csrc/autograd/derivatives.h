// The ops that only autograd calls, as C++ functions. Arguments are those of the forward op, behind
// the incoming gradients; results are the gradients of its tensor arguments, in order, and absent
// where an optional argument is. Functions that end in _out write their results into tensors of any
// strides that the caller made, their last arguments.
#pragma once

#include <tuple>

#include "dispatch.h"

namespace mamba_ssm {

void causal_conv1d_out(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& seq_idx, const OptionalTensor& initial_states,
                       bool silu, const Tensor& out, const Tensor& final_states);

std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor> causal_conv1d_bwd(
    const Tensor& dout, const OptionalTensor& dfinal_states, const Tensor& x, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& seq_idx, const OptionalTensor& initial_states,
    bool silu);

void causal_conv1d_bwd_out(const Tensor& dout, const OptionalTensor& dfinal_states, const Tensor& x,
                           const Tensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& seq_idx, const OptionalTensor& initial_states,
                           bool silu, const Tensor& dx, const Tensor& dweight,
                           const OptionalTensor& dbias, const OptionalTensor& dinitial_states);

/// selective_scan that also returns the state before every chunk, for selective_scan_bwd.
std::tuple<Tensor, Tensor, Tensor> selective_scan_fwd(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
    const OptionalTensor& initial_state, const OptionalTensor& seq_idx, bool delta_softplus);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor,
           OptionalTensor>
selective_scan_bwd(const Tensor& dout, const OptionalTensor& dlast_state, const Tensor& states,
                   const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                   const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                   const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
                   const OptionalTensor& seq_idx, bool delta_softplus);

void selective_scan_bwd_out(const Tensor& dout, const OptionalTensor& dlast_state,
                            const Tensor& states, const Tensor& u, const Tensor& delta,
                            const Tensor& A, const Tensor& B, const Tensor& C,
                            const OptionalTensor& D, const OptionalTensor& z,
                            const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
                            const OptionalTensor& seq_idx, bool delta_softplus, const Tensor& du,
                            const Tensor& ddelta, const Tensor& dA, const Tensor& dB,
                            const Tensor& dC, const OptionalTensor& dD, const OptionalTensor& dz,
                            const OptionalTensor& ddelta_bias,
                            const OptionalTensor& dinitial_state);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor,
           OptionalTensor>
ssd_chunk_scan_bwd(const Tensor& dout, const OptionalTensor& dfinal_states, const Tensor& x,
                   const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                   const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                   const OptionalTensor& initial_states, const OptionalTensor& seq_idx,
                   const OptionalTensor& cu_seqlens, bool dt_softplus, double dt_min,
                   std::optional<double> dt_max);

void ssd_chunk_scan_bwd_out(const Tensor& dout, const OptionalTensor& dfinal_states,
                            const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                            const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                            const OptionalTensor& dt_bias, const OptionalTensor& initial_states,
                            const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens,
                            bool dt_softplus, double dt_min, std::optional<double> dt_max,
                            const Tensor& dx, const Tensor& ddt, const Tensor& dA, const Tensor& dB,
                            const Tensor& dC, const OptionalTensor& dD, const OptionalTensor& dz,
                            const OptionalTensor& ddt_bias, const OptionalTensor& dinitial_states);

std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor> rms_norm_gated_bwd(
    const Tensor& dout, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& z, double eps, std::optional<int64_t> group_size, bool norm_before_gate,
    bool is_rms_norm);

void rms_norm_gated_bwd_out(const Tensor& dout, const Tensor& x, const Tensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& z, double eps,
                            std::optional<int64_t> group_size, bool norm_before_gate,
                            bool is_rms_norm, const Tensor& dx, const Tensor& dweight,
                            const OptionalTensor& dbias, const OptionalTensor& dz);

/// `sum` is residual_out, or x where nothing was added to it. Returns the gradients of x, weight,
/// bias, residual, x1, weight1, bias1; those of residual and x1 are absent where they equal that of
/// x.
std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,
           OptionalTensor>
layer_norm_bwd(const Tensor& dout, const OptionalTensor& dout1, const OptionalTensor& dresidual_out,
               const Tensor& sum, const Tensor& weight, const OptionalTensor& bias,
               const OptionalTensor& weight1, const OptionalTensor& bias1,
               const OptionalTensor& rowscale, const OptionalTensor& dropout_mask,
               const OptionalTensor& dropout_mask1, double eps, double dropout_p, bool is_rms_norm,
               bool has_residual, bool has_x1);

}  // namespace mamba_ssm
