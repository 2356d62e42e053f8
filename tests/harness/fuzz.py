"""Random cases: case K of seed S is always the same, whatever was run before."""

import collections
import random

import torch

from . import cases, poison

_WEIGHTS = {
    "causal_conv1d": 22,
    "causal_conv1d_update": 12,
    "causal_conv1d_varlen_states": 4,
    "selective_scan": 26,
    "selective_state_update": 12,
    "ssd_chunk_scan": 22,
    "mamba_inner": 3,
    "mamba2_inner": 4,
    "rms_norm_gated": 8,
    "layer_norm": 8,
    "decode_linear": 4,
    "decode_linear_prenorm": 4,
}
# No sums alone: roots, exponentials.
_INEXACT = (
    "mamba_inner",
    "mamba2_inner",
    "rms_norm_gated",
    "layer_norm",
    "decode_linear",
    "decode_linear_prenorm",
)

# Of any 1000 cases in a row, at least so many have the property.
QUOTAS = {
    **{f"op {op}": 4 * weight for op, weight in _WEIGHTS.items()},
    **{f"type {name}": 120 for name in ("float32", "float16", "bfloat16", "float64")},
    **{f"layout {layout}": 120 for layout in poison.LAYOUTS},
    "packed": 120,
    "padded": 60,
    "cu_seqlens": 40,
    "state in": 250,
    "slots with -1": 45,
    "several tokens": 20,
    "ring": 12,
    "complex A": 30,
    "step limits": 40,
    "slices of one tensor": 20,
    "exact": 300,
    "empty": 20,
    "long": 8,
    "gradients": 400,
}


def case(seed, number):
    """Case `number` of fuzz seed `seed`."""
    rng = random.Random(f"{seed}/{number}")
    op = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
    dtype = rng.choice(cases.FLOATS)
    common = {
        "dtype": dtype,
        "index_dtype": rng.choice([torch.int32, torch.int64]),
        "layout": rng.choice(poison.LAYOUTS) if rng.random() < 0.7 else "contiguous",
        "exact": rng.random() < 0.5 and op not in _INEXACT,
        "seed": rng.getrandbits(32),
    }
    made = _MAKERS[op](rng, dtype)
    if made.get("rms") and common["layout"] in poison.OVERLAPPING:
        common["layout"] = "sliced"  # nor of equal numbers
    names = made.pop("names")
    common["layouts"] = {name: rng.choice(poison.LAYOUTS) for name in names if rng.random() < 0.3}
    x_layout = common["layouts"].get("x", common["layout"])
    if not made.get("is_rms_norm", True) and x_layout == "scalar":
        common["layouts"]["x"] = "sliced"  # the deviation of equal numbers is all cancellation
    if dtype != torch.float64:
        own = made.pop("parameters")
        common["dtypes"] = {
            name: rng.choice(cases.PARAMETER_FLOATS) for name in own if rng.random() < 0.4
        }
        states = made.pop("states")
        common["dtypes"] |= {
            name: rng.choice(choices(dtype))
            for name, choices in states.items()
            if rng.random() < 0.5
        }
    else:
        del made["parameters"], made["states"]
    return made.pop("type")(**common, **made)


def _size(rng, largest):
    """1..largest, small sizes more often; now and then 0."""
    if rng.random() < 0.015:
        return 0
    return max(1, min(largest, round(largest ** rng.random())))


def _length(rng):
    """A number of tokens: mostly below 70, sometimes around the chunk sizes a kernel may use."""
    draw = rng.random()
    if draw < 0.015:
        return 0
    if draw < 0.06:
        return rng.choice([127, 128, 129, 255, 256, 257, 300, 511, 513])
    if draw < 0.25:
        return rng.choice([1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65])
    return rng.randint(1, 40)


def _fewer(length, size):
    """Keeps the long cases narrow."""
    return size if length <= 70 else min(size, 6)


def _flag(rng, chance=0.5):
    return rng.random() < chance


def _packing(rng):
    return rng.choice(cases.PACKINGS[1:]) if _flag(rng, 0.4) else None


def _conv(rng, dtype):
    seqlen = _length(rng)
    return {
        "type": cases.Conv,
        "names": ("x", "weight", "bias", "seq_idx", "initial_states", "dout", "dfinal_states"),
        "parameters": ("weight", "bias"),
        "states": {},
        "batch": _fewer(seqlen, _size(rng, 4)),
        "dim": _fewer(seqlen, _size(rng, 70)),
        "seqlen": seqlen,
        "width": rng.choice([1, 2, 3, 4, 4, 4, 5, 7, 9, 16]),
        "bias": _flag(rng),
        "silu": _flag(rng),
        "packing": _packing(rng),
        "initial_states": _flag(rng),
        "only_result": rng.choice([None, None, "out", "final_states"]),
    }


def _conv_update(rng, dtype):
    batch = _size(rng, 8)
    width = rng.choice([1, 2, 3, 4, 4, 4, 5, 9])
    state_len = width - 1 + rng.choice([0, 0, 1, 2, 13])
    return {
        "type": cases.ConvUpdate,
        "names": ("x", "conv_state", "weight", "bias", "cache_seqlens", "conv_state_indices"),
        "parameters": ("weight", "bias"),
        "states": {},
        "batch": batch,
        "dim": _size(rng, 70),
        "seqlen": rng.choice([None, None, 1, 2, 3, 5, 20, 33]),
        "width": width,
        "state_len": state_len,
        "num_slots": batch + rng.choice([0, 1, 9]) if _flag(rng) else None,
        "bias": _flag(rng),
        "silu": _flag(rng),
        "ring": state_len > 0 and _flag(rng, 0.3),
    }


def _varlen_states(rng, dtype):
    return {
        "type": cases.VarlenStates,
        "names": ("x", "cu_seqlens"),
        "parameters": (),
        "states": {},
        "total_tokens": _length(rng),
        "dim": _size(rng, 70),
        "num_sequences": rng.randint(1, 8),
        "state_len": rng.choice([0, 1, 2, 3, 4, 9]),
    }


def _scan(rng, dtype):
    seqlen = _length(rng)
    dstate = rng.choice([1, 2, 3, 4, 5, 8, 15, 16, 16, 17, 24, 32, 33, 64])
    if _flag(rng, 0.03):
        dstate = rng.choice([128, 200, 256, 257, 300])
    groups = rng.choice([1, 1, 2, 3])
    heads = _size(rng, 24 if dstate < 64 else 4)
    complex_A = _flag(rng, 0.2)
    delta_softplus = _flag(rng)

    def form():
        return rng.choice([groups, groups, "flat" if _flag(rng, 0.5) else 1, "constant"])

    return {
        "type": cases.Scan,
        "names": (*cases.Scan.differentiable, "seq_idx", "dout", "dlast_state"),
        "parameters": ("D", "delta_bias") if complex_A else ("A", "D", "delta_bias"),
        "states": {"initial_state": lambda dtype: (dtype, torch.float32)},
        "batch": _fewer(seqlen, _size(rng, 4)),
        "dim": groups * _fewer(seqlen, heads),
        "seqlen": seqlen,
        "dstate": min(dstate, 16) if seqlen > 70 else dstate,
        "B": form(),
        "C": form(),
        "complex_A": complex_A,
        "D": _flag(rng),
        "z": _flag(rng),
        "delta_bias": _flag(rng),
        "delta_softplus": delta_softplus,
        "initial_state": _flag(rng),
        "packing": _packing(rng),
        "wide_delta": delta_softplus and _flag(rng, 0.2),
        "only_result": rng.choice([None, None, "out", "last_state"]),
    }


def _state_update(rng, dtype):
    batch = _size(rng, 6)
    groups = rng.choice([1, 1, 2, 3])
    return {
        "type": cases.StateUpdate,
        "names": (
            *("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias"),
            *("state_batch_indices", "intermediate_states"),
        ),
        "parameters": ("A", "D", "dt_bias"),
        "states": {
            "state": lambda dtype: cases.PARAMETER_FLOATS,
            "intermediate_states": lambda dtype: cases.PARAMETER_FLOATS,
            "dt": lambda dtype: (dtype, torch.float32),
        },
        "batch": batch,
        "tokens": rng.choice([0, 1, 2, 3, 5, 9, 20]) if _flag(rng) else None,
        "intermediate_states": _flag(rng),
        "nheads": None if _flag(rng) else groups * rng.choice([1, 2, 5]),
        "ngroups": groups,
        "dim": _size(rng, 70),
        "dstate": rng.choice([1, 2, 3, 4, 8, 15, 16, 16, 17, 32, 64, 128, 130, 300]),
        "num_slots": batch + rng.choice([0, 1, 9]) if _flag(rng) else None,
        "D": _flag(rng),
        "z": _flag(rng),
        "dt_bias": _flag(rng),
        "dt_softplus": _flag(rng),
        "tied": rng.choice([None, None, None, "head", "channel"]),
        "A_is_log": _flag(rng),
    }


def _ssd(rng, dtype):
    seqlen = _length(rng)
    groups = rng.choice([1, 1, 2, 3])
    dt_softplus = _flag(rng)
    num_sequences = rng.choice([1, 2, 3, 7]) if _flag(rng, 0.35) else None
    dstate = rng.choice([1, 2, 3, 4, 8, 15, 16, 16, 17, 32, 37, 64, 128])
    projection = _flag(rng, 0.2)
    return {
        "type": cases.Ssd,
        "names": (*cases.Ssd.differentiable, "seq_idx", "cu_seqlens", "dout", "dfinal_states"),
        "parameters": ("A", "D", "dt_bias"),
        "states": {
            "initial_states": lambda dtype: (dtype, torch.float32),
            "dt": lambda dtype: (dtype,) if projection else (dtype, torch.float32),
        },
        "batch": _fewer(seqlen, _size(rng, 4)) if num_sequences is None else 1,
        "seqlen": seqlen,
        "nheads": groups * _fewer(seqlen, _size(rng, 6 if dstate < 64 else 2)),
        "headdim": _fewer(seqlen, _size(rng, 70)),
        "ngroups": groups,
        "dstate": min(dstate, 16) if seqlen > 70 else dstate,
        "D": rng.choice([None, "head", "channel"]),
        "z": _flag(rng),
        "dt_bias": _flag(rng),
        "dt_softplus": dt_softplus,
        "limits": _flag(rng, 0.3),
        "initial_states": rng.choice([False, True, "first" if num_sequences else True]),
        "packing": _packing(rng),
        "num_sequences": num_sequences,
        "wide_dt": dt_softplus and _flag(rng, 0.2),
        "projection": projection,
        "only_result": rng.choice([None, None, "out", "final_states"]),
    }


def _inner(rng, dtype):
    rms = _flag(rng)
    fewest = 4 if rms else 1  # the gradient of a norm of one or two numbers is all cancellation
    return {
        "type": cases.Inner,
        "names": ("xz", "dout"),
        "parameters": (),
        "states": {},
        "batch": rng.randint(1, 3),
        "dim": rng.randint(fewest, 20),
        "seqlen": rng.randint(1, 40),
        "width": rng.choice([2, 3, 4, 5]),
        "dstate": rng.choice([fewest, 4, 16]),
        "dt_rank": rng.randint(fewest, 5),
        "d_model": rng.randint(1, 12),
        "conv_bias": _flag(rng),
        "out_bias": _flag(rng),
        "B": rng.choice([None, None, "constant", "flat"]),
        "C": rng.choice([None, None, "constant", "flat"]),
        "complex_A": _flag(rng, 0.3),
        "D": _flag(rng),
        "delta_bias": _flag(rng),
        "proj_bias": _flag(rng),
        "rms": rms,
        "delta_softplus": _flag(rng),
        "checkpoint_lvl": rng.choice([0, 1]),
    }


def _inner2(rng, dtype):
    ngroups = rng.choice([1, 1, 2, 3])
    num_sequences = rng.choice([None, None, 1, 3])
    return {
        "type": cases.Inner2,
        "names": ("zxbcdt", "dout", "dfinal_states"),
        "parameters": ("conv1d_weight", "conv1d_bias", "A", "D", "dt_bias", "norm_weight"),
        "states": {"initial_states": lambda dtype: (dtype, torch.float32)},
        "batch": 1 if num_sequences is not None else rng.randint(1, 3),
        "seqlen": _length(rng),
        "nheads": ngroups * rng.randint(1, 3),
        "headdim": rng.randint(2, 8),
        "ngroups": ngroups,
        "dstate": rng.randint(1, 16),
        "d_nonssm": rng.choice([0, 0, 1, 6]),
        "width": rng.choice([1, 2, 4, 5]),
        "d_model": rng.choice([None, 1, 8]),
        "conv_bias": _flag(rng),
        "out_bias": _flag(rng),
        "D": rng.choice([None, "head", "channel"]),
        "dt_bias": _flag(rng),
        "norm": _flag(rng),
        "norm_before_gate": _flag(rng),
        "silu": _flag(rng, 0.8),
        "limits": _flag(rng, 0.3),
        "initial_states": _flag(rng),
        "packing": _packing(rng),
        "num_sequences": num_sequences,
    }


def _leading(rng):
    return tuple(_size(rng, 9) for _ in range(rng.randint(0, 4)))


def _norm_gated(rng, dtype):
    whole_row = _flag(rng)
    return {
        "type": cases.NormGated,
        "names": ("x", "weight", "bias", "z", "dout"),
        "parameters": ("weight", "bias"),
        "states": {},
        "leading": _leading(rng),
        "groups": 1 if whole_row else rng.choice([1, 2, 3, 8]),
        "group": rng.choice([4, 5, 8, 16, 17, 24, 31, 64, 65, 128, 200, 513]),
        "whole_row": whole_row,
        "bias": _flag(rng),
        "z": _flag(rng, 0.8),
        "norm_before_gate": _flag(rng),
        "is_rms_norm": _flag(rng),
    }


def _layer_norm(rng, dtype):
    x1 = _flag(rng, 0.3)
    weight1 = _flag(rng, 0.3)
    masks = _flag(rng, 0.3)
    return {
        "type": cases.LayerNorm,
        "names": (*cases.LayerNorm.differentiable, "rowscale", "dout", "dresidual_out"),
        "parameters": ("weight", "bias", "weight1", "bias1", "rowscale"),
        "states": {"residual": lambda dtype: (dtype, torch.float32)},
        "leading": _leading(rng),
        "channels": rng.choice([4, 5, 8, 16, 17, 24, 31, 64, 65, 128, 200, 513, 1000]),
        "bias": _flag(rng),
        "residual": _flag(rng, 0.7),
        "x1": x1,
        "weight1": weight1,
        "bias1": weight1 and _flag(rng),
        "rowscale": not x1 and _flag(rng, 0.3),
        "dropout_p": rng.choice([0.0, 0.1, 0.5]) if masks else 0.0,
        "masks": masks,
        "prenorm": _flag(rng, 0.7),
        "residual_in_fp32": _flag(rng),
        "is_rms_norm": _flag(rng),
    }


def _decode_linear(rng, dtype):
    return {
        "type": cases.DecodeLinear,
        "names": ("x", "weight", "bias", "z", "norm_weight"),
        "parameters": ("bias", "norm_weight"),
        "states": {},
        "rows": rng.choice([0, 1, 1, 1, 2, 3, 4, 5, 9]),
        "in_features": rng.choice([1, 5, 8, 16, 24, 48, 65, 128, 513, 520, 1000]),
        "out_features": rng.choice([1, 3, 8, 17, 64, 65, 200]),
        "bias": _flag(rng),
        "norm": _flag(rng),
        "z": _flag(rng),
    }


def _decode_linear_prenorm(rng, dtype):
    return {
        **_decode_linear(rng, dtype),
        "type": cases.DecodeLinearPrenorm,
        "names": ("x", "weight", "bias", "residual", "norm_weight"),
        "states": {"residual": lambda dtype: (dtype, torch.float32)},
        "norm": True,
        "z": False,
        "residual": _flag(rng, 0.7),
        "residual_in_fp32": _flag(rng),
    }


_MAKERS = {
    "causal_conv1d": _conv,
    "causal_conv1d_update": _conv_update,
    "causal_conv1d_varlen_states": _varlen_states,
    "selective_scan": _scan,
    "selective_state_update": _state_update,
    "ssd_chunk_scan": _ssd,
    "mamba_inner": _inner,
    "mamba2_inner": _inner2,
    "rms_norm_gated": _norm_gated,
    "layer_norm": _layer_norm,
    "decode_linear": _decode_linear,
    "decode_linear_prenorm": _decode_linear_prenorm,
}


def properties(case):
    """The quotas that a case counts for."""
    names = ("batch", "dim", "headdim", "seqlen", "total_tokens", "tokens", "rows")
    sizes = [getattr(case, name, 1) for name in names]
    sizes += getattr(case, "leading", ())
    packing = getattr(case, "packing", None)
    having = {
        "packed": packing is not None,
        "cu_seqlens": getattr(case, "num_sequences", None) is not None,
        "padded": packing in ("padded", "blank"),
        "state in": bool(
            getattr(case, "initial_states", False)
            or getattr(case, "initial_state", False)
            or case.mutable
        ),
        "slots with -1": getattr(case, "num_slots", None) is not None,
        "several tokens": (getattr(case, "tokens", None) or 0) > 1,
        "ring": getattr(case, "ring", False),
        "complex A": getattr(case, "complex_A", False),
        "step limits": getattr(case, "limits", False),
        "slices of one tensor": getattr(case, "projection", False),
        "exact": case.exact,
        "empty": 0 in sizes,
        "long": max(s or 0 for s in sizes) > 100,
        "gradients": bool(case.differentiable),
    }
    return [
        f"op {case.op}",
        f"type {cases.short(case.dtype)}",
        *{f"layout {layout}" for layout in (case.layout, *case.layouts.values())},
        *(name for name, has in having.items() if has),
    ]


def count(some_cases):
    counts = collections.Counter(dict.fromkeys(QUOTAS, 0))
    for one in some_cases:
        counts.update(properties(one))
    return counts
