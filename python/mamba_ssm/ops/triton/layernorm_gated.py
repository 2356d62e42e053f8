"""Norms with a gate, over groups of channels (RMSNorm: arXiv 1910.07467)."""

import torch
import torch.nn as nn
import torch.nn.functional as F

ops = torch.ops.mamba_ssm


def layernorm_fn(
    x,
    weight,
    bias,
    z=None,
    eps=1e-6,
    group_size=None,
    norm_before_gate=True,
    is_rms_norm=False,
):
    """norm(x) * silu(z) with norm_before_gate, else norm(x * silu(z)).

        norm(s) = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias

    Arguments:
        x, z: (..., channels), one floating dtype; without z a plain norm.
        weight, bias: (channels,); bias may be None.
        group_size: mean and variance are those of each run of so many channels, which must divide
            the channels; of all channels when None. The variance is divided by group_size.
        is_rms_norm: the mean is left out.

    Returns a contiguous tensor of x's shape and dtype, computed in float32 (float64 for float64).
    Differentiable in x, weight, bias and z. Raises RuntimeError, naming the argument, on wrong
    arguments.
    """
    return ops.rms_norm_gated(
        x,
        weight,
        bias,
        z,
        eps=eps,
        group_size=group_size,
        norm_before_gate=bool(norm_before_gate),
        is_rms_norm=bool(is_rms_norm),
    )


def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    """layernorm_fn without the mean."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


class LayerNormFn:
    """Former autograd function of the norm; the op now carries its own derivative."""

    apply = staticmethod(layernorm_fn)


def rms_norm_ref(
    x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True, upcast=True
):
    """rmsnorm_fn in plain PyTorch; with `upcast` in float32 (float64 for float64)."""
    dtype = x.dtype
    if upcast:
        wide = torch.promote_types(dtype, torch.float32)
        x, weight, bias, z = (t if t is None else t.to(wide) for t in (x, weight, bias, z))
    if z is not None and not norm_before_gate:
        x = x * F.silu(z)
    groups = x.unflatten(-1, (-1, group_size or x.shape[-1]))
    out = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight
    if bias is not None:
        out = out + bias
    if z is not None and norm_before_gate:
        out = out * F.silu(z)
    return out.to(dtype)


def _statistics(x, eps, z, group_size, norm_before_gate, is_rms_norm):
    """Mean (None for is_rms_norm) and reciprocal deviation, group by group: (groups * rows,)."""
    s = x.to(torch.promote_types(x.dtype, torch.float32))
    if z is not None and not norm_before_gate:
        s = s * F.silu(z.to(s.dtype))
    groups = s.unflatten(-1, (-1, group_size or s.shape[-1])).transpose(0, 1)
    mean = None
    if not is_rms_norm:
        mean = groups.mean(-1)
        groups = groups - mean[..., None]
        mean = mean.flatten()
    return mean, torch.rsqrt(groups.square().mean(-1) + eps).flatten()


def _filled(buffer, values):
    return values if buffer is None else buffer.copy_(values)


def _layer_norm_fwd(
    x,
    weight,
    bias,
    eps,
    z=None,
    out=None,
    group_size=None,
    norm_before_gate=True,
    is_rms_norm=False,
):
    """The forward on (rows, channels), with its statistics: (out, mean or None, rstd)."""
    result = layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm)
    statistics = _statistics(x, eps, z, group_size, norm_before_gate, is_rms_norm)
    return _filled(out, result), *statistics


def _layer_norm_bwd(
    dy,
    x,
    weight,
    bias,
    eps,
    mean,
    rstd,
    z=None,
    group_size=None,
    norm_before_gate=True,
    is_rms_norm=False,
    recompute_output=False,
    dz=None,
    out=None,
):
    """(dx, dweight, dbias, dz), and out with recompute_output. mean and rstd are computed again."""
    options = dict(
        eps=eps,
        group_size=group_size,
        norm_before_gate=bool(norm_before_gate),
        is_rms_norm=bool(is_rms_norm),
    )
    dx, dweight, dbias, gradient = ops.rms_norm_gated_bwd(dy, x, weight, bias, z, **options)
    if gradient is not None:
        gradient = _filled(dz, gradient)
    if not recompute_output:
        return dx, dweight, dbias, gradient
    result = ops.rms_norm_gated(x, weight, bias, z, **options)
    return dx, dweight, dbias, gradient, _filled(out, result)


class _GatedNorm(nn.Module):
    def __init__(self, hidden_size, eps, group_size, norm_before_gate, bias, device, dtype):
        super().__init__()
        factory_kwargs = {"device": device, "dtype": dtype}
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.empty(hidden_size, **factory_kwargs))
        if bias:
            self.bias = nn.Parameter(torch.empty(hidden_size, **factory_kwargs))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class LayerNorm(_GatedNorm):
    """layernorm_fn with parameters weight (ones) and bias (zeros)."""

    def __init__(
        self,
        hidden_size,
        eps=1e-5,
        group_size=None,
        norm_before_gate=True,
        device=None,
        dtype=None,
    ):
        super().__init__(hidden_size, eps, group_size, norm_before_gate, True, device, dtype)

    def forward(self, x, z=None):
        """x, z: (..., hidden_size)."""
        return layernorm_fn(
            x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate
        )


class RMSNorm(_GatedNorm):
    """rmsnorm_fn with parameter weight (ones)."""

    def __init__(
        self,
        hidden_size,
        eps=1e-5,
        group_size=None,
        norm_before_gate=True,
        device=None,
        dtype=None,
    ):
        super().__init__(hidden_size, eps, group_size, norm_before_gate, False, device, dtype)

    def forward(self, x, z=None):
        """x, z: (..., hidden_size)."""
        return rmsnorm_fn(
            x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate
        )
