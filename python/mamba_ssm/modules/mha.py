"""Causal or full attention for hybrid models, with grouped heads, rotary positions and a cache."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from mamba_ssm.modules._parts import cache_options, is_plain, read_cache
from mamba_ssm.ops.triton._chunks import sequence_ids

ops = torch.ops.mamba_ssm


def _update_kv_cache(kv, inference_params, layer_idx):
    """Appends keys and values to the cache of a layer.

    kv (batch, seqlen, 2, num_heads_kv, head_dim) goes to the rows from batch_size_offset and the
    positions from seqlen_offset of the first entry of key_value_memory_dict[layer_idx], of shape
    (max_batch_size, max_seqlen, 2, num_heads_kv, head_dim). Returns those rows up to the last
    position written. Raises ValueError if the cache is too small.
    """
    cache = inference_params.key_value_memory_dict[layer_idx][0]
    row, start = inference_params.batch_size_offset, inference_params.seqlen_offset
    batch, seqlen = kv.shape[:2]
    if row + batch > cache.shape[0] or start + seqlen > cache.shape[1]:
        raise ValueError(
            f"MHA: layer {layer_idx} has a cache of (max_batch_size, max_seqlen) = "
            f"{tuple(cache.shape[:2])}, too small for rows {row} to {row + batch} and positions "
            f"{start} to {start + seqlen}"
        )
    if torch.is_grad_enabled() and kv.requires_grad:
        past = cache[row : row + batch, :start].detach().clone()
        cache[row : row + batch, start : start + seqlen] = kv.detach()
        return torch.cat([past, kv.to(past.dtype)], dim=1)
    cache[row : row + batch, start : start + seqlen] = kv
    return cache[row : row + batch, : start + seqlen]


class RotaryEmbedding(nn.Module):
    """Rotary positions (arXiv 2104.09864): turns pairs of channels by position * base^(-2i / dim).

    Arguments:
        dim: channels that are turned, the first of each head; even.
        interleaved: pairs are neighbours (2i, 2i + 1), else (i, i + dim / 2).

    Angles are float32 (float64 for float64) and no buffers, so that a cast of the model leaves them.
    """

    def __init__(self, dim, base=10000.0, interleaved=False):
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved

    def forward(self, x, positions):
        """x (batch, seqlen, heads, head_dim) at positions (seqlen) or (batch, seqlen)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        exponents = torch.arange(0, self.dim, 2, dtype=dtype, device=x.device) / self.dim
        angles = positions[..., None].to(dtype) * self.base**-exponents
        cos, sin = angles.cos()[..., None, :], angles.sin()[..., None, :]  # (..., 1, dim / 2)
        turned = x[..., : self.dim].to(dtype)
        if self.interleaved:
            a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
        else:
            a, b = turned.chunk(2, dim=-1)
        a, b = a * cos - b * sin, a * sin + b * cos
        turned = torch.stack([a, b], -1).flatten(-2) if self.interleaved else torch.cat([a, b], -1)
        return torch.cat([turned.to(x.dtype), x[..., self.dim :]], dim=-1)


class MHA(nn.Module):
    """Multi-head attention, (batch, seqlen, embed_dim) to the same shape.

    Arguments:
        embed_dim: width of input and output.
        num_heads, num_heads_kv: query heads, and key and value heads (num_heads when None), each of
            which serves num_heads / num_heads_kv query heads.
        head_dim: channels per head, embed_dim / num_heads when None.
        mlp_dim: width of a gated MLP beside the attention, rounded up to a multiple of 256; half of
            it is gate.
        qkv_proj_bias, out_proj_bias: biases of in_proj and out_proj.
        softmax_scale: factor of the scores, head_dim^-0.5 when None.
        causal: a token sees none behind it.
        layer_idx: key of this layer in an inference cache.
        d_conv: width of a causal convolution of queries, keys and values; 0: none.
        rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved: see RotaryEmbedding; 0: none.

    Rows of in_proj: queries, keys, values (by head), MLP, its gate. Raises ValueError for sizes
    that do not fit.
    """

    def __init__(
        self,
        embed_dim,
        num_heads,
        num_heads_kv=None,
        head_dim=None,
        mlp_dim=0,
        qkv_proj_bias=True,
        out_proj_bias=True,
        softmax_scale=None,
        causal=False,
        layer_idx=None,
        d_conv=0,
        rotary_emb_dim=0,
        rotary_emb_base=10000.0,
        rotary_emb_interleaved=False,
        device=None,
        dtype=None,
    ):
        factory_kwargs = {"device": device, "dtype": dtype}
        super().__init__()
        self.embed_dim = embed_dim
        self.layer_idx = layer_idx
        self.d_conv = d_conv
        self.rotary_emb_dim = rotary_emb_dim
        self.softmax_scale = softmax_scale
        self.causal = causal
        self.num_heads = num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if num_heads < 1 or self.num_heads_kv < 1 or num_heads % self.num_heads_kv != 0:
            raise ValueError(
                f"MHA: num_heads_kv must divide num_heads = {num_heads}, got {num_heads_kv}"
            )
        if head_dim is None and embed_dim % num_heads != 0:
            raise ValueError(
                f"MHA: without head_dim, num_heads must divide embed_dim = {embed_dim}, "
                f"got {num_heads}"
            )
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        if not 0 <= rotary_emb_dim <= self.head_dim or rotary_emb_dim % 2 != 0:
            raise ValueError(
                f"MHA: rotary_emb_dim must be even and at most head_dim = {self.head_dim}, "
                f"got {rotary_emb_dim}"
            )
        self.mlp_dim = -(-mlp_dim // 256) * 256
        self.qkv_dim = self.head_dim * (self.num_heads + 2 * self.num_heads_kv)
        out_dim = self.head_dim * self.num_heads + self.mlp_dim // 2

        if rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved
            )
        self.in_proj = nn.Linear(
            embed_dim, self.qkv_dim + self.mlp_dim, bias=qkv_proj_bias, **factory_kwargs
        )
        if d_conv > 0:
            self.conv1d = nn.Conv1d(
                self.qkv_dim,
                self.qkv_dim,
                kernel_size=d_conv,
                padding=d_conv - 1,
                groups=self.qkv_dim,
                **factory_kwargs,
            )
        self.out_proj = nn.Linear(out_dim, embed_dim, bias=out_proj_bias, **factory_kwargs)

    def forward(self, x, inference_params=None, *, seq_idx=None, cu_seqlens=None):
        """x (batch, seqlen, embed_dim) to the same shape.

        seq_idx (batch, seqlen), integers, packs several sequences into a row: tokens see those with
        their own id only, and a negative id is padding. cu_seqlens (num_sequences + 1) describes
        the sequences of a batch of 1 by their limits.

        With inference_params the tokens continue what the cache of this layer holds, from position
        seqlen_offset on. There, lengths_per_sample (batch), if it is not None, has the position of
        each row instead: shapes then do not depend on positions, so that a CUDA graph of the call
        may be replayed at any. A cache holds one sequence per row: with it, seq_idx may only mark
        padding behind that, in a causal module, and cu_seqlens is not available
        (NotImplementedError). Raises ValueError for tokens behind the end of the cache (with
        lengths_per_sample the device raises).
        """
        if x.dim() != 3 or x.shape[2] != self.embed_dim:
            raise ValueError(
                f"MHA: x must have shape (batch, seqlen, embed_dim={self.embed_dim}), "
                f"got {tuple(x.shape)}"
            )
        batch, seqlen, _ = x.shape
        seq_idx = self._sequences(x, inference_params, seq_idx, cu_seqlens)
        qkv, mlp = self.in_proj(x).split([self.qkv_dim, self.mlp_dim], dim=-1)
        if self.d_conv > 0:
            qkv = self._convolve(qkv, inference_params, seq_idx)
        heads = [self.num_heads, self.num_heads_kv, self.num_heads_kv]
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split(heads, dim=2)

        positions = torch.arange(seqlen, device=x.device)  # (seqlen) or (batch, seqlen)
        if inference_params is not None and inference_params.seqlen_offset > 0:
            if inference_params.lengths_per_sample is None:
                positions = positions + inference_params.seqlen_offset
            else:
                row = inference_params.batch_size_offset
                lengths = inference_params.lengths_per_sample[row : row + batch]
                positions = positions + lengths[:, None]
        if self.rotary_emb_dim > 0:
            q, k = self.rotary_emb(q, positions), self.rotary_emb(k, positions)

        mask, is_causal = None, self.causal
        if seq_idx is not None:
            sees = seq_idx[:, :, None] == seq_idx[:, None, :]  # (batch, queries, keys)
            mask, is_causal = (sees.tril() if self.causal else sees)[:, None], False
        if inference_params is not None:
            kv = self._update_kv_cache(torch.stack([k, v], dim=2), positions, inference_params)
            if inference_params.seqlen_offset > 0:
                k, v = kv.to(q.dtype).unbind(2)
                mask, is_causal = self._mask(positions, k.shape[1]), False
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=is_causal,
            scale=self.softmax_scale,
            enable_gqa=self.num_heads != self.num_heads_kv,
        )
        out = out.transpose(1, 2).flatten(2)
        if self.mlp_dim > 0:
            up, gate = mlp.chunk(2, dim=-1)
            out = torch.cat([out, up * F.silu(gate)], dim=-1)
        if seq_idx is not None:
            out = out.masked_fill(seq_idx[..., None] < 0, 0)
        return self.out_proj(out)

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """Zero states (kv_cache, conv_state) for tokens up to max_seqlen.

        kv_cache (batch_size, max_seqlen, 2, num_heads_kv, head_dim); conv_state (batch_size,
        channels, d_conv), the last inputs of the convolution, None without one.
        """
        options = cache_options(self, [self.out_proj, self.in_proj], dtype)
        kv_cache = torch.zeros(
            batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim, **options
        )
        conv_state = None
        if self.d_conv > 0:
            conv_state = torch.zeros(batch_size, self.qkv_dim, self.d_conv, **options)
        return kv_cache, conv_state

    def _sequences(self, x, inference_params, seq_idx, cu_seqlens):
        """The id (batch, seqlen) of each token's sequence, -1 at padding; None for one sequence."""
        batch, seqlen, _ = x.shape
        if seq_idx is not None:
            if seq_idx.shape != (batch, seqlen):
                raise ValueError(
                    f"MHA: seq_idx must have shape (batch, seqlen) = {(batch, seqlen)}, "
                    f"got {tuple(seq_idx.shape)}"
                )
            seq_idx = seq_idx.clamp(min=-1)
        if cu_seqlens is not None:
            if inference_params is not None:
                raise NotImplementedError("MHA: cu_seqlens is not available with a cache")
            if batch != 1:
                raise ValueError(
                    f"MHA: cu_seqlens needs x with batch = 1, got x of shape {tuple(x.shape)}"
                )
            seq_idx = sequence_ids(cu_seqlens, seqlen, seq_idx)
        if inference_params is not None and seq_idx is not None and x.device.type == "cpu":
            # A GPU would have to be waited for.
            before, after = seq_idx[:, :-1], seq_idx[:, 1:]
            if ((after != before) & (after >= 0)).any():
                raise ValueError(
                    "MHA: with a cache, seq_idx must be one sequence per row, then padding"
                )
        return seq_idx

    def _get_states_from_cache(self, inference_params, batch_size):
        """The states of this layer, made where there are none, or too small for a new sequence."""
        if self.layer_idx is None:
            raise ValueError("MHA: an inference cache needs a module made with layer_idx=...")
        cache = inference_params.key_value_memory_dict
        batch = inference_params.batch_size_offset + batch_size
        states = cache.get(self.layer_idx)
        starts = inference_params.seqlen_offset == 0
        if states is None or (
            starts
            and (states[0].shape[0] < batch or states[0].shape[1] < inference_params.max_seqlen)
        ):
            states = self.allocate_inference_cache(batch, inference_params.max_seqlen)
            cache[self.layer_idx] = states
        return states

    def _update_kv_cache(self, kv, positions, inference_params):
        """Puts kv (batch, seqlen, 2, num_heads_kv, head_dim) into the cache at its positions.

        Returns the rows of the cache: up to the last position where all rows have the same, else
        to the end.
        """
        batch = kv.shape[0]
        kv_cache = self._get_states_from_cache(inference_params, batch)[0]
        if positions.dim() == 1:
            return _update_kv_cache(kv, inference_params, self.layer_idx)
        row = inference_params.batch_size_offset
        contents = kv_cache[row : row + batch]
        where = (torch.arange(batch, device=kv.device)[:, None], positions)
        kv = kv.to(kv_cache.dtype)
        if torch.is_grad_enabled() and kv.requires_grad:
            past = contents.clone()
            contents.index_put_(where, kv.detach())
            return past.index_put(where, kv)
        return contents.index_put_(where, kv)

    def _mask(self, positions, num_keys):
        """Which keys (..., 1, seqlen, num_keys) a query sees: those up to its own position, or
        without `causal` up to the last one's; None for all."""
        if positions.dim() == 1 and (positions.shape[0] == 1 or not self.causal):
            return None
        last = positions if self.causal else positions[..., -1:]
        keys = torch.arange(num_keys, device=positions.device)
        return (keys <= last[..., None])[..., None, :, :]

    def _convolve(self, qkv, inference_params, seq_idx):
        """The convolution over qkv (batch, seqlen, channels), behind its inputs in the cache."""
        x, conv_state, past = qkv.transpose(1, 2), None, None
        if inference_params is not None:
            row, batch = inference_params.batch_size_offset, x.shape[0]
            states = self._get_states_from_cache(inference_params, batch)
            conv_state = states[1][row : row + batch]
            if inference_params.seqlen_offset > 0:
                past = read_cache(conv_state, x.dtype)
        if is_plain(self.conv1d, nn.Conv1d):
            history = None if past is None else past[..., 1:]
            y, final_states = ops.causal_conv1d(
                x, self.conv1d.weight.squeeze(1), self.conv1d.bias, seq_idx, history
            )
        elif seq_idx is not None:
            raise NotImplementedError(
                "MHA: packed sequences need a conv1d that is a plain torch.nn.Conv1d without hooks"
            )
        else:
            window = x if past is None else torch.cat([past, x], dim=-1)
            start = window.shape[-1] - x.shape[-1]
            y = self.conv1d(window)[..., start : start + x.shape[-1]].to(x.dtype)
        if conv_state is not None:
            if seq_idx is None:
                past = torch.zeros_like(conv_state) if past is None else past
                columns = torch.cat([past, x.detach()], dim=-1)
            else:  # without the padding
                columns = F.pad(final_states.detach(), (1, 0))
            conv_state.copy_(columns[..., -self.d_conv :])
        return y.transpose(1, 2)
