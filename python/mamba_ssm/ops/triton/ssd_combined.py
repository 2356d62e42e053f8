"""SSD chunk scan, the recurrence of Mamba-2, and the fused body of its block (arXiv 2405.21060)."""

import torch
import torch.nn.functional as F

from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton._chunks import chunked, clamp_steps, compute_dtype, sequence_ids
from mamba_ssm.ops.triton.layernorm_gated import rms_norm_ref, rmsnorm_fn  # noqa: F401

# Not all used here: programs also take the parts from this module.
from mamba_ssm.ops.triton.ssd_bmm import _bmm_chunk_bwd, _bmm_chunk_fwd  # noqa: F401
from mamba_ssm.ops.triton.ssd_chunk_scan import (  # noqa: F401
    _chunk_scan_bwd_dC,
    _chunk_scan_bwd_dcb,
    _chunk_scan_bwd_ddAcs_prev,
    _chunk_scan_bwd_ddAcs_stable,
    _chunk_scan_bwd_dstates,
    _chunk_scan_bwd_dx,
    _chunk_scan_bwd_dz,
    _chunk_scan_chunk_state_bwd_dx,
    _chunk_scan_fwd,
    chunk_scan,
    chunk_scan_ref,
)
from mamba_ssm.ops.triton.ssd_chunk_state import (  # noqa: F401
    _chunk_cumsum_bwd,
    _chunk_cumsum_fwd,
    _chunk_state_bwd_db,
    _chunk_state_bwd_ddAcs_stable,
    _chunk_state_bwd_dx,
    _chunk_state_fwd,
    chunk_state,
    chunk_state_ref,
    chunk_state_varlen,
)
from mamba_ssm.ops.triton.ssd_state_passing import (  # noqa: F401
    _state_passing_bwd,
    _state_passing_fwd,
    state_passing,
    state_passing_ref,
)

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
        # Each sequence starts anew, whatever seq_idx says before it.
        seq_idx = sequence_ids(cu_seqlens, x.shape[1], seq_idx)
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
        d = clamp_steps(F.softplus(d) if dt_softplus else d, dt_limit).to(x.dtype)
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


def ensure_stride(inp):
    """inp itself: the operations take any strides."""
    return inp


def _silu(activation):
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'activation must be None, "silu" or "swish", got {activation!r}')
    return activation is not None


def _headdim(D, headdim):
    if D.dim() == 2:
        return D.shape[1]
    if headdim is None:
        raise ValueError("headdim is needed where D is (nheads,)")
    return headdim


def mamba_conv1d_scan_ref(
    xBC,
    conv1d_weight,
    conv1d_bias,
    dt,
    A,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    activation="silu",
    headdim=None,
    ngroups=1,
):
    """The convolution and the scan of a Mamba-2 block, composed of ssd_selective_scan.

    Arguments:
        xBC: (batch, seqlen, dim + 2 * ngroups * dstate), with dim = nheads * headdim.
        conv1d_weight: (dim + 2 * ngroups * dstate, width); conv1d_bias: one for each row, or None.
        dt: (batch, seqlen, nheads) or (batch, seqlen, nheads, headdim); A: (nheads,).
        D: (nheads,), (nheads, headdim) or None; headdim may be None where D or dt has it.
        z: (batch, seqlen, dim) or None.
        activation: None, "silu" or "swish".

    Returns (batch, seqlen, dim).
    """
    nheads = A.shape[0]
    if headdim is None and dt.dim() == 4:
        headdim = dt.shape[3]
    if headdim is None or (D is not None and D.dim() == 2):
        if D is None:
            raise ValueError("headdim is needed where neither D nor dt has it")
        headdim = _headdim(D, headdim)
    dim = nheads * headdim
    xBC, _ = ops.causal_conv1d(xBC.mT, conv1d_weight, conv1d_bias, silu=_silu(activation))
    matrix = (xBC.shape[1] - dim) // 2
    x, B, C = xBC.mT.split([dim, matrix, matrix], dim=-1)
    out = ssd_selective_scan(
        x.unflatten(2, (nheads, headdim)),
        dt.to(x.dtype),
        A,
        B.unflatten(2, (ngroups, -1)),
        C.unflatten(2, (ngroups, -1)),
        D,
        None if z is None else z.unflatten(2, (nheads, headdim)),
        dt_bias,
        dt_softplus,
        dt_limit,
    )
    return out.flatten(2)


def mamba_split_conv1d_scan_combined(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    initial_states=None,
    seq_idx=None,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-6,
    outproj_weight=None,
    outproj_bias=None,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,
    state_dtype=None,
    *,
    cu_seqlens=None,
):
    """Everything between in_proj and the end of a Mamba-2 block (arXiv 2405.21060, section 7).

    Splits zxbcdt into z0, x0, z, xBC and dt, convolves xBC, splits it into x, B and C, scans, gates
    with z, puts silu(z0) * x0 in front, and projects out. One autograd node.

    Arguments, with dim = nheads * headdim:
        zxbcdt: (batch, seqlen, 2 * d_nonssm + 2 * dim + 2 * ngroups * dstate + nheads), where
            d_nonssm is what is left over.
        conv1d_weight: (dim + 2 * ngroups * dstate, width); conv1d_bias: one for each row, or None.
        dt_bias, A: (nheads,); dt goes through softplus and is clamped to dt_limit.
        D: (nheads, headdim), or (nheads,) with headdim.
        chunk_size: at least 1; has no influence on the result, nor has state_dtype.
        initial_states, seq_idx, cu_seqlens: as in mamba_chunk_scan_combined. Packed sequences are
            apart in the convolution too, which starts from 0.
        activation: of the convolution, None, "silu" or "swish".
        rmsnorm_weight: (dim,) normalizes y over groups of dim / ngroups channels, before its gate
            with norm_before_gate, else after; without it y is only gated.
        outproj_weight: (d_model, d_nonssm + dim); outproj_bias: (d_model,) or None.

    Returns out (batch, seqlen, d_model), without outproj_weight (batch, seqlen, d_nonssm + dim), or
    (out, final_states) when return_final_states, as mamba_chunk_scan_combined. Under autocast the
    projection runs in the autocast dtype. Raises RuntimeError, naming the argument, on wrong
    arguments, and ValueError for a wrong chunk_size or activation, or without a headdim.
    """
    _check_chunk_size(chunk_size)
    out, states = ops.mamba2_inner(
        zxbcdt,
        conv1d_weight,
        conv1d_bias,
        A,
        _headdim(D, headdim),
        ngroups,
        D,
        dt_bias,
        rmsnorm_weight,
        outproj_weight,
        outproj_bias,
        initial_states,
        seq_idx,
        cu_seqlens,
        silu=_silu(activation),
        norm_eps=1e-6 if rmsnorm_eps is None else rmsnorm_eps,
        norm_before_gate=bool(norm_before_gate),
        dt_min=float(dt_limit[0]),
        dt_max=float(dt_limit[1]),
    )
    if not return_final_states:
        return out
    return out, states if cu_seqlens is None else _state_of_row(states, cu_seqlens)


class MambaSplitConv1dScanCombinedFn:
    """Former autograd function of the block; the op now carries its own derivative."""

    apply = staticmethod(mamba_split_conv1d_scan_combined)


def mamba_split_conv1d_scan_ref(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    dt_limit=(0.0, float("inf")),
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-6,
    outproj_weight=None,
    outproj_bias=None,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,
):
    """mamba_split_conv1d_scan_combined composed of its parts, without states and packed rows."""
    nheads, headdim = A.shape[0], _headdim(D, headdim)
    dim, channels = nheads * headdim, conv1d_weight.shape[0]
    d_nonssm = (zxbcdt.shape[-1] - dim - channels - nheads) // 2
    z0, x0, z, xBC, dt = zxbcdt.split([d_nonssm, d_nonssm, dim, channels, nheads], dim=-1)
    y = mamba_conv1d_scan_ref(
        xBC,
        conv1d_weight,
        conv1d_bias,
        dt,
        A,
        chunk_size,
        D,
        None if rmsnorm_weight is not None else z,
        dt_bias,
        True,
        dt_limit,
        activation,
        headdim,
        ngroups,
    )
    if rmsnorm_weight is not None:
        y = rms_norm_ref(
            y,
            rmsnorm_weight,
            None,
            z,
            1e-6 if rmsnorm_eps is None else rmsnorm_eps,
            dim // ngroups,
            norm_before_gate,
        )
    if d_nonssm > 0:
        y = torch.cat([F.silu(z0) * x0, y], dim=-1)
    return y if outproj_weight is None else F.linear(y, outproj_weight, outproj_bias)
