"""Malformed files of weights: each is refused with a ValueError that names the file, by the package
safetensors and by our own reader, and leaves the module that was to be filled as it was."""

import json
import struct
import sys

import pytest
import torch
from harness.registration import import_bindings

from mamba_ssm import Mamba2, MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils._safetensors import save_safetensors
from mamba_ssm.utils.hf import load_state_dict_hf


def tensor(dtype="F32", shape=(2, 2), begin=0, end=16, **changes):
    """What a header says of a tensor; a change to None leaves that out."""
    info = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **changes}
    return {key: value for key, value in info.items() if value is not None}


def file_of(header, data=b"\0" * 16, length=None):
    """A file: the length of the header, the header, data."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def one(**changes):
    return file_of({"a": tensor(**changes)})


GOOD = one()
FILES = {
    "empty": b"",
    **{f"{n} bytes": GOOD[:n] for n in (1, 7, 8)},
    "header of 0 bytes": file_of(b"", length=0),
    "header of 1 byte": file_of(b"{", length=1),
    "header behind the end": file_of(b"{}", length=1000),
    "header above the limit": file_of(b"{}", length=100_000_001),
    "header of 2^63": file_of(b"{}", length=2**63),
    "header of 2^64 - 1": file_of(b"{}", length=2**64 - 1),
    "length that overflows": file_of(b"{}", length=2**64 - 8),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "a list": file_of([]),
    "text": file_of('"a"'),
    "blank ahead": file_of(' {"a": 1}'),
    "cut off": file_of('{"a": {"dtype": "F32"'),
    "deep": file_of('{"a":' + "[" * 10_000),
    "more behind it": file_of(json.dumps({"a": tensor()}) + "}"),
    "number": file_of({"a": 3}),
    "no dtype": one(dtype=None),
    "unknown dtype": one(dtype="F31"),
    "dtype in small letters": one(dtype="f32"),
    "dtype of a number": one(dtype=32),
    "dtype of 6 bits": one(dtype="F6_E2M3", shape=(4, 4), end=12),
    "half a byte": one(dtype="F4", shape=(3,), end=2),
    "no shape": file_of({"a": tensor(shape=()) | {"shape": None}}),
    "shape of a number": file_of({"a": tensor() | {"shape": 4}}),
    "negative size": one(shape=(-2, -2)),
    "size of a fraction": one(shape=(2.5, 2)),
    "size of text": one(shape=("2", 2)),
    "size above 64 bits": one(shape=(2**64, 1)),
    "product that wraps to 4": one(shape=(4194305, 4194305, 211106198978564)),
    "more than there is": one(shape=(4, 4)),
    "less than there is": one(shape=(1, 2)),
    "no offsets": one(data_offsets=None),
    "one offset": one(data_offsets=[0]),
    "three offsets": one(data_offsets=[0, 8, 16]),
    "offsets reversed": one(data_offsets=[16, 0]),
    "negative offset": one(data_offsets=[-16, 0]),
    "offset of a fraction": one(data_offsets=[0, 16.5]),
    "offset above 64 bits": one(data_offsets=[0, 2**64 + 16]),
    "behind the end": file_of({"a": tensor(begin=16, end=32)}),
    "overlap": file_of({"a": tensor(), "b": tensor(begin=8, end=24)}, b"\0" * 24),
    "same memory": file_of({"a": tensor(), "b": tensor()}),
    "gap": file_of({"a": tensor(), "b": tensor(begin=20, end=36)}, b"\0" * 36),
    "gap at the start": file_of({"a": tensor(begin=4, end=20)}, b"\0" * 20),
    "data left over": file_of({"a": tensor()}, b"\0" * 17),
    "data missing": file_of({"a": tensor()}, b"\0" * 15),
    "empty tensor with memory": one(shape=(0, 4)),
    "metadata of a number": file_of({"__metadata__": 3, "a": tensor()}),
    "metadata of numbers": file_of({"__metadata__": {"x": 3}, "a": tensor()}),
    "a zip archive": b"PK\x03\x04" * 8,
    "a pickle": b"\x80\x02}q\x00." * 4,
}


@pytest.fixture(params=["safetensors", "_C"])
def package(request, monkeypatch):
    """Which library reads."""
    if request.param == "safetensors":
        pytest.importorskip("safetensors")
    else:
        import_bindings()
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    return request.param


def test_good_file(tmp_path, package):
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    assert load_state_dict_hf(tmp_path)["a"].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("content", FILES.values(), ids=FILES.keys())
def test_malformed_file(tmp_path, package, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_state_dict_hf(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and len(message) > len(f"{path}: ") + 10
    assert len(message) < len(str(path)) + 1000


@pytest.mark.parametrize("shape", [(4194305, 4194305, 211106198978564), (2**40,)])
def test_declared_size_is_not_asked_for(tmp_path, package, shape):
    """A small file that claims much is refused before there is memory for it."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(one(shape=shape, end=2**42))
    with pytest.raises(ValueError, match="model.safetensors: "):
        load_state_dict_hf(tmp_path)


def test_malformed_shard_is_named(tmp_path, package):
    (tmp_path / "model-1.safetensors").write_bytes(GOOD)
    (tmp_path / "model-2.safetensors").write_bytes(GOOD[:-3])
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model-2.safetensors: "):
        load_state_dict_hf(tmp_path)


MODELS = {
    "MambaLMHeadModel": lambda: MambaLMHeadModel(
        MambaConfig(d_model=8, n_layer=1, vocab_size=9, ssm_cfg={"d_state": 4})
    ),
    "Mamba2": lambda: Mamba2(8, headdim=4),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("content", ["data missing", "behind the end", "unknown dtype"])
def test_models_name_the_file(tmp_path, package, kind, content):
    model = MODELS[kind]()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(FILES[content])
    with pytest.raises(ValueError, match="model.safetensors: "):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_leave_no_model(tmp_path, package, kind, fault):
    """from_pretrained returns a whole model or none."""
    model = MODELS[kind]()
    model.save_pretrained(tmp_path)
    state_dict = load_state_dict_hf(tmp_path)
    name = sorted(state_dict)[-1]
    if fault == "missing":
        del state_dict[name]
    elif fault == "unexpected":
        state_dict["x"] = torch.zeros(1)
    else:
        state_dict[name] = torch.zeros(3, 5)
    save_safetensors(state_dict, tmp_path / "model.safetensors")
    message = {"missing": "Missing key", "unexpected": "Unexpected key", "shape": "size mismatch"}
    with pytest.raises(RuntimeError, match=message[fault]):
        type(model).from_pretrained(tmp_path)
