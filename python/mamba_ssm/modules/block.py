"""Residual block: add, normalize, mix."""

import torch
import torch.nn as nn

from mamba_ssm.modules._parts import (
    TAKES_PROJECTED,
    is_plain,
    is_unhooked,
    states_from_cache,
    upcast,
)
from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn


def _is_fusible(norm):
    """Whether layer_norm_fn computes what norm does to its input."""
    if is_plain(norm, RMSNorm):
        return norm.drop is None
    return is_plain(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1


def add_norm(norm, hidden_states, residual, residual_in_fp32):
    """Adds hidden_states to the residual stream and normalizes the sum.

    The sum is at least float32 when residual_in_fp32. A plain LayerNorm or RMSNorm becomes one
    operation, which runs in float32; any other module gets the sum in the dtype of its weight, of
    hidden_states if it has none.
    Returns (normalized, new residual).
    """
    if _is_fusible(norm):
        return layer_norm_fn(
            hidden_states,
            norm.weight,
            norm.bias,
            residual=residual,
            eps=norm.eps,
            prenorm=True,
            residual_in_fp32=residual_in_fp32,
            is_rms_norm=isinstance(norm, RMSNorm),
        )
    total = hidden_states if residual is None else hidden_states + residual
    weight = getattr(norm, "weight", None)
    normalized = norm(total.to(hidden_states.dtype if weight is None else weight.dtype))
    return normalized, upcast(total) if residual_in_fp32 else total


class Block(nn.Module):
    """Pre-norm residual block around a sequence mixer, and around an MLP if there is one.

    Arguments:
        dim: width of the residual stream.
        mixer_cls: called with dim, makes the mixer.
        mlp_cls: called with dim, makes the MLP; nn.Identity: the block has none.
        norm_cls: called with dim, makes a norm, of the mixer's input and of the MLP's.
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
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        if mlp_cls is nn.Identity:
            self.mlp = None
        else:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)

    def forward(self, hidden_states, residual=None, inference_params=None, **mixer_kwargs):
        """hidden_states and residual (batch, seqlen, dim); None is a residual of 0.

        mixer_kwargs go to the mixer. Returns (hidden_states, residual); their sum is the output of
        the block.
        """
        if self._is_joint_step(hidden_states, inference_params, mixer_kwargs):
            hidden_states, residual = self._step(hidden_states, residual, inference_params)
        else:
            hidden_states, residual = add_norm(
                self.norm, hidden_states, residual, self.residual_in_fp32
            )
            hidden_states = self.mixer(
                hidden_states, inference_params=inference_params, **mixer_kwargs
            )
        if self.mlp is not None:
            hidden_states, residual = add_norm(
                self.norm2, hidden_states, residual, self.residual_in_fp32
            )
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def _is_joint_step(self, hidden_states, inference_params, mixer_kwargs):
        """Whether this is a decode step, whose norm and in_proj can be one operation."""
        return (
            inference_params is not None
            and inference_params.seqlen_offset > 0
            and hidden_states.shape[1] == 1
            and all(value is None for value in mixer_kwargs.values())
            and type(self.mixer) in TAKES_PROJECTED
            and is_unhooked(self.mixer)
            and is_plain(self.mixer.in_proj, nn.Linear)
            and is_plain(self.norm, RMSNorm)
            and self.norm.drop is None
        )

    def _step(self, hidden_states, residual, inference_params):
        """add_norm and the mixer for one token of each row."""
        in_proj = self.mixer.in_proj
        projected, residual = torch.ops.mamba_ssm.step_linear_prenorm(
            hidden_states,
            in_proj.weight,
            in_proj.bias,
            residual=residual,
            norm_weight=self.norm.weight,
            eps=self.norm.eps,
            residual_in_fp32=self.residual_in_fp32,
        )
        states = states_from_cache(self.mixer, inference_params, hidden_states.shape[0])
        return self.mixer._step(projected[:, 0], *states), residual

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """The mixer's."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
