"""Residual addition fused with the norm behind it (RMSNorm: arXiv 1910.07467)."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

ops = torch.ops.mamba_ssm


def layer_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    is_rms_norm=False,
    return_dropout_mask=False,
):
    """Normalizes dropout(rowscale * x) + dropout(x1) + residual.

        norm(s) = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias

    Arguments:
        x, x1: (..., channels), one floating dtype; residual: that shape, x's dtype or float32.
        weight, bias, weight1, bias1: (channels,); all but weight may be None. With weight1 a
            second result is normalized with weight1 and bias1.
        dropout_p: chance of an element of x and x1 to be dropped, drawn with torch's generator.
        rowscale: (...,), not together with x1.
        prenorm: also return the sum, rounded to residual's dtype, or without a residual to float32
            if residual_in_fp32, else to x's dtype. It is x itself where nothing was added.
        is_rms_norm: the mean is left out.
        return_dropout_mask: also return what dropout kept of x and of x1 (None without).

    Returns y[, y1][, sum][, mask, mask1], y in x's dtype. Runs in float32 (float64 for float64), y
    from the sum before it is rounded. Differentiable in all but rowscale. Raises RuntimeError,
    naming the argument, on wrong arguments.
    """
    mask, mask1 = _dropout_mask(x, dropout_p), _dropout_mask(x1, dropout_p)
    y, y1, residual_out = ops.layer_norm(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        rowscale,
        mask,
        mask1,
        eps=eps,
        dropout_p=dropout_p,
        prenorm=bool(prenorm),
        residual_in_fp32=bool(residual_in_fp32),
        is_rms_norm=bool(is_rms_norm),
    )
    results = [y]
    if weight1 is not None:
        results.append(y1)
    if prenorm:
        results.append(x if residual_out is None else residual_out)
    if return_dropout_mask:
        results += [mask, mask1]
    return results[0] if len(results) == 1 else tuple(results)


def _dropout_mask(x, dropout_p):
    """True with probability 1 - dropout_p, in the shape of x; None where nothing is to be drawn."""
    if x is None or dropout_p == 0:
        return None
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout_p)


def rms_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    return_dropout_mask=False,
):
    """layer_norm_fn without the mean."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        True,
        return_dropout_mask,
    )


class LayerNormFn:
    """Former autograd function of the norm; the op now carries its own derivative."""

    apply = staticmethod(layer_norm_fn)


class RMSNorm(nn.Module):
    """rms_norm_fn with parameter weight (ones), and dropout in training."""

    def __init__(self, hidden_size, eps=1e-5, dropout_p=0.0, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.weight)

    def forward(self, x, residual=None, prenorm=False, residual_in_fp32=False):
        """x, residual: (..., hidden_size). Returns y, or (y, sum) when prenorm."""
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


class _LayerNormLinear(torch.autograd.Function):
    """Keeps the sum and normalizes it again in the backward, instead of keeping what the linear
    layer reads. Returns (out, sum), or out alone where the sum is x."""

    @staticmethod
    def forward(
        ctx,
        x,
        norm_weight,
        norm_bias,
        linear_weight,
        linear_bias,
        residual,
        eps,
        residual_in_fp32,
        is_rms_norm,
    ):
        options = dict(eps=eps, is_rms_norm=is_rms_norm)
        y, _, residual_out = ops.layer_norm(
            x,
            norm_weight,
            norm_bias,
            residual,
            prenorm=True,
            residual_in_fp32=residual_in_fp32,
            **options,
        )
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else y.dtype
        offset = None if linear_bias is None else linear_bias.to(dtype)
        out = F.linear(y.to(dtype), linear_weight.to(dtype), offset)
        total = x if residual_out is None else residual_out
        ctx.save_for_backward(total, norm_weight, norm_bias, linear_weight)
        ctx.options = options
        ctx.types = x.dtype, None if linear_bias is None else linear_bias.dtype
        ctx.has_residual = residual is not None
        return out if residual_out is None else (out, residual_out)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dtotal=None):
        total, norm_weight, norm_bias, linear_weight = ctx.saved_tensors
        x_dtype, bias_dtype = ctx.types
        y, *_ = ops.layer_norm(total, norm_weight, norm_bias, **ctx.options)
        rows = dout.flatten(0, -2)
        dlinear_weight = rows.T @ y.to(dout.dtype).flatten(0, -2)
        dy = dout @ linear_weight.to(dout.dtype)
        dx, dnorm_weight, dnorm_bias, dresidual, *_ = ops.layer_norm_bwd(
            dy.to(x_dtype),
            None,
            dtotal,
            total,
            norm_weight,
            norm_bias,
            has_residual=ctx.has_residual,
            **ctx.options,
        )
        if ctx.has_residual and dresidual is None:
            dresidual = dx
        return (
            dx,
            dnorm_weight,
            dnorm_bias,
            dlinear_weight.to(linear_weight.dtype),
            None if bias_dtype is None else rows.sum(0).to(bias_dtype),
            dresidual,
            None,
            None,
            None,
        )


def layer_norm_linear_fn(
    x,
    norm_weight,
    norm_bias,
    linear_weight,
    linear_bias,
    residual=None,
    eps=1e-6,
    prenorm=False,
    residual_in_fp32=False,
    is_rms_norm=False,
):
    """A linear layer on layer_norm_fn(x, norm_weight, norm_bias, residual).

    linear_weight: (out_features, channels); linear_bias: (out_features,) or None. The linear layer
    runs in the autocast dtype, without autocast in x's dtype. What it reads is not kept for the
    backward but computed again. Returns out, or (out, sum) when prenorm.
    """
    results = _LayerNormLinear.apply(
        x,
        norm_weight,
        norm_bias,
        linear_weight,
        linear_bias,
        residual,
        eps,
        bool(residual_in_fp32),
        bool(is_rms_norm),
    )
    out, total = results if isinstance(results, tuple) else (results, x)
    return (out, total) if prenorm else out


class LayerNormLinearFn:
    """The autograd function of layer_norm_linear_fn, by its former name."""

    apply = staticmethod(layer_norm_linear_fn)


def layer_norm_ref(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    dropout_mask=None,
    dropout_mask1=None,
    upcast=False,
):
    """layer_norm_fn in plain PyTorch, with the masks of dropout given or drawn.

    With `upcast` in float32 (float64 for float64), else in the dtypes of the arguments.
    """

    def norm(s, weight, bias):
        return F.layer_norm(s.to(weight.dtype), s.shape[-1:], weight, bias, eps)

    return _reference(**locals())


def rms_norm_ref(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    dropout_mask=None,
    dropout_mask1=None,
    upcast=False,
):
    """layer_norm_ref without the mean."""

    def norm(s, weight, bias):
        y = F.rms_norm(s.to(weight.dtype), s.shape[-1:], weight, eps)
        return y if bias is None else y + bias

    return _reference(**locals())


def _reference(
    norm,
    x,
    weight,
    bias,
    residual,
    x1,
    weight1,
    bias1,
    eps,
    dropout_p,
    rowscale,
    prenorm,
    dropout_mask,
    dropout_mask1,
    upcast,
):
    dtype = x.dtype
    if upcast:
        wide = torch.promote_types(dtype, torch.float32)
        x, weight, bias, residual, x1, weight1, bias1, rowscale = (
            t if t is None else t.to(wide)
            for t in (x, weight, bias, residual, x1, weight1, bias1, rowscale)
        )

    def dropped(v, mask):
        if dropout_p == 0:
            return v
        if mask is None:
            return F.dropout(v, dropout_p)
        return v.masked_fill(~mask, 0) / (1 - dropout_p if dropout_p < 1 else 1)

    total = dropped(x if rowscale is None else x * rowscale[..., None], dropout_mask)
    if x1 is not None:
        total = total + dropped(x1, dropout_mask1)
    if residual is not None:
        total = total + residual
    results = [norm(total, weight, bias).to(dtype)]
    if weight1 is not None:
        results.append(norm(total, weight1, bias1).to(dtype))
    if prenorm:
        results.append(total)
    return results[0] if len(results) == 1 else tuple(results)


def _layer_norm_fwd(
    x,
    weight,
    bias,
    eps,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    dropout_p=0.0,
    rowscale=None,
    out_dtype=None,
    residual_dtype=None,
    is_rms_norm=False,
    return_dropout_mask=False,
):
    """The forward on (rows, channels), with its statistics: (y, y1, mean or None, rstd, sum, None,
    mask, mask1). Where a seed of dropout was, is None: there are masks."""
    y, *heads, total, mask, mask1 = layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm=True,
        residual_in_fp32=residual_dtype == torch.float32,
        is_rms_norm=is_rms_norm,
        return_dropout_mask=True,
    )
    s = total.to(torch.promote_types(x.dtype, torch.float32))
    mean = None
    if not is_rms_norm:
        mean = s.mean(-1)
        s = s - mean[:, None]
    rstd = torch.rsqrt(s.square().mean(-1) + eps)
    y, y1 = (
        v if v is None or out_dtype is None else v.to(out_dtype) for v in (y, *heads, None)[:2]
    )
    return y, y1, mean, rstd, total, None, mask, mask1


def _layer_norm_bwd(
    dy,
    x,
    weight,
    bias,
    eps,
    mean,
    rstd,
    dresidual=None,
    dy1=None,
    weight1=None,
    bias1=None,
    seeds=None,
    dropout_p=0.0,
    rowscale=None,
    has_residual=False,
    has_x1=False,
    is_rms_norm=False,
    x_dtype=None,
    recompute_output=False,
):
    """The backward on (rows, channels), without dropout, whose masks have no place here.

    x is the sum that was normalized, x_dtype the dtype of what was added up first (None: x's),
    dresidual the gradient of the sum. mean and rstd are computed again. Returns (dx, dweight,
    dbias, dresidual_in, dx1, dweight1, dbias1), None where there is no such argument, then the
    output with recompute_output. Raises ValueError for dropout_p > 0.
    """
    if dropout_p > 0:
        raise ValueError(
            "_layer_norm_bwd: dropout_p must be 0; layer_norm_fn differentiates dropout"
        )
    options = dict(eps=eps, is_rms_norm=bool(is_rms_norm))
    dx, dweight, dbias, dresidual_in, dx1, *others = ops.layer_norm_bwd(
        dy.to(x_dtype or x.dtype),
        dy1,
        dresidual,
        x,
        weight,
        bias,
        weight1,
        bias1,
        rowscale,
        has_residual=bool(has_residual),
        has_x1=bool(has_x1),
        **options,
    )
    if has_residual and dresidual_in is None:
        dresidual_in = dx
    if has_x1 and dx1 is None:
        dx1 = dx
    gradients = (dx, dweight, dbias, dresidual_in, dx1, *others)
    if not recompute_output:
        return gradients
    return (*gradients, ops.layer_norm(x, weight, bias, **options)[0])
