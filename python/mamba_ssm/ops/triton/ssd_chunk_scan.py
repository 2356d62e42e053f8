"""Outputs of the chunks of an SSD scan, in plain PyTorch (see ssd_chunk_state)."""

import torch
import torch.nn.functional as F

from mamba_ssm.ops.triton._chunks import (
    chunked,
    compute_dtype,
    per_head,
    sequence_of,
    sequences_at_chunk_ends,
    sum_from_each_on,
    vjp,
)
from mamba_ssm.ops.triton.ssd_bmm import _bmm_chunk_fwd
from mamba_ssm.ops.triton.ssd_chunk_state import _chunk_state_gradients


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
    y = _from_tokens(cb, x, dt, dA_cumsum) + _from_states(C, states, dA_cumsum, seq_idx)
    y = y.flatten(1, 2)[:, : x.shape[1]]
    if D is not None:
        y = y + _skip(D, x.to(dtype))
    if seq_idx is not None:
        y = torch.where((seq_idx >= 0)[..., None, None], y, 0)
    if z is None:
        return y.to(x.dtype), None
    return (y * F.silu(z.to(dtype))).to(x.dtype), y.to(x.dtype)


def _skip(D, x):
    """D x, D (nheads,) or (nheads, headdim)."""
    return (D if D.dim() == 2 else D[:, None]).to(x.dtype) * x


def _skip_gradient(D, x, dout):
    """Gradient of D in _skip."""
    return (dout * x).sum((0, 1) if D.dim() == 2 else (0, 1, 3)).to(D.dtype)


def _from_tokens(cb, x, dt, dA_cumsum):
    """What tokens of a chunk give to each other, (batch, nchunks, chunk_size, nheads, headdim)."""
    dtype = compute_dtype(x)
    chunk_size = dt.shape[-1]
    c = dA_cumsum.to(dtype).transpose(1, 2)  # (batch, nchunks, nheads, chunk_size)
    later = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).triu(1)
    decay = (c[..., :, None] - c[..., None, :]).masked_fill(later, -torch.inf).exp()
    scores = cb.to(dtype).repeat_interleave(x.shape[2] // cb.shape[2], dim=2) * decay
    scores = scores * dt.to(dtype).transpose(1, 2)[..., None, :]
    return torch.einsum("bchij,bcjhp->bcihp", scores, chunked(x.to(dtype), chunk_size))


def _from_states(C, states, dA_cumsum, seq_idx=None):
    """What the states that enter the chunks give to their tokens, like _from_tokens."""
    dtype = compute_dtype(C)
    chunk_size = dA_cumsum.shape[-1]
    from_start = (
        dA_cumsum.to(dtype).exp().permute(0, 2, 3, 1)
    )  # (batch, nchunks, chunk_size, nheads)
    if seq_idx is not None:
        before = sequences_at_chunk_ends(seq_idx, chunk_size)[:, :-1, None]
        reached = chunked(sequence_of(seq_idx), chunk_size) == before
        from_start = torch.where(reached[..., None], from_start, 0)
    C = chunked(per_head(C.to(dtype), states.shape[2]), chunk_size)
    return from_start[..., None] * torch.einsum("bchpn,bcihn->bcihp", states.to(dtype), C)


def chunk_scan(B, C, x, dt, dA_cumsum, prev_states, D=None, z=None):
    """_chunk_scan_fwd from B and C, without packed sequences. Returns out."""
    cb = _bmm_chunk_fwd(C, B, dt.shape[-1], output_dtype=compute_dtype(x))
    return _chunk_scan_fwd(cb, x, dt, dA_cumsum, C, prev_states, D, z)[0]


chunk_scan_ref = chunk_scan


class ChunkScanFn:
    """Former autograd function of chunk_scan; autograd differentiates it now."""

    apply = staticmethod(chunk_scan)


def _padding_without_gradient(dout, seq_idx):
    return dout if seq_idx is None else torch.where((seq_idx >= 0)[..., None, None], dout, 0)


def _token_gradients(cb, x, dt, dA_cumsum, dout):
    """Gradients of cb, x, dt and dA_cumsum in _from_tokens, in float64."""
    return vjp(_from_tokens, (cb, x, dt, dA_cumsum), chunked(dout, dt.shape[-1]))


def _state_gradients(C, states, dA_cumsum, dout, seq_idx):
    """Gradients of C, states and dA_cumsum in _from_states, in float64."""

    def out(C, states, dA_cumsum):
        return _from_states(C, states, dA_cumsum, seq_idx)

    dout = chunked(_padding_without_gradient(dout, seq_idx), dA_cumsum.shape[-1])
    dC, dstates, ddA_cumsum = vjp(out, (C, states, dA_cumsum), dout)
    return dC, dstates, ddA_cumsum


def _chunk_scan_bwd_dz(
    x, z, out, dout, chunk_size, has_ddAcs=True, D=None, dz=None, recompute_output=False
):
    """Derivative of the gate, and what follows from the output before it.

    Arguments:
        out: y, the output before the gate; dout: gradient of the one after, like x.
        D: (nheads,) or (nheads, headdim) or None.
        dz: tensor to write to.

    Returns (dz, dout_x, dD), the gradients of z, y and D (None without), then with has_ddAcs
    ddA_cumsum (batch, nheads, nchunks, chunk_size), the part of that gradient that each token has
    as a reader, and with recompute_output the output behind the gate.
    """
    wide_x, gate, y, dout = (M.double() for M in (x, z, out, dout))
    sigmoid = gate.sigmoid()
    gradient = dout * y * sigmoid * (1 + gate * (1 - sigmoid))
    dz = gradient.to(z.dtype) if dz is None else dz.copy_(gradient)
    dy = dout * gate * sigmoid
    results = [dz, dy.to(x.dtype), None if D is None else _skip_gradient(D, wide_x, dy)]
    if has_ddAcs:
        of_scan = y if D is None else y - _skip(D, wide_x)
        ddA_cumsum = chunked((dy * of_scan).sum(-1), chunk_size).permute(0, 3, 1, 2)
        results.append(ddA_cumsum.to(compute_dtype(x)))
    if recompute_output:
        results.append((y * gate * sigmoid).to(out.dtype))
    return tuple(results)


def _chunk_scan_bwd_dstates(C, dA_cumsum, dout, seq_idx=None, dtype=None):
    """Gradient (batch, nchunks, nheads, headdim, dstate) of the states that enter the chunks, in
    `dtype` or C's. It does not depend on them."""
    shape = (C.shape[0], dA_cumsum.shape[2], *dout.shape[2:], C.shape[-1])
    _, dstates, _ = _state_gradients(C, C.new_zeros(shape), dA_cumsum, dout, seq_idx)
    return dstates.to(dtype or C.dtype)


def _chunk_scan_bwd_dC(prev_states, dA_cumsum, dout, seq_idx=None, C=None, ngroups=1):
    """Gradient (batch, seqlen, ngroups, dstate) of C beside the states that enter the chunks, in
    float32 (float64 for float64). It does not depend on C; with C, of ngroups groups, (dC,
    ddA_cumsum), both of that part of the output."""
    shape = (*dout.shape[:2], ngroups, prev_states.shape[-1])
    dC, _, ddA_cumsum = _state_gradients(
        dout.new_zeros(shape) if C is None else C, prev_states, dA_cumsum, dout, seq_idx
    )
    dC = dC.to(compute_dtype(dout))
    return dC if C is None else (dC, ddA_cumsum.to(dA_cumsum.dtype))


def _chunk_scan_bwd_ddAcs_prev(prev_states, C, dout, dA_cumsum, seq_idx=None):
    """ddA_cumsum of what the states that enter the chunks give."""
    *_, ddA_cumsum = _state_gradients(C, prev_states, dA_cumsum, dout, seq_idx)
    return ddA_cumsum.to(dA_cumsum.dtype)


def _chunk_scan_bwd_dcb(x, dt, dA_cumsum, dout, seq_idx=None, CB=None, ngroups=1):
    """Gradient of cb, (batch, nchunks, ngroups, chunk_size, chunk_size), in float32 (float64 for
    float64), 0 across sequences. With CB, which is cb, (dcb, ddA) of what tokens of a chunk give
    to each other."""
    chunk_size = dt.shape[-1]
    shape = (x.shape[0], dt.shape[2], ngroups, chunk_size, chunk_size)
    dout = _padding_without_gradient(dout, seq_idx)
    dcb, _, _, ddA_cumsum = _token_gradients(
        x.new_zeros(shape) if CB is None else CB, x, dt, dA_cumsum, dout
    )
    if seq_idx is not None:
        ids = chunked(seq_idx, chunk_size)
        same = (ids[..., :, None] == ids[..., None, :]) & (ids >= 0)[..., None]
        dcb = torch.where(same[:, :, None], dcb, 0)
    dcb = dcb.to(compute_dtype(x))
    return dcb if CB is None else (dcb, sum_from_each_on(ddA_cumsum).to(dA_cumsum.dtype))


def _chunk_scan_bwd_dx(cb, x, dt, dA_cumsum, dout, D=None):
    """Gradients (dx, ddt), like x and dt, of what tokens of a chunk give to each other, and of D x
    with D."""
    _, dx, ddt, _ = _token_gradients(cb, x, dt, dA_cumsum, dout)
    if D is not None:
        dx = dx + _skip(D, dout.double())
    return dx.to(x.dtype), ddt.to(dt.dtype)


def _chunk_scan_bwd_ddAcs_stable(x, dt, dA_cumsum, dout, cb):
    """ddA (batch, nheads, nchunks, chunk_size) of what tokens of a chunk give to each other."""
    *_, ddA_cumsum = _token_gradients(cb, x, dt, dA_cumsum, dout)
    return sum_from_each_on(ddA_cumsum).to(dA_cumsum.dtype)


def _chunk_scan_chunk_state_bwd_dx(
    x, dt, dA_cumsum, B, CB, dout, dstates, D=None, seq_idx=None, dx=None
):
    """Gradients of x (into dx if given) and dt, of the outputs of the chunks and of their states
    together, from dout and dstates, and of D: (dx, ddt, dD or None)."""
    dout = _padding_without_gradient(dout, seq_idx)
    _, gradient, ddt, _ = _token_gradients(CB, x, dt, dA_cumsum, dout)
    _, dx_of_states, ddt_of_states, _ = _chunk_state_gradients(
        B, x, dt, dA_cumsum, dstates, seq_idx
    )
    gradient = gradient + dx_of_states
    dD = None
    if D is not None:
        gradient = gradient + _skip(D, dout.double())
        dD = _skip_gradient(D, x.double(), dout.double())
    dx = gradient.to(x.dtype) if dx is None else dx.copy_(gradient)
    return dx, (ddt + ddt_of_states).to(dt.dtype), dD
