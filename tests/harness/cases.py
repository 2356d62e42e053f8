"""Calls to judge: sizes, options, types and layouts on one side, tensors on the other.

A case is a frozen row of a table; `case.call(device)` makes the tensors, the same values on every
device. `variations` spells a table as a base row and what changes from it.
"""

import dataclasses
import math
import random
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from . import poison

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PARAMETER_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# Ways to pack a row. "padded" adds padding in front of sequences, in them, between and behind them;
# "blank" also makes row 0 all padding.
PACKINGS = (None, "single", "packed", "padded", "blank")


@dataclasses.dataclass
class Call:
    """One call of an operation, its arguments inside red zones."""

    op: str
    arguments: dict[str, Any]
    differentiable: tuple[str, ...]
    mutable: tuple[str, ...]
    results: tuple[str, ...]
    cotangents: dict[str, torch.Tensor | None]
    arena: poison.Arena
    exact: bool
    note: str

    def function(self):
        return getattr(torch.ops.mamba_ssm, self.op).default

    def invoke(self, **replaced):
        """The op's results by name; None and a tensor that the op updates are not among them."""
        results = self.function()(**{**self.arguments, **replaced})
        results = results if isinstance(results, tuple) else (results,)
        results = [r for r in results if r is not None]
        return dict(zip(self.results, results, strict=True))


class Draw:
    """Random values from one seed, made in float64 on the CPU."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.random = random.Random(seed)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, low, high, *shape):
        return torch.empty(shape, dtype=torch.float64).uniform_(low, high, generator=self.generator)

    def complex(self, *shape):
        return torch.complex(self.normal(*shape), self.normal(*shape))

    def choice(self, values, *shape):
        index = torch.randint(len(values), shape, generator=self.generator)
        return torch.tensor(values, dtype=torch.float64)[index]

    def sparse(self, *shape):
        """Small integers, mostly 0: sums of many products of them are exact in float32."""
        return self.choice([-1, 0, 0, 1], *shape)

    def complex_sparse(self, *shape):
        return torch.complex(self.sparse(*shape), self.sparse(*shape))


def packed_ids(draw, batch, seqlen, packing):
    """seq_idx of that packing: unsorted ids that do not start at 0, runs of random length >= 1."""
    ids = torch.empty(batch, seqlen, dtype=torch.int64)
    for b in range(batch):
        if packing == "blank" and b == 0:
            ids[b] = -1
            continue
        names = draw.random.sample(range(max(1000, seqlen)), max(seqlen, 1))
        row = []
        if packing == "padded":
            row += [-1] * draw.random.randrange(3)
        while len(row) < seqlen:
            longest = seqlen if packing == "single" else max(1, seqlen // 2)
            length = seqlen if packing == "single" else draw.random.randint(1, longest)
            run = [names.pop()] * length
            if packing in ("padded", "blank") and length > 2 and draw.random.random() < 0.3:
                run[draw.random.randrange(1, length - 1)] = -3  # inside a sequence
            row += run
            if packing in ("padded", "blank"):
                row += [draw.random.choice([-1, -7])] * draw.random.choice([0, 0, 1, 3])
        ids[b] = torch.tensor(row[:seqlen], dtype=torch.int64)
    if packing == "padded" and seqlen > 1:
        ids[-1:, -1] = -2
    return ids


def cuts(draw, count, total):
    """cu_seqlens of `count` sequences with `total` tokens; some are empty."""
    inner = sorted(draw.random.randint(0, total) for _ in range(count - 1))
    return torch.tensor([0, *inner, total][: count + 1])


def slots(draw, batch, num_slots):
    """Distinct slots in any order, about every third row padding."""
    order = draw.random.sample(range(num_slots), batch)
    indices = [draw.random.choice([-1, -5]) if draw.random.random() < 0.3 else i for i in order]
    return torch.tensor(indices, dtype=torch.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What the cases of all operations share. `dtypes` and `layouts` are exceptions by argument."""

    op: ClassVar[str]
    results: ClassVar[tuple[str, ...]]
    differentiable: ClassVar[tuple[str, ...]] = ()
    mutable: ClassVar[tuple[str, ...]] = ()

    dtype: torch.dtype = torch.float32
    dtypes: Mapping[str, torch.dtype] = dataclasses.field(default_factory=dict)
    index_dtype: torch.dtype = torch.int32
    layout: str = "contiguous"
    layouts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    exact: bool = False  # integers and powers of two, so that every sum is exact
    only_result: str | None = None  # the one result that the loss reads
    seed: int = 0

    def values(self, draw):
        """{argument: float64, complex128, int64 or plain value}, for the op's schema."""
        raise NotImplementedError

    def own_dtype(self, name, values):
        """The type of an argument when `dtypes` says nothing."""
        raise NotImplementedError

    def dtype_of(self, name, values):
        if name in self.dtypes:
            return self.dtypes[name]
        if values.dtype == torch.int64:
            return self.index_dtype
        if values.dtype == torch.bool:
            return torch.bool
        return self.own_dtype(name, values)

    def call(self, device="cpu"):
        draw = Draw(self.seed)
        arena = poison.Arena(device)
        arguments = {}
        for name, values in self.values(draw).items():
            if not isinstance(values, torch.Tensor):
                arguments[name] = values
                continue
            layout = self.layouts.get(name, self.layout)
            distinct = name in self.mutable or values.dtype == torch.int64
            if distinct and layout in poison.OVERLAPPING:
                layout = "sliced"
            arguments[name] = arena.place(name, values.to(self.dtype_of(name, values)), layout)

        from . import oracle  # the contract's result types

        dtypes = oracle.types(arguments)
        cotangents = {}
        if self.differentiable:
            for name, shape in self.result_shapes().items():
                if self.only_result not in (None, name):
                    cotangents[name] = None
                    continue
                dtype = oracle.result_dtype(self.op, name, dtypes)
                if dtype.is_complex:
                    values = draw.complex_sparse(*shape) if self.exact else draw.complex(*shape)
                else:
                    values = draw.sparse(*shape) if self.exact else draw.normal(*shape)
                layout = self.layouts.get("d" + name, self.layout)
                cotangents[name] = arena.place("d" + name, values.to(dtype), layout)
        return Call(
            op=self.op,
            arguments=arguments,
            differentiable=self.differentiable_of(arguments),
            mutable=tuple(name for name in self.mutable if name in arguments),
            results=self.results,
            cotangents=cotangents,
            arena=arena,
            exact=self.exact,
            note=repr(self),
        )

    def differentiable_of(self, arguments):
        return tuple(n for n in self.differentiable if arguments.get(n) is not None)

    def result_shapes(self):
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conv(Case):
    op: ClassVar[str] = "causal_conv1d"
    results: ClassVar[tuple[str, ...]] = ("out", "final_states")
    differentiable: ClassVar[tuple[str, ...]] = ("x", "weight", "bias", "initial_states")

    batch: int = 2
    dim: int = 5
    seqlen: int = 19
    width: int = 4
    bias: bool = True
    silu: bool = True
    packing: str | None = None
    initial_states: bool = True

    def values(self, draw):
        exact = self.exact
        silu = self.silu and (self.bias or not exact)
        normal = draw.sparse if exact else draw.normal
        values = {
            "x": normal(self.batch, self.dim, self.seqlen),
            "weight": normal(self.dim, self.width) if exact else 0.5 * normal(self.dim, self.width),
            "silu": silu,
        }
        if self.bias:
            values["bias"] = normal(self.dim)
            if exact and silu:
                values["bias"] += 128  # far right of 0, a * sigmoid(a) is a
        if self.packing:
            values["seq_idx"] = packed_ids(draw, self.batch, self.seqlen, self.packing)
        if self.initial_states:
            values["initial_states"] = normal(self.batch, self.dim, self.width - 1)
        return values

    def own_dtype(self, name, values):
        if name in ("weight", "bias") and self.dtype != torch.float64:
            return torch.float32
        return self.dtype

    def result_shapes(self):
        return {
            "out": (self.batch, self.dim, self.seqlen),
            "final_states": (self.batch, self.dim, self.width - 1),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvUpdate(Case):
    op: ClassVar[str] = "causal_conv1d_update"
    results: ClassVar[tuple[str, ...]] = ("out",)
    mutable: ClassVar[tuple[str, ...]] = ("conv_state",)

    batch: int = 3
    dim: int = 5
    seqlen: int | None = None  # None: x is (batch, dim)
    width: int = 4
    state_len: int | None = None  # None: width - 1
    num_slots: int | None = None  # None: batch, without conv_state_indices
    bias: bool = True
    silu: bool = True
    ring: bool = False

    def values(self, draw):
        normal = draw.sparse if self.exact else draw.normal
        state_len = self.width - 1 if self.state_len is None else self.state_len
        num_slots = self.batch if self.num_slots is None else self.num_slots
        silu = self.silu and (self.bias or not self.exact)
        tokens = () if self.seqlen is None else (self.seqlen,)
        values = {
            "x": normal(self.batch, self.dim, *tokens),
            "conv_state": normal(num_slots, self.dim, state_len),
            "weight": normal(self.dim, self.width) * (1 if self.exact else 0.5),
            "silu": silu,
        }
        if self.bias:
            values["bias"] = normal(self.dim)
            if self.exact and silu:
                values["bias"] += 128
        if self.ring:
            values["cache_seqlens"] = torch.tensor(
                [draw.random.randint(-40, 100) for _ in range(self.batch)], dtype=torch.int64
            )
        if self.num_slots is not None:
            values["conv_state_indices"] = slots(draw, self.batch, num_slots)
        return values

    own_dtype = Conv.own_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class VarlenStates(Case):
    op: ClassVar[str] = "causal_conv1d_varlen_states"
    results: ClassVar[tuple[str, ...]] = ("out",)

    total_tokens: int = 23
    dim: int = 5
    num_sequences: int = 4
    state_len: int = 4

    def values(self, draw):
        return {
            "x": draw.normal(self.total_tokens, self.dim),
            "cu_seqlens": cuts(draw, self.num_sequences, self.total_tokens),
            "state_len": self.state_len,
        }

    def own_dtype(self, name, values):
        return self.dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scan(Case):
    op: ClassVar[str] = "selective_scan"
    results: ClassVar[tuple[str, ...]] = ("out", "last_state")
    differentiable: ClassVar[tuple[str, ...]] = (
        "u",
        "delta",
        "A",
        "B",
        "C",
        "D",
        "z",
        "delta_bias",
        "initial_state",
    )

    batch: int = 2
    dim: int = 6
    seqlen: int = 19
    dstate: int = 4
    B: int | str = 1  # groups; "flat": (batch, dstate, seqlen); "constant": (dim, dstate)
    C: int | str = 1
    complex_A: bool = False
    D: bool = True
    z: bool = True
    delta_bias: bool = True
    delta_softplus: bool = True
    initial_state: bool = True
    packing: str | None = None
    wide_delta: bool = False  # delta from far below to far above the threshold of softplus

    def values(self, draw):
        exact = self.exact
        normal = draw.sparse if exact else draw.normal
        batch, dim, seqlen, dstate = self.batch, self.dim, self.seqlen, self.dstate
        values = {"u": normal(batch, dim, seqlen), "delta_softplus": self.delta_softplus}
        if exact:  # softplus leaves 32 as it is and makes of -256 a zero of float32
            values["delta"] = draw.choice(
                [32, 32, -256] if self.delta_softplus else [1, 1, 2], batch, dim, seqlen
            )
            values["A"] = draw.choice([0, 0, -1024], dim, dstate)  # decays 1 and 0
        else:
            if self.wide_delta:
                values["delta"] = draw.uniform(-120, 40, batch, dim, seqlen)
            elif self.delta_softplus:
                values["delta"] = draw.uniform(-3, 2, batch, dim, seqlen)
            else:
                values["delta"] = draw.uniform(-0.05, 0.6, batch, dim, seqlen)
            values["A"] = -draw.uniform(0.05, 1.5, dim, dstate)
        if self.complex_A:
            imaginary = torch.zeros(dim, dstate) if exact else 2 * draw.normal(dim, dstate)
            values["A"] = torch.complex(values["A"], imaginary.double())
        for name, form in (("B", self.B), ("C", self.C)):
            columns = 2 * seqlen if self.complex_A else seqlen
            if form == "constant" and self.complex_A:
                values[name] = (draw.complex_sparse if exact else draw.complex)(dim, dstate)
            elif form == "constant":
                values[name] = normal(dim, dstate)
            elif form == "flat":
                values[name] = normal(batch, dstate, columns)
            else:
                values[name] = normal(batch, form, dstate, columns)
            if not exact:
                values[name] = values[name] / math.sqrt(max(dstate, 1))
        if self.D:
            values["D"] = normal(dim)
        if self.z:  # silu leaves 24 as it is in float32
            values["z"] = (
                draw.choice([0, 24], batch, dim, seqlen) if exact else normal(batch, dim, seqlen)
            )
        if self.delta_bias:
            if exact:
                values["delta_bias"] = draw.choice([0, 32] if self.delta_softplus else [0, 2], dim)
            else:
                values["delta_bias"] = draw.uniform(-0.1, 0.1, dim)
        if self.initial_state:
            shape = (batch, dim, dstate)
            if self.complex_A:
                values["initial_state"] = (draw.complex_sparse if exact else draw.complex)(*shape)
            else:
                values["initial_state"] = normal(*shape)
        if self.packing:
            values["seq_idx"] = packed_ids(draw, batch, seqlen, self.packing)
        return values

    def own_dtype(self, name, values):
        wide = self.dtype == torch.float64
        if values.is_complex():
            return torch.complex128 if wide else torch.complex64
        constant = name in ("B", "C") and values.dim() == 2
        if name in ("A", "D", "delta_bias", "initial_state") or constant:
            return torch.float64 if wide else torch.float32
        return self.dtype

    def dtype_of(self, name, values):
        if name in ("B", "C") and values.dim() == 2 and not values.is_complex():
            name = "A"  # a constant B or C has A's type
        if values.is_complex():
            return self.own_dtype(name, values)
        return super().dtype_of(name, values)

    def result_shapes(self):
        return {
            "out": (self.batch, self.dim, self.seqlen),
            "last_state": (self.batch, self.dim, self.dstate),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateUpdate(Case):
    op: ClassVar[str] = "selective_state_update"
    results: ClassVar[tuple[str, ...]] = ("out",)
    mutable: ClassVar[tuple[str, ...]] = ("state", "intermediate_states")

    batch: int = 3
    tokens: int | None = None  # None: no axis of tokens
    nheads: int | None = None  # None: no axis of heads
    ngroups: int = 1
    dim: int = 5  # headdim with heads
    dstate: int = 4
    num_slots: int | None = None
    intermediate_states: bool = False
    D: bool = True
    z: bool = True
    dt_bias: bool = True
    dt_softplus: bool = True
    tied: str | None = None  # "head": A, dt, dt_bias expanded from one decay per head; "channel":
    # A expanded over dstate
    A_is_log: bool = False  # but in exact cases: no logarithm is

    def values(self, draw):
        exact = self.exact
        normal = draw.sparse if exact else draw.normal
        heads = () if self.nheads is None else (self.nheads,)
        groups = () if self.nheads is None else (self.ngroups,)
        num_slots = self.batch if self.num_slots is None else self.num_slots
        inner = (*heads, self.dim)
        outer = (self.batch,) if self.tokens is None else (self.batch, self.tokens)
        values = {
            "state": normal(num_slots, *inner, self.dstate),
            "x": normal(*outer, *inner),
            "B": normal(*outer, *groups, self.dstate),
            "C": normal(*outer, *groups, self.dstate),
            "dt_softplus": self.dt_softplus,
        }
        rows = (*heads, 1) if self.tied == "head" else inner
        states = 1 if self.tied else self.dstate
        if exact:
            values["dt"] = draw.choice([32, -256] if self.dt_softplus else [0, 1], *outer, *rows)
            values["A"] = draw.choice([0, -1024], *rows, states)
            bias = draw.choice([0, 32] if self.dt_softplus else [0, 1], *rows)
        else:
            low, high = (-3, 30) if self.dt_softplus else (-0.05, 0.6)
            values["dt"] = draw.uniform(low, high, *outer, *rows)
            values["A"] = -draw.uniform(0.05, 1.5, *rows, states)
            if self.A_is_log:
                values["A"] = torch.log(-values["A"])
                values["A_is_log"] = True
            bias = draw.uniform(-0.1, 0.1, *rows)
        if self.dt_bias:
            values["dt_bias"] = bias
        if self.D:
            values["D"] = normal(*inner)
        if self.z:
            shape = (*outer, *inner)
            values["z"] = draw.choice([0, 24], *shape) if exact else draw.normal(*shape)
        if self.num_slots is not None:
            values["state_batch_indices"] = slots(draw, self.batch, num_slots)
        if self.intermediate_states:  # rows of padding keep what they have
            values["intermediate_states"] = normal(*outer, *inner, self.dstate)
        return values

    def call(self, device="cpu"):
        call = super().call(device)
        if self.tied:
            inner = call.arguments["state"].shape[1:-1]
            for name in ("dt", "dt_bias"):
                if name in call.arguments:
                    M = call.arguments[name]
                    call.arguments[name] = M.expand(*M.shape[:-1], self.dim)
            call.arguments["A"] = call.arguments["A"].expand(*inner, self.dstate)
        return call

    def own_dtype(self, name, values):
        if name in ("A", "D", "dt_bias") and self.dtype != torch.float64:
            return torch.float32
        return self.dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ssd(Case):
    op: ClassVar[str] = "ssd_chunk_scan"
    results: ClassVar[tuple[str, ...]] = ("out", "final_states")
    differentiable: ClassVar[tuple[str, ...]] = (
        "x",
        "dt",
        "A",
        "B",
        "C",
        "D",
        "z",
        "dt_bias",
        "initial_states",
    )

    batch: int = 2
    seqlen: int = 19
    nheads: int = 4
    headdim: int = 5
    ngroups: int = 2
    dstate: int = 4
    D: str | None = "head"  # "head": (nheads); "channel": (nheads, headdim)
    z: bool = True
    dt_bias: bool = True
    dt_softplus: bool = True
    limits: bool = False  # dt_min and dt_max where they cut off some steps
    initial_states: bool | str = True  # "first": with cu_seqlens, of the first sequence alone
    packing: str | None = None
    num_sequences: int | None = None  # of cu_seqlens, with batch 1
    wide_dt: bool = False  # from far below to far above the threshold of softplus
    projection: bool = False  # x, z, B, C and dt are slices of one tensor, as in a module

    def values(self, draw):
        exact, softplus = self.exact, self.dt_softplus
        normal = draw.sparse if exact else draw.normal
        batch, seqlen, nheads, dstate = self.batch, self.seqlen, self.nheads, self.dstate
        shape, matrix = (batch, seqlen, nheads, self.headdim), (batch, seqlen, self.ngroups, dstate)
        values = {"x": normal(*shape), "dt_softplus": softplus}
        if exact:  # softplus leaves 32 as it is and makes of -256 a zero of float32
            values["dt"] = draw.choice([32, 32, -256] if softplus else [1, 1, 2], *shape[:3])
            values["A"] = draw.choice([0, 0, -1024], nheads)  # decays 1 and 0
        else:
            low, high = (-120, 40) if self.wide_dt else (-3, 2) if softplus else (-0.05, 0.6)
            values["dt"] = draw.uniform(low, high, *shape[:3])
            values["A"] = -draw.uniform(0.05, 1.5, nheads)
        for name in ("B", "C"):
            values[name] = normal(*matrix) / (1 if exact else math.sqrt(max(dstate, 1)))
        if self.D:
            values["D"] = normal(nheads) if self.D == "head" else normal(nheads, self.headdim)
        if self.z:  # silu leaves 24 as it is in float32
            values["z"] = draw.choice([0, 24], *shape) if exact else normal(*shape)
        if self.dt_bias:
            if exact:
                values["dt_bias"] = draw.choice([0, 32] if softplus else [0, 2], nheads)
            else:
                values["dt_bias"] = draw.uniform(-0.1, 0.1, nheads)
        if self.limits:
            low, high = (32, 64) if exact and softplus else (2, 3) if exact else (0.1, 0.5)
            values |= {"dt_min": float(low), "dt_max": float(high)}
        spans = [seqlen]  # in which ids start anew
        if self.num_sequences is not None:
            values["cu_seqlens"] = cuts(draw, self.num_sequences, seqlen)
            if draw.random.random() < 0.5:  # else an id may go on behind an offset
                spans = values["cu_seqlens"].diff().tolist()
        if self.initial_states:
            rows = 1 if self.initial_states == "first" else self.result_shapes()["final_states"][0]
            values["initial_states"] = normal(rows, nheads, self.headdim, dstate)
        if self.packing:
            ids = [packed_ids(draw, batch, span, self.packing) for span in spans]
            values["seq_idx"] = torch.cat(ids or [torch.empty(batch, 0, dtype=torch.int64)], dim=1)
        return values

    def call(self, device="cpu"):
        call = super().call(device)
        if self.projection:
            names = [name for name in ("z", "x", "B", "C", "dt") if name in call.arguments]
            parts = [call.arguments[name].flatten(2).to(self.dtype) for name in names]
            whole = call.arena.place("zxBCdt", torch.cat(parts, dim=-1))
            for name, part in zip(names, whole.split([p.shape[-1] for p in parts], dim=-1)):
                call.arguments[name] = part.unflatten(2, call.arguments[name].shape[2:])
        return call

    def own_dtype(self, name, values):
        if name in ("A", "D", "dt_bias", "initial_states") and self.dtype != torch.float64:
            return torch.float32
        return self.dtype

    def result_shapes(self):
        rows = self.batch if self.num_sequences is None else self.num_sequences
        return {
            "out": (self.batch, self.seqlen, self.nheads, self.headdim),
            "final_states": (rows, self.nheads, self.headdim, self.dstate),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(Case):
    op: ClassVar[str] = "mamba_inner"
    results: ClassVar[tuple[str, ...]] = ("out",)
    differentiable: ClassVar[tuple[str, ...]] = (
        "xz",
        "conv1d_weight",
        "conv1d_bias",
        "x_proj_weight",
        "delta_proj_weight",
        "out_proj_weight",
        "out_proj_bias",
        "A",
        "B",
        "C",
        "D",
        "delta_bias",
        "B_proj_bias",
        "C_proj_bias",
        "b_rms_weight",
        "c_rms_weight",
        "dt_rms_weight",
    )

    batch: int = 2
    dim: int = 6
    seqlen: int = 17
    width: int = 4
    dstate: int = 4
    dt_rank: int = 3
    d_model: int = 5
    conv_bias: bool = True
    out_bias: bool = True
    B: str | None = None  # None: from x; "constant"; "flat"
    C: str | None = None
    complex_A: bool = False
    D: bool = True
    delta_bias: bool = True
    proj_bias: bool = False
    rms: bool = False
    delta_softplus: bool = True
    checkpoint_lvl: int = 1

    def values(self, draw):
        dim, rows = self.dim, self.dstate * (2 if self.complex_A else 1)
        from_x = rows * ((self.B is None) + (self.C is None))

        def weight(rows, columns):
            return draw.normal(rows, columns) / math.sqrt(max(columns, 1))

        values = {
            "xz": draw.normal(self.batch, 2 * dim, self.seqlen),
            "conv1d_weight": draw.normal(dim, 1, self.width) / 2,
            "conv1d_bias": draw.normal(dim) / 2 if self.conv_bias else None,
            "x_proj_weight": weight(self.dt_rank + from_x, dim),
            "delta_proj_weight": weight(dim, self.dt_rank),
            "out_proj_weight": weight(self.d_model, dim),
            "out_proj_bias": draw.normal(self.d_model) if self.out_bias else None,
            "A": -draw.uniform(0.1, 1.5, dim, self.dstate),
            "delta_softplus": self.delta_softplus,
            "checkpoint_lvl": self.checkpoint_lvl,
        }
        if self.complex_A:
            values["A"] = torch.complex(values["A"], draw.normal(dim, self.dstate))
        for name, form in (("B", self.B), ("C", self.C)):
            columns = self.seqlen * (2 if self.complex_A else 1)
            if form == "constant":
                values[name] = (draw.complex if self.complex_A else draw.normal)(dim, self.dstate)
            elif form == "flat":
                values[name] = draw.normal(self.batch, self.dstate, columns)
            elif self.proj_bias:
                values[name + "_proj_bias"] = draw.normal(rows)
            if form is None and self.rms:
                values[name.lower() + "_rms_weight"] = draw.uniform(0.5, 1.5, rows)
        if self.rms:
            values["dt_rms_weight"] = draw.uniform(0.5, 1.5, dim)
        if self.D:
            values["D"] = draw.normal(dim)
        if self.delta_bias:
            low, high = (-2, 0) if self.delta_softplus else (0.0, 0.1)
            values["delta_bias"] = draw.uniform(low, high, dim)
        if not self.delta_softplus:  # keeps the decay below 1 or close to it
            for name in {"delta_proj_weight", "dt_rms_weight"} & set(values):
                values[name] *= 0.05
        return values

    def own_dtype(self, name, values):
        wide = self.dtype == torch.float64
        if values.is_complex():
            return torch.complex128 if wide else torch.complex64
        constant = name in ("B", "C") and values.dim() == 2
        if name in ("A", "D", "delta_bias") or constant:
            return torch.float64 if wide else torch.float32
        return self.dtype

    def result_shapes(self):
        return {"out": (self.batch, self.seqlen, self.d_model)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner2(Case):
    op: ClassVar[str] = "mamba2_inner"
    results: ClassVar[tuple[str, ...]] = ("out", "final_states")
    differentiable: ClassVar[tuple[str, ...]] = (
        "zxbcdt",
        "conv1d_weight",
        "conv1d_bias",
        "A",
        "D",
        "dt_bias",
        "norm_weight",
        "out_proj_weight",
        "out_proj_bias",
        "initial_states",
    )

    batch: int = 2
    seqlen: int = 17
    nheads: int = 4
    headdim: int = 3
    ngroups: int = 2
    dstate: int = 4
    d_nonssm: int = 0
    width: int = 4
    d_model: int | None = 5  # None: no projection
    conv_bias: bool = True
    out_bias: bool = True
    D: str | None = "head"  # "head": (nheads); "channel": (nheads, headdim)
    dt_bias: bool = True
    norm: bool = True
    norm_before_gate: bool = False
    silu: bool = True
    limits: bool = False  # dt_min and dt_max where they cut off some steps
    initial_states: bool | str = True  # "first": with cu_seqlens, of the first sequence alone
    packing: str | None = None
    num_sequences: int | None = None  # of cu_seqlens, with batch 1

    @property
    def d_out_proj(self):
        return self.d_nonssm + self.nheads * self.headdim

    def values(self, draw):
        nheads, dim = self.nheads, self.nheads * self.headdim
        channels = dim + 2 * self.ngroups * self.dstate
        columns = 2 * self.d_nonssm + dim + channels + nheads
        values = {
            "zxbcdt": draw.normal(self.batch, self.seqlen, columns),
            "conv1d_weight": draw.normal(channels, self.width) / 2,
            "conv1d_bias": draw.normal(channels) / 2 if self.conv_bias else None,
            "A": -draw.uniform(0.05, 1.5, nheads),
            "headdim": self.headdim,
            "ngroups": self.ngroups,
            "silu": self.silu,
            "norm_before_gate": self.norm_before_gate,
        }
        if self.D:
            values["D"] = draw.normal(nheads, *([self.headdim] if self.D == "channel" else []))
        if self.dt_bias:
            values["dt_bias"] = draw.uniform(-2, 0, nheads)
        if self.norm:  # of few channels and small numbers the norm is ill-conditioned
            values |= {"norm_weight": draw.uniform(0.5, 1.5, dim), "norm_eps": 1e-2}
        if self.d_model is not None:
            values["out_proj_weight"] = draw.normal(self.d_model, self.d_out_proj)
            values["out_proj_weight"] /= math.sqrt(max(self.d_out_proj, 1))
            values["out_proj_bias"] = draw.normal(self.d_model) if self.out_bias else None
        if self.limits:
            values |= {"dt_min": 0.1, "dt_max": 0.5}
        if self.num_sequences is not None:
            values["cu_seqlens"] = cuts(draw, self.num_sequences, self.seqlen)
        if self.initial_states:
            rows = 1 if self.initial_states == "first" else self.result_shapes()["final_states"][0]
            values["initial_states"] = draw.normal(rows, nheads, self.headdim, self.dstate)
        if self.packing:
            values["seq_idx"] = packed_ids(draw, self.batch, self.seqlen, self.packing)
        return values

    def own_dtype(self, name, values):
        if name in ("A", "D", "dt_bias", "initial_states") and self.dtype != torch.float64:
            return torch.float32
        return self.dtype

    def result_shapes(self):
        rows = self.batch if self.num_sequences is None else self.num_sequences
        columns = self.d_out_proj if self.d_model is None else self.d_model
        return {
            "out": (self.batch, self.seqlen, columns),
            "final_states": (rows, self.nheads, self.headdim, self.dstate),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormGated(Case):
    op: ClassVar[str] = "rms_norm_gated"
    results: ClassVar[tuple[str, ...]] = ("out",)
    differentiable: ClassVar[tuple[str, ...]] = ("x", "weight", "bias", "z")

    leading: tuple[int, ...] = (2, 7)  # sizes before the channels
    groups: int = 1
    group: int = 24  # channels of a group
    whole_row: bool = False  # group_size None, with one group
    bias: bool = True
    z: bool = True
    norm_before_gate: bool = True
    is_rms_norm: bool = True
    eps: float = 1e-5

    def values(self, draw):
        channels = self.groups * self.group
        values = {
            "x": draw.normal(*self.leading, channels),
            "weight": draw.uniform(0.5, 1.5, channels),
            "eps": self.eps,
            "group_size": None if self.whole_row else max(self.group, 1),
            "norm_before_gate": self.norm_before_gate,
            "is_rms_norm": self.is_rms_norm,
        }
        if self.bias:
            values["bias"] = draw.normal(channels)
        if self.z:
            values["z"] = draw.normal(*self.leading, channels)
        return values

    def own_dtype(self, name, values):
        if name in ("weight", "bias") and self.dtype != torch.float64:
            return torch.float32
        return self.dtype

    def result_shapes(self):
        return {"out": (*self.leading, self.groups * self.group)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNorm(Case):
    op: ClassVar[str] = "layer_norm"
    differentiable: ClassVar[tuple[str, ...]] = (
        "x",
        "weight",
        "bias",
        "residual",
        "x1",
        "weight1",
        "bias1",
    )

    leading: tuple[int, ...] = (2, 7)
    channels: int = 24
    bias: bool = True
    residual: bool = True
    x1: bool = False
    weight1: bool = False
    bias1: bool = False
    rowscale: bool = False
    dropout_p: float = 0.0
    masks: bool = False  # of x, and of x1 if it is there
    prenorm: bool = True
    residual_in_fp32: bool = False
    is_rms_norm: bool = False
    eps: float = 1e-5

    @property
    def results(self):
        wider = self.residual_in_fp32 and self.dtype in (torch.float16, torch.bfloat16)
        changed = self.residual or self.x1 or self.rowscale or self.masks or wider
        return (
            "out",
            *(["out1"] if self.weight1 else []),
            *(["residual_out"] if self.prenorm and changed else []),
        )

    def values(self, draw):
        shape = (*self.leading, self.channels)

        def mask():
            return draw.uniform(0, 1, *shape) > self.dropout_p

        values = {
            "x": draw.normal(*shape),
            "weight": draw.uniform(0.5, 1.5, self.channels),
            "eps": self.eps,
            "dropout_p": self.dropout_p,
            "prenorm": self.prenorm,
            "residual_in_fp32": self.residual_in_fp32,
            "is_rms_norm": self.is_rms_norm,
        }
        for name in ("residual", "x1"):
            if getattr(self, name):
                values[name] = draw.normal(*shape)
        for name in ("bias", "weight1", "bias1"):
            if getattr(self, name):
                values[name] = draw.normal(self.channels)
        if self.rowscale:
            values["rowscale"] = draw.uniform(0.5, 2, *self.leading)
        if self.masks:
            values["dropout_mask"] = mask()
            if self.x1:
                values["dropout_mask1"] = mask()
        return values

    def own_dtype(self, name, values):
        if name in ("weight", "bias", "weight1", "bias1", "rowscale", "residual"):
            return torch.float64 if self.dtype == torch.float64 else torch.float32
        return self.dtype

    def result_shapes(self):
        return {name: (*self.leading, self.channels) for name in self.results}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeLinear(Case):
    op: ClassVar[str] = "decode_linear"
    results: ClassVar[tuple[str, ...]] = ("out",)

    rows: int = 3
    in_features: int = 24
    out_features: int = 10
    bias: bool = True
    norm: bool = True
    z: bool = True  # with norm
    eps: float = 1e-5

    def values(self, draw):
        shape = (self.rows, self.in_features)
        values = {
            "x": draw.normal(*shape),
            "weight": draw.normal(self.out_features, self.in_features),
            "eps": self.eps,
        }
        if self.bias:
            values["bias"] = draw.normal(self.out_features)
        if self.norm:
            values["norm_weight"] = draw.uniform(0.5, 1.5, self.in_features)
            if self.z:
                values["z"] = draw.normal(*shape)
        return values

    def own_dtype(self, name, values):
        if name in ("bias", "norm_weight", "residual") and self.dtype != torch.float64:
            return torch.float32
        return self.dtype

    def result_shapes(self):
        return {"out": (self.rows, self.out_features)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeLinearPrenorm(DecodeLinear):
    op: ClassVar[str] = "decode_linear_prenorm"
    results: ClassVar[tuple[str, ...]] = ("out", "residual_out")

    z: bool = False
    residual: bool = True
    residual_in_fp32: bool = False

    def values(self, draw):
        values = super().values(draw)
        values["residual_in_fp32"] = self.residual_in_fp32
        if self.residual:
            values["residual"] = draw.normal(self.rows, self.in_features)
        return values

    def result_shapes(self):
        return {**super().result_shapes(), "residual_out": (self.rows, self.in_features)}


def variations(base, *rows, **changes):
    """Rows that each change one thing of `base`: {id: case}, the base row itself first.

    changes: field=[settings]; rows: {field: setting, ...} for rows that have to change several.
    """
    table = {"base": base}
    single = ({field: setting} for field, settings in changes.items() for setting in settings)
    for change in (*single, *rows):
        label = " ".join(f"{field}={short(setting)}" for field, setting in change.items())
        table[label] = dataclasses.replace(base, **change)
    return table


def short(value):
    if isinstance(value, Mapping):
        return ",".join(f"{k}:{short(v)}" for k, v in value.items())
    return str(value).removeprefix("torch.")


def with_dtypes(rows, dtypes=FLOATS):
    """Every row in every type: {"row-dtype": case}; a row's own exceptions stay."""
    return {
        f"{label}-{short(dtype)}": dataclasses.replace(case, dtype=dtype)
        for label, case in rows.items()
        for dtype in dtypes
        if dtype != torch.float64 or not case.dtypes  # float64 allows no exceptions
    }
