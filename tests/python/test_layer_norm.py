"""layer_norm, forward and backward, and its Python functions and module."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from harness import cases, compare, poison, properties

BASE = cases.LayerNorm()
ROWS = cases.variations(
    BASE,
    {"residual": False, "prenorm": False, "bias": False},
    {"residual": False, "residual_in_fp32": True},
    {"residual": False, "is_rms_norm": True, "bias": False},
    {"is_rms_norm": True, "bias": False},
    {"is_rms_norm": True, "bias": False, "prenorm": False},
    {"x1": True, "weight1": True, "bias1": True},
    {"x1": True, "weight1": True, "is_rms_norm": True, "residual": False},
    {"weight1": True, "bias1": True, "prenorm": False},
    {"masks": True, "dropout_p": 0.3},
    {"masks": True, "dropout_p": 0.3, "x1": True, "weight1": True},
    {"masks": True, "dropout_p": 0.3, "rowscale": True, "residual": False},
    {"masks": True, "dropout_p": 1.0, "eps": 1e-2},
    {"rowscale": True, "dtypes": {"rowscale": torch.bfloat16}},
    {
        "x1": True,
        "masks": True,
        "dropout_p": 0.5,
        "dtypes": {"residual": torch.bfloat16},
        "dtype": torch.bfloat16,
    },
    {"leading": (3, 2, 2, 5), "layout": "transposed"},
    {"leading": (2, 1, 3, 1, 2, 2), "layout": "sliced"},
    {"layout": "scalar", "is_rms_norm": True},  # LayerNorm of equal numbers is all cancellation
    {"leading": (300,), "channels": 40},
    {"leading": (3,), "channels": 2050},
    {"leading": (2,), "channels": 9000, "is_rms_norm": True},
    leading=[(), (0,), (1,), (2, 0, 3), (5,), (3, 4, 5), (2, 3, 2, 3)],
    channels=[0, 4, 5, 8, 31, 64, 67, 128, 256, 520, 1024],
    bias=[False],
    residual=[False],
    x1=[True],
    weight1=[True],
    rowscale=[True],
    prenorm=[False],
    residual_in_fp32=[True],
    is_rms_norm=[True],
    layout=[layout for layout in poison.LAYOUTS[1:] if layout != "scalar"],
    layouts=[
        {"x": "transposed"},
        {"residual": "sliced"},
        {"dout": "scalar"},
        {"dresidual_out": "scalar"},
    ],
    dtypes=[
        {"weight": torch.bfloat16},
        {"bias": torch.float16},
        {"residual": torch.bfloat16},
        {"residual": torch.float16},
    ],
    only_result=["out", "residual_out"],
)


def table(rows):
    return pytest.mark.parametrize("case", rows.values(), ids=rows.keys())


def _with_dtypes(rows):
    """Residuals of a 16-bit type go with x of that type."""
    for label, case in cases.with_dtypes(rows).items():
        residual = case.dtypes.get("residual", torch.float32)
        if residual in (torch.float32, case.dtype):
            yield label, case


@table(dict(_with_dtypes(ROWS)))
def test_against_oracle(case, device):
    compare.check_call(case.call(device))


@pytest.mark.full
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("rows, channels", [(700, 2560), (300, 5120), (9000, 64), (70, 16384)])
def test_large(dtype, is_rms_norm, rows, channels, device):
    case = cases.LayerNorm(
        leading=(rows,),
        channels=channels,
        dtype=dtype,
        is_rms_norm=is_rms_norm,
        bias=not is_rms_norm,
    )
    compare.check_call(case.call(device))


GRADCHECK = cases.variations(
    dataclasses.replace(BASE, leading=(3,), channels=6, dtype=torch.float64),
    {"x1": True, "weight1": True, "bias1": True, "masks": True, "dropout_p": 0.4},
    {"rowscale": True, "masks": True, "dropout_p": 0.4, "residual": False},
    leading=[(), (2, 2)],
    bias=[False],
    residual=[False],
    x1=[True],
    weight1=[True],
    rowscale=[True],
    prenorm=[False],
    is_rms_norm=[True],
    layout=["transposed", "sliced"],
)


@table(GRADCHECK)
def test_gradcheck(case, device):
    properties.gradcheck(case.call(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_laws(dtype, is_rms_norm, device):
    """The same bits with any number of threads, at any place in the batch, for any gradients."""
    call = cases.LayerNorm(
        leading=(5, 70), channels=130, dtype=dtype, is_rms_norm=is_rms_norm, x1=True, weight1=True
    ).call(device)
    properties.check_thread_count(call)
    properties.check_gradient_subsets(call)
    properties.check_repeats(call)
    properties.check_row_position(call)


def test_forward_normalizes_the_unrounded_sum(device):
    """A residual of 16 bits loses what x adds to it; out does not."""
    residual = torch.full((1, 4), 256.0, dtype=torch.bfloat16, device=device)
    x = torch.tensor([[0.25, -0.25, 0.5, -0.5]], dtype=torch.bfloat16, device=device)
    weight = torch.ones(4, device=device)
    out, _, residual_out = torch.ops.mamba_ssm.layer_norm(
        x, weight, None, residual, prenorm=True, eps=0.0
    )
    assert torch.equal(residual_out, residual)
    expected = F.layer_norm(x.double(), (4,), eps=0.0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-3)


def test_equal_gradients_are_written_once(device):
    """dresidual and dx1 are None where they are dx."""
    dout, total = torch.randn(2, 3, 8, device=device)
    weight = torch.ones(8, device=device)
    options = dict(has_residual=True, has_x1=True)
    op = torch.ops.mamba_ssm.layer_norm_bwd
    _, _, _, dresidual, dx1, *_ = op(dout, None, None, total, weight, **options)
    assert dresidual is None and dx1 is None
    mask = torch.ones(3, 8, dtype=torch.bool, device=device)
    _, _, _, dresidual, dx1, *_ = op(
        dout, None, None, total, weight, dropout_mask=mask, dropout_p=0.5, **options
    )
    assert dresidual is not None and dx1 is not None


# Python functions and module --------------------------------------------------------------------


def _inputs(device, dtype=torch.float64):
    x, residual, x1 = torch.randn(3, 2, 5, 24, dtype=dtype, device=device)
    weight, bias, weight1, bias1 = torch.randn(4, 24, dtype=dtype, device=device)
    return x, residual, x1, weight, bias, weight1, bias1


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("given", ["", "residual", "residual x1", "residual x1 weight1", "weight1"])
def test_layer_norm_fn(is_rms_norm, prenorm, given, device):
    from mamba_ssm.ops.triton import layer_norm as module

    x, residual, x1, weight, bias, weight1, bias1 = _inputs(device)
    parts = dict(residual=residual, x1=x1, weight1=weight1)
    parts = {name: parts[name] if name in given.split() else None for name in parts}
    if parts["weight1"] is not None:
        parts["bias1"] = bias1
    options = dict(eps=1e-3, prenorm=prenorm)
    function, reference = module.rms_norm_fn, module.rms_norm_ref
    if not is_rms_norm:
        function, reference = module.layer_norm_fn, module.layer_norm_ref
    results = function(x, weight, bias, **parts, **options)
    expected = reference(x, weight, bias, **parts, **options)
    torch.testing.assert_close(results, expected)
    if is_rms_norm:
        options["is_rms_norm"] = True
    torch.testing.assert_close(module.layer_norm_fn(x, weight, bias, **parts, **options), expected)
    s = sum(v for v in (x, parts["residual"], parts["x1"]) if v is not None)
    norm = F.rms_norm(s, (24,), weight, 1e-3) + bias
    if not is_rms_norm:
        norm = F.layer_norm(s, (24,), weight, bias, 1e-3)
    torch.testing.assert_close(results[0] if isinstance(results, tuple) else results, norm)


def test_unchanged_residual_is_x(device):
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn

    weight = torch.ones(8, device=device)
    x = torch.randn(3, 8, device=device)
    assert layer_norm_fn(x, weight, None, prenorm=True)[1] is x
    assert layer_norm_fn(x, weight, None, prenorm=True, residual_in_fp32=True)[1] is x
    half = x.half()
    assert layer_norm_fn(half, weight, None, prenorm=True, residual_in_fp32=True)[1].dtype == (
        torch.float32
    )
    leaf = x.clone().requires_grad_()
    out, residual = layer_norm_fn(leaf, weight, None, prenorm=True)
    (out.sum() + (residual * residual).sum()).backward()
    expected = x.clone().requires_grad_()
    (F.layer_norm(expected, (8,), eps=1e-6).sum() + expected.square().sum()).backward()
    torch.testing.assert_close(leaf.grad, expected.grad)


@pytest.mark.parametrize("with_x1", [False, True])
@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_dropout(with_x1, dropout_p, device):
    """torch's seed rules; the masks that come back reproduce the result."""
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn, layer_norm_ref

    x, residual, x1, weight, bias, *_ = _inputs(device)
    x = x.repeat(20, 1, 1).requires_grad_()
    residual = residual.repeat(20, 1, 1)
    x1 = x1.repeat(20, 1, 1) if with_x1 else None
    arguments = (x, weight, bias, residual, x1)
    options = dict(dropout_p=dropout_p, prenorm=True, eps=1e-3)

    def run():
        torch.manual_seed(3)
        return layer_norm_fn(*arguments, **options, return_dropout_mask=True)

    out, total, mask, mask1 = run()
    for first, second in zip(run(), (out, total, mask, mask1)):
        assert first is second is None or torch.equal(first, second)
    assert mask.dtype == torch.bool and mask.shape == x.shape and (mask1 is not None) == with_x1
    assert abs(mask.double().mean() - (1 - dropout_p)) < 0.03
    expected = layer_norm_ref(*arguments, **options, dropout_mask=mask, dropout_mask1=mask1)
    torch.testing.assert_close((out, total), expected)
    gradient = torch.autograd.grad(out.square().sum() + total.sum(), x)[0]
    exact = torch.autograd.grad(expected[0].square().sum() + expected[1].sum(), x)[0]
    torch.testing.assert_close(gradient, exact)
    assert (gradient[~mask] == 0).all()
    out2 = layer_norm_fn(*arguments, **options)[0]
    assert dropout_p == 1 or not torch.equal(out, out2)  # the generator moves on


def test_rowscale(device):
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn, layer_norm_ref

    x, residual, _, weight, bias, *_ = _inputs(device)
    rowscale = torch.rand(2, 5, dtype=x.dtype, device=device)
    arguments = (x, weight, bias, residual)
    torch.testing.assert_close(
        layer_norm_fn(*arguments, rowscale=rowscale, prenorm=True),
        layer_norm_ref(*arguments, rowscale=rowscale, prenorm=True),
    )


def test_module(device):
    from mamba_ssm.ops.triton.layer_norm import RMSNorm, rms_norm_fn

    module = RMSNorm(24, eps=1e-3, device=device, dtype=torch.float64)
    assert list(module.state_dict()) == ["weight"] and module.bias is None and module.drop is None
    x, residual, *_ = _inputs(device)
    with torch.no_grad():
        module.weight.normal_()
    expected = rms_norm_fn(x, module.weight, None, residual=residual, eps=1e-3, prenorm=True)
    torch.testing.assert_close(module(x, residual, prenorm=True), expected)
    dropping = RMSNorm(24, dropout_p=0.5, device=device, dtype=torch.float64)
    assert isinstance(dropping.drop, torch.nn.Dropout)
    assert list(dropping.state_dict()) == ["weight"]
    assert not torch.equal(dropping(x), dropping(x))
    dropping.eval()
    torch.testing.assert_close(dropping(x), F.rms_norm(x, (24,), eps=1e-5))


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("linear_bias", [False, True])
def test_layer_norm_linear_fn(is_rms_norm, prenorm, linear_bias, device):
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn, layer_norm_linear_fn

    x, residual, _, weight, bias, *_ = _inputs(device)
    linear = torch.randn(7, 24, dtype=x.dtype, device=device)
    offset = torch.randn(7, dtype=x.dtype, device=device) if linear_bias else None
    leaves = [x, weight, bias, linear, residual] + ([offset] if linear_bias else [])
    for leaf in leaves:
        leaf.requires_grad_()
    options = dict(eps=1e-3, prenorm=prenorm, is_rms_norm=is_rms_norm)
    results = layer_norm_linear_fn(x, weight, bias, linear, offset, residual, **options)
    expected = layer_norm_fn(x, weight, bias, residual, **options)
    results, expected = (r if isinstance(r, tuple) else (r,) for r in (results, expected))
    expected = (F.linear(expected[0], linear, offset), *expected[1:])
    torch.testing.assert_close(results, expected)
    gradients = [
        torch.autograd.grad(sum(r.square().sum() for r in rs), leaves) for rs in (results, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_layer_norm_linear_fn_keeps_no_normalized_rows(device):
    from mamba_ssm.ops.triton.layer_norm import layer_norm_linear_fn

    x, residual, _, weight, bias, *_ = _inputs(device)
    linear = torch.randn(7, 24, dtype=x.dtype, device=device, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer_norm_linear_fn(x, weight, bias, linear, None, residual)
    assert sum(t.shape == x.shape for t in kept) <= 2  # x and residual, or their sum


def test_layer_norm_linear_fn_under_autocast(device):
    from mamba_ssm.ops.triton.layer_norm import layer_norm_linear_fn

    x, residual, _, weight, bias, *_ = _inputs(device, torch.float32)
    linear = torch.randn(7, 24, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        out, total = layer_norm_linear_fn(
            x, weight, bias, linear, None, residual, prenorm=True, residual_in_fp32=True
        )
    assert out.dtype == torch.bfloat16 and total.dtype == torch.float32
    exact = F.layer_norm(x + residual, (24,), weight, bias, 1e-6) @ linear.T
    torch.testing.assert_close(out.float(), exact, rtol=0.03, atol=0.1)
    out.float().sum().backward()
    assert linear.grad.dtype == torch.float32


def test_former_orders(device):
    """mamba_ssm 1.x: the module `layernorm`, with another order from the fifth argument on."""
    from mamba_ssm.ops.triton import layernorm

    x, residual, _, weight, bias, *_ = _inputs(device)
    results = layernorm.rms_norm_fn(x, weight, bias, residual, True, True, 1e-3)
    expected = torch.ops.mamba_ssm.layer_norm(
        x, weight, bias, residual, eps=1e-3, prenorm=True, is_rms_norm=True
    )
    torch.testing.assert_close(results, (expected[0], expected[2]))
    results = layernorm.layer_norm_fn(x, weight, bias, residual, 1e-3, True, True, False)
    torch.testing.assert_close(results[0], F.layer_norm(x + residual, (24,), weight, bias, 1e-3))
    y, mean, rstd, total = layernorm._layer_norm_fwd(
        x.flatten(0, 1), weight, bias, 1e-3, None, residual_dtype=None, is_rms_norm=True
    )
    torch.testing.assert_close(y, F.rms_norm(x, (24,), weight, 1e-3).flatten(0, 1) + bias)
    assert mean is None and rstd.shape == (10,)


@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_private_forward(is_rms_norm, device):
    from mamba_ssm.ops.triton.layer_norm import _layer_norm_fwd

    x, residual, _, weight, bias, *_ = _inputs(device)
    x, residual = x.flatten(0, 1), residual.flatten(0, 1)
    y, y1, mean, rstd, total, seeds, mask, mask1 = _layer_norm_fwd(
        x, weight, bias, 1e-3, residual, is_rms_norm=is_rms_norm
    )
    assert y1 is seeds is mask is mask1 is None
    s = x + residual
    torch.testing.assert_close(total, s)
    if is_rms_norm:
        assert mean is None
    else:
        torch.testing.assert_close(mean, s.mean(-1).to(mean.dtype))
        s = s - s.mean(-1, keepdim=True)
    torch.testing.assert_close(rstd, (s.square().mean(-1) + 1e-3).rsqrt().to(rstd.dtype))
    expected = s * (s.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight + bias
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("has_x1", [False, True])
def test_private_backward(is_rms_norm, has_x1, device):
    from mamba_ssm.ops.triton.layer_norm import _layer_norm_bwd, _layer_norm_fwd, layer_norm_fn

    names = ["x", "residual", "weight", "bias", "weight1", "bias1"] + ["x1"] * has_x1
    shapes = {"weight": (6,), "bias": (6,), "weight1": (6,), "bias1": (6,)}
    leaves = {n: torch.randn(shapes.get(n, (5, 6)), device=device).requires_grad_() for n in names}
    results = layer_norm_fn(**leaves, eps=1e-3, prenorm=True, is_rms_norm=is_rms_norm)
    dy, dy1, dtotal = torch.randn(3, 5, 6, device=device)
    expected = torch.autograd.grad(results, list(leaves.values()), [dy, dy1, dtotal])
    expected = dict(zip(leaves, expected))
    values = {name: leaf.detach() for name, leaf in leaves.items()}
    _, _, mean, rstd, total, *_ = _layer_norm_fwd(
        values["x"],
        values["weight"],
        values["bias"],
        1e-3,
        values["residual"],
        values.get("x1"),
        is_rms_norm=is_rms_norm,
    )
    arguments = (dy, total, values["weight"], values["bias"], 1e-3, mean, rstd, dtotal, dy1)
    options = dict(has_residual=True, has_x1=has_x1, is_rms_norm=is_rms_norm)
    *got, y = _layer_norm_bwd(
        *arguments, values["weight1"], values["bias1"], recompute_output=True, **options
    )
    torch.testing.assert_close(y, results[0].detach())
    order = ["x", "weight", "bias", "residual", "x1", "weight1", "bias1"]
    for name, gradient in zip(order, got, strict=True):
        torch.testing.assert_close(gradient, expected.get(name), msg=name)
    with pytest.raises(ValueError, match="dropout_p must be 0"):
        _layer_norm_bwd(*arguments, dropout_p=0.1, **options)
