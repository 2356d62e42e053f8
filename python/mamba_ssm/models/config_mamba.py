"""Configuration of the language model."""

import json
import math
from dataclasses import asdict, dataclass, field, fields

_MAX_SIZE = 2**31 - 1  # no product of two sizes leaves int64


@dataclass
class MambaConfig:
    """What a MambaLMHeadModel is made of; config.json holds the same names.

    Fields:
        d_model: width of the residual stream.
        d_intermediate: width of the MLP behind every mixer, 0: none.
        n_layer: number of blocks.
        vocab_size: number of tokens, rounded up to a multiple of pad_vocab_size_multiple.
        ssm_cfg: keyword arguments of the mixers, and in "layer" their kind; see create_block.
        attn_layer_idx, attn_cfg: blocks that have attention instead, and keyword arguments of MHA.
        rms_norm: RMSNorm instead of LayerNorm.
        residual_in_fp32: keep the residual stream in float32.
        fused_add_norm: accepted for compatibility; both values compute the same.
        tie_embeddings: the head's weight is the embedding's.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict = field(default_factory=dict)
    attn_layer_idx: list = field(default_factory=list)
    attn_cfg: dict = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True

    @classmethod
    def from_dict(cls, values):
        """The config of parsed JSON; None stands for an empty ssm_cfg, attn_cfg, attn_layer_idx.

        Raises ValueError that names the key for unknown keys, wrong types and sizes out of range.
        """
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {_describe(values)}")
        kinds = {f.name: f.type for f in fields(cls)}
        config = {}
        for key, value in values.items():
            if key not in kinds:
                raise ValueError(f"unknown key {_describe(key)}; known are {', '.join(kinds)}")
            kind = kinds[key]
            if kind in (dict, list) and value is None:
                continue
            if kind is int:
                least = 0 if key == "d_intermediate" else 1
                if not _is_size(value, least):
                    raise ValueError(
                        f"{key} must be an integer from {least} to {_MAX_SIZE}, "
                        f"got {_describe(value)}"
                    )
            elif not isinstance(value, kind):
                name = {bool: "true or false", dict: "an object", list: "a list"}[kind]
                raise ValueError(f"{key} must be {name}, got {_describe(value)}")
            if kind is dict:
                for option, setting in value.items():
                    items = setting if isinstance(setting, list) else [setting]
                    if not all(map(_is_option, items)):
                        raise ValueError(
                            f"{key}: {_describe(option)} must be a number of usual size, a string, "
                            f"true, false, null or a list of those, got {_describe(setting)}"
                        )
            if kind is list and not all(_is_size(item, 0) for item in value):
                raise ValueError(f"{key} must be a list of layer indices, got {_describe(value)}")
            config[key] = value
        return cls(**config)

    def to_json(self):
        """The text of config.json. JSON knows no infinity: dt_limit without an upper end has null.

        Raises ValueError or TypeError for what JSON cannot hold.
        """
        config = asdict(self)
        limits = (config["ssm_cfg"] or {}).get("dt_limit")
        if limits is not None:
            config["ssm_cfg"]["dt_limit"] = [None if end == math.inf else end for end in limits]
        return json.dumps(config, indent=2, allow_nan=False) + "\n"


def _is_size(value, least):
    return type(value) is int and least <= value <= _MAX_SIZE


def _is_option(value):
    if type(value) is int:
        return abs(value) <= _MAX_SIZE
    if isinstance(value, float):
        return not math.isnan(value)
    return value is None or isinstance(value, (bool, str))


def _describe(value):
    """A value for an error message: short, and ASCII whatever a file holds."""
    if isinstance(value, (dict, list)):
        return {dict: "an object", list: "a list"}[type(value)]
    text = ascii(value) if not isinstance(value, int) or abs(value) < 10**40 else "a huge number"
    return text if len(text) <= 80 else text[:80] + "..."
