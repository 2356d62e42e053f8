"""The language model's files: what is written, read, and refused."""

import contextlib
import errno
import functools
import io
import json
import math
import os
import pickle
import resource
import stat
import struct
import subprocess
import sys
import types
import zipfile

import pytest
import torch
from harness.registration import import_bindings

from mamba_ssm import MambaLMHeadModel
from mamba_ssm.models import mixer_seq_simple
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils._safetensors import load_safetensors, save_safetensors
from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf

load = MambaLMHeadModel.from_pretrained
load_pickle = functools.partial(load, use_safetensors=False)

MAMBA, MAMBA2 = {"d_state": 4}, {"layer": "Mamba2", "d_state": 4, "headdim": 8}
ATTENTION = {"attn_layer_idx": [1], "attn_cfg": {"num_heads": 4, "causal": True, "d_conv": 4}}
MODELS = {
    "Mamba": {"ssm_cfg": MAMBA},
    "Mamba2": {"ssm_cfg": MAMBA2},
    "hybrid": {"ssm_cfg": MAMBA2, "d_intermediate": 24, **ATTENTION},
}
models = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())


def make(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 50, "ssm_cfg": MAMBA, **kwargs}
    return MambaLMHeadModel(MambaConfig(**config), dtype=dtype)


def logits_of(model):
    torch.manual_seed(1)
    with torch.no_grad():
        return model(torch.randint(50, (2, 7))).logits


def write_json(path, value):
    path.write_text(json.dumps(value))


def write_pickle(model, folder, **options):
    """As upstream's save_pretrained."""
    write_json(folder / "config.json", model.config.__dict__)
    torch.save(model.state_dict(), folder / "pytorch_model.bin", **options)


def saved(folder, **kwargs):
    """A model and its checkpoint."""
    model = make(**kwargs)
    model.save_pretrained(folder)
    return model


@pytest.fixture(params=["safetensors", "_C"])
def package(request, monkeypatch):
    """Which library reads and writes safetensors."""
    if request.param == "safetensors":
        pytest.importorskip("safetensors")
    else:
        import_bindings()
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    return request.param


@models
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_save_and_load(tmp_path, package, config, tie_embeddings):
    folder = tmp_path / "a" / "checkpoint"
    model = saved(folder, **config, tie_embeddings=tie_embeddings)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    loaded = load(folder)
    assert loaded.config == model.config
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert (loaded.lm_head.weight is loaded.backbone.embedding.weight) == tie_embeddings


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype(tmp_path, dtype):
    """Parameters that a module keeps in float32 are not rounded on their way."""
    model = saved(tmp_path)
    loaded = load(str(tmp_path), "cpu", dtype)
    assert loaded.lm_head.weight.dtype == dtype
    A_log = loaded.backbone.layers[0].mixer.A_log
    assert torch.equal(A_log.float(), model.backbone.layers[0].mixer.A_log)
    loaded.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load(tmp_path, dtype=dtype)), logits_of(loaded))


def test_arguments_of_the_constructor(tmp_path):
    class Tagged(MambaLMHeadModel):
        def __init__(self, config, initializer_cfg=None, device=None, dtype=None, tag=None):
            super().__init__(config, initializer_cfg, device, dtype)
            self.tag = tag

    model = saved(tmp_path)
    loaded = Tagged.from_pretrained(tmp_path, tag=3)
    assert type(loaded) is Tagged and loaded.tag == 3
    assert torch.equal(logits_of(loaded), logits_of(model))


# config.json ------------------------------------------------------------------------------------


@models
def test_loading_draws_little(tmp_path, config):
    """Nothing but dt's biases: it would be overwritten, and on the meta device needs a compiler."""
    make(**config).save_pretrained(tmp_path)
    program = f"""
import sys, torch
from mamba_ssm import MambaLMHeadModel
MambaLMHeadModel.from_pretrained({str(tmp_path)!r})
assert not {{"torch._dynamo", "sympy"}} & set(sys.modules)
with torch.profiler.profile() as profile:  # which imports them
    MambaLMHeadModel.from_pretrained({str(tmp_path)!r})
counts = {{event.key: event.count for event in profile.key_averages()}}
assert "aten::copy_" in counts and "aten::normal_" not in counts
assert counts["aten::uniform_"] < counts["aten::rand"]  # which calls the former
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("config", [MODELS["Mamba"], MODELS["Mamba2"]], ids=["Mamba", "Mamba2"])
def test_loading_in_cpp_draws_little(tmp_path, config):
    """Nothing as large as a matrix of weights; the few numbers are of convolutions and of dt."""
    load = import_bindings().MambaLMHeadModel.from_pretrained
    make(**config, d_model=256).save_pretrained(tmp_path)
    with torch.profiler.profile(record_shapes=True) as profile:
        load(tmp_path)
    sizes = [
        math.prod(event.input_shapes[0])
        for event in profile.events()
        if event.name in ("aten::normal_", "aten::uniform_")
    ]
    assert 0 < max(sizes) < 512 * 16  # of dt_proj, the smallest matrix


def test_config_file_is_json(tmp_path):
    model = saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert list(config) == list(vars(MambaConfig()))
    assert config["d_model"] == 16 and config["ssm_cfg"] == {"d_state": 4}
    assert MambaConfig(**config) == model.config
    assert load_config_hf(tmp_path) == load_config_hf(str(tmp_path)) == config


@pytest.mark.parametrize("upper", [0.5, float("inf")])
def test_step_limits_are_saved(tmp_path, upper):
    """Also without an upper end, for which JSON has no number."""
    model = saved(tmp_path, ssm_cfg={**MAMBA2, "dt_limit": (0.01, upper)})
    text = (tmp_path / "config.json").read_text()
    limits = json.loads(text, parse_constant=pytest.fail)["ssm_cfg"]["dt_limit"]
    assert limits == [0.01, None if upper == float("inf") else upper]
    assert torch.equal(logits_of(load(tmp_path)), logits_of(model))
    assert not torch.equal(logits_of(make(ssm_cfg=MAMBA2)), logits_of(model))
    assert model.config.ssm_cfg["dt_limit"] == (0.01, upper)


def test_infinity_is_read(tmp_path):
    """Upstream writes the word."""
    model = make(ssm_cfg={**MAMBA2, "dt_limit": (0.01, float("inf"))})
    write_pickle(model, tmp_path)
    assert "Infinity" in (tmp_path / "config.json").read_text()
    assert torch.equal(logits_of(load_pickle(tmp_path)), logits_of(model))


def test_absent_and_null_keys_have_defaults():
    assert MambaConfig.from_dict({}) == MambaConfig()
    nulls = {"ssm_cfg": None, "attn_cfg": None, "attn_layer_idx": None}
    assert MambaConfig.from_dict(nulls) == MambaConfig()


HOSTILE_CONFIGS = {
    "empty": ("", "not valid JSON"),
    "no JSON": ("{'d_model': 16}", "not valid JSON"),
    "not UTF-8": (b'{"d_model\xff": 16}', "not valid JSON"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "a long number": ('{"d_model": ' + "9" * 10_000 + "}", "not valid JSON"),
    "large": ('{"x": "' + "y" * (1 << 20) + '"}', "more than 1048576 bytes"),
    "a list": ("[16]", "expected a JSON object, got a list"),
    "null": ("null", "expected a JSON object, got None"),
    "unknown key": ({"hidden_size": 16}, "unknown key 'hidden_size'; known are d_model, "),
    "odd key": ({"\u202e" + "k" * 999: 1}, r"unknown key '\\u202ek{70}"),
    "zero": ({"d_model": 0}, "d_model must be an integer from 1 to 2147483647, got 0"),
    "negative": ({"n_layer": -2}, "n_layer must be an integer from 1 .* got -2"),
    "huge": ({"vocab_size": 10**60}, "vocab_size must be .* got a huge number"),
    "float": ({"d_model": 16.0}, "d_model must be .* got 16.0"),
    "string": ({"n_layer": "2"}, "n_layer must be .* got '2'"),
    "bool as int": ({"n_layer": True}, "n_layer must be .* got True"),
    "int as bool": ({"rms_norm": 1}, "rms_norm must be true or false, got 1"),
    "null size": ({"d_model": None}, "d_model must be .* got None"),
    "multiple": ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple must be .* got 0"),
    "negative MLP": ({"d_intermediate": -1}, "d_intermediate must be an integer from 0"),
    "options": ({"ssm_cfg": [1]}, "ssm_cfg must be an object, got a list"),
    "layers": ({"attn_layer_idx": 1}, "attn_layer_idx must be a list, got 1"),
    "layer": ({"attn_layer_idx": [-1]}, "attn_layer_idx must be a list of layer indices"),
    "nested": ({"ssm_cfg": {"d_state": {}}}, "ssm_cfg: 'd_state' must be a number"),
    "not a number": ('{"ssm_cfg": {"dt_min": NaN}}', "ssm_cfg: 'dt_min' must be .* got nan"),
    "huge option": ({"attn_cfg": {"num_heads": 2**31}}, "attn_cfg: 'num_heads' must be"),
    "huge model": ({"d_model": 2**31 - 1}, "no such model can be made"),
    "many layers": ({"n_layer": 2**31 - 1}, "n_layer is 2147483647, but there are 2. weights"),
    "unknown option": ({"ssm_cfg": {"d_stat": 4}}, "no such model can be made: .*'d_stat'"),
    "own option": ({"ssm_cfg": {"device": "cuda"}}, "no such model can be made: .*'device'"),
    "option type": ({"ssm_cfg": {"d_state": "4"}}, "no such model can be made"),
    "option range": ({"ssm_cfg": {"d_state": -4}}, "no such model can be made"),
    "expand": ({"ssm_cfg": {"expand": 1e308}}, "no such model can be made"),
    "infinite": ({"ssm_cfg": {"expand": float("inf")}}, "no such model can be made"),
    "kind": ({"ssm_cfg": {"layer": "os.system"}}, "unknown ssm_cfg layer 'os.system'"),
    "kind type": ({"ssm_cfg": {"layer": ["Mamba1"]}}, "no such model can be made"),
    "no heads": ({"attn_layer_idx": [0]}, "no such model can be made: .*num_heads"),
    "zero heads": ({"attn_layer_idx": [0], "attn_cfg": {"num_heads": 0}}, "num_heads"),
    "headdim": ({"ssm_cfg": {"layer": "Mamba2", "headdim": 5}}, "headdim must divide d_ssm"),
    "group": ({"ssm_cfg": {"layer": "Mamba2", "process_group": 1}}, "process_group"),
}


@pytest.mark.parametrize("content, message", HOSTILE_CONFIGS.values(), ids=HOSTILE_CONFIGS.keys())
def test_hostile_config(tmp_path, content, message):
    """Is refused with a sentence, and before memory is asked for."""
    saved(tmp_path)
    if isinstance(content, dict):
        small = {"d_model": 16, "n_layer": 2, "vocab_size": 50, "ssm_cfg": MAMBA}
        content = json.dumps({**small, **content})
    if isinstance(content, str):
        content = content.encode()
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises((ValueError, NotImplementedError), match=message) as error:
        load(tmp_path)
    assert len(str(error.value)) < 1000


def test_layers_that_do_not_exist_yet(tmp_path):
    saved(tmp_path)
    write_json(tmp_path / "config.json", {"ssm_cfg": {"layer": "Mamba3"}, "n_layer": 2})
    with pytest.raises(NotImplementedError, match="Mamba3"):
        load(tmp_path)


# Weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"d_model": 2**20}, "size mismatch for backbone.embedding.weight"),
        ({"n_layer": 1}, "Unexpected key.*layers.1.mixer"),
        ({"n_layer": 3}, "Missing key.*layers.2.mixer"),
        ({"rms_norm": False}, "Missing key.*norm_f.bias"),
        ({"vocab_size": 2**31 - 1}, "size mismatch"),
        ({"d_intermediate": 2**31 - 1}, "Missing key.*mlp.fc1.weight"),
        ({"tie_embeddings": False}, "Missing key.*lm_head.weight"),
    ],
)
def test_weights_of_another_model(tmp_path, changes, message):
    model = saved(tmp_path)
    write_json(tmp_path / "config.json", {**vars(model.config), **changes})
    with pytest.raises(RuntimeError, match=message):
        load(tmp_path)


def test_weights_that_are_none(tmp_path):
    model = make()
    write_pickle(model, tmp_path)
    for name, tensor in (("lm_head.weight", torch.zeros(56, 16)), ("x", torch.zeros(2).int())):
        torch.save({**model.state_dict(), name: tensor}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=f"ties .*{name}|{name} is torch.int32, not floating"):
            load_pickle(tmp_path)


@pytest.mark.parametrize("kept", ["lm_head.weight", "backbone.embedding.weight"])
def test_tied_matrix_has_either_name(tmp_path, kept):
    model = make()
    write_pickle(model, tmp_path)
    state_dict = model.state_dict()
    del state_dict["lm_head.weight" if kept != "lm_head.weight" else "backbone.embedding.weight"]
    torch.save(state_dict, tmp_path / "pytorch_model.bin")
    loaded = load_pickle(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.lm_head.weight is loaded.backbone.embedding.weight


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tmp_path / "none")
    write_json(tmp_path / "config.json", {})
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="no model.safetensors.*use_safetensors=False"):
        load(tmp_path)
    saved(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="no pytorch_model.bin"):
        load_pickle(tmp_path / "other")


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 64, b"{}", b"PK\x03\x04" * 9])
def test_malformed_safetensors(tmp_path, package, content):
    saved(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(Exception, match="eader|JSON|UTF-8"):
        load(tmp_path)


def test_truncated_safetensors(tmp_path, package):
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(Exception, match="MetadataIncompleteBuffer|not fully covered"):
        load(tmp_path)


def write_shards(model, folder, suffix):
    """Two shards and their index, which are returned."""
    save = torch.save if suffix == ".bin" else save_safetensors
    write_json(folder / "config.json", vars(model.config))
    names = list(model.state_dict())
    if model.config.tie_embeddings:
        names.remove("lm_head.weight")
    stem = "pytorch_model" if suffix == ".bin" else "model"
    weight_map = {}
    for number, part in enumerate((names[:7], names[7:]), start=1):
        shard = f"{stem}-0000{number}-of-00002{suffix}"
        save({name: model.state_dict()[name].clone() for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    write_json(folder / f"{stem}{suffix}.index.json", index)
    return folder / f"{stem}{suffix}.index.json", index


@models
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_shards(tmp_path, config, suffix, tie_embeddings):
    model = make(**config, tie_embeddings=tie_embeddings)
    write_shards(model, tmp_path, suffix)
    loaded = load(tmp_path, use_safetensors=suffix == ".safetensors")
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_bad_shards(tmp_path):
    path, index = write_shards(make(), tmp_path, ".safetensors")
    first = next(iter(index["weight_map"]))
    outside = tmp_path.parent / "model-00001-of-00002.safetensors"
    save_safetensors({first: torch.zeros(1)}, outside)
    for content, kind, message in (
        ({first: f"../{outside.name}"}, ValueError, "files of this folder"),
        ({first: str(outside)}, ValueError, "files of this folder"),
        ({first: 3}, ValueError, "files of this folder"),
        ([first], ValueError, "files of this folder"),
        ({first: ".."}, FileNotFoundError, "no such file"),
        (dict.fromkeys(index["weight_map"], "model-3.safetensors"), FileNotFoundError, "model-3"),
        ({first: index["weight_map"][first]}, ValueError, "does not hold what is listed"),
        ({**index["weight_map"], "x": index["weight_map"][first]}, ValueError, r"listed: \['x'\]"),
    ):
        write_json(path, {"weight_map": content})
        with pytest.raises(kind, match=message):
            load(tmp_path)
    for content in ([], {}, 3):
        write_json(path, content)
        with pytest.raises(ValueError, match="weight_map"):
            load(tmp_path)


def test_a_key_twice(tmp_path):
    path, index = write_shards(make(), tmp_path, ".safetensors")
    first, shard = next(iter(index["weight_map"].items()))
    path.write_text(json.dumps(index).replace(f'"{first}"', f'"{first}": "{shard}", "{first}"', 1))
    with pytest.raises(ValueError, match="there twice"):
        load(tmp_path)


def shard_sizes(folder):
    return {
        path.name: sum(tensor.nbytes for tensor in load_safetensors(path).values())
        for path in sorted(folder.glob("*.safetensors"))
    }


@models
@pytest.mark.parametrize("size", [1, 5000, "5KB", "0.005 mb", 10**9, "1GB"])
def test_saving_shards(tmp_path, package, config, size):
    model = make(**config)
    expected = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert torch.equal(logits_of(load(tmp_path)), logits_of(model))
    sizes = shard_sizes(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    if size in (10**9, "1GB"):
        assert list(sizes) == ["model.safetensors"] and not path.exists()
        return
    index = json.loads(path.read_text())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert list(index["weight_map"]) == list(expected)
    assert list(sizes) == [
        f"model-{i:05}-of-{len(sizes):05}.safetensors" for i in range(1, len(sizes) + 1)
    ]
    held = [list(index["weight_map"].values()).count(name) for name in sizes]
    limit = 1 if size == 1 else 5000
    assert all(size <= limit or count == 1 for size, count in zip(sizes.values(), held))
    assert len(sizes) == len(expected) if limit == 1 else 1 < len(sizes) < len(expected)


def test_shards_are_as_the_hub_splits_them(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    model = make(n_layer=3)
    state_dict = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(tmp_path, max_shard_size=10_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    theirs = hub.split_torch_state_dict_into_shards(state_dict, max_shard_size=10_000)
    assert index["weight_map"] == theirs.tensor_to_filename
    assert index["metadata"] == theirs.metadata


def test_shards_replace_one_file_and_the_reverse(tmp_path):
    saved(tmp_path)
    for options in ({"max_shard_size": 5000}, {}, {"max_shard_size": 6000}):
        model = make()
        with torch.no_grad():
            model.lm_head.weight += len(options)
        model.save_pretrained(tmp_path, **options)
        assert torch.equal(logits_of(load(tmp_path)), logits_of(model))


@pytest.mark.parametrize("size", [0, -1, "5", "GB", "5 GiB", "infGB", [1]])
def test_sizes_that_are_none(tmp_path, size):
    with pytest.raises(ValueError, match='bytes or a text such as "5GB"'):
        make().save_pretrained(tmp_path / "folder", max_shard_size=size)
    assert not (tmp_path / "folder").exists()


def test_state_dict_of_a_checkpoint(tmp_path):
    model = saved(tmp_path, tie_embeddings=False)
    expected = model.state_dict()
    state_dict = load_state_dict_hf(str(tmp_path))
    assert state_dict.keys() == expected.keys()
    assert all(torch.equal(state_dict[name], expected[name]) for name in expected)
    half = load_state_dict_hf(tmp_path, device="cpu", dtype=torch.float16)
    assert all(torch.equal(half[name], expected[name].half()) for name in expected)
    assert load_state_dict_hf(tmp_path, device="meta")["lm_head.weight"].is_meta
    saved(tmp_path)
    fresh = make()
    fresh.load_state_dict(load_state_dict_hf(tmp_path))  # a tied matrix under one name
    assert torch.equal(logits_of(fresh), logits_of(load(tmp_path)))


# Pickles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_checkpoint_of_1x(tmp_path, options):
    """A pickle, and a config without the later keys."""
    model = make()
    write_pickle(model, tmp_path, **options)
    later = ("d_intermediate", "attn_layer_idx", "attn_cfg", "tie_embeddings")
    config = {name: value for name, value in vars(model.config).items() if name not in later}
    write_json(tmp_path / "config.json", config)
    loaded = load_pickle(str(tmp_path), device="cpu", dtype=torch.float32)
    assert torch.equal(logits_of(loaded), logits_of(model)) and loaded.config == model.config
    assert load_state_dict_hf(tmp_path, use_safetensors=False).keys() == model.state_dict().keys()


def test_which_file_is_read(tmp_path, monkeypatch):
    model = saved(tmp_path)
    other = make(residual_in_fp32=False)
    with torch.no_grad():
        other.lm_head.weight *= 2
    torch.save(other.state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.equal(logits_of(load_pickle(tmp_path)), logits_of(other))
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, pytest.fail)
    assert torch.equal(logits_of(load(tmp_path)), logits_of(model))


class Canary:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def opcodes(path):
    """Pickles by hand, of each opcode that imports or calls something."""
    text = str(path).encode()
    string = b"X" + struct.pack("<I", len(text)) + text
    short = b"\x8c" + bytes([len(text)]) + text
    return {
        "GLOBAL and REDUCE": b"\x80\x02cos\nmkdir\n" + string + b"\x85R.",
        "nested": b"\x80\x02}X\x01\x00\x00\x00a]cos\nmkdir\n" + string + b"\x85Ras.",
        "INST": b"(" + string + b"ios\nmkdir\n.",
        "OBJ": b"(cos\nmkdir\n" + string + b"o.",
        "NEWOBJ": b"\x80\x02cpathlib\nPath\n"
        + string
        + b"\x85\x81cos\nmkdir\n"
        + string
        + b"\x85R.",
        "NEWOBJ_EX": b"\x80\x04cos\nmkdir\n" + short + b"\x85}\x92.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + short + b"\x85R.",
        "BUILD": b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemscos\nmkdir\nsb"
        + b"cos\nmkdir\n"
        + string
        + b"\x85R0.",
        "dotted name": b"\x80\x04\x8c\x05torch\x8c\x10serialization.os\x93.",
        "eval": b"\x80\x02c__builtin__\neval\nX\x13\x00\x00\x00__import__('os')    \x85R.",
        "EXT": b"\x80\x02\x82\x01.",
        "PERSID": b"Pos.mkdir\n.",
        "SETITEM of a list": b"\x80\x02]X\x01\x00\x00\x00aK\x01s.",
    }


KINDS = list(opcodes("x"))
RUNNING = ("GLOBAL and REDUCE", "nested", "INST", "OBJ", "NEWOBJ", "STACK_GLOBAL", "BUILD")
CONTAINERS = ["bare", "zip", "zip out of its folder", "renamed", "shard", "behind a header"]


def archive_of(content, compression=zipfile.ZIP_STORED, more=()):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for name in more:
            archive.writestr(name, "more")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_hostile_pickle(tmp_path, kind, container):
    """No opcode of it gets to run anything."""
    canary, folder = tmp_path / "canary", tmp_path / "checkpoint"
    saved(folder)
    content = opcodes(canary)[kind]
    if kind in RUNNING:  # for who trusts it
        with contextlib.suppress(Exception):
            pickle.loads(content)
        canary.rmdir()
    (folder / "model.safetensors").unlink()
    if container.startswith("zip"):
        content = archive_of(content, more=["../../escaped"] if "out of" in container else [])
    elif container == "behind a header":  # of the former format
        header = [119547037146038801333356, 1001, {"little_endian": True}]
        content = b"".join(pickle.dumps(part, protocol=2) for part in header) + content
    name = {"renamed": "model.safetensors", "shard": "shard.bin"}.get(container)
    (folder / (name or "pytorch_model.bin")).write_bytes(content)
    if container == "shard":
        write_json(folder / "pytorch_model.bin.index.json", {"weight_map": {"a": "shard.bin"}})
    with pytest.raises(Exception) as error:
        load(folder, use_safetensors=container == "renamed")
    assert not isinstance(error.value, FileNotFoundError)
    assert not canary.exists() and not (tmp_path.parent / "escaped").exists()


OBJECTS = {
    "call": lambda path: {"a": Canary(os.mkdir, str(path))},
    "in a list": lambda path: {"a": [torch.zeros(1), Canary(os.mkdir, str(path))]},
    "as a key": lambda path: {Canary(os.mkdir, str(path)): torch.zeros(1)},
    "a whole module": lambda path: torch.nn.Linear(1, 1),
    "nested": lambda path: {"state_dict": {"a": torch.zeros(1)}},
    "a number": lambda path: {"a": 1.0},
    "a numbered tensor": lambda path: {1: torch.zeros(1)},
    "a list": lambda path: [torch.zeros(1)],
    "a tensor": lambda path: torch.zeros(1),
    "sparse": lambda path: {"a": torch.zeros(3, 3).to_sparse()},
    "without memory": lambda path: {"a": torch.zeros(3, device="meta")},
    "more than its memory": lambda path: {"a": torch.zeros(1).expand(2**20, 2**20)},
}


@pytest.mark.parametrize("kind", OBJECTS)
@pytest.mark.parametrize("zipped", [False, True])
def test_pickle_of_other_things(tmp_path, kind, zipped):
    canary = tmp_path / "canary"
    write_pickle(make(), tmp_path)
    thing = OBJECTS[kind](canary)
    torch.save(thing, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="pytorch_model.bin: (expected|holds|'a' has)"):
        load_pickle(tmp_path)
    assert not canary.exists()


def test_pickle_of_numpy_objects(tmp_path):
    numpy = pytest.importorskip("numpy")
    write_pickle(make(), tmp_path)
    array = numpy.array([Canary(os.mkdir, str(tmp_path / "canary"))], dtype=object)
    torch.save({"a": array}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds other things than tensors"):
        load_pickle(tmp_path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_script_archive(tmp_path):
    write_pickle(make(), tmp_path)
    script = torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1))
    torch.jit.save(script, tmp_path / "pytorch_model.bin")
    # It holds compressed paths of source files, which may be longer than the rest.
    with pytest.raises((RuntimeError, ValueError), match="TorchScript|a compressed archive"):
        load_pickle(tmp_path)


def test_archive_that_unpacks_to_more(tmp_path):
    write_pickle(make(), tmp_path)
    bomb = archive_of(b"\x80\x02]" + b"0" * (1 << 26), zipfile.ZIP_DEFLATED)
    (tmp_path / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(ValueError, match="compressed"):
        load_pickle(tmp_path)


def test_storage_of_another_size(tmp_path):
    model = make()
    write_pickle(model, tmp_path)
    path, shorter = tmp_path / "pytorch_model.bin", io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(shorter, "w") as copied:
        for member in archive.infolist():
            content = archive.read(member)
            copied.writestr(member, content[:8] if "/data/" in member.filename else content)
    path.write_bytes(shorter.getvalue())
    with pytest.raises((RuntimeError, ValueError)):
        load_pickle(tmp_path)


# The hub ----------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for huggingface_hub: its models by name, and the files it was asked for."""
    package = types.ModuleType("huggingface_hub")
    package.models, package.asked = {}, []

    def snapshot_download(repo_id, *, allow_patterns):
        package.asked.append((repo_id, tuple(allow_patterns)))
        return str(package.models[repo_id])

    package.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    return package


def test_hub(tmp_path, hub):
    hub.models = {"owner/model": tmp_path / "a", "model": tmp_path / "b"}
    model = saved(tmp_path / "a")
    assert torch.equal(logits_of(load("owner/model")), logits_of(model))
    assert load_config_hf("owner/model")["d_model"] == 16
    assert not any("pytorch_model" in pattern for _, asked in hub.asked for pattern in asked)
    (tmp_path / "b").mkdir()
    write_pickle(model, tmp_path / "b")
    hub.asked.clear()
    assert torch.equal(logits_of(load_pickle("model")), logits_of(model))
    assert [asked[0] for _, asked in hub.asked] == ["config.json", "pytorch_model.bin"]


def test_folders_are_not_looked_up(tmp_path, hub, monkeypatch):
    saved(tmp_path / "owner" / "model")
    monkeypatch.chdir(tmp_path)
    load("owner/model")
    for name in (str(tmp_path / "none"), tmp_path / "none", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            load(name)
    assert not hub.asked


def test_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"no such folder.* pip install mamba_ssm\[hub\]"):
        load("owner/model")


# Writing ----------------------------------------------------------------------------------------


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


FAILURES = {
    "while writing weights": (mixer_seq_simple, "save_safetensors"),
    "at the end of weights": (os, "fsync"),
    "before the first rename": (os, "replace"),
}


@pytest.mark.parametrize("where", FAILURES)
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_failure_leaves_the_former_checkpoint(tmp_path, monkeypatch, where, kind):
    saved(tmp_path)
    before = content_of(tmp_path)

    def fail(*_):
        raise kind(errno.ENOSPC)

    monkeypatch.setattr(*FAILURES[where], fail)
    with pytest.raises(kind):
        make(d_model=24).save_pretrained(tmp_path)
    assert content_of(tmp_path) == before


def test_full_disk(tmp_path, package):
    """Here: a file that may not grow as long as it has to."""
    saved(tmp_path)
    before = content_of(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = make(d_model=64)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(Exception, match=r"[Ff]ile too large"):
            model.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content_of(tmp_path) == before
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load(tmp_path)), logits_of(model))


def test_saving_again_replaces(tmp_path):
    """Also files that are links, which stay what they were."""
    first = saved(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "b" / name).symlink_to(tmp_path / "a" / name)
    second = saved(tmp_path / "b", d_model=24)
    assert torch.equal(logits_of(load(tmp_path / "a")), logits_of(first))
    assert torch.equal(logits_of(load(tmp_path / "b")), logits_of(second))


def test_modes_of_files(tmp_path):
    saved(tmp_path)
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_what_cannot_be_written(tmp_path):
    for options in ({"dt_min": object()}, {"dt_min": float("nan")}):
        model = make()
        model.config.ssm_cfg = options
        with pytest.raises((TypeError, ValueError)):
            model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_weights_that_are_not_tied_any_more(tmp_path):
    model = make()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path)  # equal as yet
    before = content_of(tmp_path)
    with torch.no_grad():
        model.lm_head.weight += 1
    with pytest.raises(ValueError, match="tie_weights"):
        model.save_pretrained(tmp_path)
    assert content_of(tmp_path) == before
    model.config.tie_embeddings = False
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load(tmp_path)), logits_of(model))
