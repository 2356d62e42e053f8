"""The two entry points of the former C extension of this name, over ``torch.ops.mamba_ssm``.

Arguments are positional, in the extension's order. They run on CPU and CUDA.
"""

import torch
import torch.nn.functional as F

import mamba_ssm._library  # noqa: F401  registers the ops

_CHUNK = 2048  # tokens per column of `x`, of which callers read the last one as the last state


def _gate(out, z):
    compute = torch.float64 if z.dtype == torch.float64 else torch.float32
    return (out.to(compute) * F.silu(z.to(compute))).to(out.dtype)


def fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """Selective scan. Returns [out, x], with z [out, x, out_z].

    out is the output before the gate and out_z after it. x (batch, dim, chunks, 2 * dstate) holds
    the last state in x[:, :, -1, 1::2] and zeros elsewhere; shapes of the arguments are those of
    mamba_ssm.selective_scan_fn.
    """
    out, last_state = torch.ops.mamba_ssm.selective_scan(
        u, delta, A, B, C, D, None, delta_bias, delta_softplus=bool(delta_softplus)
    )
    batch, dim, dstate = last_state.shape
    chunks = max(1, -(-u.shape[-1] // _CHUNK))
    x = last_state.new_zeros(batch, dim, chunks, 2 * dstate)
    x[:, :, -1, 1::2] = last_state
    return [out, x] if z is None else [out, x, _gate(out, z)]


def bwd(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    dout,
    x,
    out,
    dz,
    delta_softplus,
    recompute_out_z,
):
    """Derivative of fwd at the gated output (without z, at out).

    x is not read: the states are computed again. dz may be a buffer to fill. Returns
    [du, ddelta, dA, dB, dC, dD, ddelta_bias], then dz with z, then out_z if recompute_out_z.
    """
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    softplus = bool(delta_softplus)
    out_z, _, states = torch.ops.mamba_ssm.selective_scan_fwd(*inputs, delta_softplus=softplus)
    du, ddelta, dA, dB, dC, dD, dz_new, ddelta_bias, _ = torch.ops.mamba_ssm.selective_scan_bwd(
        dout, None, states, *inputs, delta_softplus=softplus
    )
    gradients = [du, ddelta, dA, dB, dC, dD, ddelta_bias]
    if z is not None:
        gradients.append(dz_new if dz is None else dz.copy_(dz_new))
        if recompute_out_z:
            gradients.append(out_z)
    return gradients
