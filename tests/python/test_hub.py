"""Mamba2 in folders and repositories of the Hugging Face Hub, with and without its package."""

import copy
import errno
import json
import os
import pickle
import resource
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from mamba_ssm import Mamba2
from mamba_ssm.modules import _hub

OPTIONS = {"headdim": 4, "d_state": 5, "dt_limit": (0.01, float("inf"))}


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


def assert_same(got, expected):
    assert type(got) is type(expected)
    assert tuple(got.dt_limit) == tuple(expected.dt_limit) and got.headdim == expected.headdim
    got, expected = got.state_dict(), expected.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_round_trip(tmp_path, no_hub):
    block = Mamba2(8, **OPTIONS, dtype=torch.float64)
    assert block.save_pretrained(tmp_path / "a" / "b") is None
    folder = tmp_path / "a" / "b"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(Mamba2.from_pretrained(str(folder), dtype=torch.float64), block)
    single = Mamba2.from_pretrained(folder)
    assert single.in_proj.weight.dtype == torch.float32
    assert torch.equal(single.in_proj.weight, block.in_proj.weight.float())
    assert Mamba2.from_pretrained(folder, layer_idx=3).layer_idx == 3
    assert Mamba2.from_pretrained(folder, map_location="meta").D.is_meta


def test_config_names_every_argument(tmp_path):
    Mamba2(8, headdim=4, dtype=torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["d_model"] == 8 and config["headdim"] == 4 and config["d_state"] == 128
    assert "dtype" not in config and "self" not in config
    Mamba2(8, headdim=4).save_pretrained(tmp_path, config={"d_model": 8, "headdim": 4, "tag": 1})
    assert Mamba2.from_pretrained(tmp_path).d_model == 8
    (tmp_path / "config.json").unlink()
    assert Mamba2.from_pretrained(tmp_path, d_model=8, headdim=4).d_model == 8


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda block: pickle.loads(pickle.dumps(block))]
)
def test_copies_can_be_saved(tmp_path, duplicate):
    block = Mamba2(8, **OPTIONS)
    duplicate(block).save_pretrained(tmp_path)
    assert_same(Mamba2.from_pretrained(tmp_path), block)


def test_missing_names(tmp_path):
    block = Mamba2(8, **OPTIONS)
    block.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="Missing key.*in_proj.bias"):
        Mamba2.from_pretrained(tmp_path, bias=True)
    assert Mamba2.from_pretrained(tmp_path, bias=True, strict=False).in_proj.bias is not None
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors does not exist"):
        Mamba2.from_pretrained(tmp_path)


HOSTILE_CONFIGS = {
    "no JSON": ("{'d_model': 8}", "not valid JSON"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "large": (" " * (1 << 20) + "{}", "more than 1048576 bytes"),
    "a list": ("[8]", "expected a JSON object"),
    "nothing": ("{}", "no such module can be made: .*'d_model'"),
    "negative": ({"d_model": -8}, "no such module can be made"),
    "text": ({"d_model": "8"}, "no such module can be made"),
    "zero": ({"headdim": 0}, "no such module can be made"),
    "fraction": ({"d_state": 5.5}, "no such module can be made"),
    "not a number": ('{"d_model": 8, "headdim": 4, "expand": NaN}', "no such module can be made"),
    "infinite": ({"expand": float("inf")}, "no such module can be made"),
    "group": ({"process_group": 1}, "no such module can be made"),
    "huge product": ({"d_model": 2**62}, "no such module can be made"),
    "huge": ({"d_model": 2**24}, "size mismatch for in_proj.weight"),
    "huge states": ({"d_state": 2**30}, "size mismatch for in_proj.weight"),
}


@pytest.mark.parametrize("content, message", HOSTILE_CONFIGS.values(), ids=HOSTILE_CONFIGS.keys())
def test_hostile_config(tmp_path, content, message):
    """Is refused with a sentence, and before memory is asked for."""
    Mamba2(8, headdim=4).save_pretrained(tmp_path)
    if isinstance(content, dict):
        content = json.dumps({"d_model": 8, "headdim": 4, **content})
    (tmp_path / "config.json").write_text(content)
    with pytest.raises((ValueError, RuntimeError), match=message):
        Mamba2.from_pretrained(tmp_path)


FAILURES = {"weights": (_hub, "save_safetensors"), "disk": (os, "fsync"), "name": (os, "replace")}


@pytest.mark.parametrize("where", FAILURES)
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_failure_leaves_the_former_files(tmp_path, monkeypatch, where, kind):
    block = Mamba2(8, headdim=4)
    block.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_):
        raise kind(errno.ENOSPC)

    with monkeypatch.context() as patch:
        patch.setattr(*FAILURES[where], fail)
        with pytest.raises(kind):
            Mamba2(8, headdim=8).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert_same(Mamba2.from_pretrained(tmp_path), block)


def test_full_disk(tmp_path, no_hub):
    """Here: a file that may not grow as long as it has to."""
    block = Mamba2(8, headdim=4)
    block.save_pretrained(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(Exception, match=r"[Ff]ile too large"):
            Mamba2(64, headdim=8).save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(Mamba2.from_pretrained(tmp_path), block)


def test_without_the_package(tmp_path, no_hub):
    with pytest.raises(ImportError, match=r"push_to_hub needs .*pip install huggingface_hub"):
        Mamba2(8, headdim=4).push_to_hub("owner/name")
    with pytest.raises(
        ImportError, match=r"owner/name is no folder, .*pip install huggingface_hub"
    ):
        Mamba2.from_pretrained("owner/name")


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="'width'"):
        Mamba2(8, width=3)
    with pytest.raises(TypeError, match="'d_model'"):
        Mamba2()


def test_hub(tmp_path, monkeypatch):
    """Against a stand-in that keeps repositories as folders."""
    hub = ModuleType("huggingface_hub")
    calls = []

    class HfApi:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, *, private, exist_ok):
            assert exist_ok
            calls.append(("private", private))
            return SimpleNamespace(repo_id=f"owner/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, commit_message, revision, **kwargs):
            calls.append((commit_message, revision, kwargs))
            Path(folder_path).rename(tmp_path / repo_id.replace("/", "-"))
            Path(folder_path).mkdir()
            return f"https://hub/{repo_id}"

    def snapshot_download(repo_id, *, revision, allow_patterns, **kwargs):
        calls.append((revision, allow_patterns))
        return str(tmp_path / repo_id.replace("/", "-"))

    hub.HfApi, hub.snapshot_download = HfApi, snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    block = Mamba2(8, **OPTIONS)
    url = block.push_to_hub("a", private=True, token="t", branch="b", create_pr=True)
    assert url == "https://hub/owner/a"
    assert calls[:2] == [("token", "t"), ("private", True)]
    assert calls[2][1:] == ("b", {"create_pr": True})
    assert_same(Mamba2.from_pretrained("owner/a", revision="b"), block)
    assert calls[3] == ("b", ["config.json", "model.safetensors"])
    url = block.save_pretrained(tmp_path / "c", push_to_hub=True, commit_message="second")
    assert url == "https://hub/owner/c" and calls[-1] == ("second", None, {})
    assert_same(Mamba2.from_pretrained(tmp_path / "owner-c"), block)


def test_exchange_with_the_package(tmp_path):
    hub = pytest.importorskip("huggingface_hub")

    class Peer(hub.PyTorchModelHubMixin, Mamba2):
        pass

    block = Peer(8, **OPTIONS)
    block.save_pretrained(tmp_path / "theirs")
    ours = Mamba2.from_pretrained(tmp_path / "theirs")
    assert type(ours) is Mamba2 and tuple(ours.dt_limit) == OPTIONS["dt_limit"]
    assert torch.equal(ours.in_proj.weight, block.in_proj.weight)
    ours.save_pretrained(tmp_path / "ours")
    assert_same(Peer.from_pretrained(tmp_path / "ours"), block)
