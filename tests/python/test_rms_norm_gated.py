"""rms_norm_gated, forward and backward, and its Python functions and modules."""

import dataclasses

import pytest
import torch
from harness import cases, compare, poison, properties

BASE = cases.NormGated()
ROWS = cases.variations(
    BASE,
    {"z": False, "bias": False},
    {"z": False, "is_rms_norm": False},
    {"norm_before_gate": False, "is_rms_norm": False},
    {"norm_before_gate": False, "groups": 3},
    {"norm_before_gate": False, "group": 130, "groups": 2},
    {"groups": 4, "group": 16, "is_rms_norm": False},
    {"groups": 40, "group": 5, "norm_before_gate": False},
    {"leading": (3, 2, 2, 5), "layout": "transposed"},
    {"leading": (2, 1, 3, 1, 2, 2), "layout": "sliced"},
    {"leading": (300,), "group": 40},
    {"leading": (1000,), "group": 8, "groups": 2},
    {"leading": (3,), "group": 2050, "is_rms_norm": False},
    {"leading": (2,), "group": 9000, "norm_before_gate": False},
    leading=[(), (0,), (1,), (2, 0, 3), (5,), (3, 4, 5), (2, 3, 2, 3)],
    group=[0, 4, 5, 8, 31, 64, 67, 128, 256, 520, 1024],
    groups=[2, 3],
    whole_row=[True],
    bias=[False],
    z=[False],
    norm_before_gate=[False],
    is_rms_norm=[False],
    layout=poison.LAYOUTS[1:],
    layouts=[{"x": "transposed"}, {"z": "sliced"}, {"dout": "scalar"}, {"dout": "transposed"}],
    dtypes=[{"weight": torch.bfloat16}, {"bias": torch.float16}],
)


def table(rows):
    return pytest.mark.parametrize("case", rows.values(), ids=rows.keys())


@table(cases.with_dtypes(ROWS))
def test_against_oracle(case, device):
    compare.check_call(case.call(device))


@pytest.mark.full
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize(
    "rows, group, groups",
    [(700, 2560, 1), (300, 5120, 1), (5000, 128, 8), (70, 16384, 1), (9000, 64, 1), (900, 768, 3)],
)
def test_large(dtype, norm_before_gate, is_rms_norm, rows, group, groups, device):
    case = cases.NormGated(
        leading=(rows,),
        group=group,
        groups=groups,
        dtype=dtype,
        norm_before_gate=norm_before_gate,
        is_rms_norm=is_rms_norm,
        bias=not is_rms_norm,
    )
    compare.check_call(case.call(device))


GRADCHECK = cases.variations(
    dataclasses.replace(BASE, leading=(3,), group=6, dtype=torch.float64),
    {"norm_before_gate": False, "is_rms_norm": False},
    {"norm_before_gate": False, "groups": 2},
    leading=[(), (2, 2)],
    groups=[3],
    bias=[False],
    z=[False],
    norm_before_gate=[False],
    is_rms_norm=[False],
    layout=["transposed", "sliced"],
)


@table(GRADCHECK)
def test_gradcheck(case, device):
    properties.gradcheck(case.call(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_laws(dtype, norm_before_gate, device):
    """The same bits with any number of threads, at any place in the batch, for any gradients."""
    call = cases.NormGated(
        leading=(5, 70), group=130, groups=2, dtype=dtype, norm_before_gate=norm_before_gate
    ).call(device)
    properties.check_thread_count(call)
    properties.check_gradient_subsets(call)
    properties.check_repeats(call)
    properties.check_row_position(call)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
def test_results_are_contiguous(layout, device):
    call = cases.NormGated(leading=(3, 4), layout=layout).call(device)
    assert call.invoke()["out"].is_contiguous()
    for gradient in compare.run(call).gradients.values():
        assert gradient.is_contiguous()


# Python functions and modules -------------------------------------------------------------------


def _reference(*arguments, **options):
    from mamba_ssm.ops.triton.layernorm_gated import rms_norm_ref

    return rms_norm_ref(*arguments, **options)


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_rmsnorm_fn(group_size, norm_before_gate, gate, device):
    from mamba_ssm.ops.triton.layernorm_gated import RMSNorm, rmsnorm_fn

    x, z = torch.randn(2, 3, 4, 24, dtype=torch.float64, device=device)
    z = z if gate else None
    weight, bias = torch.randn(2, 24, dtype=torch.float64, device=device)
    out = rmsnorm_fn(x, weight, bias, z, 1e-3, group_size, norm_before_gate)
    expected = _reference(x, weight, bias, z, 1e-3, group_size, norm_before_gate)
    torch.testing.assert_close(out, expected)
    grouped = x if z is None or norm_before_gate else x * torch.nn.functional.silu(z)
    grouped = grouped.unflatten(-1, (-1, group_size or 24))
    expected = torch.nn.functional.rms_norm(grouped, grouped.shape[-1:], eps=1e-3).flatten(-2)
    expected = expected * weight + bias
    if z is not None and norm_before_gate:
        expected = expected * torch.nn.functional.silu(z)
    torch.testing.assert_close(out, expected)

    module = RMSNorm(24, 1e-3, group_size, norm_before_gate, device=device, dtype=torch.float64)
    assert list(module.state_dict()) == ["weight"] and module.bias is None
    assert (module.weight == 1).all()
    torch.testing.assert_close(
        module(x, z), rmsnorm_fn(x, module.weight, None, z, 1e-3, group_size, norm_before_gate)
    )


@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_layernorm_fn(is_rms_norm, device):
    from mamba_ssm.ops.triton import layernorm_gated

    x, z = torch.randn(2, 5, 24, device=device)
    weight, bias = torch.randn(2, 24, device=device)
    out = layernorm_gated.layernorm_fn(x, weight, bias, z, 1e-5, None, True, is_rms_norm)
    norm = torch.nn.functional.layer_norm(x, (24,), weight, bias)
    if is_rms_norm:
        norm = torch.nn.functional.rms_norm(x, (24,), weight, 1e-5) + bias
    torch.testing.assert_close(out, norm * torch.nn.functional.silu(z))
    module = layernorm_gated.LayerNorm(24, device=device)
    assert list(module.state_dict()) == ["weight", "bias"]
    norm = torch.nn.functional.layer_norm(x, (24,))
    torch.testing.assert_close(module(x, z), norm * torch.nn.functional.silu(z))
    out = layernorm_gated.LayerNormFn.apply(x, weight, bias, z, 1e-5, None, True, is_rms_norm)
    torch.testing.assert_close(
        out, layernorm_gated.layernorm_fn(x, weight, bias, z, 1e-5, is_rms_norm=is_rms_norm)
    )


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_private_forward_and_backward(is_rms_norm, norm_before_gate, device):
    """The two functions that other packages call: statistics group by group, buffers filled."""
    from mamba_ssm.ops.triton.layernorm_gated import _layer_norm_bwd, _layer_norm_fwd

    x, z, dy = torch.randn(3, 5, 24, device=device)
    weight, bias = torch.randn(2, 24, device=device)
    options = dict(group_size=8, norm_before_gate=norm_before_gate, is_rms_norm=is_rms_norm)
    buffer = torch.empty_like(x)
    out, mean, rstd = _layer_norm_fwd(x, weight, bias, 1e-5, z, buffer, **options)
    assert out is buffer
    s = x if norm_before_gate else x * torch.nn.functional.silu(z)
    groups = s.unflatten(-1, (3, 8)).transpose(0, 1)  # (groups, rows, channels)
    if is_rms_norm:
        assert mean is None
        torch.testing.assert_close(rstd, (groups.square().mean(-1) + 1e-5).rsqrt().flatten())
    else:
        torch.testing.assert_close(mean, groups.mean(-1).flatten())
        variance = groups.var(-1, correction=0)
        torch.testing.assert_close(rstd, (variance + 1e-5).rsqrt().flatten())

    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, z)]
    expected = torch.ops.mamba_ssm.rms_norm_gated(*leaves, eps=1e-5, **options)
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(expected, leaves, dy)
    dz = torch.empty_like(z)
    dx, dw, db, returned, again = _layer_norm_bwd(
        dy, x, weight, bias, 1e-5, mean, rstd, z, recompute_output=True, dz=dz, **options
    )
    assert returned is dz
    for got, wanted in zip((dx, dw, db, dz, again), (*gradients, expected)):
        torch.testing.assert_close(got, wanted)
