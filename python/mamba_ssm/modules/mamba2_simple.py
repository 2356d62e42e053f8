"""The Mamba-2 block with learnable initial states (arXiv 2405.21060, section 7)."""

import torch
import torch.nn as nn

from mamba_ssm.modules.mamba2 import Mamba2


class Mamba2Simple(Mamba2):
    """Mamba2 with all channels in the scan, without a cache in forward.

    Arguments as those of Mamba2, and
        learnable_init_states: the scan starts from the parameter init_states (nheads, headdim,
            d_state) instead of 0.
        activation: of the convolution, "silu" or "swish", which are the same.
    """

    def __init__(
        self,
        d_model,
        d_state=64,
        d_conv=4,
        conv_init=None,
        expand=2,
        headdim=128,
        ngroups=1,
        A_init_range=(1, 16),
        dt_min=0.001,
        dt_max=0.1,
        dt_init_floor=1e-4,
        dt_limit=(0.0, float("inf")),
        learnable_init_states=False,
        activation="swish",
        bias=False,
        conv_bias=True,
        chunk_size=256,
        use_mem_eff_path=True,
        layer_idx=None,
        device=None,
        dtype=None,
    ):
        if activation not in ("silu", "swish"):
            raise ValueError(
                f'Mamba2Simple: activation must be "silu" or "swish", got {activation!r}'
            )
        super().__init__(
            d_model,
            d_state=d_state,
            d_conv=d_conv,
            conv_init=conv_init,
            expand=expand,
            headdim=headdim,
            ngroups=ngroups,
            A_init_range=A_init_range,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_limit=dt_limit,
            bias=bias,
            conv_bias=conv_bias,
            chunk_size=chunk_size,
            use_mem_eff_path=use_mem_eff_path,
            layer_idx=layer_idx,
            device=device,
            dtype=dtype,
        )
        self.activation = activation
        self.learnable_init_states = learnable_init_states
        if learnable_init_states:
            # Before the others: optimizers know parameters by their order.
            others = dict(self._parameters)
            self._parameters.clear()
            self.init_states = nn.Parameter(
                torch.zeros(self.nheads, self.headdim, self.d_state, device=device, dtype=dtype)
            )
            self.init_states._no_weight_decay = True
            self._parameters.update(others)

    def forward(self, u, seq_idx=None):
        """u (batch, seqlen, d_model) to the same shape. seq_idx: as in Mamba2.forward; init_states
        belongs to the first sequence of a row."""
        if u.dim() != 3 or u.shape[2] != self.d_model:
            raise ValueError(
                f"Mamba2Simple: u must have shape (batch, seqlen, d_model={self.d_model}), "
                f"got {tuple(u.shape)}"
            )
        initial_states = None
        if self.learnable_init_states:
            initial_states = self.init_states.expand(u.shape[0], -1, -1, -1)
        return self._forward(u, seq_idx, initial_states=initial_states)
