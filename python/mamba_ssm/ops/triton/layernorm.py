"""Module of mamba_ssm 1.x: `layer_norm` with its former order of arguments."""

from mamba_ssm.ops.triton import layer_norm as _current
from mamba_ssm.ops.triton.layer_norm import (  # noqa: F401  part of the former module
    LayerNormLinearFn,
    RMSNorm,
    layer_norm_linear_fn,
    layer_norm_ref,
    rms_norm_ref,
)


def layer_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    eps=1e-6,
    prenorm=False,
    residual_in_fp32=False,
    is_rms_norm=False,
):
    """mamba_ssm.ops.triton.layer_norm.layer_norm_fn."""
    return _current.layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        eps=eps,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )


def rms_norm_fn(x, weight, bias, residual=None, prenorm=False, residual_in_fp32=False, eps=1e-6):
    """mamba_ssm.ops.triton.layer_norm.rms_norm_fn."""
    return layer_norm_fn(x, weight, bias, residual, eps, prenorm, residual_in_fp32, True)


class LayerNormFn:
    """Former autograd function of the norm; the op now carries its own derivative."""

    apply = staticmethod(layer_norm_fn)


def _layer_norm_fwd(
    x,
    weight,
    bias,
    eps,
    residual=None,
    out_dtype=None,
    residual_dtype=None,
    is_rms_norm=False,
):
    """The forward on (rows, channels): (y, mean or None, rstd, sum)."""
    y, _, mean, rstd, total, *_ = _current._layer_norm_fwd(
        x,
        weight,
        bias,
        eps,
        residual,
        out_dtype=out_dtype,
        residual_dtype=residual_dtype,
        is_rms_norm=is_rms_norm,
    )
    return y, mean, rstd, total
