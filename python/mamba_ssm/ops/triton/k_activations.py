"""The gate of a gated MLP, SwiGLU (arXiv 2002.05202)."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def _halves(xy):
    """x and y side by side in xy, in float32 (float64 for float64)."""
    if xy.dim() == 0 or xy.shape[-1] % 2 != 0:
        raise ValueError(
            f"swiglu: xy must have an even number of channels (..., 2 * channels), "
            f"got {tuple(xy.shape)}"
        )
    return xy.to(torch.promote_types(xy.dtype, torch.float32)).chunk(2, dim=-1)


def _swiglu_fwd(xy, out=None):
    """silu(x) * y for xy = [x, y] (..., 2 * channels); into out (..., channels) where given."""
    x, y = _halves(xy)
    result = (F.silu(x) * y).to(xy.dtype)
    return result if out is None else out.copy_(result)


def _swiglu_bwd(xy, dout, dxy=None, recompute_output=False, out=None):
    """Gradient of xy for that of the result, into dxy where given.

    Returns dxy, or (dxy, result) with recompute_output.
    """
    x, y = _halves(xy)
    dout = dout.to(x.dtype)
    gate = torch.sigmoid(x)
    dx = dout * y * gate * (1 + x * (1 - gate))
    gradient = torch.cat([dx, dout * x * gate], dim=-1).to(xy.dtype)
    dxy = gradient if dxy is None else dxy.copy_(gradient)
    return (dxy, _swiglu_fwd(xy, out)) if recompute_output else dxy


class SwiGLU(torch.autograd.Function):
    """Keeps xy alone for the backward."""

    @staticmethod
    def forward(ctx, xy):
        ctx.save_for_backward(xy)
        return _swiglu_fwd(xy)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (xy,) = ctx.saved_tensors
        return _swiglu_bwd(xy, dout)


def swiglu(xy):
    """silu(x) * y for xy = [x, y] (..., 2 * channels), as (..., channels) of the same dtype.

    Runs in float32 (float64 for float64). Raises ValueError for an odd number of channels.
    """
    return SwiGLU.apply(xy)
