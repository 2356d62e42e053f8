"""`mamba-ssm convert` without transformers; tests/clients compares with its models."""

import json
import math

import pytest
import torch

from mamba_ssm import MambaLMHeadModel, convert, text
from mamba_ssm.__main__ import main
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils._safetensors import load_safetensors, save_safetensors

MAMBA = {"d_state": 4, "dt_rank": 3, "d_conv": 3, "bias": True, "conv_bias": False}
MAMBA2 = {"layer": "Mamba2", "d_state": 4, "headdim": 8, "expand": 1, "dt_limit": [0.5, math.inf]}


def make(ssm_cfg, dtype=torch.float32, **options):
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 50, "ssm_cfg": ssm_cfg, **options}
    model = MambaLMHeadModel(MambaConfig(**config), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def write_pickle(model, folder):
    """As upstream's save_pretrained."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config.__dict__))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def assert_same_logits(model, other, **tolerances):
    tokens = torch.randint(50, (2, 9))
    with torch.no_grad():
        expected = other(tokens).logits
        torch.testing.assert_close(model(tokens).logits, expected, **tolerances)


models = pytest.mark.parametrize("ssm_cfg", [MAMBA, MAMBA2], ids=["Mamba", "Mamba2"])


@models
@pytest.mark.parametrize("tied", [True, False])
def test_from_a_pickle(ssm_cfg, tied, tmp_path, capsys):
    model = make(ssm_cfg, tie_embeddings=tied)
    write_pickle(model, tmp_path / "in")
    (tmp_path / "in" / text.TOKENIZER).write_text("{}")
    (tmp_path / "in" / "notes.txt").write_text("")
    out = tmp_path / "a" / "out"
    assert main(["convert", str(tmp_path / "in"), str(out)]) == 0
    parameters = sum(p.numel() for p in model.parameters())
    told = f"{tmp_path / 'in'} (mamba_ssm) -> {out} (mamba_ssm): {parameters:,} parameters\n"
    assert capsys.readouterr().out == told
    names = ["config.json", "model.safetensors", text.TOKENIZER]
    assert sorted(path.name for path in out.iterdir()) == names
    assert_same_logits(MambaLMHeadModel.from_pretrained(out), model, rtol=0, atol=0)


def test_dtype(tmp_path):
    """As they are, or converted."""
    model = make(MAMBA2, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    kept = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert set(kept.values()) == {torch.bfloat16, torch.float32}  # D, whatever the model's dtype
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "same")]) == 0
    for name, tensor in load_safetensors(tmp_path / "same" / "model.safetensors").items():
        assert tensor.dtype == kept[name] and torch.equal(tensor, model.state_dict()[name])
    arguments = ["--dtype", "float16", "--to", "transformers"]
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "half"), *arguments]) == 0
    weights = load_safetensors(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"


@models
@pytest.mark.parametrize("tied", [True, False])
def test_to_transformers_and_back(ssm_cfg, tied, tmp_path):
    """Nothing that a trained model depends on is lost."""
    model = make(ssm_cfg | {"dt_min": 0.002}, tie_embeddings=tied, residual_in_fp32=False)
    model.save_pretrained(tmp_path / "in")
    arguments = [str(tmp_path / "in"), str(tmp_path / "theirs"), "--to", "transformers"]
    assert main(["convert", *arguments]) == 0
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert written["vocab_size"] == 56  # with padding, which transformers does not know
    assert written["tie_word_embeddings"] == tied and not written["residual_in_fp32"]
    weights = load_safetensors(tmp_path / "theirs" / "model.safetensors")
    assert convert.THEIR_EMBEDDING in weights and ("lm_head.weight" in weights) != tied

    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    back = MambaLMHeadModel.from_pretrained(tmp_path / "ours")
    assert back.config.residual_in_fp32 is False and back.config.tie_embeddings == tied
    assert_same_logits(back, model, rtol=0, atol=0)


def test_defaults_of_transformers():
    """A config.json that leaves out what its model type gives."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50}
    mamba = convert.from_transformers({"model_type": "mamba", **sizes})
    assert (mamba["tie_embeddings"], mamba["ssm_cfg"]["d_state"]) == (True, 16)
    mamba2 = convert.from_transformers({"model_type": "mamba2", **sizes, "time_step_limit": [0, 1]})
    expected = {"d_state": 128, "headdim": 64, "ngroups": 8, "dt_limit": [0, 1]}
    assert not mamba2["tie_embeddings"] and expected.items() <= mamba2["ssm_cfg"].items()


@pytest.mark.parametrize(
    "change, told",
    [
        ({"model_type": "falcon_mamba"}, "'falcon_mamba' is not one of mamba, mamba2"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon must be 1e-05, got 1e-06"),
        ({"num_heads": 3}, r"num_heads * head_dim = 24 is not expand * hidden_size"),
        ({"num_hidden_layers": "2"}, "n_layer must be an integer"),
        ({"vocab_size": 57}, "size mismatch"),
        ({"num_hidden_layers": ...}, "'num_hidden_layers' is missing"),
        ({"time_step_limit": 3}, "config.json"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_models_of_transformers_that_ours_cannot_be(change, told, tmp_path, capsys):
    make(MAMBA2).save_pretrained(tmp_path / "in")
    theirs = tmp_path / "theirs"
    assert main(["convert", str(tmp_path / "in"), str(theirs), "--to", "transformers"]) == 0
    values = json.loads((theirs / "config.json").read_text()) | change
    values = {key: value for key, value in values.items() if value is not ...}
    (theirs / "config.json").write_text(json.dumps(values))
    assert main(["convert", str(theirs), str(tmp_path / "out")]) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "ssm_cfg, options, told",
    [
        (MAMBA, {"d_intermediate": 8}, "an MLP"),
        (MAMBA, {"rms_norm": False}, "LayerNorm"),
        (MAMBA, {"attn_layer_idx": [0], "attn_cfg": {"num_heads": 2}}, "attention"),
        (MAMBA2 | {"D_has_hdim": True}, {}, "D_has_hdim = True"),
        (MAMBA2 | {"norm_before_gate": True}, {}, "norm_before_gate = True"),
        (MAMBA2 | {"rmsnorm": False}, {}, "rmsnorm = False"),
        (MAMBA2 | {"d_ssm": 8}, {}, "d_ssm = 8"),
    ],
)
def test_models_that_transformers_has_not(ssm_cfg, options, told, tmp_path, capsys):
    make(ssm_cfg, **options).save_pretrained(tmp_path / "in")
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--to", "transformers"]
    assert main(["convert", *arguments]) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_groups_are_noted(tmp_path, capsys):
    make(MAMBA2 | {"ngroups": 2}).save_pretrained(tmp_path / "in")
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--to", "transformers"]
    assert main(["convert", *arguments]) == 0
    assert "results differ" in capsys.readouterr().err


def test_tokenizer_of_another_folder(tmp_path, capsys):
    make(MAMBA).save_pretrained(tmp_path / "in")
    (tmp_path / "tokens").mkdir()
    arguments = ["convert", str(tmp_path / "in"), str(tmp_path / "out")]
    assert main([*arguments, "--tokenizer", str(tmp_path / "tokens")]) == 2
    assert f"no {text.TOKENIZER}" in capsys.readouterr().err
    for name in text.TOKENIZER_FILES:
        (tmp_path / "tokens" / name).write_text("{}")
    assert main([*arguments, "--tokenizer", str(tmp_path / "tokens")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} > set(text.TOKENIZER_FILES)


def test_refusals(tmp_path, capsys):
    def told(code, *arguments):
        assert main(["convert", *map(str, arguments)]) == code
        return capsys.readouterr().err

    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("")
    make(MAMBA).save_pretrained(tmp_path / "in")
    assert "not an empty folder" in told(2, tmp_path / "in", full)
    assert "not an empty folder" in told(2, tmp_path / "in", full / "thesis.tex")
    assert "no such folder" in told(1, tmp_path / "missing", tmp_path / "out")
    (tmp_path / "in" / "model.safetensors").unlink()
    assert "no model.safetensors, no pytorch_model.bin" in told(
        1, tmp_path / "in", tmp_path / "out"
    )

    class Program:
        def __reduce__(self):
            return (print, ("it ran",))

    torch.save({"a": Program()}, tmp_path / "in" / "pytorch_model.bin")
    assert "holds other things than tensors" in told(1, tmp_path / "in", tmp_path / "out")
    save_safetensors({"a": torch.ones(3)}, tmp_path / "in" / "model.safetensors")
    assert "n_layer is 2" in told(1, tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
