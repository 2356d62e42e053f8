"""Products of all rows of two matrices in each chunk, in plain PyTorch (see ssd_chunk_state)."""

from mamba_ssm.ops.triton._chunks import chunked, compute_dtype


def _bmm_chunk_fwd(a, b, chunk_size, seq_idx=None, causal=False, output_dtype=None):
    """out[i, j] = a_i . b_j for all tokens i, j of a chunk.

    Arguments:
        a, b: (batch, seqlen, k) or (batch, seqlen, ngroups, k).
        seq_idx: (batch, seqlen); products across sequences and with padding (ids < 0) are 0.
        causal: products with j > i are 0.

    Returns (batch, nchunks, [ngroups,] chunk_size, chunk_size) in output_dtype or a's dtype.
    """
    dtype = compute_dtype(a)
    rows, columns = (chunked(M.to(dtype), chunk_size) for M in (a, b))
    if a.dim() == 4:
        rows, columns = rows.transpose(2, 3), columns.transpose(2, 3)
    out = rows @ columns.mT
    if seq_idx is not None:
        ids = chunked(seq_idx, chunk_size)
        same = (ids[..., :, None] == ids[..., None, :]) & (ids >= 0)[..., None]
        out = out.where(same[:, :, None] if a.dim() == 4 else same, 0)
    if causal:
        out = out.tril()
    return out.to(output_dtype or a.dtype)


def _bmm_chunk_bwd(a, dout, residual=None, out=None):
    """Gradient of b in _bmm_chunk_fwd(a, b): what a and dout give for its other argument.

    Arguments:
        a: (batch, seqlen, k) or (batch, seqlen, ngroups, k).
        dout: (batch, nchunks, [ngroups,] chunk_size, chunk_size).
        residual: like a, added.
        out: tensor to write to.

    Returns a tensor like a.
    """
    dtype = compute_dtype(a)
    rows = chunked(a.to(dtype), dout.shape[-1])
    if a.dim() == 4:
        rows = rows.transpose(2, 3)
    product = dout.to(dtype).mT @ rows
    if a.dim() == 4:
        product = product.transpose(2, 3)
    product = product.flatten(1, 2)[:, : a.shape[1]]
    if residual is not None:
        product = product + residual.to(dtype)
    return product.to(a.dtype) if out is None else out.copy_(product)
