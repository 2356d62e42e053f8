"""What existing programs rely on: import paths, signatures, former calling orders, side effects."""

import importlib
import importlib.metadata
import inspect
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import mamba_ssm

CONTRACT = pathlib.Path(__file__).with_name("contract.txt")

# Keyword arguments of transformers' models: it hands them to every function that has such a name.
OF_TRANSFORMERS = """position_ids cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k use_cache
attention_mask output_attentions output_hidden_states output_router_logits logits_to_keep""".split()


def contract():
    """The rows of contract.txt: (module, name, what is said about it)."""
    rows, module = [], None
    text = re.sub("\n +", " ", CONTRACT.read_text())
    for line in text.splitlines():
        if line.startswith("["):
            module = line.strip("[]")
        elif line and not line.startswith("#"):
            name, said = re.fullmatch(r"(-? ?[\w.]+)(.*)", line).groups()
            rows.append((module, name, said.strip()))
    return rows


ROWS = contract()


def look_up(module, name):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def parameters_of(function):
    """As contract.txt has them: without annotations."""
    signature = inspect.signature(function)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    signature = signature.replace(parameters=plain, return_annotation=signature.empty)
    return re.sub(" at 0x[0-9a-f]+", "", str(signature))


@pytest.mark.parametrize("module, name, said", ROWS, ids=[f"{m}-{n}" for m, n, _ in ROWS])
def test_contract(module, name, said):
    if name.startswith("-"):
        with pytest.raises(ImportError):
            exec(f"from {module} import {name[2:]}")
    elif said.startswith("="):
        home, _, original = said[2:].rpartition(".")
        assert look_up(module, name) is (
            look_up(home, original) if home else importlib.import_module(original)
        )
    elif said:
        function = look_up(module, name)
        assert (
            inspect.isfunction(function)
            or inspect.ismethod(function)
            or (inspect.isclass(function) and name[0].isupper())
        )
        assert parameters_of(function) == said
    else:
        look_up(module, name)


def test_additions_are_not_taken_for_arguments_of_models():
    added = {name for *_, said in ROWS for name in re.findall(r"(\w+)=", said.partition("*, ")[2])}
    assert len(added) > 10 and not added.intersection(OF_TRANSFORMERS)


@pytest.mark.parametrize("name, least", [("mamba_ssm", (2, 4, 0)), ("causal_conv1d", (1, 7, 0))])
def test_distribution(name, least):
    version = importlib.metadata.version(name)
    assert version == importlib.import_module(name).__version__
    assert tuple(map(int, version.split("."))) >= least
    assert importlib.metadata.packages_distributions()[name] == [name]


def test_determinism_mode(monkeypatch):
    from mamba_ssm.utils.determinism import set_deterministic_mode, use_deterministic_mode

    monkeypatch.delenv("MAMBA_DETERMINISTIC", raising=False)
    assert use_deterministic_mode() == torch.are_deterministic_algorithms_enabled()
    for value in ("1", "0"):
        monkeypatch.setenv("MAMBA_DETERMINISTIC", value)
        assert use_deterministic_mode() == (value == "1")
        for mode in (True, False):
            set_deterministic_mode(mode)
            assert use_deterministic_mode() is mode
        set_deterministic_mode(None)


def test_workspaces_of_kernels_of_others():
    from mamba_ssm.utils import determinism

    assert determinism.autotune_configs([1, 2]) == [1, 2]
    parts, stride = determinism.alloc_tile_workspace((2, 3), 4, torch.float32, "cpu", True)
    assert parts.shape == (2, 3, 4) and stride == parts.stride(-1) and not parts.any()
    assert torch.equal(
        determinism.finalize_tile_workspace(parts + 1, True), torch.full((2, 3), 4.0)
    )
    whole, stride = determinism.alloc_tile_workspace((2, 3), 4, torch.float64, "cpu", False)
    assert whole.shape == (2, 3) and whole.dtype == torch.float64 and stride == 0
    assert determinism.finalize_tile_workspace(whole, False) is whole
    assert determinism.alloc_tile_workspace(None, 4, torch.float32, "cpu", True) == (None, 0)
    assert determinism.finalize_tile_workspace(None, True) is None


def test_amp_decorators():
    from mamba_ssm.utils.torch import custom_amp_decorator, custom_bwd, custom_fwd

    assert custom_amp_decorator(custom_fwd, False) is custom_fwd

    class Double(torch.autograd.Function):
        @staticmethod
        @custom_fwd(cast_inputs=torch.float32)
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @custom_bwd
        def backward(ctx, dout):
            return 2 * dout

    x = torch.ones(3, requires_grad=True)
    Double.apply(x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


def in_new_process(program):
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )


def test_import_has_no_side_effects():
    program = """
import sys, torch
before, threads = set(sys.modules), torch.get_num_threads()
import mamba_ssm
new = {name.partition(".")[0] for name in set(sys.modules) - before}
new -= set(sys.stdlib_module_names) | {"torch"}
assert new == {"mamba_ssm", "selective_scan_cuda"}, new
assert "mamba_ssm._C" not in sys.modules
assert not torch.cuda.is_initialized()
assert torch.get_num_threads() == threads
"""
    result = in_new_process(program)
    assert result.stdout == "" and result.stderr == ""


OPTIONAL = ["triton", "einops", "transformers", "huggingface_hub", "safetensors"]
OPTIONAL += ["causal_conv1d", "flash_attn", "tilelang", "quack", "packaging"]


@pytest.mark.parametrize(
    "error", ["ModuleNotFoundError", "ImportError", "AttributeError", "RuntimeError", "OSError"]
)
def test_import_without_optional_packages(tmp_path, error):
    """Neither missing nor broken ones matter, nor hidden GPUs: it works, prints nothing, and starts
    no CUDA context."""
    program = f"""
import os, sys
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import torch

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL}:
            raise {error}(f"{{name}} is broken")

for name in {OPTIONAL}:
    for loaded in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[loaded]
sys.meta_path.insert(0, Broken())
import mamba_ssm, mamba_ssm.modules.mamba2_simple, mamba_ssm.modules.mha
import mamba_ssm.distributed.tensor_parallel, mamba_ssm.utils.hf, mamba_ssm.utils.determinism
config = mamba_ssm.models.config_mamba.MambaConfig(d_model=8, n_layer=2, vocab_size=9)
for config.ssm_cfg in ({{"layer": "Mamba1"}}, {{"layer": "Mamba2", "headdim": 4}}):
    model = mamba_ssm.MambaLMHeadModel(config)
    tokens = model.generate(torch.zeros(1, 3, dtype=torch.long), 5)
    model(tokens).logits.sum().backward()
assert tokens.shape == (1, 5)
if {error} in (ModuleNotFoundError, ImportError) and mamba_ssm._library.NATIVE:
    model.save_pretrained({str(tmp_path)!r})
    mamba_ssm.MambaLMHeadModel.from_pretrained({str(tmp_path)!r})
assert not torch.cuda.is_initialized()
"""
    result = in_new_process(program)
    assert result.stdout == "" and result.stderr == ""


def test_fork_after_import():
    """As data loaders do."""
    result = in_new_process(
        """
import os, torch, mamba_ssm
block, x = mamba_ssm.Mamba(4), torch.zeros(1, 3, 4)
block(x)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if block(x).shape == x.shape else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    )
    assert result.stdout == "" and result.stderr == ""


def test_submodules_are_attributes():
    in_new_process(
        """
import mamba_ssm
assert callable(mamba_ssm.ops.triton.selective_state_update.selective_state_update)
assert callable(mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined)
assert callable(mamba_ssm.ops.triton.layer_norm.layer_norm_fn)
assert callable(mamba_ssm.ops.triton.layernorm.layer_norm_fn)
assert callable(mamba_ssm.ops.triton.layernorm_gated.rmsnorm_fn)
assert callable(mamba_ssm.ops.selective_scan_interface.selective_scan_fn)
assert mamba_ssm.modules.mamba_simple.Mamba is mamba_ssm.Mamba
assert mamba_ssm.models.mixer_seq_simple and mamba_ssm.utils.generation
assert not hasattr(mamba_ssm, "selective_state_update")
"""
    )


def test_functions_can_be_wrapped(monkeypatch):
    """As programs do that keep them out of compiled graphs: what the package calls is the op."""
    wrapped = torch.compiler.disable(mamba_ssm.selective_scan_fn)
    assert inspect.signature(wrapped) == inspect.signature(mamba_ssm.selective_scan_fn)
    interface = mamba_ssm.ops.selective_scan_interface
    monkeypatch.setattr(interface, "selective_scan_fn", wrapped)
    u, delta, B = torch.randn(2, 4, 7), torch.rand(2, 4, 7), torch.randn(2, 3, 7)
    A = -torch.rand(4, 3)
    expected = mamba_ssm.selective_scan_fn(u, delta, A, B, B)
    assert torch.equal(interface.selective_scan_fn(u, delta, A, B, B), expected)


@pytest.mark.parametrize("first", ["selective_scan_cuda", "causal_conv1d_cuda", "causal_conv1d"])
def test_any_module_may_be_imported_first(first):
    in_new_process(f"import {first}, mamba_ssm")


@pytest.mark.parametrize("module", ["mamba_ssm.ops.selective_scan_interface", "causal_conv1d"])
def test_modules_reload(module):
    in_new_process(f"import importlib, {module} as m; importlib.reload(m)")


def test_another_torch_is_refused():
    result = subprocess.run(
        [sys.executable, "-c", "import torch; torch.__version__ = '2.9.1'; import mamba_ssm"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "ImportError" in result.stderr and "torch 2.9.1 is running" in result.stderr


# Calls as projects write them ---------------------------------------------------------------------


def test_calls_of_the_scan(device):
    """Five, six and eight positional arguments, and None for False."""
    from mamba_ssm import selective_scan_fn

    u, delta, z = torch.randn(3, 2, 4, 7, device=device)
    B, C = torch.randn(2, 2, 3, 7, device=device)
    A, D, bias = -torch.rand(4, 3, device=device), *torch.randn(2, 4, device=device)
    expected = selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True)
    named = {"delta_bias": bias, "delta_softplus": True, "return_last_state": True}
    for got in (
        selective_scan_fn(u, delta, A, B, C, D=D, z=z, **named),
        selective_scan_fn(u, delta, A, B, C, D, z=z, **named),
        selective_scan_fn(u, delta, A, B, C, D, z, **named),
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    named["return_last_state"] = None
    assert torch.equal(selective_scan_fn(u, delta, A, B, C, D, z, **named), expected[0])


def test_calls_of_the_state_update(device):
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    state = torch.randn(2, 6, 3, device=device)
    x, dt, z = torch.randn(3, 2, 6, device=device)
    B, C = torch.randn(2, 2, 3, device=device)
    A, D, bias = -torch.rand(6, 3, device=device), *torch.randn(2, 6, device=device)
    states = [state.clone() for _ in range(3)]
    update = selective_state_update
    outs = [
        update(states[0], x, dt, A, B, C, D, z=z, dt_bias=bias, dt_softplus=True),
        update(states[1], x, dt, A, B, C, D, z, bias, dt_softplus=True),
        update(
            state=states[2], x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=bias, dt_softplus=True
        ),
    ]
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert all(torch.equal(s, states[0]) and not torch.equal(s, state) for s in states)
    update(state, x, dt, A, B, C)  # D and dt_bias may be left out


def test_calls_of_the_chunk_scan(device):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as scan

    x, dt = torch.randn(1, 9, 2, 4, device=device), torch.rand(1, 9, 2, device=device)
    B, C = torch.randn(2, 1, 9, 1, 3, device=device)
    A, D = -torch.rand(2, device=device), torch.randn(2, device=device)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    expected = scan(x, dt, A, B, C, 4, D)
    assert torch.equal(scan(x, dt, A, B, C, chunk_size=4, D=D, z=None), expected)
    limited = scan(x, dt, A, B, C, 4, D=D, dt_limit=[0.0, float("inf")], state_dtype=None)
    assert torch.equal(limited, expected)
    out, final, varlen = scan(
        x,
        dt,
        A,
        B,
        C,
        4,
        cu_seqlens=bounds,
        seq_idx=torch.tensor([[0] * 4 + [1] * 5], dtype=torch.int32, device=device),
        return_final_states=True,
        return_varlen_states=True,
        state_dtype=torch.float32,
    )
    assert final.shape == (1, 2, 4, 3) and varlen.shape == (2, 2, 4, 3)
    torch.testing.assert_close(final, varlen[1:])


def test_calls_of_the_norms(device):
    """Of both generations, with the residual by position."""
    from mamba_ssm.ops.triton import layer_norm, layernorm

    x, residual = torch.randn(2, 3, 5, device=device)
    weight, bias = torch.randn(2, 5, device=device)
    named = {"eps": 1e-3, "prenorm": True, "residual_in_fp32": True}
    for name in ("layer_norm_fn", "rms_norm_fn"):
        now, then = getattr(layer_norm, name), getattr(layernorm, name)
        expected = now(x, weight, bias, residual, **named)
        torch.testing.assert_close(now(x, weight, bias, residual=residual, **named), expected)
        torch.testing.assert_close(then(x, weight, bias, residual, **named), expected)
        torch.testing.assert_close(then(x, weight, bias, residual=residual, **named), expected)
    expected = layer_norm.rms_norm_fn(x, weight, bias, residual, **named)
    by_position = layernorm.rms_norm_fn(x, weight, bias, residual, True, True, 1e-3)
    torch.testing.assert_close(by_position, expected)
    by_position = layernorm.layer_norm_fn(x, weight, bias, residual, 1e-3, True, True, True)
    torch.testing.assert_close(by_position, expected)


@pytest.fixture
def conv(device):
    torch.manual_seed(0)
    shapes = {"x": (2, 6, 9), "weight": (6, 4), "bias": (6,), "dout": (2, 6, 9), "state": (2, 6, 3)}
    return {name: torch.randn(shape).to(device) for name, shape in shapes.items()}


def test_conv_in_former_orders(conv):
    from causal_conv1d import causal_conv1d_fn
    from causal_conv1d.causal_conv1d_interface import CausalConv1dFn, causal_conv1d_ref

    x, weight, bias, state = conv["x"], conv["weight"], conv["bias"], conv["state"]
    expected = causal_conv1d_ref(x, weight, bias, activation="silu")
    for activation in ("silu", "swish", True):
        torch.testing.assert_close(causal_conv1d_fn(x, weight, bias, activation), expected)
    applied = CausalConv1dFn.apply(x, weight, bias, None, state, True, None, "silu")
    expected = causal_conv1d_ref(x, weight, bias, state, True, activation="silu")
    torch.testing.assert_close(applied, expected)
    with pytest.raises(NotImplementedError, match="relu"):
        causal_conv1d_fn(x, weight, bias, activation="relu")


@pytest.mark.parametrize("channel_last", [False, True])
def test_final_states_are_written_in_place(conv, channel_last):
    from causal_conv1d import causal_conv1d_fn

    x, weight, state = conv["x"], conv["weight"], conv["state"]
    buffer = torch.empty_like(state)
    if channel_last:
        buffer = buffer.transpose(1, 2).contiguous().transpose(1, 2)
    out, final = causal_conv1d_fn(
        x, weight, initial_states=state, return_final_states=True, final_states_out=buffer
    )
    assert final is buffer
    torch.testing.assert_close(buffer, x[..., -3:])
    buffer.zero_()
    torch.testing.assert_close(causal_conv1d_fn(x, weight, None, None, state, False, buffer), out)
    torch.testing.assert_close(buffer, x[..., -3:])


def test_conv_reference_with_packed_rows(conv):
    from causal_conv1d import causal_conv1d_fn
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref

    seq_idx = torch.tensor([[-1, 0, 0, 0, 3, 3, -1, 5, -1], [2] * 9], device=conv["x"].device)
    arguments = (conv["x"], conv["weight"], conv["bias"])
    got = causal_conv1d_fn(*arguments, seq_idx, conv["state"], True, None, "silu")
    expected = causal_conv1d_ref(*arguments, conv["state"], True, None, "silu", seq_idx)
    torch.testing.assert_close(got, expected)


def test_conv_extension_forward(conv):
    import causal_conv1d_cuda
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref

    fwd = causal_conv1d_cuda.causal_conv1d_fwd
    x, weight, bias, state = conv["x"], conv["weight"], conv["bias"], conv["state"]
    expected = causal_conv1d_ref(x, weight, bias, activation="silu")
    torch.testing.assert_close(fwd(x, weight, bias, True), expected)
    torch.testing.assert_close(fwd(x, weight, bias, None, True), expected)
    expected, expected_final = causal_conv1d_ref(x, weight, bias, state, True, activation="silu")
    final, out = torch.empty_like(state), torch.empty_like(x)
    torch.testing.assert_close(fwd(x, weight, bias, None, state, final, True), expected)
    torch.testing.assert_close(final, expected_final)
    assert fwd(x, weight, bias, None, state, out, final.zero_(), True) is None
    torch.testing.assert_close((out, final), (expected, expected_final))
    with pytest.raises(TypeError, match="4, 5, 7 or 8"):
        fwd(x, weight, bias)


def test_conv_extension_backward(conv):
    import causal_conv1d_cuda
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref

    bwd = causal_conv1d_cuda.causal_conv1d_bwd
    x, weight, bias, dout, state = conv.values()

    def expected(*states):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, *states)]
        causal_conv1d_ref(*leaves, activation="silu").backward(dout)
        return [leaf.grad for leaf in leaves]

    torch.testing.assert_close(bwd(x, weight, bias, dout, None, True), expected())
    torch.testing.assert_close(bwd(x, weight, bias, dout, None, None, True), expected())
    got = bwd(x, weight, bias, dout, None, state, None, None, True, True)
    torch.testing.assert_close(got, expected(state))
    dx = torch.empty_like(x)
    assert bwd(x, weight, bias, dout, None, state, None, dx, False, True)[0] is dx
    into = [torch.empty_like(x), torch.ones_like(weight), torch.ones_like(bias), state.clone()]
    assert bwd(x, weight, bias, dout, None, state, None, *into, True) is None
    dx, dweight, dbias, dstate = expected(state)
    torch.testing.assert_close(into, [dx, dweight + 1, dbias + 1, dstate])


def test_conv_functions_without_autograd(conv):
    """What upstream's mamba_ssm calls, in its order of arguments."""
    from causal_conv1d import cpp_functions
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref, causal_conv1d_update_ref

    x, weight, bias, dout, state = conv.values()
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, state)]
    expected, expected_final = causal_conv1d_ref(*leaves, True, activation="silu")
    final = torch.empty_like(state)
    out = cpp_functions.causal_conv1d_fwd_function(x, weight, bias, None, state, final, True)
    torch.testing.assert_close((out, final), (expected.detach(), expected_final.detach()))

    expected.backward(dout)
    gradients = [leaf.grad for leaf in leaves]
    for dx, wanted in ((None, True), (torch.empty_like(x), False)):
        got = cpp_functions.causal_conv1d_bwd_function(
            x, weight, bias, dout, None, state, None, dx, wanted, True
        )
        torch.testing.assert_close(list(got), gradients if wanted else [*gradients[:3], None])
        assert dx is None or got[0] is dx

    token, cache = x[..., :1], torch.cat([state, state[..., :1]], dim=-1)
    expected_cache = cache.clone()
    expected = causal_conv1d_update_ref(token, expected_cache, weight, bias, "silu")
    got = cpp_functions.causal_conv1d_update_function(token, cache, weight, bias, True, None, None)
    torch.testing.assert_close((got, cache), (expected, expected_cache))


@pytest.mark.parametrize("count", [5, 6, 7, 8])
def test_conv_extension_update(conv, count):
    import causal_conv1d_cuda
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_update_ref

    x, weight, bias = conv["x"][..., 0], conv["weight"], conv["bias"]
    state = torch.cat([conv["state"], conv["state"][..., :1]], dim=-1)
    expected_state, out = state.clone(), torch.empty_like(x)
    expected = causal_conv1d_update_ref(x, expected_state, weight, bias, "silu")
    arguments = [x, state, weight, bias, True, None, None][:count]
    if count == 8:
        arguments.insert(4, out)
    result = causal_conv1d_cuda.causal_conv1d_update(*arguments)
    assert (result is None) == (count == 8)
    torch.testing.assert_close(out if count == 8 else result, expected)
    torch.testing.assert_close(state, expected_state)


def test_update_reference_as_ring(conv):
    from causal_conv1d import causal_conv1d_update
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_update_ref

    x, weight, bias = conv["x"], conv["weight"], conv["bias"]
    state = torch.cat([conv["state"], conv["state"]], dim=-1)[..., :5].contiguous()
    expected_state = state.clone()
    seqlens = torch.tensor([7, 3], device=x.device, dtype=torch.int32)
    got = causal_conv1d_update(x, state, weight, bias, "silu", cache_seqlens=seqlens)
    expected = causal_conv1d_update_ref(x, expected_state, weight, bias, "silu", seqlens)
    torch.testing.assert_close((got, state), (expected, expected_state))


def test_varlen_states(conv):
    from causal_conv1d.causal_conv1d_varlen import (
        causal_conv1d_varlen_states,
        causal_conv1d_varlen_states_ref,
    )

    x = conv["x"][0].t()  # (9, 6)
    bounds = torch.tensor([0, 0, 2, 9], device=x.device, dtype=torch.int32)
    expected = causal_conv1d_varlen_states_ref(x, bounds, 4)
    assert torch.equal(causal_conv1d_varlen_states(x, bounds, 4), expected)


@pytest.mark.parametrize("gated", [False, True])
def test_scan_extension(device, gated):
    import selective_scan_cuda
    from mamba_ssm.ops.selective_scan_interface import SelectiveScanFn, selective_scan_ref

    torch.manual_seed(0)
    shapes = [(2, 4, 10), (2, 4, 10), (4, 3), (2, 1, 3, 10), (2, 1, 3, 10), (4,), (2, 4, 10), (4,)]
    u, delta, A, B, C, D, z, bias = (torch.randn(shape).to(device) for shape in shapes)
    A = -A.abs()
    inputs = [u, delta, A, B, C, D, z if gated else None, bias]
    leaves = [t if t is None else t.clone().requires_grad_() for t in inputs]
    expected, last_state = selective_scan_ref(*leaves, True, True)
    dout = torch.randn_like(expected)
    expected.backward(dout)

    out, x, *out_z = selective_scan_cuda.fwd(*inputs, True)
    assert x.shape == (2, 4, 1, 6) and len(out_z) == gated
    torch.testing.assert_close(x[:, :, -1, 1::2], last_state.detach())
    torch.testing.assert_close((out_z or [out])[0], expected.detach())
    dz = torch.empty_like(u) if gated else None
    *gradients, last = selective_scan_cuda.bwd(*inputs, dout, x, out, dz, True, gated)
    names = ["du", "ddelta", "dA", "dB", "dC", "dD", "ddelta_bias"] + ["dz"] * gated
    if gated:
        torch.testing.assert_close(last, expected.detach())
        assert gradients[7] is dz
    else:
        gradients.append(last)
    order = [0, 1, 2, 3, 4, 5, 7] + [6] * gated
    for name, gradient, i in zip(names, gradients, order, strict=True):
        torch.testing.assert_close(gradient, leaves[i].grad, rtol=1e-4, atol=1e-5, msg=name)

    applied, state = SelectiveScanFn.apply(*inputs, True, True)
    torch.testing.assert_close(applied, expected.detach())
    torch.testing.assert_close(state, last_state.detach())
    assert isinstance(SelectiveScanFn.apply(*inputs, True, None), torch.Tensor)


@pytest.mark.parametrize("kind", ["real", "complex", "constant B and C"])
def test_references_agree_with_operations(device, kind):
    from mamba_ssm.ops import selective_scan_interface as interface

    torch.manual_seed(0)
    dim, dstate, rank, seqlen = 4, 3, 2, 7
    factor = 2 if kind == "complex" else 1
    A = -torch.rand(dim, dstate, device=device) - 0.5
    if kind == "complex":
        A = torch.complex(A, torch.randn_like(A))

    def randn(*shape):
        return torch.randn(shape, device=device)

    constant = kind.startswith("constant")
    rows = rank + (0 if constant else 2 * factor * dstate)
    B, C = (randn(dim, dstate), randn(dim, dstate)) if constant else (None, None)
    arguments = [randn(2, 2 * dim, seqlen), randn(dim, 1, 4), randn(dim), randn(rows, dim)]
    arguments += [randn(dim, rank), randn(5, dim), randn(5), A, B, C, randn(dim), randn(dim)]
    got = interface.mamba_inner_fn(*arguments)
    torch.testing.assert_close(interface.mamba_inner_ref(*arguments), got, rtol=1e-4, atol=1e-4)

    if not constant:
        B, C = randn(2, 2, dstate, factor * seqlen), randn(2, 2, dstate, factor * seqlen)
    scan = [randn(2, dim, seqlen), randn(2, dim, seqlen), A, B, C, randn(dim)]
    scan += [randn(2, dim, seqlen), randn(dim), True, True]
    torch.testing.assert_close(
        interface.selective_scan_ref(*scan),
        interface.selective_scan_fn(*scan),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("heads", [False, True])
def test_state_update_reference(device, heads):
    from mamba_ssm.ops.triton.selective_state_update import (
        selective_state_update,
        selective_state_update_ref,
    )

    torch.manual_seed(0)
    channels, groups = ((4, 6), (2,)) if heads else ((6,), ())

    def randn(*shape):
        return torch.randn(shape, device=device)

    state = randn(3, *channels, 5)
    expected_state = state.clone()
    arguments = [randn(3, *channels), randn(3, *channels), -randn(*channels, 5).abs()]
    arguments += [randn(3, *groups, 5), randn(3, *groups, 5), randn(*channels)]
    arguments += [randn(3, *channels), randn(*channels), True]
    got = selective_state_update(state, *arguments)
    expected = selective_state_update_ref(expected_state, *arguments)
    torch.testing.assert_close((got, state), (expected, expected_state))


def test_rms_norm_forward(device):
    from mamba_ssm.ops.selective_scan_interface import rms_norm_forward

    x, weight, bias = (torch.randn(s, device=device) for s in ((3, 8), (8,), (8,)))
    norm = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(rms_norm_forward(x, weight, None), norm * weight)
    torch.testing.assert_close(rms_norm_forward(x, weight, bias), norm * weight + bias)
    expected = torch.nn.functional.layer_norm(x, (8,), weight, bias, 1e-6)
    torch.testing.assert_close(rms_norm_forward(x, weight, bias, is_rms_norm=False), expected)
