"""Folders and repositories of the Hugging Face Hub with a module in them.

Programs expect modules that are a huggingface_hub.PyTorchModelHubMixin. That package is optional
here, and importing it takes longer than importing this one, so HubMixin has the mixin's three
methods and file format and imports the package only to reach the Hub.
"""

import inspect
import json
import os
import shutil
import tempfile
from pathlib import Path

from mamba_ssm.utils._safetensors import load_safetensors, save_safetensors
from mamba_ssm.utils.hf import _MAX_CONFIG_SIZE, _read_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def _huggingface_hub(purpose):
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(
            f"{purpose} needs the package huggingface_hub: pip install huggingface_hub"
        ) from None
    return huggingface_hub


def _jsonable(arguments):
    """The arguments that JSON can hold: not a dtype, for example."""
    kept = {}
    for name, value in arguments.items():
        try:
            json.dumps(value)
        except TypeError:
            continue
        kept[name] = value
    return kept


class HubMixin:
    """Gives an nn.Module save_pretrained, from_pretrained and push_to_hub."""

    def __new__(cls, *args, **kwargs):
        module = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(module, *args, **kwargs)
        except TypeError:  # a copy, made without arguments; else __init__ raises
            return module
        bound.apply_defaults()
        _, *arguments = bound.arguments.items()
        module._hub_config = _jsonable(dict(arguments))
        return module

    def save_pretrained(
        self, save_directory, *, config=None, repo_id=None, push_to_hub=False, **push_to_hub_kwargs
    ):
        """Writes config.json, the arguments of the constructor or `config`, and model.safetensors.

        Both are complete on the disk before the first of them takes the place of a former one.
        push_to_hub: also uploads both, as push_to_hub does, to repo_id, by default the name of the
        folder; returns its address.
        """
        folder = Path(save_directory)
        config = self._hub_config if config is None else config
        text = json.dumps(config, indent=2, sort_keys=True)  # with Infinity, as the mixin has it
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
            paths = [Path(temporary, WEIGHTS), Path(temporary, CONFIG)]
            save_safetensors(tensors, paths[0])
            paths[1].write_text(text + "\n", encoding="utf-8")
            shutil.copymode(paths[1], paths[0])  # safetensors makes files for their owner only
            for path in paths:
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
            for path in paths:
                os.replace(path, folder / path.name)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, config=config, **push_to_hub_kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *,
        force_download=False,
        token=None,
        cache_dir=None,
        local_files_only=False,
        revision=None,
        map_location="cpu",
        strict=True,
        **model_kwargs,
    ):
        """Module from a folder that save_pretrained wrote, or from such a repository on the Hub.

        model_kwargs go to the constructor, before the arguments in config.json. map_location:
        device that the module is moved to, unless "cpu". strict=False: names may be missing. The
        others are those of huggingface_hub.snapshot_download. Loading runs no code from the folder.

        Raises FileNotFoundError without weights, ValueError for a config that describes no module
        and for malformed files, RuntimeError that lists the weights that do not fit, all before
        memory for the module is asked for.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            hub = _huggingface_hub(
                f"{cls.__name__}.from_pretrained: {folder} is no folder, and the Hub"
            )
            folder = Path(
                hub.snapshot_download(
                    str(pretrained_model_name_or_path),
                    force_download=force_download,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    revision=revision,
                    allow_patterns=[CONFIG, WEIGHTS],
                )
            )
        if not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(
                f"{cls.__name__}.from_pretrained: {folder / WEIGHTS} does not exist; expected a "
                f"folder with {CONFIG} and {WEIGHTS}, as save_pretrained writes it"
            )
        known = inspect.signature(cls.__init__).parameters
        if (folder / CONFIG).is_file():
            config = _read_json(folder / CONFIG, _MAX_CONFIG_SIZE)
            if not isinstance(config, dict):
                raise ValueError(f"{folder / CONFIG}: expected a JSON object")
            saved = {name: value for name, value in config.items() if name in known}
            model_kwargs = {**saved, **model_kwargs}
        state_dict = load_safetensors(folder / WEIGHTS)
        if "device" in known:  # compare names and shapes where a module takes no memory
            try:
                description = cls(**{**model_kwargs, "device": "meta"})
            except Exception as error:
                raise ValueError(
                    f"{cls.__name__}.from_pretrained: {folder / CONFIG}: no such module can be "
                    f"made: {error}"
                ) from error
            description.load_state_dict(state_dict, strict=strict, assign=True)
        module = cls(**model_kwargs)
        module.load_state_dict(state_dict, strict=strict)
        return module if map_location == "cpu" else module.to(map_location)

    def push_to_hub(
        self,
        repo_id,
        *,
        config=None,
        commit_message="Push model using huggingface_hub.",
        private=None,
        token=None,
        branch=None,
        **upload_kwargs,
    ):
        """Uploads what save_pretrained writes to a repository, made if there is none.

        It gets no model card. upload_kwargs are those of huggingface_hub.HfApi.upload_folder:
        create_pr, allow_patterns, ignore_patterns, delete_patterns. Returns the address of the
        commit. Raises ImportError without huggingface_hub.
        """
        api = _huggingface_hub(f"{type(self).__name__}.push_to_hub").HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, config=config)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=branch,
                **upload_kwargs,
            )
