"""What the chunk-wise parts of SSD share: cutting time into chunks, packed sequences in them."""

import torch


def compute_dtype(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def clamp_steps(d, dt_limit):
    """d within dt_limit. A step at a limit has its own derivative, as in the op ssd_chunk_scan; with
    torch's clamp it depends on the version of torch (2.14: 0)."""
    low, high = dt_limit
    return torch.where((d >= low) & (d <= high), d, d.detach().clamp(low, high))


def chunked(M, chunk_size):
    """(batch, seqlen, ...) as (batch, nchunks, chunk_size, ...), zeros behind the last token."""
    nchunks = -(-M.shape[1] // chunk_size)
    tail = M.new_zeros(M.shape[0], nchunks * chunk_size - M.shape[1], *M.shape[2:])
    return torch.cat([M, tail], dim=1).unflatten(1, (nchunks, chunk_size))


def per_head(M, nheads):
    """(..., ngroups, n) as (..., nheads, n): head h reads group h // (nheads / ngroups)."""
    return M.repeat_interleave(nheads // M.shape[-2], dim=-2)


def sequence_of(seq_idx):
    """The id of the sequence that each token (batch, seqlen) stands in.

    Padding (ids < 0) stands in the sequence before it, at the start of a row in the first one.
    """
    position = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(seq_idx)
    real = seq_idx >= 0
    first = torch.where(real, position, seq_idx.shape[1] - 1).amin(dim=1, keepdim=True)
    last_real = torch.where(real, position, -1).cummax(dim=1).values
    return seq_idx.gather(1, torch.maximum(last_real, first))


def sequences_at_chunk_ends(seq_idx, chunk_size):
    """(batch, nchunks + 1): the sequence before the first token, and that of each chunk's last."""
    sequence = sequence_of(seq_idx)
    seqlen = sequence.shape[1]
    ends = torch.arange(chunk_size - 1, seqlen + chunk_size - 1, chunk_size, device=seq_idx.device)
    return torch.cat([sequence[:, :1], sequence[:, ends.clamp(max=seqlen - 1)]], dim=1)


def vjp(function, inputs, cotangents):
    """Gradients of function in the tensors `inputs`, for cotangents of its results.

    In float64: sums over time and channels of numbers that cancel lose nothing.
    """
    inputs = tuple(tensor.detach().double() for tensor in inputs)
    cotangents = cotangents.double() if torch.is_tensor(cotangents) else cotangents
    return torch.autograd.functional.vjp(function, inputs, cotangents)[1]


def sum_from_each_on(M):
    """Sums of (..., chunk_size) from each position to the end: what turns a gradient for sums along
    a chunk into one for what is added up."""
    return M.flip(-1).cumsum(-1).flip(-1)


def sequence_ids(cu_seqlens, seqlen, seq_idx=None):
    """seq_idx of the sequences that cu_seqlens (num_sequences + 1,) describes: (1, seqlen), int64.

    With seq_idx (1, seqlen) its ids divide them further, and its padding stays padding. Nothing is
    read from the device.
    """
    token = torch.arange(seqlen, device=cu_seqlens.device)
    number = torch.searchsorted(cu_seqlens[1:].to(token.dtype), token, right=True)[None]
    if seq_idx is None or seqlen == 0:
        return number
    # Ids below `span` in every sequence, moved apart from sequence to sequence.
    span = seq_idx.amax().to(token.dtype) + 1
    return torch.where(seq_idx < 0, -1, number * span + seq_idx)
