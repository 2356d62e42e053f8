"""Converts a checkpoint: from a pickle, from the layout of transformers, or into it."""

import inspect
import json
import math
import sys
from pathlib import Path

import torch

from mamba_ssm import MambaLMHeadModel
from mamba_ssm._command import ArgumentError
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import EMBEDDING, HEAD, MIXERS
from mamba_ssm.text import TOKENIZER, TOKENIZER_FILES, copy_tokenizer
from mamba_ssm.utils._safetensors import save_safetensors
from mamba_ssm.utils.hf import checkpoint_folder, load_config_hf, load_state_dict_hf

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}

# transformers' names of what a model is made of, and what a config.json without them means.
MODEL_TYPES = {"mamba": "Mamba1", "mamba2": "Mamba2"}
ARCHITECTURES = {"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}
TIED_BY_DEFAULT = {"mamba": True, "mamba2": False}
SIZES = {"d_model": "hidden_size", "n_layer": "num_hidden_layers", "vocab_size": "vocab_size"}
THEIR_EMBEDDING = "backbone.embeddings.weight"
_COMMON = {
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "bias": ("use_bias", False),
    "conv_bias": ("use_conv_bias", True),
}
OPTIONS = {
    "Mamba1": _COMMON | {"d_state": ("state_size", 16), "dt_rank": ("time_step_rank", "auto")},
    "Mamba2": _COMMON
    | {
        "d_state": ("state_size", 128),
        "headdim": ("head_dim", 64),
        "ngroups": ("n_groups", 8),
        "chunk_size": ("chunk_size", 256),
        "dt_limit": ("time_step_limit", (0.0, math.inf)),
    },
}
# Options of our blocks that a trained model does not depend on.
IRRELEVANT = {
    "dt_min",
    "dt_max",
    "dt_init",
    "dt_scale",
    "dt_init_floor",
    "A_init_range",
    "conv_init",
}
IRRELEVANT |= {"use_fast_path", "use_mem_eff_path"}

EPILOG = """\
examples:
  mamba-ssm convert state-spaces/mamba2-130m model --tokenizer EleutherAI/gpt-neox-20b
  mamba-ssm convert folder-with-pytorch-model-bin model --dtype bfloat16
  mamba-ssm convert folder-of-transformers model
  mamba-ssm convert model folder-for-transformers --to transformers

Reads model.safetensors, or shards of it, or else pytorch_model.bin, which runs no code, with
torch.load(weights_only=True). Writes config.json, model.safetensors and the files of the tokenizer.
"""


def add_arguments(parser):
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder, or a model of the Hugging Face hub")
    add("out", type=Path, metavar="FOLDER", help="a new or empty folder for the result")
    add(
        "--to",
        choices=("mamba_ssm", "transformers"),
        default="mamba_ssm",
        help="layout of the result (default: mamba_ssm)",
    )
    add("--dtype", choices=DTYPES, help="of the weights (default: as they are)")
    add("--tokenizer", metavar="NAME", help="folder or model whose tokenizer is copied instead")


def run(args):
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ArgumentError(f"{args.out} exists and is not an empty folder")
    model, layout = read(args.model, args.dtype and DTYPES[args.dtype])
    source = checkpoint_folder(args.tokenizer or args.model, TOKENIZER_FILES)
    if args.tokenizer and not (source / TOKENIZER).is_file():
        raise ArgumentError(f"{args.tokenizer}: no {TOKENIZER}")
    if args.to == "transformers":
        write_transformers(model, args.out)
    else:
        model.save_pretrained(args.out)
    copy_tokenizer(source, args.out)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.model} ({layout}) -> {args.out} ({args.to}): {parameters:,} parameters")
    if (model.config.ssm_cfg or {}).get("ngroups", 1) > 1 and "transformers" in (layout, args.to):
        print(
            "note: with several groups, transformers normalizes all channels together outside "
            "training, mamba_ssm by group as in training: results differ",
            file=sys.stderr,
        )
    return 0


def read(name, dtype=None):
    """The model of a checkpoint in any layout, and the name of its layout.

    dtype: of the floating weights; None: as they are. Raises what reading raises, and ValueError
    for a model of transformers that MambaLMHeadModel cannot be.
    """
    values = load_config_hf(name)
    try:
        state_dict = load_state_dict_hf(name, dtype=dtype)
    except FileNotFoundError:
        try:
            state_dict = load_state_dict_hf(name, dtype=dtype, use_safetensors=False)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{name}: no model.safetensors, no pytorch_model.bin"
            ) from error
    layout = "mamba_ssm"
    try:
        if isinstance(values, dict) and "model_type" in values:
            layout = "transformers"
            values = from_transformers(values)
            if THEIR_EMBEDDING in state_dict:
                state_dict[EMBEDDING] = state_dict.pop(THEIR_EMBEDDING)
        config = MambaConfig.from_dict(values)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{name}: config.json: {reason}") from error
    return MambaLMHeadModel.from_state_dict(config, state_dict, name), layout


def from_transformers(values):
    """The contents of our config.json for those of transformers'.

    Raises KeyError for missing sizes and ValueError for what our model cannot be.
    """
    kind = values["model_type"]
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type {kind!r} is not one of {', '.join(MODEL_TYPES)}")
    for key, only in (("hidden_act", "silu"), ("layer_norm_epsilon", 1e-5)):
        if values.get(key, only) != only:
            raise ValueError(f"{key} must be {only}, got {values[key]!r}")
    layer = MODEL_TYPES[kind]
    ssm_cfg = {"layer": layer}
    for ours, (theirs, default) in OPTIONS[layer].items():
        ssm_cfg[ours] = values.get(theirs, default)
    if "dt_limit" in ssm_cfg:
        ssm_cfg["dt_limit"] = [_from_json(end) for end in ssm_cfg["dt_limit"]]
    if layer == "Mamba2" and "num_heads" in values:
        channels, expanded = values["num_heads"] * ssm_cfg["headdim"], ssm_cfg["expand"]
        if channels != expanded * values["hidden_size"]:
            raise ValueError(f"num_heads * head_dim = {channels} is not expand * hidden_size")
    return {
        **{ours: values[theirs] for ours, theirs in SIZES.items()},
        "ssm_cfg": ssm_cfg,
        "residual_in_fp32": values.get("residual_in_fp32", True),
        "tie_embeddings": values.get("tie_word_embeddings", TIED_BY_DEFAULT[kind]),
        "pad_vocab_size_multiple": 1,
    }


def to_transformers(config, dtype):
    """The contents of transformers' config.json for a MambaConfig and the dtype of the weights.

    Raises ValueError for what its models cannot be.
    """
    if config.attn_layer_idx or config.d_intermediate or not config.rms_norm:
        raise ValueError("attention, an MLP or LayerNorm: transformers' models have none")
    ssm_cfg = dict(config.ssm_cfg or {})
    layer = ssm_cfg.pop("layer", "Mamba1")
    kind = {ours: theirs for theirs, ours in MODEL_TYPES.items()}[layer]
    defaults = {n: p.default for n, p in inspect.signature(MIXERS[layer]).parameters.items()}
    for name, value in ssm_cfg.items():
        known = name in OPTIONS[layer] or name in IRRELEVANT
        if not known and value != defaults[name]:
            raise ValueError(
                f"ssm_cfg: {name} = {value!r}: transformers' models have no such option"
            )
    options = {name: ssm_cfg.get(name, defaults[name]) for name in OPTIONS[layer]}
    if "dt_limit" in options:
        low, high = options["dt_limit"]
        options["dt_limit"] = [_to_json(low), _to_json(math.inf if high is None else high)]
    multiple = config.pad_vocab_size_multiple
    values = {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind]],
        "dtype": str(dtype).removeprefix("torch."),
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        **{OPTIONS[layer][name][0]: value for name, value in options.items()},
        "residual_in_fp32": config.residual_in_fp32,
        "tie_word_embeddings": config.tie_embeddings,
    }
    values["vocab_size"] = -(-config.vocab_size // multiple) * multiple
    if layer == "Mamba2":
        values["num_heads"] = int(options["expand"] * config.d_model) // options["headdim"]
    return values


def write_transformers(model, folder):
    """Writes a model in the layout of transformers into a folder."""
    weight = model.backbone.embedding.weight
    text = json.dumps(to_transformers(model.config, weight.dtype), indent=2) + "\n"
    state_dict = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    state_dict[THEIR_EMBEDDING] = state_dict.pop(EMBEDDING)
    if model.config.tie_embeddings:
        del state_dict[HEAD]
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(state_dict, folder / "model.safetensors")
    (folder / "config.json").write_text(text, encoding="utf-8")


# transformers writes an infinity, which JSON has not, as {"__float__": "Infinity"}.


def _from_json(number):
    return float(number["__float__"]) if isinstance(number, dict) else number


def _to_json(number):
    return {"__float__": "Infinity"} if number == math.inf else number
