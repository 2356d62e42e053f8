"""SSD chunk scan, the recurrence of Mamba-2 (arXiv 2405.21060)."""

import torch
import torch.nn.functional as F

from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton._chunks import chunked, compute_dtype
from mamba_ssm.ops.triton.ssd_chunk_scan import chunk_scan
from mamba_ssm.ops.triton.ssd_chunk_state import _chunk_cumsum_fwd, _chunk_state_fwd
from mamba_ssm.ops.triton.ssd_state_passing import _state_passing_fwd

ops = torch.ops.mamba_ssm


def _check_chunk_size(chunk_size):
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def _state_of_row(final_states, cu_seqlens):
    """(1, ...): the final state of the last sequence with tokens, found without a host sync."""
    if final_states.shape[0] == 0:
        return final_states.new_zeros(1, *final_states.shape[1:])
    number = torch.arange(final_states.shape[0], device=final_states.device)
    last = torch.where(cu_seqlens[1:] > cu_seqlens[:-1], number, 0).amax()
    return final_states.index_select(0, last[None])


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
    state_dtype=None,
):
    """SSD chunk scan (arXiv 2405.21060, sections 6 and 7).

        d_t = dt_t + dt_bias, through softplus when dt_softplus, then clamped to dt_limit
        h_t = exp(d_t A) h_{t-1} + d_t x_t B_t^T
        y_t = h_t C_t + D x_t
        out = y, or y * silu(z) with z

    Arguments:
        x, z: (batch, seqlen, nheads, headdim), one floating dtype.
        dt: (batch, seqlen, nheads), x's dtype or float32.
        A, dt_bias: (nheads,).
        B, C: (batch, seqlen, ngroups, dstate), x's dtype; ngroups divides nheads.
        chunk_size: at least 1; has no influence on the result.
        D: (nheads,) or (nheads, headdim).
        initial_states: (batch, nheads, headdim, dstate), x's dtype or float32; zero when None. With
            cu_seqlens one for each sequence, or one for the first.
        seq_idx: (batch, seqlen) int32 or int64, packs several sequences into a row: the state is
            reset where the id changes; ids < 0 are padding, with output 0.
        cu_seqlens: (num_sequences + 1,) int32 or int64, where the sequences of the only row start
            and end: from 0 to seqlen. Needs no seq_idx.
        state_dtype: dtype of varlen_states, C's when None. States are kept in float32 in any case.

    Returns:
        out (batch, seqlen, nheads, headdim) in x's dtype; with return_final_states also
        final_states (batch, nheads, headdim, dstate), float32 (float64 for float64), that fit to
        continue each row; with return_varlen_states also varlen_states (num_sequences, nheads,
        headdim, dstate), the final state of each sequence of cu_seqlens.

    Runs on CPU and CUDA, with any strides and sizes, and is differentiable in every floating
    argument through all results. Raises RuntimeError, naming the argument, on wrong arguments, and
    ValueError for a chunk_size below 1 or return_varlen_states without cu_seqlens.
    """
    _check_chunk_size(chunk_size)
    if return_varlen_states and cu_seqlens is None:
        raise ValueError("return_varlen_states needs cu_seqlens")
    out, states = ops.ssd_chunk_scan(
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        initial_states,
        seq_idx,
        cu_seqlens,
        dt_softplus=bool(dt_softplus),
        dt_min=float(dt_limit[0]),
        dt_max=float(dt_limit[1]),
    )
    results = [out]
    if return_final_states:
        results.append(states if cu_seqlens is None else _state_of_row(states, cu_seqlens))
    if return_varlen_states:
        results.append(states.to(state_dtype or C.dtype))
    return tuple(results) if len(results) > 1 else out


class MambaChunkScanCombinedFn:
    """Former autograd function of the scan; the op now carries its own derivative."""

    apply = staticmethod(mamba_chunk_scan_combined)


def _mamba_chunk_scan_combined_fwd(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    state_dtype=None,
):
    """mamba_chunk_scan_combined with what happens inside, in chunks of chunk_size.

    Returns (out, out_x, d, c, states, final_states[, varlen_states]): out_x is the output before
    the gate (None without z); d and c are those of ssd_chunk_state, with d = 0 in padding; states
    (batch, nchunks, nheads, headdim, dstate), in state_dtype or C's dtype, are those that flow into
    each chunk; varlen_states come with cu_seqlens.
    """
    options = {"dt_softplus": dt_softplus, "dt_limit": dt_limit}
    arguments = (dt_bias, initial_states, seq_idx, cu_seqlens)
    out, final_states, *varlen_states = mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D,
        z,
        *arguments,
        return_final_states=True,
        return_varlen_states=cu_seqlens is not None,
        state_dtype=state_dtype,
        **options,
    )
    out_x = None
    if z is not None:
        out_x = mamba_chunk_scan_combined(
            x, dt, A, B, C, chunk_size, D, None, *arguments, **options
        )

    if cu_seqlens is not None:
        token = torch.arange(x.shape[1], device=x.device)
        number = torch.searchsorted(cu_seqlens[1:].to(token.dtype), token, right=True)[None]
        # Numbers of sequences stand for ids: each starts anew, whatever seq_idx says before it.
        if seq_idx is None:
            seq_idx = number
        else:
            span = seq_idx.amax() + 1
            seq_idx = torch.where(seq_idx < 0, seq_idx, number * span + seq_idx)
    c, d = _chunk_cumsum_fwd(dt, A, chunk_size, dt_bias, **options)
    if seq_idx is not None:
        d = torch.where(chunked(seq_idx, chunk_size)[:, None] >= 0, d, 0)
        c = (d * A.to(d.dtype)[:, None, None]).cumsum(dim=-1)
    added = _chunk_state_fwd(B, x, d, c, seq_idx)
    first = None if initial_states is None else initial_states[: x.shape[0]].flatten(2)
    states, _ = _state_passing_fwd(
        added.flatten(3), c[..., -1], first, seq_idx, chunk_size, state_dtype or C.dtype
    )
    states = states.unflatten(3, added.shape[3:])
    return (out, out_x, d, c, states, final_states, *varlen_states)


def _mamba_chunk_scan_combined_bwd(
    dout,
    x,
    dt,
    A,
    B,
    C,
    out,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    dfinal_states=None,
    seq_idx=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    dx=None,
    ddt=None,
    dB=None,
    dC=None,
    dz=None,
    recompute_output=False,
    state_dtype=None,
):
    """Derivative of mamba_chunk_scan_combined.

    out is the output before the gate; it is read only to recompute the one after. state_dtype is
    not read. dx, ddt, dB, dC, dz may be tensors to fill. Returns (dx, ddt, dA, dB, dC, dD, dz,
    ddt_bias, dinitial_states), None where an argument is, then the gated output if
    recompute_output.
    """
    _check_chunk_size(chunk_size)
    gradients = ops.ssd_chunk_scan_bwd(
        dout,
        dfinal_states,
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        initial_states,
        seq_idx,
        dt_softplus=bool(dt_softplus),
        dt_min=float(dt_limit[0]),
        dt_max=float(dt_limit[1]),
    )
    buffers = (dx, ddt, None, dB, dC, None, dz, None, None)
    gradients = tuple(
        gradient if buffer is None else buffer.copy_(gradient)
        for gradient, buffer in zip(gradients, buffers)
    )
    if not recompute_output:
        return gradients
    dtype = compute_dtype(out)
    gated = out if z is None else (out.to(dtype) * F.silu(z.to(dtype))).to(out.dtype)
    return (*gradients, gated)


def mamba_chunk_scan(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False):
    """mamba_chunk_scan_combined in plain PyTorch, in float32 (float64 for float64).

    Composed of its parts, in chunks of chunk_size; seqlen need not be a multiple. Returns out.
    """
    _check_chunk_size(chunk_size)
    c, d = _chunk_cumsum_fwd(dt, A, chunk_size, dt_bias, dt_softplus)
    added = _chunk_state_fwd(B, x, d, c)
    states, _ = _state_passing_fwd(added.flatten(3), c[..., -1])
    return chunk_scan(B, C, x, d, c, states.unflatten(3, added.shape[3:]), D, z)


ssd_chunk_scan_combined_ref = mamba_chunk_scan


def ssd_selective_scan(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
):
    """mamba_chunk_scan_combined as a selective scan over nheads * headdim channels.

    dt may also be (batch, seqlen, nheads, headdim), dt_bias (nheads, headdim) and A (nheads *
    headdim, dstate); the other arguments, and out, are as there. Steps that do not go through a
    plain softplus are rounded to x's dtype.
    """
    nheads, headdim = x.shape[2:]
    dtype = compute_dtype(x)

    def channels(M, axis=0):  # nheads, headdim from `axis` on, or only nheads: as one axis
        M = M if M.dim() == axis + 2 else M[..., None].expand(*M.shape, headdim)
        return M.flatten(axis)

    d, bias = channels(dt, 2), None if dt_bias is None else channels(dt_bias)
    # Behind softplus nothing is negative: the default limits change nothing.
    if not dt_softplus or tuple(dt_limit) != (0.0, float("inf")) or d.dtype != x.dtype:
        d = d.to(dtype) if bias is None else d.to(dtype) + bias.to(dtype)
        d = (F.softplus(d) if dt_softplus else d).clamp(*dt_limit).to(x.dtype)
        bias, dt_softplus = None, False
    out = selective_scan_fn(
        x.flatten(2).mT,
        d.mT,
        channels(A)[:, None].expand(-1, B.shape[-1]) if A.dim() == 1 else A,
        B.permute(0, 2, 3, 1),
        C.permute(0, 2, 3, 1),
        None if D is None else channels(D),
        None if z is None else z.flatten(2).mT,
        bias,
        dt_softplus,
    )
    return out.mT.unflatten(2, (nheads, headdim))
