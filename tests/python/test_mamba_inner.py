"""mamba_inner, the fused body of a Mamba block."""

import dataclasses

import pytest
import torch
from harness import cases, compare, properties
from harness.registration import fused_only

BASE = cases.Inner()
ROWS = cases.variations(
    BASE,
    {"B": "constant", "C": "constant"},
    {"B": "flat", "C": "flat"},
    {"rms": True, "proj_bias": True},
    {"rms": True, "checkpoint_lvl": 0},
    {"proj_bias": True, "B": "flat"},
    {"complex_A": True, "proj_bias": True, "rms": True},
    {"complex_A": True, "B": "constant"},
    {"complex_A": True, "C": "flat", "checkpoint_lvl": 0},
    {"conv_bias": False, "out_bias": False, "D": False, "delta_bias": False},
    {"seqlen": 70, "dim": 32, "dstate": 16},
    batch=[1, 3],
    dim=[1, 8, 33],
    seqlen=[1, 2, 3, 33, 65],
    width=[2, 3, 5],
    dstate=[1, 3, 16],
    dt_rank=[1, 7],
    d_model=[1, 16],
    conv_bias=[False],
    out_bias=[False],
    B=["constant", "flat"],
    C=["constant", "flat"],
    complex_A=[True],
    D=[False],
    delta_bias=[False],
    proj_bias=[True],
    rms=[True],
    delta_softplus=[False],
    checkpoint_lvl=[0],
    layouts=[{"xz": "transposed"}, {"xz": "step2"}, {"xz": "sliced"}, {"dout": "scalar"}],
)


def table(rows):
    return pytest.mark.parametrize("case", rows.values(), ids=rows.keys())


@table(cases.with_dtypes(ROWS))
def test_against_oracle(case, device):
    compare.check_call(case.call(device))


GRADCHECK = cases.variations(
    cases.Inner(dim=2, seqlen=4, dstate=2, dt_rank=1, d_model=2, dtype=torch.float64),
    {"rms": True, "proj_bias": True},
    {"rms": True, "proj_bias": True, "checkpoint_lvl": 0},
    {"complex_A": True, "rms": True},
    {"complex_A": True, "B": "constant", "C": "constant"},
    {"conv_bias": False, "out_bias": False, "D": False, "delta_bias": False},
    B=["constant", "flat"],
    C=["constant", "flat"],
    complex_A=[True],
    delta_softplus=[False],
    checkpoint_lvl=[0],
)


@table(GRADCHECK)
def test_gradcheck(case, device):
    properties.gradcheck(case.call(device), fast_mode=True)


@table(cases.variations(BASE, complex_A=[True], rms=[True], dtype=[torch.bfloat16]))
def test_checkpoint_level_changes_no_bit(case, device):
    """What is computed again is computed the same way."""
    kept = compare.run(dataclasses.replace(case, checkpoint_lvl=0).call(device))
    call = dataclasses.replace(case, checkpoint_lvl=1).call(device)
    compare.check_same(call, kept, compare.run(call), "depends on checkpoint_lvl")


@table(cases.variations(BASE, rms=[True], complex_A=[True]))
def test_gradient_subsets(case, device):
    """Each gradient alone is that among all the others (to the rounding of torch's matmul)."""
    call = case.call(device)
    everything = compare.run(call).gradients
    for name in call.differentiable:
        one = compare.run(dataclasses.replace(call, differentiable=(name,))).gradients
        torch.testing.assert_close(one[name], everything[name], rtol=1e-5, atol=1e-5)


@fused_only
def test_checkpointing_keeps_less(device):
    """Level 1 holds neither the convolved x nor delta for the backward."""

    def saved_bytes(level):
        call = cases.Inner(dim=64, seqlen=64, checkpoint_lvl=level).call(device)
        xz = call.arguments["xz"].detach().requires_grad_()
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            call.invoke(xz=xz)
        return total

    one_activation = 2 * 64 * 64 * 4
    assert saved_bytes(0) - saved_bytes(1) >= 2 * one_activation


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_projections(autocast_dtype, device):
    """Float32 weights with 16-bit activations: results of that type, gradients of the weights'."""
    case = cases.Inner(dtype=autocast_dtype)
    weights = ("x_proj_weight", "delta_proj_weight", "out_proj_weight", "out_proj_bias")
    call = case.call(device)
    wide = {name: call.arguments[name].float().requires_grad_() for name in weights}
    with torch.autocast(device, dtype=autocast_dtype):
        out = call.invoke(**wide)["out"]
    assert out.dtype == autocast_dtype
    torch.testing.assert_close(out, call.invoke()["out"])
    gradients = torch.autograd.grad(out, list(wide.values()), torch.ones_like(out))
    for name, gradient in zip(weights, gradients):
        assert gradient.dtype == torch.float32 and gradient.shape == wide[name].shape
        assert gradient.isfinite().all()


@fused_only
@pytest.mark.parametrize("layout", ["contiguous", "channels, batch, time", "channel-last"])
@pytest.mark.parametrize("options", [{}, {"out_bias": False, "proj_bias": True}, {"rms": True}])
def test_moves_nothing(layout, options, device):
    """No layout of xz makes the block copy a tensor of its activations, forward or backward."""
    case = cases.Inner(batch=3, dim=8, seqlen=64, d_model=8, dstate=2, dt_rank=2, **options)
    call = case.call(device)
    xz = call.arguments["xz"]
    if layout == "channels, batch, time":
        xz = xz.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "channel-last":
        xz = xz.transpose(1, 2).contiguous().transpose(1, 2)
    leaves = {n: call.arguments[n].detach().requires_grad_() for n in call.differentiable}
    leaves["xz"] = xz.detach().requires_grad_()

    def run():
        out = call.invoke(**leaves)["out"]
        dxz, *_ = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
        assert dxz.stride() == xz.stride()

    # B and C behind their norms, dt_rank rows at most, go to their place through a copy.
    properties.check_moves_nothing(run, least=case.batch * case.dim * case.seqlen)


@pytest.mark.parametrize("seqlen", [3, 40])
def test_empty_and_short(seqlen, device):
    for change in ({"batch": 0}, {"seqlen": 0}):
        call = dataclasses.replace(cases.Inner(seqlen=seqlen), **change).call(device)
        outcome = compare.run(call)
        assert outcome.results["out"].numel() == 0
        for name, gradient in outcome.gradients.items():
            assert (gradient == 0).all(), name
