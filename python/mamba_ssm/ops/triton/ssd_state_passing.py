"""The recurrence from chunk to chunk of an SSD scan, in plain PyTorch (see ssd_chunk_state)."""

import torch

from mamba_ssm.ops.triton._chunks import compute_dtype, sequences_at_chunk_ends


def _state_passing_fwd(
    states, dA_chunk_cumsum, initial_states=None, seq_idx=None, chunk_size=None, out_dtype=None
):
    """The state that enters each chunk, and the one behind the last.

    Arguments:
        states: (batch, nchunks, nheads, d), what each chunk adds to the state at its end.
        dA_chunk_cumsum: (batch, nheads, nchunks), c at the end of each chunk.
        initial_states: (batch, nheads, d), zero when None.
        seq_idx, with chunk_size: a state goes no further than its sequence; the initial one belongs
            to the first sequence of the row.

    Returns (out, final_states): (batch, nchunks, nheads, d) in out_dtype or the dtype of states,
    and (batch, nheads, d) in float32.
    """
    dtype = compute_dtype(states)
    batch, nchunks, nheads, d = states.shape
    state = states.new_zeros(batch, nheads, d, dtype=dtype)
    if initial_states is not None:
        state = initial_states.to(dtype)
    if seq_idx is not None:
        ends = sequences_at_chunk_ends(seq_idx, chunk_size)
    entering = [states.new_empty(batch, 0, nheads, d, dtype=dtype)]
    for chunk in range(nchunks):
        entering.append(state[:, None])
        state = torch.exp(dA_chunk_cumsum[:, :, chunk].to(dtype))[..., None] * state
        if seq_idx is not None:
            same = ends[:, chunk] == ends[:, chunk + 1]
            state = torch.where(same[:, None, None], state, 0)
        state = state + states[:, chunk]
    return torch.cat(entering, dim=1).to(out_dtype or states.dtype), state


def state_passing(states, dA_chunk_cumsum, initial_states=None):
    """_state_passing_fwd without packed sequences."""
    return _state_passing_fwd(states, dA_chunk_cumsum, initial_states)


state_passing_ref = state_passing


class StatePassingFn:
    """Former autograd function of state_passing; autograd differentiates it now."""

    apply = staticmethod(state_passing)


def _state_passing_bwd(
    states,
    dA_chunk_cumsum,
    dout,
    dfinal_states=None,
    seq_idx=None,
    has_initial_states=None,
    dstates_dtype=None,
    states_dtype=None,
    chunk_size=None,
):
    """Derivative of _state_passing_fwd.

    Arguments:
        states: what it returned as out, the state that enters each chunk.
        dout, dfinal_states: gradients of its results; the second may be None, for 0.
        has_initial_states: whether their gradient is wanted.
        dstates_dtype: dtype of the first result, that of states when None.

    Returns (dstates, ddA_chunk_cumsum, dinitial_states or None), then states in states_dtype if
    that is given; dinitial_states has the dtype of the first.
    """
    dtype = compute_dtype(states)
    ends = None if seq_idx is None else sequences_at_chunk_ends(seq_idx, chunk_size)
    gradient = torch.zeros_like(states[:, 0], dtype=dtype)
    if dfinal_states is not None:
        gradient = dfinal_states.to(dtype)
    dstates, ddA = torch.empty_like(states, dtype=dstates_dtype), torch.empty_like(dA_chunk_cumsum)
    for chunk in reversed(range(states.shape[1])):
        dstates[:, chunk] = gradient
        gradient = torch.exp(dA_chunk_cumsum[:, :, chunk].to(dtype))[..., None] * gradient
        if ends is not None:
            same = ends[:, chunk] == ends[:, chunk + 1]
            gradient = torch.where(same[:, None, None], gradient, 0)
        ddA[:, :, chunk] = (gradient * states[:, chunk].to(dtype)).sum(-1)
        gradient = gradient + dout[:, chunk].to(dtype)
    dinitial_states = gradient.to(dstates.dtype) if has_initial_states else None
    results = (dstates, ddA, dinitial_states)
    return results if states_dtype is None else (*results, states.to(states_dtype))
