"""Residual block: add, normalize, mix."""

import torch.nn as nn

from mamba_ssm.ops.triton.layer_norm import layer_norm_fn


def add_norm(norm, hidden_states, residual, residual_in_fp32):
    """Adds hidden_states to the residual stream and normalizes the sum.

    The sum is at least float32 when residual_in_fp32; the normalization is, always. Returns
    (normalized, in the dtype of hidden_states; new residual).
    """
    return layer_norm_fn(
        hidden_states,
        norm.weight,
        getattr(norm, "bias", None),  # torch.nn.RMSNorm has none
        residual=residual,
        eps=norm.eps,
        prenorm=True,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=not isinstance(norm, nn.LayerNorm),
    )


class Block(nn.Module):
    """Pre-norm residual block around a sequence mixer.

    Arguments:
        dim: width of the residual stream.
        mixer_cls: called with dim, makes the mixer.
        mlp_cls: nn.Identity, the block has no MLP.
        norm_cls: called with dim, makes an nn.LayerNorm, or an RMSNorm of ops.triton.layer_norm.
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
