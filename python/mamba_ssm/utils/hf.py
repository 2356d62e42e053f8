"""Checkpoints in local folders and on the Hugging Face hub.

A checkpoint is config.json and weights: model.safetensors, or shards that
model.safetensors.index.json lists, or, if asked for, pytorch_model.bin (a pickle). Reading one runs
no code of it.
"""

import json
import math
import pickle
import zipfile
from pathlib import Path

import torch

from mamba_ssm.utils._safetensors import load_safetensors

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
_PICKLE = "pytorch_model.bin"
_MAX_CONFIG_SIZE = 1 << 20  # bytes
_MAX_INDEX_SIZE = 100_000_000
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def load_config_hf(model_name):
    """The contents of config.json as a dict, unchecked.

    model_name: a folder, or a model of the hub, which huggingface_hub downloads (extra "hub").
    Raises FileNotFoundError, or ValueError for what is not JSON.
    """
    folder = checkpoint_folder(model_name, [CONFIG])
    return _read_json(_existing(folder, CONFIG), _MAX_CONFIG_SIZE)


def load_state_dict_hf(model_name, device=None, dtype=None, *, use_safetensors=True):
    """The weights of a checkpoint, by name.

    Arguments:
        model_name: see load_config_hf.
        device, dtype: where the tensors go, and what floating ones are converted to; None: the CPU,
            and no conversion.
        use_safetensors: False takes a pickle, read by torch.load(weights_only=True), which makes
            tensors and runs no code; True takes safetensors only.

    Raises FileNotFoundError for missing files, and ValueError, or what safetensors and torch.load
    raise, for malformed ones.
    """
    if not use_safetensors:
        folder = checkpoint_folder(model_name, [_PICKLE, index_of(_PICKLE), "pytorch_model-*.bin"])
        state_dict = _read_weights(folder, _PICKLE, _read_pickle)
        if state_dict is None:
            raise FileNotFoundError(f"{folder}: no {_PICKLE}, and no index of shards of it")
    else:
        folder = checkpoint_folder(
            model_name, [SAFETENSORS, index_of(SAFETENSORS), "model-*.safetensors"]
        )
        state_dict = _read_weights(folder, SAFETENSORS, load_safetensors)
        if state_dict is None:
            raise FileNotFoundError(
                f"{folder}: no {SAFETENSORS}, and no index of shards of it; a {_PICKLE}, which is a "
                "pickle, is read with use_safetensors=False"
            )
    for name, tensor in state_dict.items():
        kind = dtype if tensor.is_floating_point() else None
        state_dict[name] = tensor.to(device=device, dtype=kind)
    return state_dict


def checkpoint_folder(model_name, patterns):
    """A local folder with the files of a checkpoint that match the patterns, as far as it has any.

    model_name: see load_config_hf. Raises FileNotFoundError if there is none.
    """
    folder = Path(model_name)
    if folder.is_dir():
        return folder
    if isinstance(model_name, Path) or folder.is_absolute() or model_name.count("/") > 1:
        raise FileNotFoundError(f"{folder}: no such folder")
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError(
            f"{model_name}: no such folder, and to look on the Hugging Face hub needs "
            "huggingface_hub: pip install mamba_ssm[hub]"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(model_name, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # all that the package raises
        raise FileNotFoundError(
            f"{model_name}: no such folder, and not from the Hugging Face hub: {error}"
        ) from error


def split_into_shards(state_dict, max_shard_size=None):
    """The tensors of each file of a checkpoint, by file name, and the contents of the index of the
    files, None for a single one; see MambaLMHeadModel.save_pretrained for max_shard_size."""
    limit = _bytes(max_shard_size)
    shards, size = [{}], 0
    for name, tensor in state_dict.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return {SAFETENSORS: state_dict}, None
    files = {f"model-{i:05}-of-{len(shards):05}.safetensors": t for i, t in enumerate(shards, 1)}
    return files, {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in state_dict.values())},
        "weight_map": {name: file for file, tensors in files.items() for name in tensors},
    }


def _bytes(size):
    """A size as split_into_shards takes it, in bytes."""
    if size is None:
        return math.inf
    number, unit = size, 1
    if isinstance(size, str):
        number, unit = size.strip()[:-2], _UNITS.get(size.strip()[-2:].upper())
    try:
        count = float(number) * unit
    except (TypeError, ValueError):
        count = math.nan
    if not 1 <= count < math.inf:
        raise ValueError(f'max_shard_size must be bytes or a text such as "5GB", got {size!r}')
    return count


def index_of(name):
    """The file that lists the shards of a file `name`."""
    return f"{name}.index.json"


def _existing(folder, name):
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def _read_json(path, max_size):
    if path.stat().st_size > max_size:
        raise ValueError(f"{path}: more than {max_size} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8
        raise ValueError(f"{path}: not valid JSON: {error}") from error


def _distinct(members):
    """The dict of a JSON object that has no key twice."""
    result = {}
    for key, value in members:
        if key in result:
            raise ValueError(f"the key {ascii(key)[:80]} is there twice")
        result[key] = value
    return result


def _read_weights(folder, name, read):
    """The tensors of the file `name`, or of its shards; None if there are neither."""
    if (folder / name).is_file():
        return read(folder / name)
    if not (folder / index_of(name)).is_file():
        return None
    path = folder / index_of(name)
    index = _read_json(path, _MAX_INDEX_SIZE)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()
    ):
        raise ValueError(f"{path}: weight_map must map tensor names to files of this folder")
    state_dict = {}
    for shard in sorted(set(weight_map.values())):
        tensors = read(_existing(folder, shard))
        expected = {tensor for tensor, place in weight_map.items() if place == shard}
        if tensors.keys() != expected:
            difference = sorted(tensors.keys() ^ expected)
            raise ValueError(f"{path}: {shard} does not hold what is listed: {difference[:5]}")
        state_dict.update(tensors)
    return state_dict


def _read_pickle(path):
    """The tensors of a pickle, without running what else it asks for."""
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_zip:  # torch writes it uncompressed: nothing in it is larger than the file
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                raise ValueError(f"{path}: a compressed archive")
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: holds other things than tensors, and is not loaded") from error
    if not isinstance(state_dict, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(state_dict).__name__}")
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: expected tensors by name, got {ascii(name)[:80]}")
        dense = tensor.layout == torch.strided and not tensor.is_meta
        if not dense or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {ascii(name)[:80]} has no dense memory")
    return dict(state_dict)
