"""What is done to modules from outside, tried on every one: copies, other devices and types,
checkpointing, hooks, and layers that are wrapped, parametrized or replaced."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from harness import modules
from harness.modules import gradients, inputs, linears, make, run, run_in_pieces
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

every_module = pytest.mark.parametrize("name", modules.MODULES)
PIECES = [3, 2, 1, 1]


def check_equal(name, got, expected, x, **tolerances):
    """Results and gradients; and results with a cache, where there is one."""
    out, grads = gradients(expected, x)
    got_out, got_grads = gradients(got, x)
    torch.testing.assert_close(got_out, out, **tolerances)
    torch.testing.assert_close(got_grads, grads, **tolerances)
    check_pieces(name, got, x, out, **tolerances)


def check_pieces(name, module, x, expected, **tolerances):
    if name in modules.WITH_CACHE:
        torch.testing.assert_close(run_in_pieces(module, x, PIECES), expected, **tolerances)


# Copies ------------------------------------------------------------------------------------------


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
}


@every_module
@pytest.mark.parametrize("kind", COPIES)
def test_copies(name, kind):
    module = make(name)
    twin, x = COPIES[kind](module), inputs(module)
    assert type(twin) is type(module)
    check_equal(name, twin, module, x)
    for parameter, other in zip(module.parameters(), twin.parameters(), strict=True):
        if kind != "deepcopy":  # which loses marks of all parameters, as _no_weight_decay
            assert vars(parameter) == vars(other)
        assert parameter.data_ptr() != other.data_ptr()
    if isinstance(module, MambaLMHeadModel):
        assert twin.lm_head.weight is twin.backbone.embedding.weight


@every_module
@pytest.mark.parametrize("how", ["argument", "context", "to_empty"])
def test_meta_device(name, how):
    reference = make(name)
    if how == "context":
        with torch.device("meta"):
            module = modules.MODULES[name](None, torch.float64)
    else:
        module = make(name, "meta")
    assert all(p.is_meta for p in module.parameters())
    x = inputs(reference)
    assert run(module, x.to("meta")).shape == run(reference, x).shape
    if how == "to_empty":
        module.to_empty(device="cpu")
        if isinstance(module, MambaLMHeadModel):
            module.tie_weights()
    module.load_state_dict(reference.state_dict(), assign=how != "to_empty")
    check_equal(name, module, reference, x)


@every_module
def test_assigned_state_dict_of_another_dtype(name):
    module, single = make(name), make(name, dtype=torch.float32)
    module.load_state_dict(single.state_dict(), assign=True)
    x = inputs(module, dtype=torch.float32)
    torch.testing.assert_close(run(module, x), run(single, x))
    assert {p.dtype for p in module.parameters()} == {torch.float32}


@every_module
def test_cast_and_back(name):
    """.half() and .bfloat16() round what they reach; nothing is left behind in another type."""
    module = make(name, dtype=torch.float32)
    x = inputs(module, dtype=torch.float32)
    expected = run(module, x)
    for dtype in (torch.bfloat16, torch.float16):
        cast = copy.deepcopy(module).to(dtype)
        out = run(cast, x if x.dtype == torch.int64 else x.to(dtype))
        assert out.dtype == (torch.float32 if name == "Block" else dtype)
        torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
        check_pieces(
            name, cast, x if x.dtype == torch.int64 else x.to(dtype), out, rtol=0.1, atol=0.1
        )


# Training ----------------------------------------------------------------------------------------


@every_module
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, dtype, device):
    module = make(name, device, torch.float32)
    x = inputs(module, device, torch.float32)
    _, expected = gradients(module, x)
    with torch.autocast(device, dtype=dtype):
        out = run(module, x)
        check_pieces(name, module, x, out.detach(), rtol=0.1, atol=0.1)
        _, grads = gradients(module, x)
    assert grads.keys() == expected.keys()
    sizes = {parameter: gradient.abs().max().item() for parameter, gradient in expected.items()}
    for parameter, gradient in grads.items():
        assert gradient.dtype == torch.float32, parameter
        # Sums that cancel have the rounding of what is summed up.
        atol = 0.1 * sizes[parameter] + 0.01 * max(sizes.values())
        torch.testing.assert_close(gradient, expected[parameter], rtol=0, atol=atol, msg=parameter)


@every_module
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(name, use_reentrant, device):
    module = make(name, device)
    x = inputs(module, device)
    expected = gradients(module, x)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, x):
            # Reentrant checkpoints need an input with a gradient.
            x = x.detach().requires_grad_() if x.is_floating_point() else x
            if isinstance(module, MambaLMHeadModel):
                return self.blocks_of_model(x)
            return checkpoint(lambda x: run(module, x), x, use_reentrant=use_reentrant)

        def blocks_of_model(self, x):
            hidden, residual = module.backbone.embedding(x), None
            for layer in module.backbone.layers:
                hidden, residual = checkpoint(layer, hidden, residual, use_reentrant=use_reentrant)
            return module.lm_head(module.backbone.norm_f(hidden + residual))

    out, grads = gradients(Checkpointed(), x)
    torch.testing.assert_close(out, expected[0])
    grads = {parameter.removeprefix("module."): g for parameter, g in grads.items()}
    torch.testing.assert_close(grads, expected[1])


# Layers ------------------------------------------------------------------------------------------


HOOKS = {
    "before": nn.Module.register_forward_pre_hook,
    "after": nn.Module.register_forward_hook,
    "before backward": nn.Module.register_full_backward_pre_hook,
    "after backward": nn.Module.register_full_backward_hook,
}


@every_module
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks(name, kind, device):
    """A hook of any layer runs once for each call."""
    module = make(name, device)
    x = inputs(module, device)
    expected = gradients(module, x)
    seen = []
    for path, layer in modules.layers(module, *modules.LAYERS).items():
        hook = HOOKS[kind](layer, lambda *_: seen.append(1))
        got = gradients(module, x)
        assert len(seen) == 1, path
        torch.testing.assert_close(got, expected)
        seen.clear()
        check_pieces(name, module, x, expected[0])
        forward = name in modules.WITH_CACHE and "backward" not in kind
        assert len(seen) == (len(PIECES) if forward else 0), path
        seen.clear()
        hook.remove()


@every_module
def test_hooks_change_results(name, device):
    module = make(name, device)
    x = inputs(module, device)
    expected = run(module, x)
    for path, layer in modules.layers(module, *modules.LAYERS).items():
        hook = layer.register_forward_hook(lambda layer, arguments, out: doubled(lambda: out)())
        changed = run(module, x)
        assert not torch.allclose(changed, expected), path
        check_pieces(name, module, x, changed)
        hook.remove()
    torch.testing.assert_close(run(module, x), expected)


class LowRank(nn.Module):
    """A Linear with a low-rank update, without other attributes of one than weight and bias."""

    def __init__(self, linear):
        super().__init__()
        kind = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.base_layer = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, 2, bias=False, **kind)
        self.up = nn.Linear(2, linear.out_features, bias=False, **kind)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))

    def merged(self):
        layer = copy.deepcopy(self.base_layer)
        with torch.no_grad():
            layer.weight += self.up.weight @ self.down.weight
        return layer


class Int8(nn.Module):
    """A Linear of 8-bit integers. Its weight is not of floating type, and not one of Linear's."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.keep((weight / scale).round().to(torch.int8))
        self.register_buffer("scale", 1.2 * scale)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def keep(self, integers):
        self.register_buffer("weight", integers)

    def integers(self):
        return self.weight

    def forward(self, x):
        return F.linear(x, self.integers() * self.scale.to(x.dtype), self.bias)

    def merged(self):
        layer = nn.Linear(*reversed(self.integers().shape))
        layer.weight = nn.Parameter(self.integers() * self.scale)
        layer.bias = None if self.bias is None else nn.Parameter(self.bias)
        return layer


class Packed(Int8):
    """Its weight is a method, as that of torch's quantized layers."""

    def keep(self, integers):
        self.register_buffer("packed", integers)

    def integers(self):
        return self.packed

    def weight(self):
        return self.packed


class Subclass(nn.Linear):
    """A Linear that computes something else."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        return 0.5 * super().forward(x)

    def merged(self):
        layer = copy.deepcopy(self)
        layer.__class__ = nn.Linear
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter *= 0.5
        return layer


@every_module
@pytest.mark.parametrize("wrapper", [LowRank, Int8, Packed, Subclass])
@pytest.mark.parametrize("which", ["each", "all"])
def test_other_linear_layers(name, wrapper, which, device):
    """Their forward counts: the result is that of plain layers which compute the same, in training,
    prefill and decoding, and adapters get gradients."""
    original = make(name, device)
    x, paths = inputs(original, device), list(linears(original))
    for chosen in [[path] for path in paths] if which == "each" else [paths]:
        module, plain = copy.deepcopy(original), copy.deepcopy(original)
        for path in chosen:
            layer = wrapper(module.get_submodule(path))
            modules.replace(module, path, layer)
            modules.replace(plain, path, copy.deepcopy(layer).merged())
        with torch.no_grad():
            out = run(module, x)
            assert not torch.allclose(out, run(original, x)), chosen
            torch.testing.assert_close(out, run(plain, x), msg=str(chosen))
        check_pieces(name, module, x, out)
        if wrapper is LowRank:
            out, grads = gradients(module, x)
            torch.testing.assert_close(out, run(plain, x))
            for path in chosen:
                assert all(
                    grads[f"{path}.{part}.weight"].abs().sum() > 0 for part in ("up", "down")
                )
                assert f"{path}.base_layer.weight" not in grads


@every_module
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_by_torch(name):
    """torch's own dynamic quantization replaces every Linear. It computes in float32."""
    module = make(name, dtype=torch.float32)
    x = inputs(module, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        quantized = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(module).eval(), {nn.Linear}, torch.qint8
        )
    assert not modules.layers(quantized, nn.Linear)
    with torch.no_grad():
        out = run(quantized, x)
    scale = run(module, x).abs().max().item()
    torch.testing.assert_close(out, run(module, x), rtol=0, atol=0.2 * scale)
    # The type of inputs is chosen call by call: pieces are near, not equal.
    check_pieces(name, quantized, x, out, rtol=0, atol=0.2 * scale)


@every_module
def test_weight_norm(name, device):
    """A parametrization: what is trained are its parts."""
    for kind in modules.LAYERS:
        module = make(name, device)
        paths = [p for p in modules.layers(module, kind) if p != "lm_head"]
        check_weight_norm(name, module, paths, inputs(module, device))


def check_weight_norm(name, module, paths, x):
    expected = copy.deepcopy(module)
    for path in paths:
        layer = parametrizations.weight_norm(module.get_submodule(path))
        with torch.no_grad():
            layer.parametrizations.weight.original0 *= 1.5
            expected.get_submodule(path).weight *= 1.5
    out, grads = gradients(module, x)
    # The norm of a weight is rounded differently on a GPU.
    torch.testing.assert_close(out, run(expected, x), rtol=1e-5, atol=1e-5)
    check_pieces(name, module, x, out)
    for path in paths:
        for part in ("original0", "original1"):
            assert grads[f"{path}.parametrizations.weight.{part}"].abs().sum() > 0, path
        parametrize.remove_parametrizations(module.get_submodule(path), "weight")
    torch.testing.assert_close(run(module, x), out.detach())


def doubled(forward):
    """A function that is put in place of a layer's forward."""

    def replacement(*arguments, **options):
        results = forward(*arguments, **options)
        return tuple(2 * r for r in results) if isinstance(results, tuple) else 2 * results

    return replacement


@every_module
def test_replaced_forward(name, device):
    module = make(name, device)
    x = inputs(module, device)
    expected = run(module, x)
    for path, layer in modules.layers(module, *modules.LAYERS).items():
        layer.forward = doubled(layer.forward)
        changed = run(module, x)
        assert not torch.allclose(changed, expected), path
        check_pieces(name, module, x, changed)
        del layer.forward
