"""States of the chunks of an SSD scan, in plain PyTorch (arXiv 2405.21060, section 6).

Parts for tools and experiments, differentiable by autograd; `ssd_combined` is the fast path.
Everything is computed in float32 (float64 for float64). With c the sum of d A from the start of a
chunk, d the step after bias, softplus and limits, tensors per chunk are (batch, nheads, nchunks,
chunk_size); behind the last token d is 0.

seq_idx (batch, seqlen) packs sequences into rows. Padding (ids < 0) contributes nothing; it also
leaves the state as it is where d is 0 there.

Functions named _bwd are derivatives; ddA is a gradient for d A, ddA_cumsum one for its sums c.
"""

import torch
import torch.nn.functional as F

from mamba_ssm.ops.triton._chunks import (
    chunked,
    clamp_steps,
    compute_dtype,
    per_head,
    sequence_of,
    sequences_at_chunk_ends,
    sum_from_each_on,
    vjp,
)


def _chunk_cumsum_fwd(
    dt, A, chunk_size, dt_bias=None, dt_softplus=False, dt_limit=(0.0, float("inf"))
):
    """d and its sum along each chunk, from dt (batch, seqlen, nheads) and A (nheads,).

    Returns (c, d), each (batch, nheads, nchunks, chunk_size).
    """
    d = _steps(dt, dt_bias, chunk_size, dt_softplus, dt_limit)
    return (d * A.to(d.dtype)[:, None, None]).cumsum(dim=-1), d


def _steps(dt, dt_bias, chunk_size, dt_softplus, dt_limit):
    dtype = compute_dtype(dt)
    d = dt.to(dtype)
    if dt_bias is not None:
        d = d + dt_bias.to(dtype)
    if dt_softplus:
        d = F.softplus(d)
    return chunked(clamp_steps(d, dt_limit), chunk_size).permute(0, 3, 1, 2)


def _chunk_cumsum_bwd(
    ddA,
    ddt_out,
    dt,
    A,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    ddt=None,
):
    """Derivative of d and d A, from ddA and ddt_out, gradients of both, like d.

    ddt is a tensor to write to. Returns (ddt like dt, dA (nheads,), ddt_bias (nheads,) or None),
    the last two in float32 (float64 for float64).
    """
    bias = torch.zeros_like(A) if dt_bias is None else dt_bias

    def results(dt, A, bias):
        d = _steps(dt, bias, ddA.shape[-1], dt_softplus, dt_limit)
        return d * A[:, None, None], d

    cotangents = (ddA.double(), ddt_out.double())
    gradient, dA, ddt_bias = vjp(results, (dt, A, bias), cotangents)
    dtype = compute_dtype(dt)
    ddt = gradient.to(dt.dtype) if ddt is None else ddt.copy_(gradient)
    return ddt, dA.to(dtype), None if dt_bias is None else ddt_bias.to(dtype)


def _chunk_state_fwd(B, x, dt, dA_cumsum, seq_idx=None, states=None, states_in_fp32=True):
    """What each chunk adds to the state at its end: sum_k exp(c_end - c_k) d_k x_k B_k^T.

    Arguments:
        B: (batch, seqlen, ngroups, dstate); x: (batch, seqlen, nheads, headdim).
        dt, dA_cumsum: d and c.
        seq_idx: only tokens of the sequence that the chunk ends in are added up.
        states: tensor to write to.

    Returns (batch, nchunks, nheads, headdim, dstate), float32 or, unless states_in_fp32, as B.
    """
    dtype = compute_dtype(x)
    chunk_size = dt.shape[-1]
    c = dA_cumsum.to(dtype)
    weight = torch.exp(c[..., -1:] - c) * dt.to(dtype)
    if seq_idx is not None:
        last = sequences_at_chunk_ends(seq_idx, chunk_size)[:, 1:, None]
        counts = (chunked(sequence_of(seq_idx), chunk_size) == last) & (
            chunked(seq_idx, chunk_size) >= 0
        )
        weight = torch.where(counts[:, None], weight, 0)
    result = torch.einsum(
        "bhcl,bclhp,bclhn->bchpn",
        weight,
        chunked(x.to(dtype), chunk_size),
        chunked(per_head(B.to(dtype), x.shape[2]), chunk_size),
    )
    if states is not None:
        return states.copy_(result)
    return result if states_in_fp32 else result.to(B.dtype)


def chunk_state(B, x, dt, dA_cumsum, states_in_fp32=True):
    """_chunk_state_fwd without packed sequences."""
    return _chunk_state_fwd(B, x, dt, dA_cumsum, states_in_fp32=states_in_fp32)


chunk_state_ref = chunk_state


class ChunkStateFn:
    """Former autograd function of chunk_state; autograd differentiates it now."""

    apply = staticmethod(chunk_state)


def _chunk_state_gradients(B, x, dt, dA_cumsum, dstates, seq_idx=None):
    """Gradients of B, x, dt and dA_cumsum in _chunk_state_fwd, in float64."""

    def states(B, x, dt, dA_cumsum):
        return _chunk_state_fwd(B, x, dt, dA_cumsum, seq_idx)

    return vjp(states, (B, x, dt, dA_cumsum), dstates)


def _chunk_state_bwd_dx(B, x, dt, dA_cumsum, dstates, dx=None):
    """Derivative of chunk_state in x (into dx if given), dt and dA_cumsum:
    (dx, ddt, ddA_cumsum), each like its argument."""
    _, gradient, ddt, ddA_cumsum = _chunk_state_gradients(B, x, dt, dA_cumsum, dstates)
    dx = gradient.to(x.dtype) if dx is None else dx.copy_(gradient)
    return dx, ddt.to(dt.dtype), ddA_cumsum.to(dA_cumsum.dtype)


def _chunk_state_bwd_db(x, dt, dA_cumsum, dstates, seq_idx=None, B=None, ngroups=1):
    """Derivative of _chunk_state_fwd in B, (batch, seqlen, ngroups, dstate), in float32 (float64
    for float64), which does not depend on B. With B, of ngroups groups, (dB, ddA)."""
    shape = (*x.shape[:2], ngroups, dstates.shape[-1])
    dB, _, _, ddA_cumsum = _chunk_state_gradients(
        x.new_zeros(shape) if B is None else B, x, dt, dA_cumsum, dstates, seq_idx
    )
    dB = dB.to(compute_dtype(x))
    return dB if B is None else (dB, sum_from_each_on(ddA_cumsum).to(dA_cumsum.dtype))


def _chunk_state_bwd_ddAcs_stable(B, x, dt, dA_cumsum, dstates, seq_idx=None):
    """ddA of _chunk_state_fwd, like dA_cumsum."""
    *_, ddA_cumsum = _chunk_state_gradients(B, x, dt, dA_cumsum, dstates, seq_idx)
    return sum_from_each_on(ddA_cumsum).to(dA_cumsum.dtype)


def chunk_state_varlen(B, x, dt, dA_cumsum, cu_seqlens, chunk_states):
    """The state at the end of every packed sequence, of one row.

    Arguments:
        B: (total_tokens, ngroups, dstate); x: (total_tokens, nheads, headdim).
        dt, dA_cumsum: (nheads, nchunks, chunk_size).
        cu_seqlens: (num_sequences + 1,), where each sequence starts and ends.
        chunk_states: (nchunks, nheads, headdim, dstate), the state that enters each chunk; the
            first one, an initial state, belongs to the sequence that starts at token 0.

    Returns (num_sequences, nheads, headdim, dstate) in the dtype of chunk_states; 0 for an empty
    sequence.
    """
    dtype = compute_dtype(x)
    chunk_size = dt.shape[-1]
    start, end = (offsets.to(torch.int64) for offsets in (cu_seqlens[:-1], cu_seqlens[1:]))
    filled = end > start
    last = (end - 1).clamp(min=0)  # an empty sequence at the start has no token before its end
    chunk = last // chunk_size
    first = chunk * chunk_size  # token of the chunk in which the sequence ends
    token = first[:, None] + torch.arange(chunk_size, device=x.device)
    counts = (token >= start[:, None]) & (token < end[:, None])
    token = token.clamp(max=x.shape[0] - 1)

    c = dA_cumsum.to(dtype)[:, chunk]  # (nheads, num_sequences, chunk_size)
    c_end = c.gather(-1, (last - first).expand(c.shape[0], -1)[..., None])
    weight = torch.where(counts, c_end - c, -torch.inf).exp() * dt.to(dtype)[:, chunk]
    states = torch.einsum(
        "hrl,rlhp,rlhn->rhpn",
        weight,
        x.to(dtype)[token],
        per_head(B.to(dtype), x.shape[1])[token],
    )
    enters = filled & ((start < first) | (start == 0))
    decay = torch.where(enters, torch.exp(c_end[..., 0]), 0).mT  # (num_sequences, nheads)
    states = states + decay[..., None, None] * chunk_states.to(dtype)[chunk]
    return states.to(chunk_states.dtype)
