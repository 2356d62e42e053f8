"""Residual block: add, normalize, mix."""

import torch
import torch.nn as nn
import torch.nn.functional as F


def add_norm(norm, hidden_states, residual, residual_in_fp32):
    """Adds hidden_states to the residual stream and normalizes the sum.

    The sum is at least float32 when residual_in_fp32, and so is the normalization; the result has
    the dtype of the norm's weight. Returns (normalized, new residual).
    """
    residual = hidden_states if residual is None else hidden_states + residual
    if residual_in_fp32:
        residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
    weight = norm.weight.to(residual.dtype)
    if isinstance(norm, nn.LayerNorm):
        bias = None if norm.bias is None else norm.bias.to(residual.dtype)
        normalized = F.layer_norm(residual, norm.normalized_shape, weight, bias, norm.eps)
    else:
        normalized = F.rms_norm(residual, weight.shape, weight, norm.eps)
    return normalized.to(norm.weight.dtype), residual


class Block(nn.Module):
    """Pre-norm residual block around a sequence mixer.

    Arguments:
        dim: width of the residual stream.
        mixer_cls: called with dim, makes the mixer.
        mlp_cls: nn.Identity, the block has no MLP.
        norm_cls: called with dim, makes an nn.LayerNorm or nn.RMSNorm.
        fused_add_norm: accepted for compatibility; both values compute the same.
        residual_in_fp32: keep the residual stream in float32.
    """

    def __init__(
        self,
        dim,
        mixer_cls,
        mlp_cls=nn.Identity,
        norm_cls=nn.LayerNorm,
        fused_add_norm=False,
        residual_in_fp32=False,
    ):
        super().__init__()
        if mlp_cls is not nn.Identity:
            raise NotImplementedError("Block: a block with an MLP is not available yet")
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp = None

    def forward(self, hidden_states, residual=None, inference_params=None, **mixer_kwargs):
        """Returns (hidden_states, residual); their sum is the output of the block."""
        hidden_states, residual = add_norm(
            self.norm, hidden_states, residual, self.residual_in_fp32
        )
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        return hidden_states, residual

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
