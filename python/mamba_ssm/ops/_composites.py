"""The ops that are made of others, composed of these, each with its own autograd node.

They compute what the ops of csrc/autograd compute, and are these ops where libmamba_ssm.so is not
loaded. The backward reads what the forward keeps: nothing is computed a second time.
"""

import contextlib

import torch
import torch.nn.functional as F

from mamba_ssm.ops import _checks
from mamba_ssm.ops.triton._chunks import compute_dtype, sequence_ids

ops = torch.ops.mamba_ssm


def _is_short_prompt(tokens):
    """Whether tokens (batch, seqlen, features) may have a product by step_linear's tiles. Of what the
    first prompt of a process waits for, the start of torch's library of products is 80 ms (H200,
    2026-11-26)."""
    most_tokens = 64
    return (
        tokens.is_cuda
        and tokens.dtype in (torch.float16, torch.bfloat16)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and tokens.shape[0] * tokens.shape[1] <= most_tokens
    )


def project_channel_first(tokens, weight, bias=None):
    """weight @ token + bias for tokens (batch, seqlen, features), as (batch, rows, seqlen).

    It is stored as (rows, batch, seqlen): tokens of a channel lie side by side, as convolution and
    scan walk them, and the transpose of the result is `tokens` for the next product, uncopied. In a
    short prompt the order of tokens in memory does not matter.
    """
    batch, seqlen, _ = tokens.shape
    if _is_short_prompt(tokens):
        return torch.ops.mamba_ssm.step_linear(tokens, weight, bias).transpose(1, 2)
    columns = tokens.flatten(0, 1).t()  # (features, batch * seqlen)
    if bias is None:
        projected = torch.mm(weight, columns)
    else:
        projected = torch.addmm(bias[:, None], weight, columns)
    return projected.view(weight.shape[0], batch, seqlen).transpose(0, 1)


def mamba_inner(
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
    b_rms_weight=None,
    c_rms_weight=None,
    dt_rms_weight=None,
    *,
    delta_softplus=True,
    checkpoint_lvl=1,
    b_c_dt_rms_eps=1e-6,
):
    """mamba_ssm.ops.selective_scan_interface.mamba_inner_fn; checkpoint_lvl changes nothing."""
    _check_mamba_inner(**locals())
    xz, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias = _cast_for_autocast(
        xz, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias
    )
    with _without_autocast(xz.device):
        x, z = xz.chunk(2, dim=1)
        x, _ = ops.causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, silu=True)
        projected = project_channel_first(x.transpose(1, 2), x_proj_weight)
        dt_rank, rows = delta_proj_weight.shape[1], _rows_of_state(A)

        def normalized(rows, weight):  # over the rows, in float32
            if weight is None:
                return rows
            dtype = compute_dtype(rows)
            scale = torch.rsqrt(rows.to(dtype).square().mean(1, keepdim=True) + b_c_dt_rms_eps)
            return (rows.to(dtype) * scale * weight.to(dtype)[:, None]).to(rows.dtype)

        def per_time(first, bias, rms_weight):
            matrix = projected.narrow(1, first, rows)
            if bias is not None:
                matrix = matrix + bias.to(matrix.dtype)[:, None]
            matrix = normalized(matrix, rms_weight)
            if A.is_complex():  # rows 2n, 2n + 1 are a pair along the last axis
                matrix = matrix.unflatten(1, (-1, 2)).movedim(2, -1).flatten(-2)
            return matrix

        if B is None:
            B = per_time(dt_rank, B_proj_bias, b_rms_weight)
        if C is None:
            C = per_time(x_proj_weight.shape[0] - rows, C_proj_bias, c_rms_weight)
        delta = project_channel_first(projected[:, :dt_rank].transpose(1, 2), delta_proj_weight)
        delta = normalized(delta, dt_rms_weight)
        y, _ = ops.selective_scan(
            x, delta, A, B, C, D, z, delta_bias, delta_softplus=delta_softplus
        )
        return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def mamba2_inner(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    A,
    headdim,
    ngroups=1,
    D=None,
    dt_bias=None,
    norm_weight=None,
    out_proj_weight=None,
    out_proj_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    *,
    silu=True,
    norm_eps=1e-6,
    norm_before_gate=True,
    dt_min=0.0,
    dt_max=None,
):
    """mamba_ssm.ops.triton.ssd_combined.mamba_split_conv1d_scan_combined: (out, final_states),
    with the final states of each sequence of cu_seqlens."""
    _check_mamba2_inner(**locals())
    out_proj_weight, out_proj_bias = _cast_for_autocast(out_proj_weight, out_proj_bias)
    with _without_autocast(zxbcdt.device):
        nheads, channels = A.shape[0], conv1d_weight.shape[0]
        dim = nheads * headdim
        d_nonssm = (zxbcdt.shape[2] - dim - channels - nheads) // 2
        z0, x0, z, xBC, dt = zxbcdt.split([d_nonssm, d_nonssm, dim, channels, nheads], dim=2)
        conv_seq_idx = seq_idx
        if cu_seqlens is not None:
            conv_seq_idx = sequence_ids(cu_seqlens, zxbcdt.shape[1], seq_idx)
        xBC, _ = ops.causal_conv1d(
            xBC.transpose(1, 2), conv1d_weight, conv1d_bias, conv_seq_idx, silu=silu
        )
        matrix = (channels - dim) // 2
        x, B, C = xBC.transpose(1, 2).split([dim, matrix, matrix], dim=2)
        y, final_states = ops.ssd_chunk_scan(
            x.unflatten(2, (nheads, headdim)),
            dt,
            A,
            B.unflatten(2, (ngroups, -1)),
            C.unflatten(2, (ngroups, -1)),
            D,
            z.unflatten(2, (nheads, headdim)) if norm_weight is None else None,
            dt_bias,
            initial_states,
            seq_idx,
            cu_seqlens,
            dt_softplus=True,
            dt_min=dt_min,
            dt_max=dt_max,
        )
        y = y.flatten(2)
        if norm_weight is not None:
            y = ops.rms_norm_gated(
                y,
                norm_weight,
                None,
                z,
                eps=norm_eps,
                group_size=dim // ngroups,
                norm_before_gate=norm_before_gate,
            )
        if d_nonssm > 0:
            y = torch.cat([F.silu(z0) * x0, y], dim=2)
        if out_proj_weight is not None:
            y = F.linear(y.to(out_proj_weight.dtype), out_proj_weight, out_proj_bias)
        return y, final_states


def step_linear(x, weight, bias=None, *, z=None, norm_weight=None, eps=1e-6):
    """x weight^T + bias, of x normalized as rms_norm_gated does it behind its gate."""
    if norm_weight is not None:
        x = ops.rms_norm_gated(x, norm_weight, None, z, eps=eps, norm_before_gate=False)
    return F.linear(x, weight, bias)


def step_linear_prenorm(
    x, weight, bias=None, *, residual=None, norm_weight, eps=1e-6, residual_in_fp32=False
):
    """step_linear of x + residual, normalized, and that sum."""
    normed, _, total = ops.layer_norm(
        x,
        norm_weight,
        residual=residual,
        eps=eps,
        prenorm=True,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=True,
    )
    return F.linear(normed, weight, bias), x.clone() if total is None else total


def _rows_of_state(A):
    """Rows of x_proj_weight that B or C takes: a complex state takes two."""
    return A.shape[1] * (2 if A.is_complex() else 1)


def _autocasts(device):
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _without_autocast(device):
    """Inside, every dtype is chosen already."""
    if not _autocasts(device):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _cast_for_autocast(*tensors):
    """Under autocast, what products read is cast to its dtype."""
    device = next((t.device for t in tensors if t is not None), None)
    if device is None or not _autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return [t if t is None else t.to(dtype) for t in tensors]


def _check_mamba_inner(
    xz, conv1d_weight, x_proj_weight, delta_proj_weight, out_proj_weight, A, B, C, **others
):
    """What the parts would not see, or name otherwise. The types of arguments they check."""
    op = "mamba_inner"
    _checks.devices(op, locals() | others)

    def shape(name, tensor, **dims):
        _checks.shape(op, name, tensor, **dims)

    batch, columns, seqlen = _checks.sizes(op, "xz", xz, "batch", "2 * dim", "seqlen")
    dim, rows = columns // 2, _rows_of_state(A) if A.dim() == 2 else 0
    shape("xz", xz, **{"batch": batch, "2 * dim": 2 * dim, "seqlen": seqlen})
    *_, width = _checks.sizes(op, "conv1d_weight", conv1d_weight, "dim", "1", "width")
    shape("conv1d_weight", conv1d_weight, **{"dim": dim, "1": 1, "width": width})
    _, dt_rank = _checks.sizes(op, "delta_proj_weight", delta_proj_weight, "dim", "dt_rank")
    shape("delta_proj_weight", delta_proj_weight, dim=dim, dt_rank=dt_rank)
    _, dstate = _checks.sizes(op, "A", A, "dim", "dstate")
    shape("A", A, dim=dim, dstate=dstate)
    projected = dt_rank + (rows if B is None else 0) + (rows if C is None else 0)
    dims = {"dt_rank + rows of B and C": projected, "dim": dim}
    shape("x_proj_weight", x_proj_weight, **dims)
    d_model, _ = _checks.sizes(op, "out_proj_weight", out_proj_weight, "d_model", "dim")
    shape("out_proj_weight", out_proj_weight, d_model=d_model, dim=dim)
    shape("out_proj_bias", others["out_proj_bias"], d_model=d_model)
    for name in ("conv1d_bias", "D", "delta_bias", "dt_rms_weight"):
        shape(name, others[name], dim=dim)
    for name in ("B_proj_bias", "b_rms_weight"):
        shape(name, others[name], **{"rows of B": rows})
    for name in ("C_proj_bias", "c_rms_weight"):
        shape(name, others[name], **{"rows of C": rows})
    if others["checkpoint_lvl"] not in (0, 1):
        raise RuntimeError(f"{op}: checkpoint_lvl must be 0 or 1, got {others['checkpoint_lvl']}")


def _check_mamba2_inner(zxbcdt, conv1d_weight, A, headdim, ngroups, **others):
    """What the parts would not see, or name otherwise. The types of arguments they check."""
    op = "mamba2_inner"
    _checks.devices(op, locals() | others)

    def shape(name, **dims):
        _checks.shape(op, name, others[name], **dims)

    def require(condition, message):
        if not condition:
            raise RuntimeError(f"{op}: {message}")

    _checks.sizes(op, "zxbcdt", zxbcdt, "batch", "seqlen", "columns")
    (nheads,) = _checks.sizes(op, "A", A, "nheads")
    require(nheads >= 1, f"A must have nheads >= 1, got ({nheads})")
    require(headdim >= 1, f"headdim must be positive, got {headdim}")
    divides = ngroups >= 1 and nheads % ngroups == 0
    require(divides, f"ngroups must divide nheads = {nheads}, got {ngroups}")
    dim = nheads * headdim
    dims = "dim + 2 * ngroups * dstate", "width"
    channels, width = _checks.sizes(op, "conv1d_weight", conv1d_weight, *dims)
    require(width >= 1, f"conv1d_weight must have width >= 1, got ({channels}, {width})")
    matrices = channels - dim
    require(
        matrices > 0 and matrices % (2 * ngroups) == 0,
        "conv1d_weight must have dim + 2 * ngroups * dstate rows, with dim = nheads * headdim = "
        f"{dim} and ngroups = {ngroups}, got {channels}",
    )
    least = dim + channels + nheads
    require(
        zxbcdt.shape[2] >= least and (zxbcdt.shape[2] - least) % 2 == 0,
        "zxbcdt must have 2 * d_nonssm + 2 * dim + 2 * ngroups * dstate + nheads = 2 * d_nonssm + "
        f"{least} columns, got {zxbcdt.shape[2]}",
    )
    read = (zxbcdt.shape[2] - least) // 2 + dim  # by out_proj
    shape("dt_bias", nheads=nheads)
    shape("norm_weight", dim=dim)
    shape("conv1d_bias", **{"dim + 2 * ngroups * dstate": channels})
    weight = others["out_proj_weight"]
    if weight is not None:
        d_model, _ = _checks.sizes(op, "out_proj_weight", weight, "d_model", "d_nonssm + dim")
        shape("out_proj_weight", **{"d_model": d_model, "d_nonssm + dim": read})
        shape("out_proj_bias", d_model=d_model)
    require(
        weight is not None or others["out_proj_bias"] is None, "out_proj_bias needs out_proj_weight"
    )


# (keys, schema, function), as in csrc/autograd: the blocks are ops of their own for what traces.
_BLOCK = ("Autograd", "CompositeExplicitAutograd")
_PARTS = ("CompositeImplicitAutograd",)
OPS = {
    "mamba_inner": (
        _BLOCK,
        "(Tensor xz, Tensor conv1d_weight, Tensor? conv1d_bias, Tensor x_proj_weight, "
        "Tensor delta_proj_weight, Tensor out_proj_weight, Tensor? out_proj_bias, Tensor A, "
        "Tensor? B=None, Tensor? C=None, Tensor? D=None, Tensor? delta_bias=None, "
        "Tensor? B_proj_bias=None, Tensor? C_proj_bias=None, Tensor? b_rms_weight=None, "
        "Tensor? c_rms_weight=None, Tensor? dt_rms_weight=None, *, bool delta_softplus=True, "
        "int checkpoint_lvl=1, float b_c_dt_rms_eps=1e-6) -> Tensor",
        mamba_inner,
    ),
    "mamba2_inner": (
        _BLOCK,
        "(Tensor zxbcdt, Tensor conv1d_weight, Tensor? conv1d_bias, Tensor A, int headdim, "
        "int ngroups=1, Tensor? D=None, Tensor? dt_bias=None, Tensor? norm_weight=None, "
        "Tensor? out_proj_weight=None, Tensor? out_proj_bias=None, Tensor? initial_states=None, "
        "Tensor? seq_idx=None, Tensor? cu_seqlens=None, *, bool silu=True, float norm_eps=1e-6, "
        "bool norm_before_gate=True, float dt_min=0.0, float? dt_max=None) -> "
        "(Tensor out, Tensor final_states)",
        mamba2_inner,
    ),
    "step_linear": (
        _PARTS,
        "(Tensor x, Tensor weight, Tensor? bias=None, *, Tensor? z=None, "
        "Tensor? norm_weight=None, float eps=1e-6) -> Tensor",
        step_linear,
    ),
    "step_linear_prenorm": (
        _PARTS,
        "(Tensor x, Tensor weight, Tensor? bias=None, *, Tensor? residual=None, "
        "Tensor norm_weight, float eps=1e-6, bool residual_in_fp32=False) -> "
        "(Tensor out, Tensor residual_out)",
        step_linear_prenorm,
    ),
}
