"""The Mamba module against its C++ twin, and both against the golden file."""

from pathlib import Path

import pytest
import torch

from mamba_ssm import Mamba, MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils.generation import InferenceParams

_C = pytest.importorskip("mamba_ssm._C")

GOLDEN = Path(__file__).parents[1] / "golden" / "mamba.safetensors"


def cpp_twin(block, device, **options):
    twin = _C.Mamba(**options, device=torch.device(device))
    twin.load({name: p.detach() for name, p in block.named_parameters()})
    return twin


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"conv_bias": False, "expand": 1.5}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_equal(device, options, dtype):
    torch.manual_seed(0)
    options = {"d_model": 12, "d_state": 5, "dtype": dtype, **options}
    block = Mamba(**options).to(device)
    twin = cpp_twin(block, device, **options)
    x = torch.randn(2, 9, 12, device=device, dtype=dtype, requires_grad=True)
    x_twin = x.detach().clone().requires_grad_()
    out, out_twin = block(x), twin(x_twin)
    assert torch.equal(out, out_twin)
    dout = torch.randn_like(out)
    out.backward(dout)
    out_twin.backward(dout)
    assert torch.equal(x.grad, x_twin.grad)
    parameters = twin.named_parameters()
    assert set(parameters) == {name for name, _ in block.named_parameters()}
    for name, parameter in block.named_parameters():
        assert parameter.dtype == parameters[name].dtype
        assert torch.equal(parameter.grad, parameters[name].grad), name


def test_decoding_is_equal(device):
    torch.manual_seed(0)
    block = Mamba(12, d_state=5, layer_idx=0).to(device)
    twin = cpp_twin(block, device, d_model=12, d_state=5)
    x = torch.randn(2, 9, 12, device=device)
    params = InferenceParams(max_seqlen=9, max_batch_size=2)
    state = twin.allocate_inference_cache(2)
    with torch.no_grad():
        for piece in x.split([4, 1, 1, 3], dim=1):
            out = block(piece, inference_params=params)
            params.seqlen_offset += piece.shape[1]
            assert torch.equal(out, twin(piece, state))
    conv_state, ssm_state = params.key_value_memory_dict[0]
    assert torch.equal(conv_state, state.conv_state)
    assert torch.equal(ssm_state, state.ssm_state)


@pytest.mark.parametrize("rms_norm", [False, True])
@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_cross(tmp_path, rms_norm, tie_embeddings, dtype):
    torch.manual_seed(0)
    config = MambaConfig(
        d_model=16,
        n_layer=2,
        vocab_size=50,
        ssm_cfg={"d_state": 4, "bias": True},
        rms_norm=rms_norm,
        tie_embeddings=tie_embeddings,
    )
    model = MambaLMHeadModel(config, dtype=dtype)
    model.save_pretrained(tmp_path / "python")
    twin = _C.MambaLMHeadModel.from_pretrained(tmp_path / "python", dtype=dtype)
    ids = torch.randint(50, (2, 7))
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(twin(ids), expected)
        twin.save_pretrained(tmp_path / "cpp")
        back = MambaLMHeadModel.from_pretrained(tmp_path / "cpp", dtype=dtype)
        assert torch.equal(back(ids).logits, expected)


@pytest.mark.parametrize("language", ["python", "cpp"])
def test_golden(device, language):
    golden = {name: t.to(device) for name, t in _C.load_safetensors(GOLDEN).items()}
    weights = {
        name.removeprefix("weight."): t for name, t in golden.items() if name.startswith("weight.")
    }
    if language == "python":
        block = Mamba(d_model=16, d_state=8).to(device)
        block.load_state_dict(weights)
        parameters = dict(block.named_parameters())
    else:
        block = _C.Mamba(d_model=16, d_state=8, device=torch.device(device))
        block.load(weights)
        parameters = block.named_parameters()
    x = golden["input"].clone().requires_grad_()
    out = block(x)
    dout = torch.arange(out.numel(), dtype=torch.float64).cos().view_as(out).to(out)
    out.backward(dout)

    def check(got, name):  # float32 throughout: relative to the largest value of the tensor
        expected = golden[name]
        torch.testing.assert_close(
            got.detach(), expected, rtol=0, atol=2e-6 * expected.abs().max().item(), msg=name
        )

    check(out, "output")
    check(x.grad, "grad.input")
    for name, parameter in parameters.items():
        check(parameter.grad, f"grad.{name}")
