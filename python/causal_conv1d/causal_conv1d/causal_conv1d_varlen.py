"""Decode states of packed sequences."""

import torch

import mamba_ssm  # noqa: F401  registers the ops


def causal_conv1d_varlen_states(x, cu_seqlens, state_len):
    """The last state_len tokens of every packed sequence, zeros to the left of a shorter one.

    x (total_tokens, dim); cu_seqlens (num_sequences + 1,) int32 or int64, the bounds of the
    sequences. Returns (num_sequences, dim, state_len) in x's dtype. Has no derivative.
    """
    return torch.ops.mamba_ssm.causal_conv1d_varlen_states(x, cu_seqlens, state_len)


def causal_conv1d_varlen_states_ref(x, cu_seqlens, state_len):
    """causal_conv1d_varlen_states in plain PyTorch."""
    bounds = cu_seqlens.tolist()
    states = x.new_zeros(len(bounds) - 1, x.shape[1], state_len)
    for state, start, end in zip(states, bounds, bounds[1:]):
        count = min(state_len, end - start)
        state[:, state_len - count :] = x[end - count : end].t()
    return states
