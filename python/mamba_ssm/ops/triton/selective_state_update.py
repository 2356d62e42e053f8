"""Decode steps of a selective scan (arXiv 2312.00752, section 3.3.2)."""

import torch
import torch.nn.functional as F


def selective_state_update(
    state,
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    state_batch_indices=None,
    *,
    intermediate_states=None,
    A_is_log=False,
):
    """Advances `state` by one token or several in order, in place, and returns their outputs.

        d     = dt + dt_bias, through softplus when dt_softplus
        state = exp(d A) state + d B x
        out   = C state + D x, times silu(z) with z

    Arguments, without heads | with heads; the rank of x says whether there is an axis of tokens:
        state: (num_slots, dim, dstate) | (num_slots, nheads, headdim, dstate), any strides.
        x, dt, z: (batch, [tokens,] dim) | (batch, [tokens,] nheads, headdim).
        A: (dim, dstate) | (nheads, headdim, dstate).
        B, C: (batch, [tokens,] dstate) | (batch, [tokens,] ngroups, dstate).
        D, dt_bias: (dim,) | (nheads, headdim).
        state_batch_indices: (batch,) int32 or int64, the slot of each row; without it slot b
            belongs to row b. A negative index is padding: its output is 0, no state changes.
        intermediate_states: (batch, [tokens,] dim, dstate) | (batch, [tokens,] nheads, headdim,
            dstate), any strides and floating dtype: receives the state after each token; what
            belongs to padding stays as it is. When only the first n tokens of a row are accepted,
            its state is intermediate_states[row, n - 1].
        A_is_log: A is given as log(-A), the way models keep it.

    Returns out, in x's shape and dtype. The state is kept in its own dtype; sums run in float32, and
    so does the state from token to token: several tokens equal a call for each, bit for bit if
    state is float32, while a 16-bit state is rounded once, after the last. Has no derivative.
    Raises RuntimeError, naming the argument, on wrong arguments.
    """
    return torch.ops.mamba_ssm.selective_state_update(
        state,
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        state_batch_indices,
        dt_softplus=bool(dt_softplus),
        intermediate_states=intermediate_states,
        A_is_log=A_is_log,
    )


def selective_state_update_ref(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False
):
    """selective_state_update of one token in plain PyTorch, without state_batch_indices."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    d = dt.to(dtype)
    if dt_bias is not None:
        d = d + dt_bias.to(dtype)
    if dt_softplus:
        d = F.softplus(d)
    d = d[..., None]  # ([batch, nheads,] channels, 1)
    B, C = B.to(dtype), C.to(dtype)
    if state.dim() == 4:  # (batch, ngroups, dstate) -> (batch, nheads, dstate)
        B, C = (M.repeat_interleave(state.shape[1] // M.shape[1], dim=1) for M in (B, C))
    B, C = B[..., None, :], C[..., None, :]
    new_state = torch.exp(d * A.to(dtype)) * state.to(dtype) + d * B * x.to(dtype)[..., None]
    state.copy_(new_state)
    out = (new_state * C).sum(-1)
    if D is not None:
        out = out + D.to(dtype) * x.to(dtype)
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out.to(x.dtype)
