"""Forward, backward and update as functions without autograd, in their positional order."""

import torch

import mamba_ssm  # noqa: F401  registers the ops

LIBRARY_NAME = "mamba_ssm"  # namespace of the ops below torch.ops

ops = torch.ops.mamba_ssm


def causal_conv1d_fwd_function(
    x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation
):
    """Convolution of x; fills final_states_out unless it is None. Returns out."""
    out, final_states = ops.causal_conv1d(
        x, weight, bias, seq_idx, initial_states, silu=bool(silu_activation)
    )
    if final_states_out is not None:
        final_states_out.copy_(final_states)
    return out


def causal_conv1d_bwd_function(
    x,
    weight,
    bias,
    dout,
    seq_idx,
    initial_states,
    dfinal_states,
    dx,
    return_dinitial_states,
    silu_activation,
):
    """Derivative of the convolution. dx may be a tensor to fill.

    Returns (dx, dweight, dbias, dinitial_states); dbias is None without bias, dinitial_states
    unless return_dinitial_states.
    """
    dx_new, dweight, dbias, dinitial_states = ops.causal_conv1d_bwd(
        dout,
        dfinal_states,
        x,
        weight,
        bias,
        seq_idx,
        initial_states,
        silu=bool(silu_activation),
    )
    dx = dx_new if dx is None else dx.copy_(dx_new)
    return dx, dweight, dbias, dinitial_states if return_dinitial_states else None


def causal_conv1d_update_function(
    x, conv_state, weight, bias, silu_activation, cache_seqlens, conv_state_indices
):
    """Decode step; updates conv_state in place. Returns out, like x."""
    return ops.causal_conv1d_update(
        x,
        conv_state,
        weight,
        bias,
        cache_seqlens,
        conv_state_indices,
        silu=bool(silu_activation),
    )
