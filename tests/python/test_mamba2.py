"""Mamba2 and Mamba2Simple: parameters, their two paths, packed rows, caches, compilation."""

import copy
from types import SimpleNamespace

import pytest
import torch

from mamba_ssm import Mamba2
from mamba_ssm.modules.mamba2_simple import Mamba2Simple
from mamba_ssm.utils.generation import InferenceParams

KINDS = {
    "base": {},
    "groups": {"ngroups": 3},
    "no norm": {"rmsnorm": False},
    "norm before gate": {"norm_before_gate": True, "ngroups": 2},
    "D per channel": {"D_has_hdim": True},
    "MLP": {"d_ssm": 16, "ngroups": 2},
    "MLP, no norm": {"d_ssm": 16, "rmsnorm": False, "D_has_hdim": True},
    "limits": {"dt_limit": (0.02, 0.05)},
    "lower limit": {"dt_limit": [0.02, float("inf")], "D_has_hdim": True},
    "no upper limit": {"dt_limit": (0.02, None)},
    "biases": {"bias": True, "conv_bias": False},
    "one tap": {"d_conv": 1},
    "one head": {"headdim": 24},
    "expand": {"expand": 1.5, "headdim": 6, "conv_init": 0.3},
}
kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
OFFSETS = [0, 2, 2, 7, 8, 12]  # an empty sequence, and others shorter than the convolution


def make(device, dtype=torch.float64, cls=Mamba2, **kwargs):
    torch.manual_seed(0)
    kwargs = {"d_model": 12, "d_state": 5, "headdim": 4, "layer_idx": 0, **kwargs}
    block = cls(**kwargs, dtype=dtype).to(device)
    with torch.no_grad():  # what starts as ones
        block.D.uniform_(0.5, 1.5)
        if block.rmsnorm:
            block.norm.weight.uniform_(0.5, 1.5)
    return block


def tokens(device, seqlen=9, batch=2, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(batch, seqlen, 12, dtype=dtype).to(device)


def gradients(module, x, **packing):
    x = x.clone().requires_grad_()
    out = module(x, **packing)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).to(out.device))
    result = {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}
    module.zero_grad()
    return out.detach(), result


@torch.no_grad()
def run_in_pieces(block, x, pieces):
    params = InferenceParams(max_seqlen=x.shape[1], max_batch_size=x.shape[0])
    outputs = []
    for piece in x.split(pieces, dim=1):
        outputs.append(block(piece, inference_params=params))
        params.seqlen_offset += piece.shape[1]
    return torch.cat(outputs, dim=1)


# Parameters --------------------------------------------------------------------------------------


def test_parameter_count_and_shape(device):
    block = Mamba2(d_model=1024, d_state=64, d_conv=4, expand=2).to(device)
    assert sum(p.numel() for p in block.parameters()) == 6468320
    with torch.no_grad():
        assert block(torch.randn(2, 64, 1024, device=device)).shape == (2, 64, 1024)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"headdim must divide d_ssm = 32: pass headdim=\.\.\."):
        Mamba2(d_model=16)
    with pytest.raises(ValueError, match="d_ssm must be from 1 to d_inner = 32, got 64"):
        Mamba2(d_model=16, d_ssm=64)
    with pytest.raises(ValueError, match="d_ssm / headdim = 4, got 3"):
        Mamba2(d_model=16, headdim=8, ngroups=3)
    two_ranks = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    with pytest.raises(ValueError, match="ngroups = 1 must be a multiple of the 2 ranks"):
        Mamba2(d_model=64, process_group=two_ranks)
    with pytest.raises(ValueError, match=r"d_model=12\), got \(2, 9, 13\)"):
        make("cpu")(torch.zeros(2, 9, 13, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"batch = 1, got u of shape \(2, 9, 12\)"):
        make("cpu")(tokens("cpu"), cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="Mamba2Simple: headdim must divide d_ssm = 32"):
        Mamba2Simple(16)
    with pytest.raises(ValueError, match="gelu"):
        Mamba2Simple(64, activation="gelu")
    with pytest.raises(ValueError, match=r"Mamba2Simple: u must have .*got \(9, 12\)"):
        make("cpu", cls=Mamba2Simple)(torch.zeros(9, 12, dtype=torch.float64))


def test_names_in_order():
    """Also of parameters: optimizers know them by their place."""
    names = ["dt_bias", "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias"]
    names += ["norm.weight", "out_proj.weight"]
    assert [name for name, _ in make("cpu").named_parameters()] == names
    assert list(make("cpu").state_dict()) == names
    names.remove("norm.weight")
    assert list(make("cpu", rmsnorm=False).state_dict()) == names
    simple = make("cpu", cls=Mamba2Simple, learnable_init_states=True, bias=True)
    names = ["init_states", "dt_bias", "A_log", "D", "in_proj.weight", "in_proj.bias"]
    names += ["conv1d.weight", "conv1d.bias", "norm.weight", "out_proj.weight", "out_proj.bias"]
    assert [name for name, _ in simple.named_parameters()] == names


def test_shapes():
    shapes = {n: tuple(p.shape) for n, p in make("cpu", d_ssm=16, ngroups=2).named_parameters()}
    assert shapes == {
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "in_proj.weight": (2 * 24 + 20 + 4, 12),
        "conv1d.weight": (36, 1, 4),
        "conv1d.bias": (36,),
        "norm.weight": (16,),
        "out_proj.weight": (12, 24),
    }
    assert make("cpu", D_has_hdim=True).D.shape == (24,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_parameter_dtypes_and_marks(dtype):
    block = Mamba2Simple(64, dtype=dtype, learnable_init_states=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, parameter in block.named_parameters():
        assert parameter.dtype == (wide if name == "D" else dtype), name
    for name in ("dt_bias", "A_log", "D", "init_states"):
        assert getattr(block, name)._no_weight_decay


def test_initial_values():
    block = Mamba2(256, headdim=1, dt_min=0.01, dt_max=0.02, A_init_range=(3, 4), conv_init=0.01)
    dt = torch.nn.functional.softplus(block.dt_bias)
    assert 0.0099 < dt.min() and dt.max() < 0.0201
    assert 2.999 < block.A_log.exp().min() and block.A_log.exp().max() < 4.001
    assert 0.009 < block.conv1d.weight.abs().max() <= 0.01
    assert (block.D == 1).all() and (block.norm.weight == 1).all()
    assert block.norm.eps == 1e-5 and block.norm.group_size == 512


# Two paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [None, "seq_idx", "cu_seqlens", "both"])
@kinds
def test_fused_equals_unfused(device, options, packing):
    block, x = make(device, **options), tokens(device, 12, 1 if packing else 2)
    packed = {}
    if packing in ("cu_seqlens", "both"):
        packed["cu_seqlens"] = torch.tensor(OFFSETS, dtype=torch.int32, device=device)
    if packing in ("seq_idx", "both"):
        ids = [[0, 0, 0, 4, 4, 4, 4, 4, 5, 5, -1, -1]]
        packed["seq_idx"] = torch.tensor(ids, dtype=torch.int32, device=device)
    fused = gradients(block, x, **packed)
    block.use_mem_eff_path = False
    torch.testing.assert_close(gradients(block, x, **packed), fused)


def test_packed_rows_need_a_plain_convolution():
    block, x = make("cpu"), tokens("cpu", 8, 1)
    block.conv1d.register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="plain torch.nn.Conv1d"):
        block(x, seq_idx=torch.zeros(1, 8, dtype=torch.int32))


# Packed rows and flat tokens ---------------------------------------------------------------------


@pytest.mark.parametrize("use_mem_eff_path", [False, True])
@kinds
def test_packed_equals_separate(device, options, use_mem_eff_path):
    """In training: by offsets alone, and by ids alone, outputs and gradients."""
    block = make(device, use_mem_eff_path=use_mem_eff_path, **options)
    x = tokens(device, 12, 1)
    bounds = list(zip(OFFSETS, OFFSETS[1:]))

    def separately(x):
        return torch.cat([block(x[:, begin:end]) for begin, end in bounds], dim=1)

    separately.named_parameters, separately.zero_grad = block.named_parameters, block.zero_grad
    expected = gradients(separately, x)
    offsets = torch.tensor(OFFSETS, device=device)
    torch.testing.assert_close(gradients(block, x, cu_seqlens=offsets), expected)
    ids = torch.cat([torch.full((end - begin,), begin) for begin, end in bounds])[None].to(device)
    torch.testing.assert_close(gradients(block, x, seq_idx=ids), expected)


def test_flat_tokens(device):
    block, x = make(device), tokens(device)
    torch.testing.assert_close(block(x.flatten(0, 1), seqlen=9), block(x).flatten(0, 1))
    params = InferenceParams(max_seqlen=9, max_batch_size=2)
    out = block(x.flatten(0, 1), seqlen=9, inference_params=params)
    torch.testing.assert_close(out, block(x).flatten(0, 1))


# Caches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 1, 4], [2, 2, 5], [7, 1, 1], [1, 8]])
@kinds
def test_pieces_equal_whole(device, options, pieces):
    block, x = make(device, **options), tokens(device)
    torch.testing.assert_close(run_in_pieces(block, x, pieces), block(x))


@pytest.mark.parametrize("prefill", [1, 3, 150])
def test_step_equals_forward_over_300_tokens(device, prefill):
    block = make(device, dtype=torch.float32, d_ssm=16, ngroups=2)
    x = tokens(device, seqlen=300, dtype=torch.float32)
    steps = run_in_pieces(block, x, [prefill] + [1] * (300 - prefill))
    torch.testing.assert_close(steps, block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("continued", [False, True])
@kinds
def test_varlen_prefill(device, options, continued):
    """Packed sequences with a cache of each: two prefills and two steps, as each would alone."""
    block = make(device, **options)
    first, second, token = tokens(device, 12, 1), tokens(device, 12, 1) / 2, tokens(device, 2, 5)
    offsets = torch.tensor(OFFSETS, dtype=torch.int32, device=device)
    bounds = list(zip(OFFSETS, OFFSETS[1:]))

    def run(prompts, batch, token, **packing):
        params = InferenceParams(max_seqlen=40, max_batch_size=batch)
        outputs = []
        for piece in prompts:
            outputs.append(block(piece, inference_params=params, **packing))
            params.seqlen_offset += max(1, piece.shape[1])
        for t in range(2):
            outputs.append(block(token[:, t : t + 1], inference_params=params))
        return outputs, params.key_value_memory_dict[0]

    prompts = [first, second] if continued else [first]
    with torch.no_grad():
        packed, states = run(prompts, 5, token, cu_seqlens=offsets)
        for i, (begin, end) in enumerate(bounds):
            alone, own_states = run([p[:, begin:end] for p in prompts], 1, token[i : i + 1])
            for got, expected in zip(packed[: len(prompts)], alone):
                torch.testing.assert_close(got[:, begin:end], expected)
            for got, expected in zip(packed[len(prompts) :], alone[len(prompts) :]):
                torch.testing.assert_close(got[i : i + 1], expected)
            for got, expected in zip(states, own_states):
                torch.testing.assert_close(got[i : i + 1], expected)


def test_packed_row_continues_its_last_sequence(device):
    block, x, more = make(device), tokens(device, 12, 1), tokens(device, 5, 1)
    ids = torch.tensor([[0] * 10 + [1] * 2], device=device)  # shorter than the convolution
    outputs = []
    for prompt, packing in ((x, {"seq_idx": ids}), (x[:, 10:], {})):
        params = InferenceParams(max_seqlen=17, max_batch_size=1)
        with torch.no_grad():
            block(prompt, inference_params=params, **packing)
            params.seqlen_offset = 12
            outputs.append(block(more, inference_params=params))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_step_with_states_of_another_dtype(device, state_dtype):
    block, x = make(device, dtype=torch.float32), tokens(device, dtype=torch.float32)
    conv_state, ssm_state = block.allocate_inference_cache(2, 9, dtype=state_dtype)
    with torch.no_grad():
        for t in range(x.shape[1]):
            out, conv_out, ssm_out = block.step(x[:, t : t + 1], conv_state, ssm_state)
            assert conv_out is conv_state and ssm_out is ssm_state
    tolerance = 1e-5 if state_dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, block(x)[:, -1:], rtol=tolerance, atol=tolerance)


def test_cache_layout():
    block = make("cpu", dtype=torch.bfloat16)
    conv_state, ssm_state = block.allocate_inference_cache(3, 9)
    assert conv_state.shape == (3, 34, 4) and conv_state.stride() == (136, 1, 34)
    assert ssm_state.shape == (3, 6, 4, 5)
    assert conv_state.dtype == ssm_state.dtype == torch.bfloat16
    wide = block.allocate_inference_cache(3, 9, dtype=torch.float32)
    assert all(state.dtype == torch.float32 for state in wide)


def test_wrong_caches_are_named():
    block, x = make("cpu"), tokens("cpu")
    with pytest.raises(ValueError, match=r"\(batch, 1, d_model\)"):
        block.step(x, *block.allocate_inference_cache(2, 9))
    params = InferenceParams(max_seqlen=20, max_batch_size=2)
    block(x, inference_params=params)
    assert block(x[:1], inference_params=params).shape == (1, 9, 12)  # a new sequence
    params.seqlen_offset = 9
    with pytest.raises(ValueError, match="Mamba2: layer 0 .* batch size 1"):
        block(x, inference_params=params)
    with pytest.raises(ValueError, match="layer_idx"):
        make("cpu", layer_idx=None)(x, inference_params=params)


def test_cache_stays_out_of_the_graph(device):
    block, x = make(device), tokens(device)
    params = InferenceParams(max_seqlen=20, max_batch_size=2)
    loss = 0
    for _ in range(3):
        loss = loss + block(x, inference_params=params).sum()
        params.seqlen_offset += x.shape[1]
    assert not any(state.requires_grad for state in params.key_value_memory_dict[0])
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())


# Autocast and compilation ------------------------------------------------------------------------


@pytest.mark.parametrize("use_mem_eff_path", [False, True])
@pytest.mark.parametrize("options", [{}, {"d_ssm": 16, "rmsnorm": False}, {"dt_limit": (0.01, 1)}])
def test_autocast(device, use_mem_eff_path, options):
    block = make(
        device, dtype=torch.float32, use_mem_eff_path=use_mem_eff_path, bias=True, **options
    )
    x = tokens(device, dtype=torch.float32)
    with torch.autocast(device_type=torch.device(device).type, dtype=torch.bfloat16):
        out = block(x)
        with torch.no_grad():
            steps = run_in_pieces(block, x, [3, 4, 1, 1])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), block(x), rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(steps.float(), block(x), rtol=5e-2, atol=5e-2)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())


@pytest.mark.parametrize("use_mem_eff_path", [False, True])
def test_compiles_without_graph_breaks(device, use_mem_eff_path):
    block = make(device, use_mem_eff_path=use_mem_eff_path, d_ssm=16)
    compiled = copy.deepcopy(block)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled.forward = torch.compile(
        compiled.forward, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for seqlen in (9, 17, 40, 50, 60, 70):
        torch.testing.assert_close(
            gradients(compiled, tokens(device, seqlen)), gradients(block, tokens(device, seqlen))
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_compiles_a_decode_step(device):
    block, x = make(device), tokens(device)
    torch._dynamo.reset()
    step = torch.compile(block.step, fullgraph=True, backend="aot_eager")
    states, compiled_states = (block.allocate_inference_cache(2, 9) for _ in range(2))
    with torch.no_grad():
        for t in range(3):
            token = x[:, t : t + 1]
            torch.testing.assert_close(step(token, *compiled_states), block.step(token, *states))


@pytest.mark.parametrize("shape", [(0, 9, 12), (2, 0, 12)])
@pytest.mark.parametrize("use_mem_eff_path", [False, True])
def test_empty(device, shape, use_mem_eff_path):
    block = make(device, use_mem_eff_path=use_mem_eff_path, d_ssm=16)
    out, grads = gradients(block, torch.zeros(shape, dtype=torch.float64, device=device))
    assert out.shape == shape
    assert all((g == 0).all() for g in grads.values())


# Mamba2Simple ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"ngroups": 3}, {"dt_limit": (0.02, 0.05), "bias": True}])
def test_simple_is_mamba2(device, options):
    simple, x = make(device, cls=Mamba2Simple, **options), tokens(device)
    block = make(device, **options)
    block.load_state_dict(simple.state_dict())
    torch.testing.assert_close(gradients(simple, x), gradients(block, x))
    simple.use_mem_eff_path = False
    torch.testing.assert_close(gradients(simple, x), gradients(block, x))


@pytest.mark.parametrize("use_mem_eff_path", [False, True])
def test_simple_starts_from_its_states(device, use_mem_eff_path):
    """init_states is the state that a prefix leaves, and has the gradient of all rows."""
    options = {"learnable_init_states": True, "use_mem_eff_path": use_mem_eff_path, "d_conv": 1}
    simple = make(device, cls=Mamba2Simple, **options)
    block = make(device, d_conv=1)
    weights = {n: w for n, w in simple.state_dict().items() if n != "init_states"}
    block.load_state_dict(weights)
    prefix, x = tokens(device, 4, 1), tokens(device, 6, 3)
    params = InferenceParams(max_seqlen=10, max_batch_size=1)
    with torch.no_grad():
        block(prefix, inference_params=params)
        simple.init_states.copy_(params.key_value_memory_dict[0][1][0])
    out, grads = gradients(simple, x)
    torch.testing.assert_close(out, block(torch.cat([prefix.expand(3, -1, -1), x], 1))[:, 4:])
    assert grads["init_states"].shape == (6, 4, 5) and grads["init_states"].abs().sum() > 0


def test_simple_defaults():
    simple = Mamba2Simple(128)
    assert (simple.d_state, simple.headdim, simple.activation) == (64, 128, "swish")
    assert not hasattr(simple, "init_states") and simple.d_ssm == simple.d_inner == 256
