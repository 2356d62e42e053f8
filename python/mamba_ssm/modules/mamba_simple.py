"""The Mamba block (arXiv 2312.00752, section 3.4)."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from mamba_ssm.modules._parts import (
    TAKES_PROJECTED,
    A_of,
    A_of_step,
    cache_options,
    draw_dt_bias,
    is_plain,
    read_cache,
    states_from_cache,
    step_conv1d,
    step_linear,
    upcast,
)
from mamba_ssm.modules.block import Block as _Block
from mamba_ssm.ops._composites import project_channel_first

ops = torch.ops.mamba_ssm


class Mamba(nn.Module):
    """Mamba block, (batch, seqlen, d_model) to the same shape.

    Arguments:
        d_model: width of input and output.
        d_state: states per channel.
        d_conv: width of the causal convolution.
        expand: d_inner = int(expand * d_model) channels inside the block.
        dt_rank: rank of the step size projection; "auto" is ceil(d_model / 16).
        dt_min, dt_max, dt_init_floor: range and lower bound of the initial step sizes.
        dt_init, dt_scale: initial dt_proj.weight, "random" (uniform) or "constant", and its scale.
        conv_bias, bias: biases of the convolution and of in_proj and out_proj.
        use_fast_path: use the fused operation where it computes the same: without a cache, and
            with projections and convolution that are plain torch modules without hooks.
        layer_idx: key of this layer in an inference cache.

    A_log and D are float32 for every dtype but float64.
    """

    def __init__(
        self,
        d_model,
        d_state=16,
        d_conv=4,
        expand=2,
        dt_rank="auto",
        dt_min=0.001,
        dt_max=0.1,
        dt_init="random",
        dt_scale=1.0,
        dt_init_floor=1e-4,
        conv_bias=True,
        bias=False,
        use_fast_path=True,
        layer_idx=None,
        device=None,
        dtype=None,
    ):
        factory_kwargs = {"device": device, "dtype": dtype}
        super().__init__()
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = int(self.expand * self.d_model)
        self.dt_rank = math.ceil(self.d_model / 16) if dt_rank == "auto" else dt_rank
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx
        self.activation = "silu"

        self.in_proj = nn.Linear(self.d_model, 2 * self.d_inner, bias=bias, **factory_kwargs)
        self.conv1d = nn.Conv1d(
            in_channels=self.d_inner,
            out_channels=self.d_inner,
            bias=conv_bias,
            kernel_size=d_conv,
            groups=self.d_inner,
            padding=d_conv - 1,
            **factory_kwargs,
        )
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(
            self.d_inner, self.dt_rank + 2 * self.d_state, bias=False, **factory_kwargs
        )
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **factory_kwargs)

        # Keeps the variance of delta at initialization whatever the rank.
        dt_init_std = self.dt_rank**-0.5 * dt_scale
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, dt_init_std)
        elif dt_init == "random":
            nn.init.uniform_(self.dt_proj.weight, -dt_init_std, dt_init_std)
        else:
            raise NotImplementedError(
                f'Mamba: dt_init must be "random" or "constant", got {dt_init!r}'
            )

        with torch.no_grad():
            self.dt_proj.bias.copy_(
                draw_dt_bias(self.d_inner, dt_min, dt_max, dt_init_floor, **factory_kwargs)
            )
        self.dt_proj.bias._no_reinit = True

        # S4D real initialization, A = -(1, ..., d_state) per channel, and D = 1.
        float_dtype = torch.promote_types(self.dt_proj.weight.dtype, torch.float32)
        A_log = torch.empty(self.d_inner, self.d_state, dtype=float_dtype, device=device)
        if not A_log.is_meta:
            A = torch.arange(1, self.d_state + 1, dtype=float_dtype, device=device)
            A_log[:] = torch.log(A)
        self.A_log = nn.Parameter(A_log)
        self.A_log._no_weight_decay = True
        self.D = nn.Parameter(torch.ones(self.d_inner, dtype=float_dtype, device=device))
        self.D._no_weight_decay = True

        self.out_proj = nn.Linear(self.d_inner, self.d_model, bias=bias, **factory_kwargs)

    def forward(self, hidden_states, inference_params=None, seq_idx=None):
        """hidden_states (batch, seqlen, d_model) to the same shape.

        seq_idx (batch, seqlen) packs several sequences into a row, as in selective_scan: none sees
        another, and tokens with a negative one are padding.

        With inference_params the states of this layer are read from its cache (zero at
        seqlen_offset 0) and left there, outside of any autograd graph, ready for the next tokens
        (with seq_idx, those of the last sequence of each row).
        """
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.d_model:
            raise ValueError(
                f"Mamba: hidden_states must have shape (batch, seqlen, d_model={self.d_model}), "
                f"got {tuple(hidden_states.shape)}"
            )
        if inference_params is not None:
            states = self._get_states_from_cache(inference_params, hidden_states.shape[0])
            continues = inference_params.seqlen_offset > 0
            if continues and hidden_states.shape[1] == 1 and seq_idx is None:
                return self.step(hidden_states, *states)[0]
            return self._forward_unfused(
                self._project_in(hidden_states), seq_idx, *states, continues
            )

        xz = self._project_in(hidden_states)
        if seq_idx is not None or not (self.use_fast_path and self._is_fusible()):
            return self._forward_unfused(xz, seq_idx)
        return ops.mamba_inner(
            xz,
            self.conv1d.weight,
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.out_proj.weight,
            self.out_proj.bias,
            A_of(self.A_log),
            D=upcast(self.D),
            delta_bias=upcast(self.dt_proj.bias),
            delta_softplus=True,
        )

    def step(self, hidden_states, conv_state, ssm_state):
        """One token, hidden_states (batch, 1, d_model). Both states are updated in place.

        conv_state (batch, d_inner, d_conv) holds the last inputs of the convolution and ssm_state
        (batch, d_inner, d_state) the state of the scan. Returns (out, conv_state, ssm_state).
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(
                "Mamba.step: hidden_states must have shape (batch, 1, d_model), "
                f"got {tuple(hidden_states.shape)}"
            )
        xz = step_linear(self.in_proj, hidden_states[:, 0])
        return self._step(xz, conv_state, ssm_state), conv_state, ssm_state

    def _step(self, xz, conv_state, ssm_state):
        """step from what in_proj makes of the token, xz (batch, 2 * d_inner)."""
        x, z = xz.chunk(2, dim=-1)
        x = step_conv1d(self.conv1d, self.act, x, conv_state)
        dt, B, C = self._split(step_linear(self.x_proj, x).to(x.dtype), dim=-1)
        if is_plain(self.dt_proj, nn.Linear):
            dt, dt_bias = ops.step_linear(dt, self.dt_proj.weight), self.dt_proj.bias
        else:
            dt, dt_bias = self.dt_proj(dt), None
        A, A_is_log = A_of_step(self.A_log)
        y = ops.selective_state_update(
            ssm_state.detach(),
            x,
            dt.to(x.dtype),
            A,
            B,
            C,
            D=self.D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=True,
            A_is_log=A_is_log,
        )
        return step_linear(self.out_proj, y)[:, None]

    def allocate_inference_cache(
        self, batch_size, max_seqlen, dtype=None, *, state_dtype=None, **kwargs
    ):
        """Zero states (conv_state, ssm_state) for step; max_seqlen does not matter.

        dtype: of both, state_dtype: of ssm_state; None: that of the weights.
        """
        options = cache_options(self, [self.conv1d, self.in_proj], dtype)
        conv_state = torch.zeros(batch_size, self.d_inner, self.d_conv, **options)
        options = cache_options(self, [self.dt_proj, self.conv1d], state_dtype or dtype)
        ssm_state = torch.zeros(batch_size, self.d_inner, self.d_state, **options)
        return conv_state, ssm_state

    def _get_states_from_cache(self, inference_params, batch_size, initialize_states=False):
        return states_from_cache(self, inference_params, batch_size, initialize_states)

    def _split(self, projected, dim):
        """Output of x_proj, with dt_rank + 2 * d_state features in dimension dim, as dt, B, C."""
        return projected.split([self.dt_rank, self.d_state, self.d_state], dim=dim)

    @staticmethod
    def _project(layer, tokens):
        """layer(tokens), (batch, seqlen, features), as (batch, rows, seqlen)."""
        if is_plain(layer, nn.Linear):
            return project_channel_first(tokens, layer.weight, layer.bias)
        return layer(tokens).transpose(1, 2)

    def _is_fusible(self):
        return is_plain(self.conv1d, nn.Conv1d) and all(
            is_plain(module, nn.Linear) for module in (self.x_proj, self.dt_proj, self.out_proj)
        )

    def _project_in(self, hidden_states):
        """in_proj as (batch, 2 * d_inner, seqlen)."""
        return self._project(self.in_proj, hidden_states)

    def _forward_unfused(self, xz, seq_idx=None, conv_state=None, ssm_state=None, continues=False):
        """The block after in_proj, each part through its own module or operation.

        Leaves the states after the last token in conv_state and ssm_state where given, and starts
        from them if `continues`.
        """
        x, z = xz.chunk(2, dim=1)  # (batch, d_inner, seqlen)
        x_in = x
        # Inputs before the first token, (batch, d_inner, d_conv - 1).
        history = read_cache(conv_state[..., 1:], x.dtype) if continues else None
        if is_plain(self.conv1d, nn.Conv1d):
            x, final_states = ops.causal_conv1d(
                x, self.conv1d.weight.squeeze(1), self.conv1d.bias, seq_idx, history, silu=True
            )
        elif seq_idx is not None:
            raise NotImplementedError(
                "Mamba: packed sequences need a conv1d that is a plain torch.nn.Conv1d without hooks"
            )
        else:
            window = x if history is None else torch.cat([history, x], dim=-1)
            start = window.shape[-1] - x.shape[-1]
            x = self.act(self.conv1d(window)[..., start : start + x.shape[-1]]).to(x.dtype)

        projected = self._project(self.x_proj, x.transpose(1, 2)).to(x.dtype)
        dt, B, C = self._split(projected, dim=1)
        if is_plain(self.dt_proj, nn.Linear):
            delta = project_channel_first(dt.transpose(1, 2), self.dt_proj.weight)
            delta_bias = upcast(self.dt_proj.bias)
        else:
            delta, delta_bias = self.dt_proj(dt.transpose(1, 2)).transpose(1, 2), None
        A = A_of(self.A_log)
        y, last_state = ops.selective_scan(
            x,
            delta.to(x.dtype),
            A,
            B,
            C,
            D=upcast(self.D),
            z=z,
            delta_bias=delta_bias,
            initial_state=read_cache(ssm_state, A.dtype) if continues else None,
            seq_idx=seq_idx,
            delta_softplus=True,
        )
        if ssm_state is not None:
            if seq_idx is None:
                past = conv_state.to(x_in.dtype) if continues else torch.zeros_like(conv_state)
                columns = torch.cat([past, x_in[..., -self.d_conv :]], dim=-1)
            else:  # of the last sequence
                columns = F.pad(final_states, (1, 0))
            conv_state.copy_(columns[..., -self.d_conv :].detach())
            ssm_state.copy_(last_state.detach())
            return step_linear(self.out_proj, y.transpose(1, 2))
        return self.out_proj(y.transpose(1, 2))


TAKES_PROJECTED.add(Mamba)


class Block(_Block):
    """Block of mamba_ssm 1.x: modules.block.Block without an MLP, in the former order."""

    def __init__(
        self,
        dim,
        mixer_cls,
        norm_cls=nn.LayerNorm,
        fused_add_norm=False,
        residual_in_fp32=False,
    ):
        super().__init__(
            dim,
            mixer_cls,
            norm_cls=norm_cls,
            fused_add_norm=fused_add_norm,
            residual_in_fp32=residual_in_fp32,
        )
