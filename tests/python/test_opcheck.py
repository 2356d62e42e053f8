"""torch.library.opcheck: schema, autograd registration, fake tensors, AOT dispatch."""

import dataclasses

import pytest
import torch
from harness import cases, poison

UTILS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)

CONV = cases.variations(
    cases.Conv(seqlen=9),
    {"bias": False, "initial_states": False, "silu": False},
    {"packing": "packed", "layout": "transposed"},
    {"packing": "padded", "index_dtype": torch.int64, "initial_states": False},
    bias=[False],
    silu=[False],
    initial_states=[False],
    packing=["packed"],
    width=[1, 7],
    seqlen=[1, 2],
    batch=[1],
    layout=["transposed", "sliced", "step2"],
    dtype=[torch.bfloat16, torch.float16, torch.float64],
)
UPDATE = cases.variations(
    cases.ConvUpdate(),
    {"num_slots": 5, "ring": True, "seqlen": 2, "state_len": 6},
    seqlen=[1, 3],
    num_slots=[5],
    ring=[True],
    bias=[False],
    layout=["transposed", "sliced", "step2"],
    dtype=[torch.bfloat16, torch.float64],
)
VARLEN = cases.variations(
    cases.VarlenStates(),
    layout=["transposed", "sliced"],
    dtype=[torch.bfloat16, torch.float64],
    index_dtype=[torch.int64],
    total_tokens=[1],
)
SCAN = cases.variations(
    cases.Scan(seqlen=9),
    {"D": False, "z": False, "delta_bias": False, "initial_state": False},
    {"B": "constant", "C": "constant"},
    {"B": "flat", "C": 2},
    {"complex_A": True, "B": "constant"},
    {"packing": "packed", "initial_state": False},
    D=[False],
    z=[False],
    delta_bias=[False],
    initial_state=[False],
    delta_softplus=[False],
    B=[2, "flat", "constant"],
    complex_A=[True],
    packing=["padded"],
    seqlen=[1, 40],
    layout=["transposed", "sliced", "step2"],
    dtype=[torch.bfloat16, torch.float16, torch.float64],
)
STATE_UPDATE = cases.variations(
    cases.StateUpdate(),
    {"nheads": 4, "ngroups": 2},
    {"nheads": 4, "num_slots": 6},
    {"nheads": 4, "tied": "head"},
    {"nheads": 4, "tokens": 3, "intermediate_states": True},
    {"D": False, "z": False, "dt_bias": False},
    num_slots=[6],
    tokens=[3],
    intermediate_states=[True],
    layout=["transposed", "sliced", "step2"],
    dtype=[torch.bfloat16, torch.float64],
)
SSD = cases.variations(
    cases.Ssd(seqlen=9),
    {"D": None, "z": False, "dt_bias": False, "initial_states": False},
    {"packing": "packed", "initial_states": False},
    {"batch": 1, "num_sequences": 3},
    {"batch": 1, "num_sequences": 3, "initial_states": "first", "packing": "padded"},
    {"dtype": torch.bfloat16, "dtypes": {"dt": torch.float32}},
    D=[None, "channel"],
    z=[False],
    dt_bias=[False],
    initial_states=[False],
    dt_softplus=[False],
    limits=[True],
    ngroups=[1, 4],
    packing=["padded"],
    seqlen=[1, 70],
    projection=[True],
    layout=["transposed", "sliced", "step2"],
    dtype=[torch.bfloat16, torch.float16, torch.float64],
)
INNER = cases.variations(
    cases.Inner(seqlen=9),
    {"conv_bias": False, "out_bias": False, "D": False, "delta_bias": False},
    {"rms": True, "proj_bias": True},
    B=["constant", "flat"],
    C=["constant"],
    complex_A=[True],
    checkpoint_lvl=[0],
    dtype=[torch.bfloat16, torch.float64],
    layouts=[{"xz": "transposed"}],
)
INNER2 = cases.variations(
    cases.Inner2(seqlen=9),
    {"conv_bias": False, "out_bias": False, "D": None, "dt_bias": False, "initial_states": False},
    {"norm": False, "d_nonssm": 2},
    {"norm": False, "d_model": None},
    {"batch": 1, "num_sequences": 3},
    {"batch": 1, "num_sequences": 3, "packing": "padded", "initial_states": "first"},
    norm_before_gate=[True],
    d_model=[None],
    D=["channel"],
    limits=[True],
    packing=["padded"],
    dtype=[torch.bfloat16, torch.float64],
    layouts=[{"zxbcdt": "transposed"}, {"zxbcdt": "sliced"}],
)
NORM_GATED = cases.variations(
    cases.NormGated(),
    {"z": False, "bias": False},
    {"norm_before_gate": False, "is_rms_norm": False},
    {"groups": 3, "leading": ()},
    whole_row=[True],
    layout=["transposed", "sliced", "step2"],
    dtype=[torch.bfloat16, torch.float16, torch.float64],
)
LAYER_NORM = cases.variations(
    cases.LayerNorm(),
    {"x1": True, "weight1": True, "bias1": True, "masks": True, "dropout_p": 0.3},
    {"rowscale": True, "masks": True, "dropout_p": 0.3, "residual": False},
    {"residual": False, "bias": False},
    {"residual": False, "residual_in_fp32": True, "dtype": torch.bfloat16},
    {"is_rms_norm": True, "leading": ()},
    prenorm=[False],
    layout=["transposed", "sliced", "step2"],
    dtype=[torch.bfloat16, torch.float16, torch.float64],
)
LINEAR = cases.variations(
    cases.DecodeLinear(),
    {"norm": False, "bias": False},
    rows=[1],
    layout=["transposed", "sliced", "step2"],
    dtype=[torch.bfloat16, torch.float64],
)
LINEAR_PRENORM = cases.variations(
    cases.DecodeLinearPrenorm(),
    {"residual": False, "residual_in_fp32": True, "dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "dtypes": {"residual": torch.bfloat16}},
    rows=[1],
    residual=[False],
    layout=["transposed", "sliced", "step2"],
    dtype=[torch.float16, torch.float64],
)


def _samples():
    tables = (
        CONV,
        UPDATE,
        VARLEN,
        SCAN,
        STATE_UPDATE,
        SSD,
        INNER,
        INNER2,
        NORM_GATED,
        LAYER_NORM,
        LINEAR,
        LINEAR_PRENORM,
    )
    for rows in tables:
        for label, case in rows.items():
            wants = (False, True) if case.differentiable else (False,)
            for gradients in wants:
                name = f"{case.op}-{label}{'-gradients' if gradients else ''}"
                yield pytest.param(case, gradients, id=name)


def _own(tensor):
    """The tensor without the red zones around it, strides kept."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    if 0 in tensor.stride():
        return tensor.clone(memory_format=torch.preserve_format).as_strided_(
            tensor.shape, tensor.stride()
        )
    own = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return own.copy_(tensor)


def _plain_arguments(case, device):
    call = case.call(device)
    return call, {name: _own(value) for name, value in call.arguments.items()}


@pytest.mark.parametrize("case, gradients", list(_samples()))
def test_opcheck(case, gradients, device):
    call, arguments = _plain_arguments(case, device)
    if gradients:
        for name in call.differentiable:
            arguments[name].requires_grad_()
    torch.library.opcheck(call.function(), (), arguments, test_utils=UTILS)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "initial_states"])
def test_subsets_of_causal_conv1d(wanted, device):
    call, arguments = _plain_arguments(cases.Conv(seqlen=9), device)
    arguments[wanted].requires_grad_()
    torch.library.opcheck(call.function(), (), arguments, test_utils=UTILS)


@pytest.mark.parametrize("wanted", cases.Scan.differentiable)
def test_subsets_of_selective_scan(wanted, device):
    call, arguments = _plain_arguments(cases.Scan(seqlen=9), device)
    arguments[wanted].requires_grad_()
    torch.library.opcheck(call.function(), (), arguments, test_utils=UTILS)


@pytest.mark.parametrize("wanted", cases.Ssd.differentiable)
def test_subsets_of_ssd_chunk_scan(wanted, device):
    call, arguments = _plain_arguments(cases.Ssd(seqlen=9), device)
    arguments[wanted].requires_grad_()
    torch.library.opcheck(call.function(), (), arguments, test_utils=UTILS)


@pytest.mark.parametrize("layout", ["contiguous", "expanded", "scalar", "transposed", "step2"])
@pytest.mark.parametrize("dfinal", [False, True])
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("num_sequences", [None, 3])
def test_ssd_chunk_scan_bwd(layout, dfinal, optional, num_sequences, device):
    case = cases.Ssd(
        batch=2 if num_sequences is None else 1,
        seqlen=9,
        D="channel" if optional else None,
        z=optional,
        dt_bias=optional,
        initial_states=optional,
        packing="padded" if optional else None,
        num_sequences=num_sequences,
        layouts={"dout": layout, "dfinal_states": layout},
    )
    call, arguments = _plain_arguments(case, device)
    arguments["dout"] = _own(call.cotangents["out"])
    arguments["dfinal_states"] = _own(call.cotangents["final_states"]) if dfinal else None
    op = torch.ops.mamba_ssm.ssd_chunk_scan_bwd.default
    torch.library.opcheck(op, (), arguments, test_utils=UTILS)


@pytest.mark.parametrize("layout", ["contiguous", "expanded", "scalar", "transposed", "step2"])
@pytest.mark.parametrize("dfinal", [False, True])
@pytest.mark.parametrize("optional", [False, True])
def test_causal_conv1d_bwd(layout, dfinal, optional, device):
    case = cases.Conv(
        seqlen=9,
        bias=optional,
        initial_states=optional,
        packing="padded" if optional else None,
        layouts={"dout": layout, "dfinal_states": layout},
    )
    call, arguments = _plain_arguments(case, device)
    arguments["dout"] = _own(call.cotangents["out"])
    arguments["dfinal_states"] = _own(call.cotangents["final_states"]) if dfinal else None
    op = torch.ops.mamba_ssm.causal_conv1d_bwd.default
    torch.library.opcheck(op, (), arguments, test_utils=UTILS)


@pytest.mark.parametrize("layout", ["contiguous", "expanded", "scalar", "transposed", "step2"])
@pytest.mark.parametrize("dlast", [False, True])
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("complex_A", [False, True])
def test_selective_scan_fwd_and_bwd(layout, dlast, optional, complex_A, device):
    case = cases.Scan(
        seqlen=9,
        D=optional,
        z=optional,
        delta_bias=optional,
        initial_state=optional,
        packing="padded" if optional else None,
        complex_A=complex_A,
        layouts={"dout": layout, "dlast_state": layout},
    )
    call, arguments = _plain_arguments(case, device)
    op = torch.ops.mamba_ssm.selective_scan_fwd.default
    torch.library.opcheck(op, (), arguments, test_utils=UTILS)
    arguments["states"] = op(**arguments)[2]
    arguments["dout"] = _own(call.cotangents["out"])
    arguments["dlast_state"] = _own(call.cotangents["last_state"]) if dlast else None
    op = torch.ops.mamba_ssm.selective_scan_bwd.default
    torch.library.opcheck(op, (), arguments, test_utils=UTILS)


@pytest.mark.parametrize("wanted", cases.NormGated.differentiable)
def test_subsets_of_rms_norm_gated(wanted, device):
    call, arguments = _plain_arguments(cases.NormGated(), device)
    arguments[wanted].requires_grad_()
    torch.library.opcheck(call.function(), (), arguments, test_utils=UTILS)


@pytest.mark.parametrize("wanted", cases.LayerNorm.differentiable)
def test_subsets_of_layer_norm(wanted, device):
    case = cases.LayerNorm(x1=True, weight1=True, bias1=True)
    call, arguments = _plain_arguments(case, device)
    arguments[wanted].requires_grad_()
    torch.library.opcheck(call.function(), (), arguments, test_utils=UTILS)


@pytest.mark.parametrize("layout", ["contiguous", "expanded", "scalar", "transposed", "step2"])
@pytest.mark.parametrize("optional", [False, True])
def test_rms_norm_gated_bwd(layout, optional, device):
    case = cases.NormGated(bias=optional, z=optional, layouts={"dout": layout})
    call, arguments = _plain_arguments(case, device)
    arguments["dout"] = _own(call.cotangents["out"])
    op = torch.ops.mamba_ssm.rms_norm_gated_bwd.default
    torch.library.opcheck(op, (), arguments, test_utils=UTILS)


@pytest.mark.parametrize("layout", ["contiguous", "expanded", "scalar", "transposed", "step2"])
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("has_x1", [False, True])
def test_layer_norm_bwd(layout, optional, has_x1, device):
    case = cases.LayerNorm(
        bias=optional,
        weight1=optional,
        bias1=optional,
        x1=has_x1,
        masks=optional,
        rowscale=optional and not has_x1,
        layouts={"dout": layout, "dout1": layout, "dresidual_out": layout},
    )
    call, arguments = _plain_arguments(case, device)
    total = arguments["residual"]
    for name in ("x", "residual", "x1", "prenorm", "residual_in_fp32"):
        arguments.pop(name, None)
    arguments["dout"] = _own(call.cotangents["out"])
    arguments["dout1"] = _own(call.cotangents["out1"]) if optional else None
    arguments["dresidual_out"] = _own(call.cotangents["residual_out"]) if optional else None
    arguments |= {"sum": total, "has_residual": True, "has_x1": has_x1}
    op = torch.ops.mamba_ssm.layer_norm_bwd.default
    torch.library.opcheck(op, (), arguments, test_utils=UTILS)


OUT = {
    "causal_conv1d_out": cases.Conv(seqlen=9),
    "causal_conv1d_bwd_out": cases.Conv(seqlen=9),
    "selective_scan_bwd_out": cases.Scan(seqlen=9, B=2),
    "ssd_chunk_scan_bwd_out": cases.Ssd(seqlen=9, D="channel"),
    "rms_norm_gated_bwd_out": cases.NormGated(),
}
PLAIN = {"D", "z", "delta_bias", "dt_bias", "initial_state", "initial_states", "bias"}


@pytest.mark.parametrize("op", OUT)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "step2"])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out(op, layout, plain, dtype, device):
    """Results of any strides get the bits of fresh ones, and nothing around them is touched. On a
    GPU other kernels serve other strides, and add in another order."""
    call, arguments = _plain_arguments(dataclasses.replace(OUT[op], dtype=dtype), device)
    if plain:
        arguments = {n: None if n in PLAIN else value for n, value in arguments.items()}
    if op == "selective_scan_bwd_out":
        arguments["states"] = torch.ops.mamba_ssm.selective_scan_fwd(**arguments)[2]
        arguments["dlast_state"] = None
    elif "_bwd_" in op and "norm" not in op:
        arguments["dfinal_states"] = None
    if "_bwd_" in op:
        arguments["dout"] = _own(call.cotangents["out"])
    base = getattr(torch.ops.mamba_ssm, op.removesuffix("_out")).default
    fresh = dict(zip((r.name for r in base._schema.returns), base(**arguments), strict=True))
    fresh = {name: value for name, value in fresh.items() if value is not None}
    arena = poison.Arena(device)
    placed = {n: arena.place(n, torch.zeros_like(value), layout) for n, value in fresh.items()}
    into = getattr(torch.ops.mamba_ssm, op).default
    assert into(**arguments, **placed) is None
    for name, value in fresh.items():
        if device == "cpu" or layout == "contiguous":
            assert poison.same_bits(placed[name], value), name
        tolerance = {
            "rtol": 0,
            "atol": 16 * torch.finfo(value.dtype).eps * value.abs().max().item(),
        }
        torch.testing.assert_close(placed[name], value, **tolerance)
    arena.check(mutable=tuple(fresh))
    if dtype == torch.float32:
        own = {name: _own(value) for name, value in placed.items()}
        torch.library.opcheck(into, (), arguments | own, test_utils=UTILS)


@pytest.mark.parametrize("op", OUT)
def test_wrong_out(op, device):
    """A result of another shape or type, one that overlaps itself, or one too many or too few."""
    call, arguments = _plain_arguments(OUT[op], device)
    if op == "selective_scan_bwd_out":
        arguments["states"] = torch.ops.mamba_ssm.selective_scan_fwd(**arguments)[2]
    if "_bwd_" in op:
        arguments["dout"] = _own(call.cotangents["out"])
        arguments |= {"dlast_state": None} if "states" in arguments else {}
        arguments |= {"dfinal_states": None} if op.startswith(("causal", "ssd")) else {}
    base = getattr(torch.ops.mamba_ssm, op.removesuffix("_out")).default
    results = dict(zip((r.name for r in base._schema.returns), base(**arguments), strict=True))
    into = getattr(torch.ops.mamba_ssm, op).default
    required = {a.name for a in into._schema.arguments if not a.has_default_value()}
    for name, value in results.items():
        spoiled = [value[1:], value.double(), value[:1].expand_as(value)]
        for wrong in spoiled if name in required else [*spoiled, None]:
            with pytest.raises(RuntimeError, match=rf"{op}: {name} must|{op}: {name} is written"):
                into(**arguments, **(results | {name: wrong}))
        if name not in required:
            absent = {name.removeprefix("d"): None}
            with pytest.raises(RuntimeError, match=f"{op}: {name} must be given where"):
                into(**(arguments | absent), **results)
