"""The modules against their C++ twins, and both against the golden files."""

from pathlib import Path

import pytest
import torch

from harness.registration import import_bindings
from mamba_ssm import Mamba, Mamba2, MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils.generation import InferenceParams

_C = import_bindings()

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"d_model": 12, "d_state": 5}
SMALL2 = {**SMALL, "headdim": 4}


def cpp_twin(block, device, **options):
    twin = getattr(_C, type(block).__name__)(**options, device=torch.device(device))
    twin.load({name: p.detach() for name, p in block.named_parameters()})
    return twin


BLOCKS = {
    "Mamba": (Mamba, SMALL),
    "Mamba bias": (Mamba, SMALL | {"bias": True}),
    "Mamba expand": (Mamba, SMALL | {"conv_bias": False, "expand": 1.5}),
    "Mamba2": (Mamba2, SMALL2),
    "Mamba2 bias": (Mamba2, SMALL2 | {"bias": True, "ngroups": 2, "norm_before_gate": True}),
    "Mamba2 MLP": (Mamba2, SMALL2 | {"d_ssm": 16, "rmsnorm": False, "conv_bias": False}),
    "Mamba2 limits": (Mamba2, SMALL2 | {"dt_limit": (0.02, 0.05), "D_has_hdim": True}),
}
blocks = pytest.mark.parametrize("kind, options", BLOCKS.values(), ids=BLOCKS.keys())


def check_equal(block, twin, x, **packing):
    """Outputs, and gradients of input and parameters, bit for bit."""
    x, x_twin = (x.detach().clone().requires_grad_() for _ in range(2))
    out, out_twin = block(x, **packing), twin(x_twin, **packing)
    assert torch.equal(out, out_twin)
    dout = torch.randn_like(out)
    out.backward(dout)
    out_twin.backward(dout)
    assert torch.equal(x.grad, x_twin.grad)
    parameters = twin.named_parameters()
    assert list(parameters) == [name for name, _ in block.named_parameters()]
    for name, parameter in block.named_parameters():
        assert parameter.dtype == parameters[name].dtype
        assert torch.equal(parameter.grad, parameters[name].grad), name


@blocks
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_equal(device, kind, options, dtype):
    torch.manual_seed(0)
    options = {**options, "dtype": dtype}
    block = kind(**options).to(device)
    twin = cpp_twin(block, device, **options)
    check_equal(block, twin, torch.randn(2, 9, 12, device=device, dtype=dtype))


@pytest.mark.parametrize(
    "kind, options, packing",
    [(Mamba, SMALL, "seq_idx"), (Mamba2, SMALL2, "seq_idx"), (Mamba2, SMALL2, "cu_seqlens")],
    ids=["Mamba seq_idx", "Mamba2 seq_idx", "Mamba2 cu_seqlens"],
)
def test_packed_rows_are_equal(device, kind, options, packing):
    torch.manual_seed(0)
    block = kind(**options).to(device)
    twin = cpp_twin(block, device, **options)
    values = {"seq_idx": [[0, 0, 1, 1, 1, 1, -1, 2, 2]], "cu_seqlens": [0, 2, 2, 9]}[packing]
    packing = {packing: torch.tensor(values, dtype=torch.int32, device=device)}
    check_equal(block, twin, torch.randn(1, 9, 12, device=device), **packing)


DECODING = {name: (*block, False) for name, block in BLOCKS.items()}
DECODING |= {f"{name} packed": (*BLOCKS[name], True) for name in BLOCKS if "Mamba2" in name}


@pytest.mark.parametrize("kind, options, packed", DECODING.values(), ids=DECODING.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_is_equal(device, kind, options, packed, dtype):
    torch.manual_seed(0)
    options = {**options, "dtype": dtype}
    block = kind(**options, layer_idx=0).to(device)
    twin = cpp_twin(block, device, **options)
    rows, x, pieces = 2, torch.randn(2, 9, 12, device=device, dtype=dtype), [4, 1, 1, 3]
    params = InferenceParams(max_seqlen=9, max_batch_size=2)
    with torch.no_grad():
        if packed:
            rows, offsets = 3, torch.tensor([0, 2, 2, 9], device=device)
            x, prompt = torch.randn(3, 4, 12, device=device, dtype=dtype), x[:1]
            pieces = [1, 1, 2]
            state = twin.allocate_inference_cache(rows)
            out = block(prompt, cu_seqlens=offsets, inference_params=params)
            params.seqlen_offset = 9
            assert torch.equal(out, twin(prompt, state, cu_seqlens=offsets))
        else:
            state = twin.allocate_inference_cache(rows)
        for piece in x.split(pieces, dim=1):
            out = block(piece, inference_params=params)
            params.seqlen_offset += piece.shape[1]
            assert torch.equal(out, twin(piece, state))
    conv_state, ssm_state = params.key_value_memory_dict[0]
    assert torch.equal(conv_state, state.conv_state)
    assert torch.equal(ssm_state, state.ssm_state)


LAYERS = {
    "Mamba": {"d_state": 4, "bias": True},
    "Mamba2": {"layer": "Mamba2", "d_state": 4, "headdim": 8, "bias": True, "d_ssm": 16},
    "Mamba2 limits": {"layer": "Mamba2", "headdim": 8, "dt_limit": (0.01, float("inf"))},
}


@pytest.mark.parametrize("ssm_cfg", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("rms_norm", [False, True])
@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_cross(tmp_path, ssm_cfg, rms_norm, tie_embeddings, dtype):
    torch.manual_seed(0)
    config = MambaConfig(
        d_model=16,
        n_layer=2,
        vocab_size=50,
        ssm_cfg=ssm_cfg,
        rms_norm=rms_norm,
        tie_embeddings=tie_embeddings,
    )
    model = MambaLMHeadModel(config, dtype=dtype)
    size = 3000 if tie_embeddings else None
    model.save_pretrained(tmp_path / "python", max_shard_size=size)
    assert (tmp_path / "python" / "model.safetensors").exists() == (size is None)
    twin = _C.MambaLMHeadModel.from_pretrained(tmp_path / "python", dtype=dtype)
    ids = torch.randint(50, (2, 7))
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(twin(ids), expected)
        twin.save_pretrained(tmp_path / "cpp")
        back = MambaLMHeadModel.from_pretrained(tmp_path / "cpp", dtype=dtype)
        assert torch.equal(back(ids).logits, expected)


GOLDEN_BLOCKS = {
    "mamba": (Mamba, {"d_model": 16, "d_state": 8}),
    "mamba2": (Mamba2, {"d_model": 16, "d_state": 8, "d_ssm": 24, "headdim": 4, "ngroups": 2}),
}


@pytest.mark.parametrize("file", GOLDEN_BLOCKS)
@pytest.mark.parametrize("language", ["python", "cpp"])
def test_golden(device, language, file):
    kind, options = GOLDEN_BLOCKS[file]
    tensors = _C.load_safetensors(GOLDEN / f"{file}.safetensors")
    golden = {name: t.to(device) for name, t in tensors.items()}
    weights = {
        name.removeprefix("weight."): t for name, t in golden.items() if name.startswith("weight.")
    }
    if language == "python":
        block = kind(**options).to(device)
        block.load_state_dict(weights)
        parameters = dict(block.named_parameters())
    else:
        block = getattr(_C, kind.__name__)(**options, device=torch.device(device))
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
