"""The Mamba-2 block (arXiv 2405.21060, section 7)."""

import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from mamba_ssm.distributed.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from mamba_ssm.modules._hub import HubMixin
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
from mamba_ssm.ops.triton._chunks import sequence_ids
from mamba_ssm.ops.triton.layernorm_gated import RMSNorm as RMSNormGated

ops = torch.ops.mamba_ssm


def _behind_history(x, history, cu_seqlens):
    """Puts its past in front of each packed sequence.

    x (1, dim, seqlen) holds the sequences of cu_seqlens, history (num_sequences, dim, n) what came
    before them. Returns the longer x, its cu_seqlens, and where in it the tokens of x are.
    """
    count, dim, n = history.shape
    seqlen, device = x.shape[2], x.device
    number = torch.arange(count + 1, device=device)
    offsets = cu_seqlens.long() + n * number
    ids = sequence_ids(cu_seqlens, seqlen)[0].clamp(max=count - 1)
    tokens = torch.arange(seqlen, device=device) + n * (ids + 1)
    past = (offsets[:-1, None] + torch.arange(n, device=device)).flatten()
    longer = x.new_zeros(1, seqlen + n * count, dim)
    longer = longer.index_copy(1, tokens, x.transpose(1, 2))
    longer = longer.index_copy(1, past, history.transpose(1, 2).flatten(0, 1)[None])
    return longer.transpose(1, 2), offsets, tokens


class Mamba2(nn.Module, HubMixin):
    """Mamba-2 block, (batch, seqlen, d_model) to the same shape.

    With a process_group the ranks share the heads, groups and channels: in_proj is a
    ColumnParallelLinear, out_proj a RowParallelLinear, and the attributes d_inner, d_ssm, nheads,
    ngroups and all parameters are this rank's. Rank r has the r-th part of every parameter: of
    in_proj and conv1d, of each of their sections of rows (z0, x0, z, x, B, C, dt), and of
    out_proj.weight, of each of its sections of columns (MLP, scan). out_proj.bias is rank 0's.

    Arguments:
        d_model: width of input and output.
        d_state: states per channel.
        d_conv: width of the causal convolution.
        conv_init: conv1d.weight is uniform in [-conv_init, conv_init]; None: torch's default.
        expand: d_inner = int(expand * d_model) channels inside the block.
        headdim: channels per head; divides d_ssm.
        d_ssm: channels of the scan, all d_inner when None; the others pass a gated MLP,
            silu(z0) * x0.
        ngroups: groups of heads that share B and C, and of channels that are normalized together.
        A_init_range: A is drawn uniformly from its negative.
        D_has_hdim: D has a number for each channel instead of each head.
        rmsnorm: normalize behind the scan; norm_before_gate: before its gate instead of after.
        dt_min, dt_max, dt_init_floor: range and lower bound of the initial step sizes.
        dt_limit: range that step sizes are clamped to; None for no upper end.
        bias, conv_bias: biases of in_proj and out_proj, and of the convolution.
        chunk_size: accepted for compatibility; the result does not depend on it.
        use_mem_eff_path: use the fused operation where it computes the same: without a cache, and
            with submodules that are plain ones without hooks.
        layer_idx: key of this layer in an inference cache.
        process_group: the ranks that share the block. Their number divides d_inner, d_ssm and
            ngroups.
        sequence_parallel: with a process_group, each rank has its part of the tokens, split along
            the first dimension, and gets that part of the result; else every rank has all tokens.

    D is float32 for every dtype but float64. Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        d_model,
        d_state=128,
        d_conv=4,
        conv_init=None,
        expand=2,
        headdim=64,
        d_ssm=None,
        ngroups=1,
        A_init_range=(1, 16),
        D_has_hdim=False,
        rmsnorm=True,
        norm_before_gate=False,
        dt_min=0.001,
        dt_max=0.1,
        dt_init_floor=1e-4,
        dt_limit=(0.0, float("inf")),
        bias=False,
        conv_bias=True,
        chunk_size=256,
        use_mem_eff_path=True,
        layer_idx=None,
        process_group=None,
        sequence_parallel=True,
        device=None,
        dtype=None,
    ):
        name = type(self).__name__
        factory_kwargs = {"device": device, "dtype": dtype}
        super().__init__()
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.conv_init = conv_init
        self.expand = expand
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        if not (process_group is None or hasattr(process_group, "rank")):
            raise TypeError(f"{name}: process_group must be a ProcessGroup, got {process_group!r}")
        self.world_size = 1 if process_group is None else process_group.size()
        self.local_rank = 0 if process_group is None else process_group.rank()
        d_inner = int(self.expand * self.d_model)
        d_ssm = d_inner if d_ssm is None else d_ssm
        if not 0 < d_ssm <= d_inner:
            raise ValueError(f"{name}: d_ssm must be from 1 to d_inner = {d_inner}, got {d_ssm}")
        for size, value in {"d_inner": d_inner, "d_ssm": d_ssm, "ngroups": ngroups}.items():
            if value % self.world_size != 0:
                raise ValueError(
                    f"{name}: {size} = {value} must be a multiple of the {self.world_size} ranks "
                    "of process_group"
                )
        self.d_inner = d_inner // self.world_size
        self.headdim = headdim
        self.d_ssm = d_ssm // self.world_size
        self.ngroups = ngroups // self.world_size
        if headdim < 1 or self.d_ssm % headdim != 0:
            raise ValueError(
                f"{name}: headdim must divide d_ssm = {self.d_ssm}: pass headdim=..., got {headdim}"
            )
        self.nheads = self.d_ssm // self.headdim
        if ngroups < 1 or self.nheads % self.ngroups != 0:
            raise ValueError(
                f"{name}: ngroups must divide the number of heads, d_ssm / headdim = "
                f"{self.nheads}, got {self.ngroups}"
            )
        self.D_has_hdim = D_has_hdim
        self.rmsnorm = rmsnorm
        self.norm_before_gate = norm_before_gate
        self.dt_limit = dt_limit
        self.activation = "silu"
        self.chunk_size = chunk_size
        self.use_mem_eff_path = use_mem_eff_path
        self.layer_idx = layer_idx

        # Rows of in_proj: z0, x0 (d_mlp each), z (d_ssm), x (d_ssm), B, C (ngroups * d_state), dt.
        matrices = 2 * self.ngroups * self.d_state
        d_in_proj = 2 * self.d_inner + matrices + self.nheads
        self.in_proj = self._linear(ColumnParallelLinear)(
            self.d_model, self.world_size * d_in_proj, bias=bias, **factory_kwargs
        )
        self.conv1d = nn.Conv1d(
            in_channels=self.d_ssm + matrices,
            out_channels=self.d_ssm + matrices,
            bias=conv_bias,
            kernel_size=d_conv,
            groups=self.d_ssm + matrices,
            padding=d_conv - 1,
            **factory_kwargs,
        )
        if self.conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -self.conv_init, self.conv_init)
        self.act = nn.SiLU()

        self.dt_bias = nn.Parameter(
            draw_dt_bias(self.nheads, dt_min, dt_max, dt_init_floor, **factory_kwargs)
        )
        self.dt_bias._no_weight_decay = True

        float_dtype = torch.promote_types(self.dt_bias.dtype, torch.float32)
        A = torch.empty(self.nheads, dtype=float_dtype, device=device).uniform_(*A_init_range)
        A_log = A if A.is_meta else torch.log(A)
        self.A_log = nn.Parameter(A_log.to(self.dt_bias.dtype))
        self.A_log._no_weight_decay = True
        D_size = self.d_ssm if self.D_has_hdim else self.nheads
        self.D = nn.Parameter(torch.ones(D_size, dtype=float_dtype, device=device))
        self.D._no_weight_decay = True

        if self.rmsnorm:
            self.norm = RMSNormGated(
                self.d_ssm,
                eps=1e-5,
                norm_before_gate=self.norm_before_gate,
                group_size=self.d_ssm // self.ngroups,
                **factory_kwargs,
            )
        self.out_proj = self._linear(RowParallelLinear)(
            d_inner, self.d_model, bias=bias, **factory_kwargs
        )

    def forward(self, u, seqlen=None, seq_idx=None, cu_seqlens=None, inference_params=None):
        """u (batch, seqlen, d_model), with `seqlen` (batch * seqlen, d_model), to the same shape.

        With sequence_parallel over a process group, u is this rank's part of that along the first
        dimension, and so is the result; every other argument is about all tokens, and caches are of
        the whole batch.

        seq_idx (batch, seqlen) or cu_seqlens (num_sequences + 1,), with batch 1, pack several
        sequences into a row, as in mamba_chunk_scan_combined: none sees another.

        With inference_params the states of this layer are read from its cache (zero at
        seqlen_offset 0) and left there, outside of any autograd graph, ready for the next tokens.
        With cu_seqlens the cache has a state for each sequence, and seq_idx is not looked at.
        """
        name = type(self).__name__
        flat = seqlen is not None and u.dim() == 2
        if u.dim() != 3 - flat or u.shape[-1] != self.d_model:
            raise ValueError(
                f"{name}: u must have shape (batch, seqlen, d_model={self.d_model}), "
                f"got {tuple(u.shape)}"
            )
        batch = u.shape[0] * (self.world_size if self.sequence_parallel else 1)
        if flat:
            if batch % seqlen != 0:
                raise ValueError(
                    f"{name}: seqlen = {seqlen} must divide the {batch} tokens of u, on all ranks"
                )
            batch //= seqlen
        else:
            seqlen = u.shape[1]
        if cu_seqlens is not None and batch != 1:
            raise ValueError(
                f"{name}: cu_seqlens needs u with batch = 1, got u of shape {tuple(u.shape)}"
            )
        if inference_params is None:
            return self._forward(u, seq_idx, cu_seqlens, seqlen=seqlen)
        cached = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        states = self._get_states_from_cache(inference_params, cached)
        continues = inference_params.seqlen_offset > 0
        if continues and seqlen == 1 and seq_idx is None and cu_seqlens is None:
            out = self.step(u[:, None] if flat else u, *states)[0]
            return out[:, 0] if flat else out
        return self._forward_cached(u, seqlen, seq_idx, cu_seqlens, *states, continues)

    def step(self, hidden_states, conv_state, ssm_state):
        """One token, hidden_states (batch, 1, d_model). Both states are updated in place.

        With sequence_parallel over a process group, hidden_states and out are this rank's part of
        the batch, the states those of the whole batch.

        conv_state (batch, channels, d_conv) holds the last inputs of the convolution and ssm_state
        (batch, nheads, headdim, d_state) the state of the scan. Returns (out, conv_state,
        ssm_state).
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(
                f"{type(self).__name__}.step: hidden_states must have shape (batch, 1, d_model), "
                f"got {tuple(hidden_states.shape)}"
            )
        zxbcdt = step_linear(self.in_proj, hidden_states[:, 0])
        return self._step(zxbcdt, conv_state, ssm_state), conv_state, ssm_state

    def _step(self, zxbcdt, conv_state, ssm_state):
        """step from what in_proj makes of the token, zxbcdt (batch, d_in_proj)."""
        z0, x0, z, xBC, dt = self._split(zxbcdt)
        xBC = step_conv1d(self.conv1d, self.act, xBC, conv_state)
        x, B, C = self._split_heads(xBC)

        dt_bias, softplus = self.dt_bias, True
        dt_min, dt_max = self._dt_range()
        if dt_min > 0 or dt_max is not None:
            dt = F.softplus(upcast(dt) + upcast(dt_bias)).clamp(dt_min, dt_max)
            dt_bias, softplus = None, False

        def per_channel(M):  # (..., nheads) as (..., nheads, headdim)
            return M[..., None].expand(*M.shape, self.headdim)

        D = self._D()
        A, A_is_log = A_of_step(self.A_log)
        y = ops.selective_state_update(
            ssm_state.detach(),
            x,
            per_channel(dt),
            per_channel(A)[..., None].expand(-1, -1, self.d_state),
            B,
            C,
            D=D if D.dim() == 2 else per_channel(D),
            z=None if self.rmsnorm else z.unflatten(-1, (self.nheads, self.headdim)),
            dt_bias=None if dt_bias is None else per_channel(dt_bias),
            dt_softplus=softplus,
            A_is_log=A_is_log,
        )
        y = y.flatten(1)
        if self._norm_is_fusible() and is_plain(self.out_proj, nn.Linear):
            weight, bias = self.out_proj.weight, self.out_proj.bias
            norm = {"norm_weight": self.norm.weight, "eps": self.norm.eps}
            return ops.step_linear(y, weight, bias, z=z, **norm)[:, None]
        return step_linear(self.out_proj, self._gate(z0, x0, z, y))[:, None]

    def allocate_inference_cache(
        self, batch_size, max_seqlen, dtype=None, *, state_dtype=None, **kwargs
    ):
        """Zero states (conv_state, ssm_state) for step; max_seqlen does not matter.

        dtype: of both, state_dtype: of ssm_state; None: that of the weights.
        """
        channels = self.d_ssm + 2 * self.ngroups * self.d_state
        options = cache_options(self, [self.conv1d, self.in_proj], dtype)
        conv_state = torch.zeros(batch_size, self.d_conv, channels, **options).transpose(1, 2)
        options = cache_options(self, [self.in_proj, self.conv1d], state_dtype or dtype)
        shape = (batch_size, self.nheads, self.headdim, self.d_state)
        ssm_state = torch.zeros(shape, **options)
        return conv_state, ssm_state

    def _get_states_from_cache(self, inference_params, batch_size, initialize_states=False):
        return states_from_cache(self, inference_params, batch_size, initialize_states)

    def _linear(self, parallel):
        """Class of a projection: nn.Linear, or `parallel` over the process group."""
        if self.process_group is None:
            return nn.Linear
        return partial(
            parallel, process_group=self.process_group, sequence_parallel=self.sequence_parallel
        )

    def _D(self):
        """(nheads) or (nheads, headdim)."""
        return self.D.unflatten(0, (self.nheads, self.headdim)) if self.D_has_hdim else self.D

    def _dt_range(self):
        low, high = self.dt_limit
        return float(low), None if high is None or high == math.inf else float(high)

    def _split(self, zxbcdt):
        """Output of in_proj, (..., d_in_proj), as z0, x0, z, xBC, dt."""
        d_mlp = self.d_inner - self.d_ssm
        channels = self.d_ssm + 2 * self.ngroups * self.d_state
        return zxbcdt.split([d_mlp, d_mlp, self.d_ssm, channels, self.nheads], dim=-1)

    def _split_heads(self, xBC):
        """Output of the convolution, (..., channels), as x by head, B and C by group."""
        matrix = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_ssm, matrix, matrix], dim=-1)
        B, C = (M.unflatten(-1, (self.ngroups, self.d_state)) for M in (B, C))
        return x.unflatten(-1, (self.nheads, self.headdim)), B, C

    def _is_fusible(self):
        linear = nn.Linear if self.process_group is None else RowParallelLinear
        return (
            is_plain(self.conv1d, nn.Conv1d)
            and is_plain(self.out_proj, linear)
            and (not self.rmsnorm or is_plain(self.norm, RMSNormGated))
        )

    def _norm_is_fusible(self):
        """Whether out_proj follows a norm of all of its input, with the gate before the norm."""
        return (
            self.rmsnorm
            and is_plain(self.norm, RMSNormGated)
            and not self.norm.norm_before_gate
            and self.norm.group_size in (None, self.d_inner)
            and self.norm.bias is None
            and self.d_ssm == self.d_inner
        )

    def _project_in(self, u, seqlen, cached=False):
        """Tokens as forward takes them to (batch, seqlen, d_in_proj)."""
        zxbcdt = step_linear(self.in_proj, u) if cached else self.in_proj(u)
        return zxbcdt.unflatten(0, (-1, seqlen)) if u.dim() == 2 else zxbcdt

    def _forward(self, u, seq_idx=None, cu_seqlens=None, initial_states=None, seqlen=None):
        zxbcdt = self._project_in(u, seqlen)
        dt_min, dt_max = self._dt_range()
        if self.use_mem_eff_path and self._is_fusible():
            out, _ = ops.mamba2_inner(
                zxbcdt,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                A_of(self.A_log),
                self.headdim,
                self.ngroups,
                self._D(),
                self.dt_bias,
                self.norm.weight if self.rmsnorm else None,
                self.out_proj.weight,
                self.out_proj.bias,
                initial_states,
                seq_idx,
                cu_seqlens,
                norm_eps=self.norm.eps if self.rmsnorm else 1e-5,
                norm_before_gate=self.norm_before_gate,
                dt_min=dt_min,
                dt_max=dt_max,
            )
            out = out.flatten(0, 1) if u.dim() == 2 else out
            return out if self.process_group is None else self.out_proj.reduce(out)
        z0, x0, z, xBC, dt = self._split(zxbcdt)
        conv_seq_idx = seq_idx
        if cu_seqlens is not None:
            conv_seq_idx = sequence_ids(cu_seqlens, zxbcdt.shape[1], seq_idx)
        xBC, _ = self._convolve(xBC.transpose(1, 2), conv_seq_idx)
        y, _ = self._scan(z, xBC, dt, initial_states, seq_idx, cu_seqlens)
        return self._project_out(z0, x0, z, y, u)

    def _forward_cached(self, u, seqlen, seq_idx, cu_seqlens, conv_state, ssm_state, continues):
        """The block part by part. Leaves the states after the last token in conv_state and
        ssm_state, and starts from them if `continues`."""
        z0, x0, z, xBC, dt = self._split(self._project_in(u, seqlen, cached=True))
        inputs = xBC.transpose(1, 2)  # (batch, channels, seqlen)
        past = torch.zeros_like(conv_state, dtype=inputs.dtype)
        if continues:
            past = read_cache(conv_state, inputs.dtype)
        if cu_seqlens is not None:
            seq_idx = None
            longer, offsets, tokens = _behind_history(inputs, past, cu_seqlens)
            xBC, _ = self._convolve(longer, sequence_ids(offsets, longer.shape[2]))
            xBC = xBC.index_select(2, tokens)
            columns = ops.causal_conv1d_varlen_states(longer[0].detach().T, offsets, self.d_conv)
        else:
            xBC, final_states = self._convolve(inputs, seq_idx, past[..., 1:])
            if seq_idx is None:
                columns = torch.cat([past, inputs[..., -self.d_conv :].detach()], dim=-1)
            else:  # of the last sequence
                columns = F.pad(final_states.detach(), (1, 0))
        initial_states = read_cache(ssm_state, A_of(self.A_log).dtype) if continues else None
        y, final_states = self._scan(z, xBC, dt, initial_states, seq_idx, cu_seqlens)
        conv_state.copy_(columns[..., -self.d_conv :])
        ssm_state.copy_(final_states.detach())
        return self._project_out(z0, x0, z, y, u, cached=True)

    def _convolve(self, x, seq_idx=None, history=None):
        """(batch, channels, seqlen) behind history (batch, channels, d_conv - 1): the convolution
        with its activation, and final states where it is the fused operation."""
        if is_plain(self.conv1d, nn.Conv1d):
            return ops.causal_conv1d(
                x, self.conv1d.weight.squeeze(1), self.conv1d.bias, seq_idx, history, silu=True
            )
        if seq_idx is not None:
            raise NotImplementedError(
                f"{type(self).__name__}: packed sequences need a conv1d that is a plain "
                "torch.nn.Conv1d without hooks"
            )
        window = x if history is None else torch.cat([history, x], dim=-1)
        start = window.shape[-1] - x.shape[-1]
        return self.act(self.conv1d(window)[..., start : start + x.shape[-1]]).to(x.dtype), None

    def _scan(self, z, xBC, dt, initial_states, seq_idx, cu_seqlens):
        """y (batch, seqlen, d_ssm), gated unless the norm does that, and the final states."""
        x, B, C = self._split_heads(xBC.transpose(1, 2))
        dt_min, dt_max = self._dt_range()
        y, final_states = ops.ssd_chunk_scan(
            x,
            dt,
            A_of(self.A_log),
            B,
            C,
            self._D(),
            None if self.rmsnorm else z.unflatten(-1, (self.nheads, self.headdim)),
            self.dt_bias,
            initial_states,
            seq_idx,
            cu_seqlens,
            dt_softplus=True,
            dt_min=dt_min,
            dt_max=dt_max,
        )
        return y.flatten(2), final_states

    def _project_out(self, z0, x0, z, y, u, cached=False):
        """y (batch, seqlen, d_ssm) to tokens as forward got them in u."""
        y = self._gate(z0, x0, z, y)
        y = y.flatten(0, 1) if u.dim() == 2 else y
        return step_linear(self.out_proj, y) if cached else self.out_proj(y)

    def _gate(self, z0, x0, z, y):
        """Input of out_proj: y, normalized, behind the MLP."""
        if self.rmsnorm:
            y = self.norm(y, z)
        if self.d_ssm < self.d_inner:
            y = torch.cat([F.silu(z0) * x0, y], dim=-1)
        return y


TAKES_PROJECTED.add(Mamba2)
