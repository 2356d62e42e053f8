"""The Mamba module: parameters, its two paths, caches, autocast, compilation."""

import copy

import pytest
import torch
from harness import properties
from harness.registration import fused_only

from mamba_ssm import Mamba
from mamba_ssm.utils.generation import InferenceParams


def make(device, dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    kwargs = {"d_model": 12, "d_state": 5, "layer_idx": 0, **kwargs}
    return Mamba(**kwargs, dtype=dtype).to(device)


def tokens(device, seqlen=9, batch=2, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(batch, seqlen, 12, dtype=dtype).to(device)


def gradients(module, x):
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).to(out.device))
    result = {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}
    module.zero_grad()
    return out.detach(), result


def test_parameter_count_and_shape(device):
    block = Mamba(d_model=16, d_state=64, d_conv=4, expand=2).to(device)
    assert sum(p.numel() for p in block.parameters()) == 7968
    assert block(torch.randn(2, 32, 16, device=device)).shape == (2, 32, 16)


@pytest.mark.parametrize("bias", [False, True])
def test_state_dict(bias):
    expected = {
        "A_log": (24, 5),
        "D": (24,),
        "in_proj.weight": (48, 12),
        "conv1d.weight": (24, 1, 4),
        "conv1d.bias": (24,),
        "x_proj.weight": (11, 24),
        "dt_proj.weight": (24, 1),
        "dt_proj.bias": (24,),
        "out_proj.weight": (12, 24),
    }
    if bias:
        expected |= {"in_proj.bias": (48,), "out_proj.bias": (12,)}
    state_dict = make("cpu", bias=bias).state_dict()
    assert {name: tuple(t.shape) for name, t in state_dict.items()} == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_parameter_dtypes_and_marks(dtype):
    block = Mamba(16, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, parameter in block.named_parameters():
        assert parameter.dtype == (wide if name in ("A_log", "D") else dtype), name
    assert block.A_log._no_weight_decay and block.D._no_weight_decay
    assert block.dt_proj.bias._no_reinit


def test_initial_values():
    block = Mamba(64, d_state=3, dt_min=0.01, dt_max=0.02)
    torch.testing.assert_close(block.A_log[5].exp(), torch.tensor([1.0, 2.0, 3.0]))
    dt = torch.nn.functional.softplus(block.dt_proj.bias)
    assert 0.0099 < dt.min() and dt.max() < 0.0201
    assert block.dt_proj.weight.abs().max() <= block.dt_rank**-0.5
    constant = Mamba(64, dt_init="constant", dt_scale=2.0)
    assert (constant.dt_proj.weight == 2 * constant.dt_rank**-0.5).all()
    with pytest.raises(NotImplementedError):
        Mamba(64, dt_init="ones")


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"conv_bias": False}, {"d_conv": 1}])
def test_fast_path_equals_unfused(device, options):
    block, x = make(device, expand=1.5, **options), tokens(device)
    out, expected = gradients(block, x)
    block.use_fast_path = False
    out_unfused, unfused = gradients(block, x)
    torch.testing.assert_close(out, out_unfused)
    torch.testing.assert_close(expected, unfused)


@torch.no_grad()
def run_in_pieces(block, x, pieces):
    params = InferenceParams(max_seqlen=x.shape[1], max_batch_size=x.shape[0])
    outputs = []
    for piece in x.split(pieces, dim=1):
        outputs.append(block(piece, inference_params=params))
        params.seqlen_offset += piece.shape[1]
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 1, 4], [2, 2, 5], [7, 1, 1], [1, 8]])
@pytest.mark.parametrize("d_conv", [1, 2, 4])
def test_pieces_equal_whole(device, pieces, d_conv):
    block, x = make(device, d_conv=d_conv), tokens(device)
    torch.testing.assert_close(run_in_pieces(block, x, pieces), block(x))


@pytest.mark.parametrize("d_conv", [1, 4])
def test_packed_sequences_are_apart(device, d_conv):
    """Each as it would be alone, with its gradients; padding gives 0."""
    block, x = make(device, d_conv=d_conv), tokens(device, batch=1)
    seq_idx = torch.tensor([[-1, 2, 2, 2, 2, 0, -1, 5, 5]], dtype=torch.int32, device=device)
    x = x.requires_grad_()
    parameters = [x, *block.parameters()]
    got = block(x, seq_idx=seq_idx)
    alone = torch.zeros_like(got)
    for start, stop in ((1, 5), (5, 6), (7, 9)):
        alone[:, start:stop] = block(x[:, start:stop])
    torch.testing.assert_close(got, alone)
    dout = torch.randn_like(got)
    got, alone = (torch.autograd.grad(out, parameters, dout) for out in (got, alone))
    torch.testing.assert_close(got, alone)


@torch.no_grad()
@pytest.mark.parametrize("d_conv", [1, 4])
def test_padded_rows_in_pieces(device, d_conv):
    """Behind the end of a row, padding leaves the states to the steps that follow."""
    block, x, lengths = make(device, d_conv=d_conv), tokens(device, batch=3), [8, 2, 5]
    ids = torch.arange(8, device=device) < torch.tensor(lengths, device=device)[:, None]
    ids = ids.int() - 1
    params = InferenceParams(max_seqlen=9, max_batch_size=3)
    for start, stop in ((0, 3), (3, 4), (4, 8)):
        block(x[:, start:stop], inference_params=params, seq_idx=ids[:, start:stop])
        params.seqlen_offset = stop
    out = block(x[:, 8:], inference_params=params)
    for row, length in enumerate(lengths):
        alone = block(torch.cat([x[row, :length], x[row, 8:]])[None])
        torch.testing.assert_close(out[row], alone[0, -1:])


def test_packed_sequences_need_a_plain_convolution():
    block = make("cpu")
    block.conv1d.register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="plain torch.nn.Conv1d"):
        block(tokens("cpu"), seq_idx=torch.zeros(2, 9, dtype=torch.int32))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_step_with_states_of_another_dtype(device, state_dtype):
    block, x = make(device, dtype=torch.float32), tokens(device, dtype=torch.float32)
    conv_state, ssm_state = block.allocate_inference_cache(2, 9, dtype=state_dtype)
    with torch.no_grad():
        for t in range(x.shape[1]):
            out, conv_out, ssm_out = block.step(x[:, t : t + 1], conv_state, ssm_state)
            assert conv_out is conv_state and ssm_out is ssm_state
    tolerance = 1e-5 if state_dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out, block(x)[:, -1:], rtol=tolerance, atol=tolerance)


def test_step_takes_one_token():
    block = make("cpu")
    with pytest.raises(ValueError, match=r"\(batch, 1, d_model\)"):
        block.step(tokens("cpu"), *block.allocate_inference_cache(2, 9))


def test_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"d_model=12\), got \(2, 9, 13\)"):
        make("cpu")(torch.zeros(2, 9, 13, dtype=torch.float64))


def test_cache_of_another_batch_size():
    block, x = make("cpu"), tokens("cpu")
    params = InferenceParams(max_seqlen=20, max_batch_size=2)
    block(x, inference_params=params)
    assert block(x[:1], inference_params=params).shape == (1, 9, 12)  # a new sequence
    params.seqlen_offset = 9
    with pytest.raises(ValueError, match="batch size 1"):
        block(x, inference_params=params)
    with pytest.raises(ValueError, match="layer_idx"):
        Mamba(12)(x.float(), inference_params=params)


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


@pytest.mark.parametrize("use_fast_path", [False, True])
def test_autocast(device, use_fast_path):
    block = make(device, dtype=torch.float32, use_fast_path=use_fast_path, bias=True)
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


@pytest.mark.parametrize("use_fast_path", [False, True])
def test_compiles_without_graph_breaks(device, use_fast_path):
    block = make(device, use_fast_path=use_fast_path)
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
    # No graph per length; one more for the lengths that are a single chunk of the scan.
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
def test_empty(device, shape):
    block = make(device)
    out, grads = gradients(block, torch.zeros(shape, dtype=torch.float64, device=device))
    assert out.shape == shape
    assert all((g == 0).all() for g in grads.values())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("use_fast_path", [False, pytest.param(True, marks=fused_only)])
def test_moves_nothing(device, bias, use_fast_path):
    """From tokens to gradients no activation is copied from one layout into another."""
    block = Mamba(8, d_state=4, bias=bias, use_fast_path=use_fast_path, device=device)
    x = torch.randn(3, 64, 8, device=device, requires_grad=True)

    def run():
        if use_fast_path:
            block(x).backward(torch.ones_like(x))
        else:
            with torch.no_grad():
                block(x)

    properties.check_moves_nothing(run, least=x.numel() // 2)
