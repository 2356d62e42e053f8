"""GatedMLP and swiglu."""

import pytest
import torch
import torch.nn.functional as F

from mamba_ssm.modules.mlp import GatedMLP
from mamba_ssm.ops.triton.k_activations import SwiGLU, _swiglu_bwd, _swiglu_fwd, swiglu


@pytest.mark.parametrize("bias", [False, True])
def test_names_and_shapes(bias):
    mlp = GatedMLP(12, 130, 20, bias=bias, dtype=torch.float64)
    expected = {"fc1.weight": (512, 12), "fc2.weight": (20, 256)}
    if bias:
        expected |= {"fc1.bias": (512,), "fc2.bias": (20,)}
    assert {name: tuple(t.shape) for name, t in mlp.state_dict().items()} == expected
    assert all(p.dtype == torch.float64 for p in mlp.parameters())


def test_default_widths():
    assert GatedMLP(96).fc2.weight.shape == (96, 256)  # 8 * 96 / 3 is a multiple of 128
    assert GatedMLP(97).fc2.weight.shape == (97, 384)
    assert GatedMLP(97, multiple_of=1).fc1.weight.shape == (2 * 258, 97)


@pytest.mark.parametrize("activation", [F.silu, torch.tanh])
def test_values(device, activation):
    mlp = GatedMLP(6, 5, bias=True, activation=activation, multiple_of=1, dtype=torch.float64)
    mlp.to(device)
    x = torch.randn(2, 3, 6, dtype=torch.float64, device=device)
    W, b = mlp.fc1.weight, mlp.fc1.bias
    y, gate = x @ W[:5].T + b[:5], x @ W[5:].T + b[5:]
    expected = (y * activation(gate)) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(mlp(x), expected)


def exact(xy):
    x, y = xy.double().chunk(2, dim=-1)
    return x / (1 + torch.exp(-x)) * y


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_swiglu(device, dtype):
    """One rounding away from exact, gradient too."""
    xy = (3 * torch.randn(2, 5, 14, device=device)).to(dtype).requires_grad_()
    dout = torch.randn(2, 5, 7, device=device).to(dtype)
    out = swiglu(xy)
    out.backward(dout)
    leaf = xy.detach().double().requires_grad_()
    expected = exact(leaf)
    expected.backward(dout.double())
    rtol = {torch.float64: 1e-14, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps)
    assert out.dtype == xy.grad.dtype == dtype
    torch.testing.assert_close(out.double(), expected.detach(), rtol=rtol, atol=rtol / 10)
    torch.testing.assert_close(xy.grad.double(), leaf.grad, rtol=rtol, atol=rtol / 10)


def test_swiglu_of_large_numbers():
    xy = torch.tensor([-1e4, 1e4, 2.0, 2.0], requires_grad=True)
    out = swiglu(xy)
    out.sum().backward()
    assert out.tolist() == [0, 2e4] and xy.grad.tolist() == [0, 2, 0, 1e4]


def test_swiglu_gradient_and_strides():
    xy = torch.randn(4, 3, dtype=torch.float64).T.requires_grad_()
    assert torch.autograd.gradcheck(swiglu, xy)
    assert torch.equal(SwiGLU.apply(xy), swiglu(xy))
    assert swiglu(xy[:0]).shape == (0, 2)
    with pytest.raises(ValueError, match=r"even number of channels .* got \(4, 3\)"):
        swiglu(torch.ones(4, 3))


def test_swiglu_parts():
    xy, dout = torch.randn(3, 8), torch.randn(3, 4)
    out, dxy = torch.empty(3, 4), torch.empty(3, 8)
    assert _swiglu_fwd(xy, out) is out
    torch.testing.assert_close(out, exact(xy).float())
    again = torch.empty(3, 4)
    gradient, recomputed = _swiglu_bwd(xy, dout, dxy, recompute_output=True, out=again)
    assert gradient is dxy and recomputed is again
    assert torch.equal(again, out) and torch.equal(_swiglu_bwd(xy, dout), dxy)
