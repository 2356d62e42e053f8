"""What torch.utils.flop_counter counts for every operation.

As in torch's formulas for products of matrices, a multiplication and its addition are two, and what
is done for each element alone (exp, SiLU, softplus, gates, D, norms) is not counted.

- A convolution of width W: W multiply-adds for each of its results.
- A scan is counted as its recurrence is defined (arXiv 2312.00752, equation 2; arXiv 2405.21060,
  equation 1), whatever a kernel does instead. For each token, channel and state,

      h = a h + b B      two multiply-adds
      y = y + C h        one

  with a = exp(dt A) and b = dt x, which are made once for each element. If h, a, B and C are
  complex and b and y real: 4 + 2 + 2 multiply-adds of real numbers.
- A derivative has two products for each one of the forward, as torch counts those of convolutions:
  da = g h and g = g a for a h, dB = g b and db = g B for b B, dC = dy h and g = g + dy C for C h.
  What a kernel computes a second time is not counted.
- decode_linear is a product, whatever is normalized before it.
- mamba_inner and mamba2_inner have also their projections. Where autograd or a compiler is at work
  the counter sees their parts, among them those that the backward runs again.
"""

import importlib.abc
import importlib.util
import sys

import torch


def _recurrence(channels, A):
    """channels: of all tokens together; the states of one lie along A's last dimension (B's for SSD)."""
    return (16 if A.is_complex() else 6) * channels * A.shape[-1]


def causal_conv1d(x, weight, *args, **kwargs):
    return 2 * x.numel() * weight.shape[-1]


def causal_conv1d_bwd(dout, dfinal_states, x, weight, *args, **kwargs):
    return 2 * causal_conv1d(x, weight)


def causal_conv1d_update(x, conv_state, weight, *args, **kwargs):
    return causal_conv1d(x, weight)


def linear(x, weight, *args, **kwargs):
    return 2 * x.shape[:-1].numel() * weight.numel()


def selective_scan(u, delta, A, *args, **kwargs):
    return _recurrence(u.numel(), A)


def selective_scan_bwd(dout, dlast_state, states, u, delta, A, *args, **kwargs):
    return 2 * selective_scan(u, delta, A)


def selective_state_update(state, x, dt, A, *args, **kwargs):
    return _recurrence(x.numel(), A)


def ssd_chunk_scan(x, dt, A, B, *args, **kwargs):
    return _recurrence(x.numel(), B)


def ssd_chunk_scan_bwd(dout, dfinal_states, x, dt, A, B, *args, **kwargs):
    return 2 * ssd_chunk_scan(x, dt, A, B)


def nothing(*args, **kwargs):
    return 0


def mamba_inner(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    *args,
    **kwargs,
):
    tokens = xz.shape[0] * xz.shape[2]
    weights = x_proj_weight, delta_proj_weight, out_proj_weight, conv1d_weight
    return _recurrence(tokens * A.shape[0], A) + 2 * tokens * sum(w.numel() for w in weights)


def mamba2_inner(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    A,
    headdim,
    ngroups,
    D=None,
    dt_bias=None,
    norm_weight=None,
    out_proj_weight=None,
    *args,
    **kwargs,
):
    tokens = zxbcdt.shape[0] * zxbcdt.shape[1]
    d_ssm = A.shape[0] * headdim
    dstate = (conv1d_weight.shape[0] - d_ssm) // (2 * ngroups)
    weights = [w for w in (conv1d_weight, out_proj_weight) if w is not None]
    return 6 * tokens * d_ssm * dstate + 2 * tokens * sum(w.numel() for w in weights)


FORMULAS = {
    "causal_conv1d": causal_conv1d,
    "causal_conv1d_out": causal_conv1d,
    "causal_conv1d_bwd": causal_conv1d_bwd,
    "causal_conv1d_bwd_out": causal_conv1d_bwd,
    "causal_conv1d_update": causal_conv1d_update,
    "causal_conv1d_varlen_states": nothing,
    "decode_linear": linear,
    "decode_linear_prenorm": linear,
    "step_linear": linear,
    "step_linear_prenorm": linear,
    "selective_scan": selective_scan,
    "selective_scan_fwd": selective_scan,
    "selective_scan_bwd": selective_scan_bwd,
    "selective_scan_bwd_out": selective_scan_bwd,
    "selective_state_update": selective_state_update,
    "ssd_chunk_scan": ssd_chunk_scan,
    "ssd_chunk_scan_bwd": ssd_chunk_scan_bwd,
    "ssd_chunk_scan_bwd_out": ssd_chunk_scan_bwd,
    "rms_norm_gated": nothing,
    "rms_norm_gated_bwd": nothing,
    "rms_norm_gated_bwd_out": nothing,
    "layer_norm": nothing,
    "layer_norm_bwd": nothing,
    "mamba_inner": mamba_inner,
    "mamba2_inner": mamba2_inner,
}


def _register(flop_counter):
    for name, formula in FORMULAS.items():
        op = getattr(torch.ops.mamba_ssm, name)
        if op not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(op, get_raw=True)(formula)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the formulas when somebody imports the counter: it imports triton, or warns that
    there is none, which is nothing that `import mamba_ssm` should do."""

    NAME = "torch.utils.flop_counter"

    def find_spec(self, fullname, path, target=None):
        if fullname != self.NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            _register(module)

        spec.loader.exec_module = exec_module
        return spec


if _WhenImported.NAME in sys.modules:
    _register(sys.modules[_WhenImported.NAME])
else:
    sys.meta_path.insert(0, _WhenImported())
