"""Inputs of the benchmark, and the operations as people write them in plain PyTorch."""

import torch
import torch.nn.functional as F


def scan_inputs(batch, dim, seqlen, dstate, device, dtype):
    """u, delta, A, B, C, D, z, delta_bias."""
    options = dict(device=device, dtype=dtype)
    u = torch.randn(batch, dim, seqlen, **options)
    delta = 0.5 * torch.rand(batch, dim, seqlen, **options)
    A = -torch.arange(1, dstate + 1, device=device, dtype=torch.float32).repeat(dim, 1)
    B, C = (torch.randn(batch, dstate, seqlen, **options) for _ in range(2))
    D, delta_bias = torch.randn(dim, device=device), torch.rand(dim, device=device)
    return u, delta, A, B, C, D, torch.randn(batch, dim, seqlen, **options), delta_bias


def ssd_inputs(batch, seqlen, nheads, headdim, ngroups, dstate, device, dtype):
    """x, dt, A, B, C, D; dt is the step itself."""
    options = {"device": device, "dtype": dtype}
    x = torch.randn(batch, seqlen, nheads, headdim, **options)
    dt = F.softplus(torch.randn(batch, seqlen, nheads, device=device) - 4).to(dtype)
    A = -torch.exp(torch.rand(nheads, device=device))
    B, C = (torch.randn(batch, seqlen, ngroups, dstate, **options) for _ in range(2))
    return x, dt, A, B, C, torch.randn(nheads, device=device)


def discretized(u, delta, A, B, C, D, z, delta_bias):
    """Decay and input of the recurrence, (batch, seqlen, dim, dstate)."""
    d = F.softplus(delta + delta_bias[:, None]).transpose(1, 2)[..., None]
    return torch.exp(d * A), d * B.transpose(1, 2)[:, :, None] * u.transpose(1, 2)[..., None]


def read_out(states, u, delta, A, B, C, D, z, delta_bias):
    """Output from the states of all times, (batch, seqlen, dim, dstate)."""
    y = (states @ C.transpose(1, 2)[..., None])[..., 0].transpose(1, 2) + D[:, None] * u
    return y * F.silu(z)


def time_loop(*inputs):
    decay, driven = discretized(*inputs)
    state = torch.zeros_like(driven[:, 0])
    states = []
    for t in range(decay.shape[1]):
        state = torch.addcmul(driven[:, t], decay[:, t], state)
        states.append(state)
    return read_out(torch.stack(states, dim=1), *inputs)


def parallel_scan(pscan, *inputs):
    return read_out(pscan(*discretized(*inputs)), *inputs)


def ssd_dense_chunks(x, dt, A, B, C, D, chunk_size):
    """SSD as dense matrix products within chunks, and a loop over the states between them.

    Source: Mamba-2 (arXiv 2405.21060), section 6. seqlen must be a multiple of chunk_size.
    """
    ngroups = B.shape[2]

    def chunked(t):
        return t.unflatten(1, (-1, chunk_size))

    def by_group(t):
        return chunked(t).unflatten(3, (ngroups, -1))

    driven = by_group(x * dt[..., None])  # (batch, chunk, time, group, head of group, headdim)
    log_decay = by_group(dt * A).cumsum(2)
    B, C = chunked(B), chunked(C)
    scores = torch.einsum("bcign,bcjgn->bcgij", C, B)
    steps = log_decay.permute(0, 1, 3, 4, 2)  # (batch, chunk, group, head of group, time)
    decay = torch.exp(steps[..., :, None] - steps[..., None, :]).tril()
    y = torch.einsum("bcghij,bcjghp->bcighp", scores[:, :, :, None] * decay, driven)

    to_end = torch.exp(log_decay[:, :, -1:] - log_decay)
    ends = torch.einsum("bcjgn,bcjghp->bcghpn", B, driven * to_end[..., None])
    state = torch.zeros_like(ends[:, 0])
    entering = []
    for end, last in zip(ends.unbind(1), log_decay[:, :, -1].unbind(1)):
        entering.append(state)
        state = torch.exp(last)[..., None, None] * state + end
    carried = torch.einsum("bcign,bcghpn->bcighp", C, torch.stack(entering, dim=1))
    y = y + carried * torch.exp(log_decay)[..., None]
    return y.flatten(3, 4).flatten(1, 2) + D[:, None] * x
