"""Wrong calls: the error names op, argument, what was expected and what came; nothing is written.

A row of a table is a label, the argument that is wrong, how to spoil it (a function of the right
value, or the wrong value itself), and the words that the message must hold besides op and argument.
"""

import re

import pytest
import torch
from harness import cases
from mamba_ssm import _library

f32, f64, bf16, i64 = torch.float32, torch.float64, torch.bfloat16, torch.int64

CONV = cases.Conv(batch=2, dim=5, seqlen=19, width=4, packing="packed")
CONV_ROWS = [
    ("rank 2", "x", lambda t: t[0], ["(5, 19)"]),
    ("rank 4", "x", lambda t: t[None], ["(1, 2, 5, 19)"]),
    ("integer", "x", lambda t: t.long(), ["float32", "int64"]),
    ("complex", "x", lambda t: t.to(torch.complex64), ["float32", "complex64"]),
    ("rank 3", "weight", lambda t: t[:, None], ["(5, 1, 4)"]),
    ("rank 1", "weight", lambda t: t[0], ["(4)|(4,)"]),
    ("dim", "weight", lambda t: t[:4], ["5", "(4, 4)"]),
    ("width 0", "weight", lambda t: t[:, :0], ["(5, 0)"]),
    ("float64 among float32", "weight", lambda t: t.double(), ["float32", "float64"]),
    ("size", "bias", lambda t: t[:4], ["(5)|(5,)", "(4)|(4,)"]),
    ("rank", "bias", lambda t: t[:, None], ["(5)|(5,)", "(5, 1)"]),
    ("integer", "bias", lambda t: t.int(), ["float32", "int32"]),
    ("shape", "seq_idx", lambda t: t[:, 1:], ["(2, 19)", "(2, 18)"]),
    ("rank", "seq_idx", lambda t: t[0], ["(2, 19)", "(19)|(19,)"]),
    ("float", "seq_idx", lambda t: t.float(), ["int32", "int64", "float32"]),
    ("int16", "seq_idx", lambda t: t.short(), ["int32", "int64", "int16"]),
    ("shape", "initial_states", lambda t: t[..., :2], ["(2, 5, 3)", "(2, 5, 2)"]),
    ("transposed", "initial_states", lambda t: t.mT, ["(2, 5, 3)", "(2, 3, 5)"]),
    ("dtype", "initial_states", lambda t: t.bfloat16(), ["float32", "bfloat16"]),
]

UPDATE = cases.ConvUpdate(batch=3, dim=5, width=4, state_len=6, num_slots=7, ring=True, seqlen=2)
UPDATE_ROWS = [
    ("rank 1", "x", lambda t: t[0, :, 0], ["(5)|(5,)"]),
    ("rank 4", "x", lambda t: t[None], ["(1, 3, 5, 2)"]),
    ("integer", "x", lambda t: t.int(), ["float32", "int32"]),
    ("rank", "conv_state", lambda t: t[0], ["(5, 6)"]),
    ("dim", "conv_state", lambda t: t[:, :4], ["5", "(7, 4, 6)"]),
    ("short", "conv_state", lambda t: t[..., :2], ["3", "2"]),
    ("dtype", "conv_state", lambda t: t.bfloat16(), ["float32", "bfloat16"]),
    ("dim", "weight", lambda t: t[:3], ["5", "(3, 4)"]),
    ("width 0", "weight", lambda t: t[:, :0], ["(5, 0)"]),
    ("size", "bias", lambda t: t[:4], ["(5)|(5,)", "(4)|(4,)"]),
    ("size", "cache_seqlens", lambda t: t[:2], ["(3)|(3,)", "(2)|(2,)"]),
    ("float", "cache_seqlens", lambda t: t.float(), ["int32", "float32"]),
    ("size", "conv_state_indices", lambda t: t[:2], ["(3)|(3,)", "(2)|(2,)"]),
    ("float", "conv_state_indices", lambda t: t.float(), ["int32", "float32"]),
    (
        "fewer slots than rows",
        "conv_state",
        lambda t: t[:2],
        ["3", "2"],
        {"conv_state_indices": None},
    ),
]

VARLEN = cases.VarlenStates(total_tokens=23, dim=5, num_sequences=4, state_len=4)
VARLEN_ROWS = [
    ("rank", "x", lambda t: t[None], ["(1, 23, 5)"]),
    ("integer", "x", lambda t: t.int(), ["float32", "int32"]),
    ("rank", "cu_seqlens", lambda t: t[None], ["(1, 5)"]),
    ("none", "cu_seqlens", lambda t: t[:0], ["0"]),
    ("float", "cu_seqlens", lambda t: t.float(), ["int32", "float32"]),
    ("negative", "state_len", -1, ["-1"]),
]

SCAN = cases.Scan(batch=2, dim=6, seqlen=19, dstate=4, B=3, C=2, packing="packed")
SCAN_ROWS = [
    ("rank", "u", lambda t: t[0], ["(6, 19)"]),
    ("integer", "u", lambda t: t.int(), ["float32", "int32"]),
    ("complex", "u", lambda t: t.to(torch.complex64), ["float32", "complex64"]),
    ("shape", "delta", lambda t: t[..., 1:], ["(2, 6, 19)", "(2, 6, 18)"]),
    ("dtype", "delta", lambda t: t.half(), ["float32", "float16"]),
    ("rank", "A", lambda t: t[0], ["(4)|(4,)"]),
    ("dim", "A", lambda t: t[:5], ["6", "(5, 4)"]),
    ("transposed", "A", lambda t: t.mT, ["6", "(4, 6)"]),
    ("float64 among float32", "A", lambda t: t.double(), ["float32", "float64"]),
    ("transposed", "B", lambda t: t.mT, ["(2, 3, 4, 19)", "(2, 3, 19, 4)"]),
    ("dstate", "B", lambda t: t[:, :, :3], ["(2, 3, 4, 19)", "(2, 3, 3, 19)"]),
    ("batch", "B", lambda t: t[:1], ["(2, 3, 4, 19)", "(1, 3, 4, 19)"]),
    ("rank 5", "B", lambda t: t[None], ["(1, 2, 3, 4, 19)"]),
    ("rank 1", "B", lambda t: t[0, 0, 0], ["(19)|(19,)"]),
    ("groups do not divide", "B", lambda t: t[:, [0, 1, 2, 0]], ["6", "4"]),
    ("no groups", "B", lambda t: t[:, :0], ["0"]),
    ("dtype", "B", lambda t: t.bfloat16(), ["float32", "bfloat16"]),
    ("constant, transposed", "B", lambda t: t[0, 0, :, :6], ["(6, 4)", "(4, 6)"]),
    ("flat, dstate", "B", lambda t: t[:, 0, :3], ["4", "(2, 3, 19)"]),
    ("seqlen", "C", lambda t: t[..., :18], ["(2, 2, 4, 19)", "(2, 2, 4, 18)"]),
    ("groups do not divide", "C", lambda t: t[:, [0, 1, 0, 1]], ["6", "4"]),
    ("no groups", "C", lambda t: t[:, :0], ["0"]),
    ("dtype", "C", lambda t: t.double(), ["float32", "float64"]),
    ("size", "D", lambda t: t[:5], ["(6)|(6,)", "(5)|(5,)"]),
    ("integer", "D", lambda t: t.int(), ["float32", "int32"]),
    ("complex", "D", lambda t: t.to(torch.complex64), ["float32", "complex64"]),
    ("shape", "z", lambda t: t[:1], ["(2, 6, 19)", "(1, 6, 19)"]),
    ("dtype", "z", lambda t: t.half(), ["float32", "float16"]),
    ("size", "delta_bias", lambda t: t[:5], ["(6)|(6,)", "(5)|(5,)"]),
    ("dtype", "delta_bias", lambda t: t.double(), ["float32", "float64"]),
    ("shape", "initial_state", lambda t: t[..., :3], ["(2, 6, 4)", "(2, 6, 3)"]),
    ("dtype", "initial_state", lambda t: t.double(), ["float32", "float64"]),
    ("complex", "initial_state", lambda t: t.to(torch.complex64), ["float32", "complex64"]),
    ("shape", "seq_idx", lambda t: t[:1], ["(2, 19)", "(1, 19)"]),
    ("float", "seq_idx", lambda t: t.float(), ["int32", "float32"]),
]

COMPLEX = cases.Scan(batch=2, dim=6, seqlen=19, dstate=4, complex_A=True, C="constant")
COMPLEX_ROWS = [
    ("one column per token", "B", lambda t: t[..., :19], ["38", "(2, 1, 4, 19)"]),
    ("real constant", "C", lambda t: t.real.clone(), ["complex64", "float32"]),
    ("real", "initial_state", lambda t: t.real.clone(), ["complex64", "float32"]),
    (
        "complex128 among float32",
        "A",
        lambda t: t.to(torch.complex128),
        ["complex64", "complex128"],
    ),
]

STATE_UPDATE = cases.StateUpdate(batch=3, nheads=4, ngroups=2, dim=5, dstate=6, num_slots=7)
STATE_UPDATE_ROWS = [
    ("rank", "state", lambda t: t[0, 0], ["(5, 6)"]),
    ("integer", "state", lambda t: t.int(), ["float32", "int32"]),
    ("heads", "state", lambda t: t[:, :3], ["3"]),
    ("rank", "x", lambda t: t[:, 0], ["(3, 5)"]),
    ("headdim", "x", lambda t: t[..., :4], ["(3, 4, 4)"]),
    ("integer", "x", lambda t: t.int(), ["float32", "int32"]),
    ("shape", "dt", lambda t: t[:, :3], ["(3, 4, 5)", "(3, 3, 5)"]),
    ("dtype", "dt", lambda t: t.half(), ["float32", "float16"]),
    ("shape", "A", lambda t: t[..., :5], ["(4, 5, 6)", "(4, 5, 5)"]),
    ("rank", "A", lambda t: t[0], ["(4, 5, 6)", "(5, 6)"]),
    ("float64 among float32", "A", lambda t: t.double(), ["float32", "float64"]),
    ("dstate", "B", lambda t: t[..., :5], ["6", "(3, 2, 5)"]),
    ("groups do not divide", "B", lambda t: t[:, [0, 1, 0]], ["4", "3"]),
    ("no groups", "B", lambda t: t[:, :0], ["0"]),
    ("dtype", "B", lambda t: t.bfloat16(), ["float32", "bfloat16"]),
    ("other groups", "C", lambda t: t[:, :1], ["(3, 2, 6)", "(3, 1, 6)"]),
    ("dtype", "C", lambda t: t.bfloat16(), ["float32", "bfloat16"]),
    ("shape", "D", lambda t: t[0], ["(4, 5)", "(5)|(5,)"]),
    ("integer", "D", lambda t: t.int(), ["float32", "int32"]),
    ("shape", "z", lambda t: t[:2], ["(3, 4, 5)", "(2, 4, 5)"]),
    ("dtype", "z", lambda t: t.half(), ["float32", "float16"]),
    ("shape", "dt_bias", lambda t: t[:3], ["(4, 5)", "(3, 5)"]),
    ("size", "state_batch_indices", lambda t: t[:2], ["(3)|(3,)", "(2)|(2,)"]),
    ("float", "state_batch_indices", lambda t: t.float(), ["int32", "float32"]),
    ("fewer slots than rows", "state", lambda t: t[:2], ["3", "2"], {"state_batch_indices": None}),
]
TOKENS = cases.StateUpdate(
    batch=3, tokens=2, nheads=4, ngroups=2, dim=5, dstate=6, intermediate_states=True
)
TOKENS_ROWS = [
    ("rank", "x", lambda t: t[..., None], ["(batch, tokens, nheads, headdim)", "(3, 2, 4, 5, 1)"]),
    ("one token", "dt", lambda t: t[:, 0], ["(3, 2, 4, 5)", "(3, 4, 5)"]),
    ("fewer tokens", "dt", lambda t: t[:, :1], ["(3, 2, 4, 5)", "(3, 1, 4, 5)"]),
    ("one token", "B", lambda t: t[:, 0], ["(batch, tokens, ngroups, dstate)", "(3, 2, 6)"]),
    ("fewer tokens", "B", lambda t: t[:, :1], ["(3, 2, 2, 6)", "(3, 1, 2, 6)"]),
    ("fewer tokens", "C", lambda t: t[:, :1], ["(3, 2, 2, 6)", "(3, 1, 2, 6)"]),
    ("fewer tokens", "z", lambda t: t[:, :1], ["(3, 2, 4, 5)", "(3, 1, 4, 5)"]),
    ("one token", "intermediate_states", lambda t: t[:, 0], ["(3, 2, 4, 5, 6)", "(3, 4, 5, 6)"]),
    (
        "another batch",
        "intermediate_states",
        lambda t: t[:2],
        ["(3, 2, 4, 5, 6)", "(2, 2, 4, 5, 6)"],
    ),
    ("integer", "intermediate_states", lambda t: t.int(), ["float32", "int32"]),
    ("float64 among float32", "intermediate_states", lambda t: t.double(), ["float32", "float64"]),
]

SSD = cases.Ssd(batch=2, seqlen=19, nheads=6, headdim=5, ngroups=3, dstate=4, packing="packed")
SSD_ROWS = [
    ("rank", "x", lambda t: t[0], ["(19, 6, 5)"]),
    ("integer", "x", lambda t: t.int(), ["float32", "int32"]),
    ("complex", "x", lambda t: t.to(torch.complex64), ["float32", "complex64"]),
    ("shape", "dt", lambda t: t[:, 1:], ["(2, 19, 6)", "(2, 18, 6)"]),
    ("per channel", "dt", lambda t: t[..., None], ["(2, 19, 6)", "(2, 19, 6, 1)"]),
    ("dtype", "dt", lambda t: t.half(), ["float32", "float16"]),
    ("size", "A", lambda t: t[:5], ["(6)|(6,)", "(5)|(5,)"]),
    ("per state", "A", lambda t: t[:, None], ["(6)|(6,)", "(6, 1)"]),
    ("float64 among float32", "A", lambda t: t.double(), ["float32", "float64"]),
    ("rank", "B", lambda t: t[:, :, 0], ["(2, 19, 4)"]),
    ("seqlen", "B", lambda t: t[:, 1:], ["(2, 19, 3, 4)", "(2, 18, 3, 4)"]),
    ("batch", "B", lambda t: t[:1], ["(2, 19, 3, 4)", "(1, 19, 3, 4)"]),
    ("groups do not divide", "B", lambda t: t[:, :, [0, 1, 2, 0]], ["6", "4"]),
    ("no groups", "B", lambda t: t[:, :, :0], ["0"]),
    ("no states", "B", lambda t: t[..., :0], ["dstate >= 1", "(2, 19, 3, 0)"]),
    ("dtype", "B", lambda t: t.bfloat16(), ["float32", "bfloat16"]),
    ("dstate", "C", lambda t: t[..., :3], ["(2, 19, 3, 4)", "(2, 19, 3, 3)"]),
    ("other groups", "C", lambda t: t[:, :, :1], ["(2, 19, 3, 4)", "(2, 19, 1, 4)"]),
    ("dtype", "C", lambda t: t.double(), ["float32", "float64"]),
    ("size", "D", lambda t: t[:5], ["(6)|(6,)", "(5)|(5,)"]),
    ("headdim", "D", lambda t: t[:, None].expand(6, 4), ["(6, 5)", "(6, 4)"]),
    ("rank", "D", lambda t: t[:, None, None], ["(6, 1, 1)"]),
    ("integer", "D", lambda t: t.int(), ["float32", "int32"]),
    ("shape", "z", lambda t: t[:1], ["(2, 19, 6, 5)", "(1, 19, 6, 5)"]),
    ("dtype", "z", lambda t: t.half(), ["float32", "float16"]),
    ("size", "dt_bias", lambda t: t[:5], ["(6)|(6,)", "(5)|(5,)"]),
    ("dtype", "dt_bias", lambda t: t.double(), ["float32", "float64"]),
    ("shape", "initial_states", lambda t: t[..., :3], ["(2, 6, 5, 4)", "(2, 6, 5, 3)"]),
    ("fewer than rows", "initial_states", lambda t: t[:1], ["(2, 6, 5, 4)", "(1, 6, 5, 4)"]),
    ("rank", "initial_states", lambda t: t[0], ["(6, 5, 4)"]),
    ("dtype", "initial_states", lambda t: t.double(), ["float32", "float64"]),
    ("shape", "seq_idx", lambda t: t[:1], ["(2, 19)", "(1, 19)"]),
    ("float", "seq_idx", lambda t: t.float(), ["int32", "float32"]),
    ("above dt_max", "dt_min", 3.0, ["3", "2"], {"dt_max": 2.0}),
    ("not a number", "dt_max", float("nan"), ["nan"]),
]

SSD_CUT = cases.Ssd(batch=1, seqlen=23, nheads=6, headdim=5, ngroups=3, dstate=4, num_sequences=4)
SSD_CUT_ROWS = [
    ("rank", "cu_seqlens", lambda t: t[None], ["(1, 5)"]),
    ("none", "cu_seqlens", lambda t: t[:0], ["0"]),
    ("float", "cu_seqlens", lambda t: t.float(), ["int32", "float32"]),
    ("fewer", "initial_states", lambda t: t[:3], ["(4, 6, 5, 4)", "(3, 6, 5, 4)"]),
]

INNER = cases.Inner(
    batch=2, dim=6, seqlen=17, width=4, dstate=4, dt_rank=3, d_model=5, proj_bias=True
)
INNER_ROWS = [
    ("rank", "xz", lambda t: t[0], ["(12, 17)"]),
    ("odd", "xz", lambda t: t[:, :11], ["11"]),
    ("rank", "conv1d_weight", lambda t: t[:, 0], ["(6, 4)"]),
    ("dim", "conv1d_weight", lambda t: t[:5], ["6", "(5, 1, 4)"]),
    ("size", "conv1d_bias", lambda t: t[:5], ["(6)|(6,)", "(5)|(5,)"]),
    ("rows", "x_proj_weight", lambda t: t[:10], ["(11, 6)", "(10, 6)"]),
    ("columns", "x_proj_weight", lambda t: t[:, :5], ["(11, 6)", "(11, 5)"]),
    ("rows", "delta_proj_weight", lambda t: t[:5], ["6", "(5, 3)"]),
    ("columns", "out_proj_weight", lambda t: t[:, :5], ["6", "(5, 5)"]),
    ("size", "out_proj_bias", lambda t: t[:4], ["(5)|(5,)", "(4)|(4,)"]),
    ("rows", "A", lambda t: t[:5], ["6", "(5, 4)"]),
    ("size", "D", lambda t: t[:5], ["(6)|(6,)", "(5)|(5,)"]),
    ("size", "B_proj_bias", lambda t: t[:3], ["(4)|(4,)", "(3)|(3,)"]),
    ("size", "C_proj_bias", lambda t: t[:3], ["(4)|(4,)", "(3)|(3,)"]),
    ("level", "checkpoint_lvl", 2, ["2"]),
]

INNER2 = cases.Inner2(
    batch=1, seqlen=17, nheads=4, headdim=3, ngroups=2, dstate=4, d_nonssm=2, num_sequences=3
)
INNER2_ROWS = [
    ("rank", "zxbcdt", lambda t: t[0], ["(17, 48)"]),
    ("odd", "zxbcdt", lambda t: t[..., :47], ["47", "44"]),
    ("few", "zxbcdt", lambda t: t[..., :42], ["42", "44"]),
    ("type", "zxbcdt", lambda t: t.int(), ["float32", "int32"]),
    ("rank", "conv1d_weight", lambda t: t[:, None], ["(28, 1, 4)"]),
    ("rows", "conv1d_weight", lambda t: t[:27], ["27", "12"]),
    ("few", "conv1d_weight", lambda t: t[:12], ["12"]),
    ("width", "conv1d_weight", lambda t: t[:, :0], ["width >= 1"]),
    ("type", "conv1d_weight", lambda t: t.double(), ["float32", "float64"]),
    ("size", "conv1d_bias", lambda t: t[:5], ["(28)|(28,)", "(5)|(5,)"]),
    ("rank", "A", lambda t: t[None], ["(1, 4)"]),
    ("none", "A", lambda t: t[:0], ["nheads >= 1"]),
    ("zero", "headdim", 0, ["0"]),
    ("zero", "ngroups", 0, ["4", "0"]),
    ("three", "ngroups", 3, ["4", "3"]),
    ("size", "D", lambda t: t[:3], ["(4)|(4,)", "(3)|(3,)"]),
    ("channels", "D", lambda t: t[:, None].expand(4, 2), ["(4, 3)", "(4, 2)"]),
    ("rank", "D", lambda t: t[None, None], ["(1, 1, 4)"]),
    ("size", "dt_bias", lambda t: t[:3], ["(4)|(4,)", "(3)|(3,)"]),
    ("type", "dt_bias", lambda t: t.double(), ["float32", "float64"]),
    ("size", "norm_weight", lambda t: t[:11], ["(12)|(12,)", "(11)|(11,)"]),
    ("columns", "out_proj_weight", lambda t: t[:, :13], ["(5, 14)", "(5, 13)"]),
    ("rank", "out_proj_weight", lambda t: t[0], ["(14)|(14,)"]),
    ("size", "out_proj_bias", lambda t: t[:4], ["(5)|(5,)", "(4)|(4,)"]),
    ("type", "out_proj_bias", lambda t: t.double(), ["float32", "float64"]),
    ("alone", "out_proj_bias", lambda t: t, ["needs out_proj_weight"], {"out_proj_weight": None}),
    ("rows", "initial_states", lambda t: t[:2], ["(3, 4, 3, 4)", "(2, 4, 3, 4)"]),
    ("state", "initial_states", lambda t: t[..., :3], ["(3, 4, 3, 4)", "(3, 4, 3, 3)"]),
    ("type", "initial_states", lambda t: t.double(), ["float32", "float64"]),
    ("rank", "cu_seqlens", lambda t: t[None], ["(1, 4)"]),
    ("none", "cu_seqlens", lambda t: t[:0], ["0"]),
    ("float", "cu_seqlens", lambda t: t.float(), ["int32", "float32"]),
    ("limits", "dt_min", 2.0, ["2", "1"], {"dt_max": 1.0}),
]
INNER2_PACKED = cases.Inner2(packing="packed")
INNER2_PACKED_ROWS = [
    ("size", "seq_idx", lambda t: t[:, :16], ["(2, 17)", "(2, 16)"]),
    ("type", "seq_idx", lambda t: t.float(), ["int32", "float32"]),
    ("batch", "cu_seqlens", torch.tensor([0, 17]), ["batch = 1", "(2, 17, 44)"]),
]

NORM_GATED = cases.NormGated(leading=(2, 7), groups=3, group=8)
NORM_GATED_ROWS = [
    ("no axis", "x", lambda t: t[0, 0, 0], ["channels", "()"]),
    ("integer", "x", lambda t: t.int(), ["float32", "int32"]),
    ("complex", "x", lambda t: t.to(torch.complex64), ["float32", "complex64"]),
    ("size", "weight", lambda t: t[:23], ["(24)", "(23)"]),
    ("rank", "weight", lambda t: t[None], ["(24)", "(1, 24)"]),
    ("float64 among float32", "weight", lambda t: t.double(), ["float32", "float64"]),
    ("size", "bias", lambda t: t[:23], ["(24)", "(23)"]),
    ("integer", "bias", lambda t: t.int(), ["float32", "int32"]),
    ("shape", "z", lambda t: t[:, 1:], ["(2, 7, 24)", "(2, 6, 24)"]),
    ("rank", "z", lambda t: t[0], ["(2, 7, 24)", "(7, 24)"]),
    ("dtype", "z", lambda t: t.half(), ["float32", "float16"]),
    ("does not divide", "group_size", 7, ["24", "7"]),
    ("larger", "group_size", 48, ["24", "48"]),
    ("zero", "group_size", 0, ["24", "0"]),
    ("negative", "group_size", -8, ["24", "-8"]),
]

LAYER_NORM = cases.LayerNorm(
    leading=(2, 7), x1=True, weight1=True, bias1=True, masks=True, dropout_p=0.3
)
LAYER_NORM_ROWS = [
    ("no axis", "x", lambda t: t[0, 0, 0], ["channels", "()"]),
    ("integer", "x", lambda t: t.int(), ["float32", "int32"]),
    ("size", "weight", lambda t: t[:23], ["(24)", "(23)"]),
    ("float64 among float32", "weight", lambda t: t.double(), ["float32", "float64"]),
    ("rank", "bias", lambda t: t[None], ["(24)", "(1, 24)"]),
    ("integer", "weight1", lambda t: t.int(), ["float32", "int32"]),
    ("size", "bias1", lambda t: t[:23], ["(24)", "(23)"]),
    ("alone", "bias1", lambda t: t, ["weight1", "None"], {"weight1": None}),
    ("shape", "residual", lambda t: t[:, 1:], ["(2, 7, 24)", "(2, 6, 24)"]),
    ("dtype", "residual", lambda t: t.half(), ["float32", "float16"]),
    ("shape", "x1", lambda t: t[:1], ["(2, 7, 24)", "(1, 7, 24)"]),
    ("dtype", "x1", lambda t: t.bfloat16(), ["float32", "bfloat16"]),
    ("float", "dropout_mask", lambda t: t.float(), ["bool", "float32"]),
    ("shape", "dropout_mask", lambda t: t[..., 1:], ["(2, 7, 24)", "(2, 7, 23)"]),
    ("shape", "dropout_mask1", lambda t: t[0], ["(2, 7, 24)", "(7, 24)"]),
    ("alone", "dropout_mask1", lambda t: t, ["x1", "None"], {"x1": None}),
    ("above 1", "dropout_p", 1.5, ["[0, 1]", "1.5"]),
    ("negative", "dropout_p", -0.5, ["[0, 1]", "-0.5"]),
    ("NaN", "dropout_p", float("nan"), ["[0, 1]", "nan"]),
]
ROWSCALE = cases.LayerNorm(leading=(2, 7), rowscale=True)
ROWSCALE_ROWS = [
    ("shape", "rowscale", lambda t: t[:, 1:], ["(2, 7)", "(2, 6)"]),
    ("rank", "rowscale", lambda t: t[..., None], ["(2, 7)", "(2, 7, 1)"]),
    ("integer", "rowscale", lambda t: t.int(), ["float32", "int32"]),
]

LINEAR = cases.DecodeLinear(rows=3, in_features=8, out_features=5)
LINEAR_ROWS = [
    ("rank", "x", lambda t: t[0], ["(8)|(8,)"]),
    ("integer", "x", lambda t: t.int(), ["float32", "int32"]),
    ("rank", "weight", lambda t: t[0], ["(8)|(8,)"]),
    ("transposed", "weight", lambda t: t.mT, ["(8, 8)", "(8, 5)"]),
    ("dtype", "weight", lambda t: t.bfloat16(), ["float32", "bfloat16"]),
    ("no outputs", "weight", lambda t: t[:0], ["1", "(0, 8)"]),
    ("size", "bias", lambda t: t[:4], ["(5)|(5,)", "(4)|(4,)"]),
    ("float64 among float32", "bias", lambda t: t.double(), ["float32", "float64"]),
    ("size", "norm_weight", lambda t: t[:4], ["(8)|(8,)", "(4)|(4,)"]),
    ("shape", "z", lambda t: t[:, :7], ["(3, 8)", "(3, 7)"]),
    ("dtype", "z", lambda t: t.half(), ["float32", "float16"]),
    ("without norm", "z", lambda t: t, ["norm_weight"], {"norm_weight": None}),
]
LINEAR_PRENORM = cases.DecodeLinearPrenorm(rows=3, in_features=8, out_features=5)
LINEAR_PRENORM_ROWS = [
    ("shape", "residual", lambda t: t[1:], ["(3, 8)", "(2, 8)"]),
    ("dtype", "residual", lambda t: t.half(), ["float32", "float16"]),
    ("size", "norm_weight", lambda t: t[:4], ["(8)|(8,)", "(4)|(4,)"]),
]

TABLES = (
    (LINEAR, LINEAR_ROWS),
    (LINEAR_PRENORM, LINEAR_PRENORM_ROWS),
    (CONV, CONV_ROWS),
    (UPDATE, UPDATE_ROWS),
    (VARLEN, VARLEN_ROWS),
    (SCAN, SCAN_ROWS),
    (COMPLEX, COMPLEX_ROWS),
    (STATE_UPDATE, STATE_UPDATE_ROWS),
    (TOKENS, TOKENS_ROWS),
    (SSD, SSD_ROWS),
    (SSD_CUT, SSD_CUT_ROWS),
    (INNER, INNER_ROWS),
    (INNER2, INNER2_ROWS),
    (INNER2_PACKED, INNER2_PACKED_ROWS),
    (NORM_GATED, NORM_GATED_ROWS),
    (LAYER_NORM, LAYER_NORM_ROWS),
    (ROWSCALE, ROWSCALE_ROWS),
)


def _rows(derived=False):
    """Every row; with `derived` those of differentiable operations, to be called with gradients."""
    rows = []
    for case, table in TABLES:
        if derived and not case.differentiable:
            continue
        for label, argument, spoil, words, *others in table:
            kinds = {id(COMPLEX): "complex ", id(SSD_CUT): "cut ", id(INNER2_PACKED): "packed "}
            kind = kinds.get(id(case), "")
            label = f"{case.op}-{argument}-{kind}{label}"
            values = (case, argument, spoil, words, others[0] if others else {}, derived)
            rows.append(pytest.param(*values, id=label + (" with gradients" if derived else "")))
    return rows


def _spoiled(call, argument, spoil):
    if isinstance(spoil, torch.Tensor):
        device = next(v.device for v in call.arguments.values() if isinstance(v, torch.Tensor))
        return spoil.to(device)
    return spoil(call.arguments.get(argument)) if callable(spoil) else spoil


def check_message(message, op, argument, words):
    assert re.search(rf"\b{op}\b", message), message
    assert re.search(rf"\b{argument}\b", message), message
    for word in words:
        spellings = word.split("|")
        assert any(spelling in message for spelling in spellings), f"{word} not in: {message}"
    assert ".cpp" not in message and ".h:" not in message, message


@pytest.mark.parametrize(
    "case, argument, spoil, words, others, gradients", _rows() + _rows(derived=True)
)
def test_wrong_argument(case, argument, spoil, words, others, gradients, device):
    call = case.call(device)
    arguments = {**others, argument: _spoiled(call, argument, spoil)}
    if gradients:  # the same words when autograd is in between
        for name in call.differentiable:
            value = arguments.get(name, call.arguments[name])
            if value is not None and (value.is_floating_point() or value.is_complex()):
                arguments[name] = value.detach().requires_grad_()
    with pytest.raises(RuntimeError) as caught:
        call.invoke(**arguments)
    if _library.NATIVE or case.op != "mamba2_inner":  # whose parts else speak for themselves
        check_message(str(caught.value), call.op, argument, words)
    call.arena.check()


@pytest.mark.skipif(not _library.NATIVE, reason="fakes in Python leave most checks to the ops")
@pytest.mark.parametrize("case, argument, spoil, words, others, gradients", _rows())
def test_wrong_argument_under_tracing(case, argument, spoil, words, others, gradients):
    """The Meta kernels make the same checks."""
    call = case.call()
    arguments = {**call.arguments, **others, argument: _spoiled(call, argument, spoil)}
    arguments = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    with pytest.raises(RuntimeError) as caught:
        call.function()(**arguments)
    check_message(str(caught.value), call.op, argument, words)


def _tensor_arguments():
    only = {  # the others have had their turn
        id(TOKENS): "intermediate_states",
        id(ROWSCALE): "rowscale",
        id(INNER2_PACKED): "seq_idx",
    }
    rows = []
    for case, _ in TABLES:
        for name, value in case.call().arguments.items() if case is not COMPLEX else ():
            if only.get(id(case), name) != name:
                continue
            if isinstance(value, torch.Tensor):
                rows.append(pytest.param(case, name, id=f"{case.op}-{name}"))
    return rows


@pytest.mark.parametrize("case, argument", _tensor_arguments())
def test_another_device(case, argument, device):
    """A meta tensor among real ones, a CPU tensor among CUDA tensors."""
    for other in ("meta", "cpu") if device == "cuda" else ("meta",):
        call = case.call(device)
        with pytest.raises(RuntimeError) as caught:
            call.invoke(**{argument: call.arguments[argument].to(other)})
        message = str(caught.value)
        assert call.op in message and other in message and device in message, message
        call.arena.check()


# Values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("index", [7, 8, 2**31 - 1])
@pytest.mark.parametrize(
    "case, name", [(UPDATE, "conv_state_indices"), (STATE_UPDATE, "state_batch_indices")]
)
def test_index_beyond_the_pool(case, name, index, index_dtype, device):
    """Raises on the CPU; on CUDA it is padding, without a synchronization."""
    call = case.call(device)
    indices = torch.tensor([2, index, 0], dtype=index_dtype, device=device)
    if device == "cpu":
        with pytest.raises(RuntimeError) as caught:
            call.invoke(**{name: indices})
        check_message(str(caught.value), call.op, name, ["7", str(index)])
        call.arena.check()
    else:
        out = call.invoke(**{name: indices})["out"]
        assert (out[1] == 0).all() and (out[0] != 0).any()
        padded = torch.tensor([2, -1, 0], dtype=index_dtype, device=device)
        state = call.arguments[call.mutable[0]].clone()
        call.arena.restore()
        call.invoke(**{name: padded})
        assert torch.equal(state, call.arguments[call.mutable[0]])


BAD_CUTS = {
    "decreasing": ([0, 9, 5, 12, 23], ["9", "5"]),
    "not from 0": ([1, 5, 9, 12, 23], ["1"]),
    "negative": ([-3, 5, 9, 12, 23], ["-3"]),
    "beyond the end": ([0, 5, 9, 12, 24], ["23", "24"]),
    "far beyond the end": ([0, 5, 9, 12, 2**31 - 1], ["23", str(2**31 - 1)]),
    "not to the end": ([0, 5, 9, 12, 22], ["23", "22"]),
}


@pytest.mark.parametrize("case", [VARLEN, SSD_CUT], ids=lambda case: case.op)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("cuts, words", BAD_CUTS.values(), ids=BAD_CUTS.keys())
def test_bad_cu_seqlens(cuts, words, index_dtype, case, device):
    """Raises on the CPU; on CUDA the values are clamped and no memory error follows."""
    call = case.call(device)
    cu_seqlens = torch.tensor(cuts, dtype=index_dtype, device=device)
    if device == "cpu":
        with pytest.raises(RuntimeError) as caught:
            call.invoke(cu_seqlens=cu_seqlens)
        check_message(str(caught.value), call.op, "cu_seqlens", words)
    else:
        expected = call.invoke()
        for name, result in call.invoke(cu_seqlens=cu_seqlens).items():
            assert result.shape == expected[name].shape
        torch.cuda.synchronize()
    call.arena.check()


@pytest.mark.parametrize(
    "case, name",
    [(UPDATE, "conv_state"), (STATE_UPDATE, "state"), (TOKENS, "intermediate_states")],
)
def test_state_that_overlaps_itself(case, name, device):
    """An expanded state has several owners of one address: refused, not raced for."""
    call = case.call(device)
    state = call.arguments[name]
    overlapping = state[:1].expand(state.shape)
    before = state.clone()
    with pytest.raises(RuntimeError) as caught:
        call.invoke(**{name: overlapping})
    assert name in str(caught.value)
    assert torch.equal(state, before)


# Gradients that do not exist --------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [CONV, SCAN, COMPLEX, SSD, INNER, INNER2, NORM_GATED, LAYER_NORM],
    ids=lambda case: case.op,
)
def test_no_second_derivative(case, device):
    """Never a silently wrong second derivative."""
    call = case.call(device)
    leaves = {n: call.arguments[n].detach().requires_grad_() for n in call.differentiable}
    out = next(iter(call.invoke(**leaves).values()))
    first = torch.autograd.grad(
        out.square().sum(), list(leaves.values()), create_graph=True, allow_unused=True
    )
    with pytest.raises(RuntimeError, match="twice|double|second|not implemented"):
        torch.autograd.grad(sum(g.abs().square().sum() for g in first), list(leaves.values()))


@pytest.mark.parametrize(
    "case, argument",
    [(UPDATE, name) for name in ("x", "weight", "bias")]
    + [(STATE_UPDATE, name) for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")],
    ids=lambda value: value if isinstance(value, str) else value.op,
)
def test_updates_have_no_derivative(case, argument, device):
    """The call works with tensors that require gradients; its backward says what is missing."""
    call = case.call(device)
    expected = call.invoke()["out"]
    call.arena.restore()
    leaf = call.arguments[argument].detach().requires_grad_()
    out = call.invoke(**{argument: leaf})["out"]
    assert torch.equal(out.detach(), expected)
    assert out.requires_grad
    with pytest.raises(RuntimeError, match="not implemented"):
        out.sum().backward()
    assert leaf.grad is None


@pytest.mark.parametrize("case", [UPDATE, STATE_UPDATE], ids=["conv", "ssm"])
def test_updates_without_gradients(case, device):
    call = case.call(device)
    with torch.no_grad():
        out = call.invoke(x=call.arguments["x"].detach().requires_grad_())["out"]
    assert not out.requires_grad
    with torch.inference_mode():
        call.invoke()


@pytest.mark.parametrize("case", [CONV, SCAN, SSD], ids=lambda case: case.op)
def test_backward_ops_have_no_derivative(case, device):
    call = case.call(device)
    op = f"{call.op}_bwd"
    arguments = dict(call.arguments, dout=call.cotangents["out"])
    if case is SCAN:
        arguments["dlast_state"] = None
        arguments["states"] = torch.ops.mamba_ssm.selective_scan_fwd(**call.arguments)[2]
        leaf = "u"
    else:
        arguments["dfinal_states"] = None
        leaf = "x"
    arguments[leaf] = arguments[leaf].detach().requires_grad_()
    gradients = getattr(torch.ops.mamba_ssm, op)(**arguments)
    with pytest.raises(RuntimeError, match="twice|not implemented|does not require grad"):
        gradients[0].sum().backward()


@pytest.mark.parametrize(
    "argument, spoil, words",
    [
        ("dout", lambda t: t[..., 1:], ["(2, 6, 19)", "(2, 6, 18)"]),
        ("dout", lambda t: t.half(), ["float32", "float16"]),
        ("dlast_state", lambda t: t[:1], ["(2, 6, 4)", "(1, 6, 4)"]),
        ("dlast_state", lambda t: t.half(), ["float32", "float16"]),
        ("states", lambda t: t[:, :0], ["(2, 1, 6, 4)", "(2, 0, 6, 4)"]),
    ],
)
def test_wrong_gradient_of_selective_scan(argument, spoil, words, device):
    call = SCAN.call(device)
    arguments = dict(call.arguments, dout=call.cotangents["out"])
    arguments["dlast_state"] = call.cotangents["last_state"]
    arguments["states"] = torch.ops.mamba_ssm.selective_scan_fwd(**call.arguments)[2]
    arguments[argument] = spoil(arguments[argument])
    with pytest.raises(RuntimeError) as caught:
        torch.ops.mamba_ssm.selective_scan_bwd(**arguments)
    check_message(str(caught.value), "selective_scan_bwd", argument, words)


@pytest.mark.parametrize(
    "argument, spoil, words",
    [
        ("dout", lambda t: t[:, 1:], ["(2, 19, 6, 5)", "(2, 18, 6, 5)"]),
        ("dout", lambda t: t.half(), ["float32", "float16"]),
        ("dfinal_states", lambda t: t[:1], ["(2, 6, 5, 4)", "(1, 6, 5, 4)"]),
        ("dfinal_states", lambda t: t.half(), ["float32", "float16"]),
    ],
)
def test_wrong_gradient_of_ssd_chunk_scan(argument, spoil, words, device):
    call = SSD.call(device)
    arguments = dict(call.arguments, dout=call.cotangents["out"])
    arguments["dfinal_states"] = call.cotangents["final_states"]
    arguments[argument] = spoil(arguments[argument])
    with pytest.raises(RuntimeError) as caught:
        torch.ops.mamba_ssm.ssd_chunk_scan_bwd(**arguments)
    check_message(str(caught.value), "ssd_chunk_scan_bwd", argument, words)


@pytest.mark.parametrize(
    "argument, spoil, words",
    [
        ("dout", lambda t: t[..., 1:], ["(2, 5, 19)", "(2, 5, 18)"]),
        ("dout", lambda t: t.half(), ["float32", "float16"]),
        ("dfinal_states", lambda t: t[..., 1:], ["(2, 5, 3)", "(2, 5, 2)"]),
        ("dfinal_states", lambda t: t.half(), ["float32", "float16"]),
    ],
)
def test_wrong_gradient_of_causal_conv1d(argument, spoil, words, device):
    call = CONV.call(device)
    arguments = dict(call.arguments, dout=call.cotangents["out"])
    arguments["dfinal_states"] = call.cotangents["final_states"]
    arguments[argument] = spoil(arguments[argument])
    with pytest.raises(RuntimeError) as caught:
        torch.ops.mamba_ssm.causal_conv1d_bwd(**arguments)
    check_message(str(caught.value), "causal_conv1d_bwd", argument, words)


def test_rowscale_with_x1(device):
    call = ROWSCALE.call(device)
    with pytest.raises(RuntimeError) as caught:
        call.invoke(x1=call.arguments["x"])
    check_message(str(caught.value), "layer_norm", "rowscale", ["x1"])


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda t: t[..., 1:], ["(2, 7, 24)", "(2, 7, 23)"]),
        (lambda t: t.half(), ["float32", "float16"]),
    ],
)
def test_wrong_gradient_of_rms_norm_gated(spoil, words, device):
    call = NORM_GATED.call(device)
    dout = spoil(call.cotangents["out"])
    with pytest.raises(RuntimeError) as caught:
        torch.ops.mamba_ssm.rms_norm_gated_bwd(dout=dout, **call.arguments)
    check_message(str(caught.value), "rms_norm_gated_bwd", "dout", words)


@pytest.mark.parametrize(
    "argument, spoil, words",
    [
        ("dout1", lambda t: t[..., 1:], ["(2, 7, 24)", "(2, 7, 23)"]),
        ("dout1", lambda t: t.half(), ["float32", "float16"]),
        ("dresidual_out", lambda t: t[:1], ["(2, 7, 24)", "(1, 7, 24)"]),
        ("dresidual_out", lambda t: t.half(), ["float32", "float16"]),
        ("sum", lambda t: t[0], ["(2, 7, 24)", "(7, 24)"]),
        ("sum", lambda t: t.double(), ["float32", "float64"]),
    ],
)
def test_wrong_gradient_of_layer_norm(argument, spoil, words, device):
    call = LAYER_NORM.call(device)
    arguments = {f"d{name}": value for name, value in call.cotangents.items()}
    arguments |= {n: call.arguments[n] for n in ("weight", "bias", "weight1", "bias1")}
    arguments |= {"sum": call.arguments["x"], "has_x1": True}
    torch.ops.mamba_ssm.layer_norm_bwd(**arguments)
    arguments[argument] = spoil(arguments[argument])
    with pytest.raises(RuntimeError) as caught:
        torch.ops.mamba_ssm.layer_norm_bwd(**arguments)
    check_message(str(caught.value), "layer_norm_bwd", argument, words)
