"""SSD in a few lines of PyTorch (arXiv 2405.21060, listing 1), for reading and for tests."""

import torch


def segsum(x):
    """(..., T) to (..., T, T): entry (i, j) is the sum of x_{j+1} ... x_i, -inf above the diagonal.

    Each entry is a sum of its own, not a difference of two long ones.
    """
    T = x.shape[-1]
    below = torch.ones(T, T, dtype=torch.bool, device=x.device).tril(-1)
    terms = torch.where(below, x[..., :, None], 0)  # x_i in all columns j < i
    return terms.cumsum(dim=-2).masked_fill(below.mT, -torch.inf)


def segsum_unstable(x):
    """segsum as differences of sums, which lose digits where sums are long."""
    sums = x.cumsum(dim=-1)
    above = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device).triu(1)
    return (sums[..., :, None] - sums[..., None, :]).masked_fill(above, -torch.inf)


def ssd_minimal_discrete(X, A, B, C, block_len, initial_states=None):
    """h_t = exp(A_t) h_{t-1} + X_t B_t^T, Y_t = h_t C_t, in blocks of block_len steps.

    Arguments, all of one dtype:
        X: (batch, seqlen, nheads, headdim), already multiplied by the step; seqlen is a multiple of
            block_len.
        A: (batch, seqlen, nheads), the logarithm of the decay.
        B, C: (batch, seqlen, nheads, dstate).
        initial_states: (batch, 1, nheads, headdim, dstate), zero when None.

    Returns Y, like X, and the final state (batch, nheads, headdim, dstate). Raises ValueError for
    another dtype or length.
    """
    if not X.dtype == A.dtype == B.dtype == C.dtype:
        raise ValueError(f"X, A, B, C must have one dtype, got {[t.dtype for t in (X, A, B, C)]}")
    if X.shape[1] % block_len != 0:
        raise ValueError(f"seqlen must be a multiple of block_len = {block_len}, got {X.shape[1]}")
    X, A, B, C = (M.unflatten(1, (-1, block_len)) for M in (X, A, B, C))
    A = A.permute(0, 3, 1, 2)  # (batch, nheads, blocks, block_len)
    c = A.cumsum(dim=-1)

    # Within a block: the masked, decayed C B^T is a matrix over pairs of steps.
    Y = torch.einsum("bcihn,bcjhn,bhcij,bcjhp->bcihp", C, B, segsum(A).exp(), X)
    # What each block adds to the state at its end, behind the initial state.
    added = torch.einsum("bcjhn,bhcj,bcjhp->bchpn", B, (c[..., -1:] - c).exp(), X)
    if initial_states is None:
        initial_states = torch.zeros_like(added[:, :1])
    states = torch.cat([initial_states, added], dim=1)
    # The state at each boundary: the same matrix, over pairs of blocks.
    decay = segsum(torch.nn.functional.pad(c[..., -1], (1, 0))).exp()
    states = torch.einsum("bhij,bjhpn->bihpn", decay, states)
    Y = Y + torch.einsum("bcihn,bchpn,bhci->bcihp", C, states[:, :-1], c.exp())
    return Y.flatten(1, 2), states[:, -1]
