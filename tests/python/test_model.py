"""The language model: names, saving and loading, generation with caches."""

import json
import sys

import pytest
import torch

from mamba_ssm import MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import _init_weights, create_block
from mamba_ssm.utils.generation import InferenceParams


MAMBA, MAMBA2 = {"d_state": 4}, {"layer": "Mamba2", "d_state": 4, "headdim": 8}
layers = pytest.mark.parametrize("ssm_cfg", [MAMBA, MAMBA2], ids=["Mamba", "Mamba2"])


def make(device="cpu", dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 50, "ssm_cfg": MAMBA, **kwargs}
    return MambaLMHeadModel(MambaConfig(**config), dtype=dtype).to(device)


def ids(device="cpu", seqlen=7):
    torch.manual_seed(1)
    return torch.randint(50, (2, seqlen)).to(device)


def test_names_and_padding():
    model = make()
    names = list(model.state_dict())
    assert names[0] == "backbone.embedding.weight"
    assert names[-2:] == ["backbone.norm_f.weight", "lm_head.weight"]
    assert "backbone.layers.1.mixer.in_proj.weight" in names
    assert "backbone.layers.1.norm.weight" in names
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert model(ids()).logits.shape == (2, 7, 56)  # padded to a multiple of 8
    assert model(ids(), num_last_tokens=1).logits.shape == (2, 1, 56)
    untied = make(tie_embeddings=False)
    assert untied.lm_head.weight is not untied.backbone.embedding.weight


def test_initial_values():
    model = make(d_model=64, n_layer=4)
    assert 0.018 < model.backbone.embedding.weight.std() < 0.022
    bound = (1 / 128) ** 0.5 / 4**0.5  # of kaiming_uniform(a=sqrt(5)), over sqrt(n_layer)
    weight = model.backbone.layers[0].mixer.out_proj.weight
    assert 0.95 * bound < weight.abs().max() <= bound
    block = make(ssm_cfg={"bias": True}).backbone.layers[0].mixer
    assert (block.in_proj.bias == 0).all() and (block.dt_proj.bias != 0).all()
    linear = torch.nn.Linear(2, 2)
    _init_weights(linear, n_layer=1)
    assert (linear.bias == 0).all()


@layers
@pytest.mark.parametrize("rms_norm", [False, True])
@pytest.mark.parametrize("residual_in_fp32", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_step_equals_forward(device, ssm_cfg, rms_norm, residual_in_fp32, dtype):
    options = {"rms_norm": rms_norm, "residual_in_fp32": residual_in_fp32}
    model = make(device, dtype, ssm_cfg=ssm_cfg, **options)
    tokens = ids(device)
    expected = model(tokens).logits
    assert expected.dtype == dtype
    params = InferenceParams(max_seqlen=7, max_batch_size=2)
    outputs = []
    with torch.no_grad():
        for piece in tokens.split([3, 1, 2, 1], dim=1):
            outputs.append(model(piece, inference_params=params).logits)
            params.seqlen_offset += piece.shape[1]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=tolerance, atol=tolerance)


@layers
def test_allocated_caches_are_used(ssm_cfg):
    model, tokens = make(ssm_cfg=ssm_cfg), ids()
    params = InferenceParams(max_seqlen=7, max_batch_size=2)
    params.key_value_memory_dict = model.allocate_inference_cache(2, 7)
    states = dict(params.key_value_memory_dict)
    with torch.no_grad():
        model(tokens, inference_params=params)
    assert all(params.key_value_memory_dict[i] is states[i] for i in states)
    assert all(state.abs().sum() > 0 for layer in states.values() for state in layer)


@layers
def test_reset_starts_a_new_sequence(ssm_cfg):
    model, tokens = make(ssm_cfg=ssm_cfg), ids()
    params = InferenceParams(max_seqlen=7, max_batch_size=2)
    with torch.no_grad():
        first = model(tokens, inference_params=params).logits
        params.seqlen_offset = 7
        params.reset(7, 2)
        torch.testing.assert_close(model(tokens, inference_params=params).logits, first)


@layers
def test_trains(device, ssm_cfg):
    model, tokens = make(device, ssm_cfg=ssm_cfg), ids(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("package", ["safetensors", "_C"])
@layers
def test_save_and_load(tmp_path, monkeypatch, ssm_cfg, tie_embeddings, package):
    if package == "safetensors":
        pytest.importorskip("safetensors")
    else:
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    model = make(tie_embeddings=tie_embeddings, ssm_cfg=ssm_cfg)
    model.save_pretrained(tmp_path / "checkpoint")
    names = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert names == {"config.json", "model.safetensors"}
    loaded = MambaLMHeadModel.from_pretrained(tmp_path / "checkpoint")
    assert loaded.config == model.config
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    assert (loaded.lm_head.weight is loaded.backbone.embedding.weight) == tie_embeddings
    double = MambaLMHeadModel.from_pretrained(str(tmp_path / "checkpoint"), dtype=torch.float64)
    assert double.lm_head.weight.dtype == torch.float64


def test_config_file_is_json(tmp_path):
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["d_model"] == 16 and config["ssm_cfg"] == {"d_state": 4}
    assert MambaConfig(**config) == make().config


def test_published_sizes():
    """mamba2-130m, without its layers but one."""
    config = MambaConfig(d_model=768, n_layer=1, ssm_cfg={"layer": "Mamba2"})
    config.pad_vocab_size_multiple = 16
    model = MambaLMHeadModel(config, device="meta")
    layer = sum(p.numel() for p in model.backbone.layers[0].parameters())
    assert sum(p.numel() for p in model.parameters()) + 23 * layer == 128_989_632


def test_packed_sequences_are_apart(device):
    """cu_seqlens reaches every block of the model."""
    model, tokens = make(device, torch.float64, ssm_cfg=MAMBA2), ids(device)
    offsets = torch.tensor([0, 7, 14], device=device)
    packed = model(tokens.view(1, 14), cu_seqlens=offsets).logits
    torch.testing.assert_close(packed.view(2, 7, -1), model(tokens).logits)


@pytest.mark.parametrize("upper", [0.5, float("inf")])
def test_step_limits_are_saved(tmp_path, upper):
    """Also without an upper end, for which JSON has no number."""
    model = make(ssm_cfg={**MAMBA2, "dt_limit": (0.01, upper)})
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    limits = json.loads(text, parse_constant=pytest.fail)["ssm_cfg"]["dt_limit"]
    assert limits == [0.01, None if upper == float("inf") else upper]
    loaded = MambaLMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    assert not torch.equal(make(ssm_cfg=MAMBA2)(ids()).logits, model(ids()).logits)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        MambaLMHeadModel.from_pretrained(tmp_path)


def test_parts_that_do_not_exist_yet_say_so():
    with pytest.raises(NotImplementedError, match="Mamba3"):
        create_block(16, ssm_cfg={"layer": "Mamba3"})
    with pytest.raises(NotImplementedError, match="attention"):
        create_block(16, attn_layer_idx=[0], layer_idx=0)
    with pytest.raises(NotImplementedError, match="MLP"):
        create_block(16, 32)
    with pytest.raises(ValueError, match="Mamba9"):
        create_block(16, ssm_cfg={"layer": "Mamba9"})
