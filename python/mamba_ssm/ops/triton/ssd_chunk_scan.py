"""Outputs of the chunks of an SSD scan, in plain PyTorch (see ssd_chunk_state)."""

import torch
import torch.nn.functional as F

from mamba_ssm.ops.triton._chunks import (
    chunked,
    compute_dtype,
    per_head,
    sequence_of,
    sequences_at_chunk_ends,
)
from mamba_ssm.ops.triton.ssd_bmm import _bmm_chunk_fwd


def _chunk_scan_fwd(cb, x, dt, dA_cumsum, C, states, D=None, z=None, seq_idx=None):
    """y_i = sum_{j <= i} cb_ij exp(c_i - c_j) d_j x_j + exp(c_i) h C_i + D x_i in each chunk.

    Arguments:
        cb: (batch, nchunks, ngroups, chunk_size, chunk_size), the products C_i . B_j, 0 across
            sequences.
        x, z: (batch, seqlen, nheads, headdim).
        dt, dA_cumsum: d and c, (batch, nheads, nchunks, chunk_size).
        C: (batch, seqlen, ngroups, dstate).
        states: (batch, nchunks, nheads, headdim, dstate), h, which enters each chunk.
        D: (nheads,) or (nheads, headdim).
        seq_idx: (batch, seqlen); h reaches only its own sequence; padding gives 0.

    Returns (out, out_x), both like x: y, or y silu(z) with z; and y with z, else None.
    """
    dtype = compute_dtype(x)
    seqlen, nheads = x.shape[1:3]
    chunk_size = dt.shape[-1]
    c = dA_cumsum.to(dtype).transpose(1, 2)  # (batch, nchunks, nheads, chunk_size)
    later = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).triu(1)
    decay = (c[..., :, None] - c[..., None, :]).masked_fill(later, -torch.inf).exp()
    scores = cb.to(dtype).repeat_interleave(nheads // cb.shape[2], dim=2) * decay
    scores = scores * dt.to(dtype).transpose(1, 2)[..., None, :]
    y = torch.einsum("bchij,bcjhp->bcihp", scores, chunked(x.to(dtype), chunk_size))

    from_start = c.exp().transpose(2, 3)  # (batch, nchunks, chunk_size, nheads)
    if seq_idx is not None:
        before = sequences_at_chunk_ends(seq_idx, chunk_size)[:, :-1, None]
        reached = chunked(sequence_of(seq_idx), chunk_size) == before
        from_start = torch.where(reached[..., None], from_start, 0)
    C = chunked(per_head(C.to(dtype), nheads), chunk_size)
    y = y + from_start[..., None] * torch.einsum("bchpn,bcihn->bcihp", states.to(dtype), C)

    y = y.flatten(1, 2)[:, :seqlen]
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]).to(dtype) * x.to(dtype)
    if seq_idx is not None:
        y = torch.where((seq_idx >= 0)[..., None, None], y, 0)
    if z is None:
        return y.to(x.dtype), None
    return (y * F.silu(z.to(dtype))).to(x.dtype), y.to(x.dtype)


def chunk_scan(B, C, x, dt, dA_cumsum, prev_states, D=None, z=None):
    """_chunk_scan_fwd from B and C, without packed sequences. Returns out."""
    cb = _bmm_chunk_fwd(C, B, dt.shape[-1], output_dtype=compute_dtype(x))
    return _chunk_scan_fwd(cb, x, dt, dA_cumsum, C, prev_states, D, z)[0]


chunk_scan_ref = chunk_scan
