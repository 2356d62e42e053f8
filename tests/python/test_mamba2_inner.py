"""mamba2_inner, the fused body of a Mamba-2 block."""

import dataclasses

import pytest
import torch
from harness import cases, compare, properties
from harness.registration import fused_only
from mamba_ssm.ops.triton.ssd_combined import (
    mamba_split_conv1d_scan_combined,
    mamba_split_conv1d_scan_ref,
)

BASE = cases.Inner2()
ROWS = cases.variations(
    BASE,
    {"norm": False, "d_nonssm": 5},
    {"norm": False, "d_model": None},
    {"norm": False, "d_model": None, "d_nonssm": 5},
    {"d_model": None, "d_nonssm": 5},
    {"d_nonssm": 5, "norm_before_gate": True},
    {"conv_bias": False, "out_bias": False, "D": None, "dt_bias": False, "initial_states": False},
    {"packing": "packed", "d_nonssm": 3},
    {"packing": "padded", "norm": False},
    {"batch": 1, "num_sequences": 4},
    {"batch": 1, "num_sequences": 4, "norm": False, "initial_states": "first"},
    {"batch": 1, "num_sequences": 3, "packing": "packed"},
    {"batch": 1, "num_sequences": 3, "packing": "padded", "initial_states": False},
    {"batch": 1, "num_sequences": 3, "index_dtype": torch.int64},
    {"seqlen": 150, "nheads": 3, "headdim": 8, "ngroups": 1, "dstate": 16},
    batch=[1, 3],
    seqlen=[1, 2, 3, 33],
    nheads=[2, 6],
    headdim=[1, 8],
    ngroups=[1, 4],
    dstate=[1, 16],
    d_nonssm=[1, 6],
    width=[1, 2, 5],
    d_model=[None, 1, 16],
    conv_bias=[False],
    out_bias=[False],
    D=[None, "channel"],
    dt_bias=[False],
    norm=[False],
    norm_before_gate=[True],
    silu=[False],
    limits=[True],
    initial_states=[False],
    packing=["single", "packed", "padded", "blank"],
    only_result=["out", "final_states"],
    layouts=[{"zxbcdt": layout} for layout in ("transposed", "step2", "sliced")]
    + [{"dout": "scalar"}],
)


def table(rows):
    return pytest.mark.parametrize("case", rows.values(), ids=rows.keys())


@table(cases.with_dtypes(ROWS))
def test_against_oracle(case, device):
    compare.check_call(case.call(device))


@pytest.mark.parametrize(
    "dtypes",
    [
        {"A": torch.bfloat16, "D": torch.bfloat16, "dt_bias": torch.bfloat16},
        {"norm_weight": torch.float32, "conv1d_weight": torch.float32},
        {"initial_states": torch.bfloat16},
        {"out_proj_weight": torch.float32, "out_proj_bias": torch.float32},
    ],
)
def test_types_of_parameters(dtypes, device):
    case = dataclasses.replace(BASE, dtype=torch.bfloat16, dtypes=dtypes, d_nonssm=2)
    compare.check_call(case.call(device))


GRADCHECK = cases.variations(
    cases.Inner2(
        seqlen=5, nheads=2, headdim=2, ngroups=1, dstate=2, d_model=3, width=3, dtype=torch.float64
    ),
    {"norm": False, "d_nonssm": 2},
    {"norm": False, "d_model": None},
    {"batch": 1, "num_sequences": 3},
    {"packing": "padded"},
    {"conv_bias": False, "out_bias": False, "D": None, "dt_bias": False},
    d_nonssm=[2],
    D=["channel"],
    norm_before_gate=[True],
    silu=[False],
    limits=[True],
)


@table(GRADCHECK)
def test_gradcheck(case, device):
    properties.gradcheck(case.call(device), fast_mode=True)


@table(cases.variations(BASE, {"norm": False, "d_nonssm": 2}, {"batch": 1, "num_sequences": 3}))
def test_gradient_subsets(case, device):
    """Each gradient alone is that among all the others (to the rounding of torch's matmul)."""
    call = case.call(device)
    everything = compare.run(call).gradients
    for name in call.differentiable:
        one = compare.run(dataclasses.replace(call, differentiable=(name,))).gradients
        torch.testing.assert_close(one[name], everything[name], rtol=1e-5, atol=1e-5)


@table(
    cases.variations(
        dataclasses.replace(BASE, num_sequences=4, batch=1, seqlen=40, dtype=torch.float64),
        {"norm": False, "d_nonssm": 2},
        {"initial_states": "first"},
    )
)
def test_packed_equals_separate(case, device):
    """Sequences in a row, by offsets and by ids, as each in a call of its own; gradients, too."""
    call = case.call(device)
    packed = compare.run(call)
    bounds = call.arguments["cu_seqlens"].tolist()
    names = [name for name in call.differentiable if name not in ("zxbcdt", "initial_states")]
    a = {n: v.detach().clone() if torch.is_tensor(v) else v for n, v in call.arguments.items()}
    leaves = [a[name].requires_grad_() for name in names]
    zxbcdt = a.pop("zxbcdt").requires_grad_()
    states = a.pop("initial_states").requires_grad_()
    del a["cu_seqlens"]
    outs, finals = [], []
    for number, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        initial = states[number : number + 1] if number < len(states) else None
        out, final = call.function()(**a, zxbcdt=zxbcdt[:, begin:end], initial_states=initial)
        outs.append(out)
        finals.append(final)
    out, final = torch.cat(outs, 1), torch.cat(finals)
    torch.testing.assert_close(out, packed.results["out"])
    torch.testing.assert_close(final, packed.results["final_states"])
    gradients = torch.autograd.grad(
        [out, final], [zxbcdt, states, *leaves], list(call.cotangents.values())
    )
    for name, gradient in zip(["zxbcdt", "initial_states", *names], gradients):
        torch.testing.assert_close(gradient, packed.gradients[name], msg=name)

    ids = torch.cat(
        [torch.full((end - begin,), i) for i, (begin, end) in enumerate(zip(bounds, bounds[1:]))]
    )
    by_ids = call.function()(**a, zxbcdt=zxbcdt, seq_idx=ids[None].to(device))[0]
    torch.testing.assert_close(by_ids, call.invoke(initial_states=None)["out"])


@fused_only
@pytest.mark.parametrize("norm", [False, True])
def test_keeps_little(norm, device):
    """The node holds zxbcdt and y, neither what the convolution nor what the norm returns."""
    case = cases.Inner2(seqlen=64, nheads=8, headdim=16, d_nonssm=16, norm=norm)
    call = case.call(device)
    zxbcdt = call.arguments["zxbcdt"].detach().requires_grad_()
    large = []

    def pack(tensor):
        if tensor.dim() == 3 and tensor.shape[1] == 64:
            large.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call.invoke(zxbcdt=zxbcdt)
    assert sorted(large) == sorted([tuple(zxbcdt.shape), (2, 64, 128)])


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, "autocast"])
def test_autocast_casts_the_projection(autocast_dtype, dtype, device):
    """Float32 weights: a result of the autocast type, gradients of the weights' type."""
    dtype = autocast_dtype if dtype == "autocast" else dtype
    call = cases.Inner2(dtype=dtype, d_nonssm=2).call(device)
    names = ("out_proj_weight", "out_proj_bias")
    wide = {name: call.arguments[name].float().requires_grad_() for name in names}
    narrow = {name: call.arguments[name].to(autocast_dtype) for name in names}
    with torch.autocast(device, dtype=autocast_dtype):
        out = call.invoke(**wide)["out"]
    assert out.dtype == autocast_dtype
    torch.testing.assert_close(out, call.invoke(**narrow)["out"])
    gradients = torch.autograd.grad(out, list(wide.values()), torch.ones_like(out))
    for name, gradient in zip(names, gradients):
        assert gradient.dtype == torch.float32 and gradient.shape == wide[name].shape
        assert gradient.isfinite().all()


def test_empty_and_short(device):
    for change in ({"batch": 0}, {"seqlen": 0}, {"seqlen": 0, "batch": 1, "num_sequences": 2}):
        for norm in (False, True):
            case = cases.Inner2(norm=norm, d_nonssm=2, **change)
            outcome = compare.run(case.call(device))
            assert outcome.results["out"].numel() == 0
            for name, gradient in outcome.gradients.items():
                assert name == "initial_states" or (gradient == 0).all(), name


def test_offsets_are_read_on_the_device_alone():
    """Nothing about the sequences comes to the host: the op traces with fake offsets."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    call = cases.Inner2(batch=1, num_sequences=3).call()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {
            n: mode.from_tensor(v) if torch.is_tensor(v) else v for n, v in call.arguments.items()
        }
        out, final_states = call.function()(**fake)
    assert out.shape == (1, 17, 5) and final_states.shape == (3, 4, 3, 4)


# The function of upstream's name -----------------------------------------------------------------


def split_arguments(device, D="head", norm=True, **options):
    call = cases.Inner2(dtype=torch.float64, D=D, norm=norm, initial_states=False, **options).call(
        device
    )
    a = call.arguments
    positional = [a[n] for n in ("zxbcdt", "conv1d_weight", "conv1d_bias", "dt_bias", "A", "D")]
    named = {
        "rmsnorm_weight": a.get("norm_weight"),
        "rmsnorm_eps": a.get("norm_eps", 1e-6),
        "outproj_weight": a.get("out_proj_weight"),
        "outproj_bias": a.get("out_proj_bias"),
        "headdim": None if D == "channel" else a["headdim"],
        "ngroups": a["ngroups"],
        "norm_before_gate": a["norm_before_gate"],
        "dt_limit": (a.get("dt_min", 0.0), a.get("dt_max", float("inf"))),
    }
    return call, positional, named


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"D": "channel"},
        {"norm": False},
        {"norm": False, "d_nonssm": 3},
        {"d_nonssm": 3, "d_model": None},
        {"limits": True, "norm_before_gate": True},
        {"seqlen": 150},
    ],
    ids=str,
)
def test_function_and_reference(options, device):
    call, positional, named = split_arguments(device, **options)
    out, final_states = mamba_split_conv1d_scan_combined(
        *positional, 64, return_final_states=True, **named
    )
    expected = call.invoke()
    torch.testing.assert_close(out, expected["out"], rtol=0, atol=0)
    torch.testing.assert_close(final_states, expected["final_states"], rtol=0, atol=0)
    torch.testing.assert_close(mamba_split_conv1d_scan_ref(*positional, 64, **named), out)


def test_function_takes_what_callers_pass(device):
    """D and chunk_size by name, a list of limits, no epsilon, and both names of the activation."""
    call, (*positional, D), named = split_arguments(device, norm=False)
    named |= {"rmsnorm_eps": None, "dt_limit": [0.0, float("inf")]}
    for activation in ("silu", "swish"):
        out = mamba_split_conv1d_scan_combined(
            *positional, D=D, chunk_size=8, activation=activation, **named
        )
        torch.testing.assert_close(out, call.invoke()["out"], rtol=0, atol=0)
    plain = mamba_split_conv1d_scan_combined(
        *positional, D=D, chunk_size=8, activation=None, **named
    )
    torch.testing.assert_close(plain, call.invoke(silu=False)["out"], rtol=0, atol=0)
    with pytest.raises(ValueError, match="gelu"):
        mamba_split_conv1d_scan_combined(*positional, D, 8, activation="gelu", **named)
    with pytest.raises(ValueError, match="headdim"):
        mamba_split_conv1d_scan_combined(*positional, D, 8, **named | {"headdim": None})
    with pytest.raises(ValueError, match="chunk_size"):
        mamba_split_conv1d_scan_combined(*positional, D, 0, **named)


@fused_only
@pytest.mark.parametrize("options", [{}, {"norm": False}, {"d_model": None}, {"packing": "packed"}])
def test_moves_nothing(options, device):
    """The block copies no tensor of its activations, forward or backward."""
    case = cases.Inner2(batch=2, seqlen=64, **options)
    call = case.call(device)
    leaves = {n: call.arguments[n].detach().requires_grad_() for n in call.differentiable}

    def run():
        out = call.invoke(**leaves)["out"]
        torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out), allow_unused=True)

    properties.check_moves_nothing(run, least=case.batch * case.seqlen * case.dstate)
