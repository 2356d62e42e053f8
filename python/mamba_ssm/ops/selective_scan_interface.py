"""Selective scan and the fused body of a Mamba block (arXiv 2312.00752)."""

import torch
import torch.nn.functional as F

import selective_scan_cuda  # noqa: F401  programs look it up here
from mamba_ssm.ops import _composites

ops = torch.ops.mamba_ssm


def selective_scan_fn(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    *,
    initial_state=None,
    seq_idx=None,
):
    """Selective scan (arXiv 2312.00752, algorithm 2).

        d_t = delta_t + delta_bias, through softplus when delta_softplus
        h_t = exp(d_t A) h_{t-1} + d_t B_t u_t
        y_t = C_t h_t + D u_t          (complex A: twice the real part of C_t h_t)
        out = y, or y * silu(z) with z

    Arguments:
        u, delta, z: (batch, dim, seqlen), one floating dtype.
        A: (dim, dstate), real or complex.
        B, C: per time (batch, dstate, seqlen) or (batch, groups, dstate, seqlen), of u's dtype,
            or constant (dim, dstate). With complex A, B and C per time have 2 * seqlen columns,
            real and imaginary part side by side, and constant ones are complex.
        D, delta_bias: (dim,).
        initial_state: (batch, dim, dstate), the state before the first token; zero when None.
        seq_idx: (batch, seqlen) int32 or int64, packs several sequences into a row: the state is
            reset where the id changes; ids < 0 are padding, with output 0.

    Returns:
        out (batch, dim, seqlen) in u's dtype, or (out, last_state) when return_last_state, with
        last_state (batch, dim, dstate) float32 (float64 for float64, complex with complex A).

    Runs on CPU and CUDA, with any strides and sizes, and is differentiable in every floating
    argument through both results. Raises RuntimeError, naming the argument, on wrong arguments.
    """
    out, last_state = ops.selective_scan(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        initial_state,
        seq_idx,
        delta_softplus=bool(delta_softplus),
    )
    return (out, last_state) if return_last_state else out


def _check_selective_scan_cuda():
    """Upstream raises here where the scan was not compiled. It always is."""


class SelectiveScanFn:
    """Former autograd function of the scan; the op now carries its own derivative."""

    apply = staticmethod(selective_scan_fn)


def _compute_dtype(dtype):
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def _per_channel_and_time(M, A, dim):
    """B or C in any accepted form as (batch or 1, dim, dstate, seqlen or 1), in A's dtype."""
    if M.dim() == 2:
        return M.to(A.dtype)[None, :, :, None]
    if M.dim() == 3:
        M = M[:, None]  # (batch, groups, dstate, seqlen)
    if A.is_complex():
        M = torch.view_as_complex(M.to(A.real.dtype).unflatten(-1, (-1, 2)).contiguous())
    return M.to(A.dtype).repeat_interleave(dim // M.shape[1], dim=1)


def selective_scan_ref(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
):
    """selective_scan_fn as a plain PyTorch loop over time, in float32 (float64 for float64)."""
    dtype = _compute_dtype(u.dtype)
    dim, seqlen = u.shape[1:]
    A = A.to(dtype.to_complex() if A.is_complex() else dtype)
    B = _per_channel_and_time(B, A, dim).expand(-1, -1, -1, seqlen)
    C = _per_channel_and_time(C, A, dim).expand(-1, -1, -1, seqlen)
    x, d = u.to(dtype), delta.to(dtype)
    if delta_bias is not None:
        d = d + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        d = F.softplus(d)
    state = A.new_zeros(u.shape[0], dim, A.shape[1])
    ys = []
    for t in range(seqlen):
        d_t = d[:, :, t, None]
        state = torch.exp(d_t * A) * state + d_t * B[..., t] * x[:, :, t, None]
        y = (C[..., t] * state).sum(-1)
        ys.append(2 * y.real if A.is_complex() else y)
    out = torch.stack(ys, dim=-1) if ys else torch.zeros_like(x)
    if D is not None:
        out = out + D.to(dtype)[:, None] * x
    if z is not None:
        out = out * F.silu(z.to(dtype))
    out = out.to(u.dtype)
    return (out, state) if return_last_state else out


def rms_norm_forward(x, weight, bias, eps=1e-6, is_rms_norm=True):
    """Normalizes the rows of x (rows, d) in float32; LayerNorm when not is_rms_norm."""
    dtype = _compute_dtype(x.dtype)
    d = x.shape[-1:]
    bias = None if bias is None else bias.to(dtype)
    if not is_rms_norm:
        return F.layer_norm(x.to(dtype), d, weight.to(dtype), bias, eps).to(x.dtype)
    y = F.rms_norm(x.to(dtype), d, weight.to(dtype), eps)
    return (y if bias is None else y + bias).to(x.dtype)


def mamba_inner_fn(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
    checkpoint_lvl=1,
    b_rms_weight=None,
    c_rms_weight=None,
    dt_rms_weight=None,
    b_c_dt_rms_eps=1e-6,
):
    """Everything between in_proj and the end of a Mamba block (arXiv 2312.00752, section 3.4).

    Splits xz into x and z, convolves x and applies SiLU, projects it to delta, B and C, scans with
    gate z, and projects out. One autograd node.

    Arguments:
        xz: (batch, 2 * dim, seqlen).
        conv1d_weight: (dim, 1, width); conv1d_bias: (dim,) or None.
        x_proj_weight: (dt_rank + 2 * dstate, dim), without the rows of a B or C that is given.
            With complex A two rows per state, real part first.
        delta_proj_weight: (dim, dt_rank); out_proj_weight: (d_model, dim); out_proj_bias:
            (d_model,) or None.
        A: (dim, dstate); B, C: None to compute them from x, else as in selective_scan_fn.
        D, delta_bias: (dim,); B_proj_bias, C_proj_bias: added to the projected B and C.
        checkpoint_lvl: 1 recomputes the convolved x and delta in the backward, 0 keeps them.
        b_rms_weight, c_rms_weight: (dstate,) and dt_rms_weight: (dim,) normalize B and C over the
            state and delta over the channels, with epsilon b_c_dt_rms_eps.

    Returns (batch, seqlen, d_model). Under autocast the projection weights are cast to the
    autocast dtype. Raises RuntimeError, naming the argument, on wrong arguments.
    """
    return ops.mamba_inner(
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        out_proj_weight,
        out_proj_bias,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        b_rms_weight,
        c_rms_weight,
        dt_rms_weight,
        delta_softplus=bool(delta_softplus),
        checkpoint_lvl=checkpoint_lvl,
        b_c_dt_rms_eps=b_c_dt_rms_eps,
    )


class MambaInnerFn:
    """Former autograd function of mamba_inner_fn; the op now carries its own derivative."""

    apply = staticmethod(mamba_inner_fn)


def mamba_inner_ref(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
):
    """mamba_inner_fn composed of its parts, each with its own autograd node."""
    return _composites.mamba_inner(
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        out_proj_weight,
        out_proj_bias,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus=bool(delta_softplus),
    )
