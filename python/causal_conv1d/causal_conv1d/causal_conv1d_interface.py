"""Causal depthwise convolution and its decode step (arXiv 2312.00752, section 3.4)."""

import torch
import torch.nn.functional as F

import mamba_ssm  # noqa: F401  registers the ops
from causal_conv1d.cpp_functions import (  # noqa: F401  part of this module's interface
    causal_conv1d_bwd_function,
    causal_conv1d_fwd_function,
    causal_conv1d_update_function,
)

ops = torch.ops.mamba_ssm


def _is_silu(activation):
    """Whether `activation` means SiLU; a bool is the flag of the oldest interface."""
    if activation not in (None, "silu", "swish", True, False):
        raise NotImplementedError(
            f'causal_conv1d: activation must be None, "silu" or "swish", got {activation!r}'
        )
    return bool(activation)


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """Causal depthwise convolution, out[b,c,t] = act(bias[c] + sum_k weight[c,k] x[b,c,t-W+1+k]).

    Arguments:
        x: (batch, dim, seqlen), any strides.
        weight: (dim, W), any W >= 1; bias: (dim,).
        seq_idx: (batch, seqlen) int32 or int64, packs several sequences into a row: nothing
            crosses from one id to the next, and ids < 0 are padding, with output 0. A string or
            bool here is taken as the activation, which was the fourth argument once.
        initial_states: (batch, dim, W - 1), the inputs before the first token; zero when None.
            They belong to the first sequence of a packed row.
        return_final_states: return (out, final_states), final_states (batch, dim, W - 1) being
            what the next call takes as initial_states.
        final_states_out: tensor of that shape and any strides to fill, and to return.
        activation: None, "silu" or "swish".

    Returns out like x, or (out, final_states). Runs on CPU and CUDA and is differentiable in x,
    weight, bias and initial_states through both results. Raises RuntimeError, naming the
    argument, on wrong tensors, and NotImplementedError on another activation.
    """
    if isinstance(seq_idx, (bool, str)):
        seq_idx, activation = None, seq_idx
    out, final_states = ops.causal_conv1d(
        x, weight, bias, seq_idx, initial_states, silu=_is_silu(activation)
    )
    if final_states_out is not None:
        final_states = final_states_out.copy_(final_states)
    return (out, final_states) if return_final_states else out


class CausalConv1dFn:
    """Former autograd function of the convolution; the op now carries its own derivative."""

    apply = staticmethod(causal_conv1d_fn)


def causal_conv1d_ref(
    x,
    weight,
    bias=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
    seq_idx=None,
):
    """causal_conv1d_fn in plain PyTorch, computed in weight's dtype."""
    batch, dim, seqlen = x.shape
    width = weight.shape[1]
    past = x.new_zeros(batch, dim, width - 1) if initial_states is None else initial_states
    padded = torch.cat([past.to(x.dtype), x], dim=-1)  # (batch, dim, width - 1 + seqlen)
    windows = padded.to(weight.dtype).unfold(-1, width, 1)  # (batch, dim, seqlen, width)
    final_states = padded[..., seqlen:]
    if seq_idx is not None:
        real = (seq_idx >= 0).int()
        # The columns before the row have the id of its first token that is not padding.
        first = seq_idx.gather(1, real.argmax(dim=1, keepdim=True))
        ids = torch.cat([first.expand(-1, width - 1), seq_idx], dim=1)
        same = ids.unfold(-1, width, 1) == seq_idx[..., None]
        windows = windows * same[:, None].to(windows.dtype)
        # The final state ends at the last token that is not padding.
        tokens = torch.where(real.bool(), torch.arange(1, seqlen + 1, device=x.device), 0)
        end = tokens.amax(dim=1, keepdim=True)
        columns = end + torch.arange(width - 1, device=x.device)  # (batch, width - 1)
        last = ids.gather(1, (end + width - 2).clamp(min=0))
        same = (ids.gather(1, columns) == last)[:, None]
        final_states = padded.gather(2, columns[:, None].expand(-1, dim, -1)) * same
    out = torch.einsum("bdlw,dw->bdl", windows, weight)
    if bias is not None:
        out = out + bias[:, None]
    if _is_silu(activation):
        out = F.silu(out)
    if seq_idx is not None:
        out = out.masked_fill((seq_idx < 0)[:, None], 0)
    out = out.to(x.dtype)
    if final_states_out is not None:
        final_states = final_states_out.copy_(final_states)
    return (out, final_states) if return_final_states else out


def causal_conv1d_update(
    x,
    conv_state,
    weight,
    bias=None,
    activation=None,
    cache_seqlens=None,
    conv_state_indices=None,
):
    """Convolves new tokens with the inputs kept in conv_state, which is updated in place.

    Arguments:
        x: (batch, dim), or (batch, dim, seqlen) for several tokens.
        conv_state: (num_slots, dim, state_len), state_len >= W - 1, any strides: the last inputs,
            oldest first.
        weight: (dim, W); bias: (dim,).
        activation: None, "silu" or "swish".
        cache_seqlens: (batch,) int32 or int64; makes conv_state a ring buffer whose next column
            is cache_seqlens[b] modulo state_len.
        conv_state_indices: (batch,) int32 or int64, the slot of each row; without it slot b
            belongs to row b. A negative index is padding: its output is 0, no state changes.

    Returns out, like x. Has no derivative. Raises RuntimeError, naming the argument, on wrong
    tensors, and NotImplementedError on another activation.
    """
    return ops.causal_conv1d_update(
        x,
        conv_state,
        weight,
        bias,
        cache_seqlens,
        conv_state_indices,
        silu=_is_silu(activation),
    )


def causal_conv1d_update_ref(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None):
    """causal_conv1d_update in plain PyTorch, without conv_state_indices."""
    tokens = x[..., None] if x.dim() == 2 else x  # (batch, dim, seqlen)
    batch, dim, seqlen = tokens.shape
    width, state_len = weight.shape[1], conv_state.shape[-1]
    if cache_seqlens is None:
        past = conv_state[..., state_len - (width - 1) :]
    else:
        start = cache_seqlens.to(torch.int64)[:, None]
        columns = (start + torch.arange(1 - width, 0, device=x.device)) % state_len
        past = conv_state.gather(2, columns[:, None].expand(-1, dim, -1))
    out = causal_conv1d_ref(
        tokens, weight, bias, initial_states=past.to(x.dtype), activation=activation
    )
    if cache_seqlens is None:
        conv_state.copy_(torch.cat([conv_state, tokens.to(conv_state.dtype)], -1)[..., seqlen:])
    else:
        kept = min(seqlen, state_len)  # a longer input goes round the ring
        columns = (start + torch.arange(seqlen - kept, seqlen, device=x.device)) % state_len
        new = tokens[..., seqlen - kept :].to(conv_state.dtype)
        conv_state.scatter_(2, columns[:, None].expand(-1, dim, -1), new)
    return out[..., 0] if x.dim() == 2 else out
