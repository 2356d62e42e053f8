"""Language model: embedding, a stack of Mamba or Mamba-2 blocks, norm, head."""

import json
import math
from collections import namedtuple
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.modules.block import Block, add_norm
from mamba_ssm.modules.mamba2 import Mamba2
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.triton.layer_norm import RMSNorm
from mamba_ssm.utils._safetensors import load_safetensors, save_safetensors

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])

MIXERS = {"Mamba1": Mamba, "Mamba2": Mamba2}


def create_block(
    d_model,
    d_intermediate=0,
    ssm_cfg=None,
    attn_layer_idx=None,
    attn_cfg=None,
    norm_epsilon=1e-5,
    rms_norm=False,
    residual_in_fp32=False,
    fused_add_norm=False,
    layer_idx=None,
    device=None,
    dtype=None,
):
    """Block layer_idx of a model. ssm_cfg: keyword arguments of the mixer, and in "layer" its kind,
    "Mamba1" (the default) or "Mamba2"."""
    factory_kwargs = {"device": device, "dtype": dtype}
    ssm_cfg = dict(ssm_cfg or {})
    layer = ssm_cfg.pop("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2", "Mamba3"):
        raise ValueError(f"create_block: unknown ssm_cfg layer {layer!r}")
    if layer not in MIXERS:
        raise NotImplementedError(f"create_block: layer {layer!r} is not available yet")
    if layer_idx in (attn_layer_idx or ()):
        raise NotImplementedError("create_block: attention layers are not available yet")
    if d_intermediate != 0:
        raise NotImplementedError("create_block: an MLP (d_intermediate) is not available yet")
    norm_cls = RMSNorm if rms_norm else nn.LayerNorm
    block = Block(
        d_model,
        partial(MIXERS[layer], layer_idx=layer_idx, **ssm_cfg, **factory_kwargs),
        nn.Identity,
        norm_cls=partial(norm_cls, eps=norm_epsilon, **factory_kwargs),
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )
    block.layer_idx = layer_idx
    return block


def _init_weights(
    module,
    n_layer,
    initializer_range=0.02,
    rescale_prenorm_residual=True,
    n_residuals_per_layer=1,
):
    """GPT-2's initialization: residual outputs are scaled down by the square root of their number.

    For `nn.Module.apply`. Biases marked _no_reinit keep their values.
    """
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        # Matches parameters of direct children, so that apply() draws each of them once.
        for name, parameter in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                with torch.no_grad():
                    parameter /= math.sqrt(n_residuals_per_layer * n_layer)


class MixerModel(nn.Module):
    """Token ids (batch, seqlen) to normalized hidden states (batch, seqlen, d_model)."""

    def __init__(
        self,
        d_model,
        n_layer,
        d_intermediate,
        vocab_size,
        ssm_cfg=None,
        attn_layer_idx=None,
        attn_cfg=None,
        norm_epsilon=1e-5,
        rms_norm=False,
        initializer_cfg=None,
        fused_add_norm=False,
        residual_in_fp32=False,
        device=None,
        dtype=None,
    ):
        factory_kwargs = {"device": device, "dtype": dtype}
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **factory_kwargs)
        self.layers = nn.ModuleList(
            create_block(
                d_model,
                d_intermediate,
                ssm_cfg=ssm_cfg,
                attn_layer_idx=attn_layer_idx,
                attn_cfg=attn_cfg,
                norm_epsilon=norm_epsilon,
                rms_norm=rms_norm,
                residual_in_fp32=residual_in_fp32,
                fused_add_norm=fused_add_norm,
                layer_idx=i,
                **factory_kwargs,
            )
            for i in range(n_layer)
        )
        norm_cls = RMSNorm if rms_norm else nn.LayerNorm
        self.norm_f = norm_cls(d_model, eps=norm_epsilon, **factory_kwargs)
        self.apply(partial(_init_weights, n_layer=n_layer, **(initializer_cfg or {})))

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """States of every layer by layer index."""
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for i, layer in enumerate(self.layers)
        }

    def forward(self, input_ids, inference_params=None, **mixer_kwargs):
        hidden_states = self.embedding(input_ids)
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(
                hidden_states, residual, inference_params=inference_params, **mixer_kwargs
            )
        return add_norm(self.norm_f, hidden_states, residual, self.residual_in_fp32)[0]


class MambaLMHeadModel(nn.Module):
    """MixerModel with a linear head, whose weight is the embedding's when tie_embeddings.

    The vocabulary is padded up to a multiple of pad_vocab_size_multiple.
    """

    def __init__(self, config: MambaConfig, initializer_cfg=None, device=None, dtype=None):
        factory_kwargs = {"device": device, "dtype": dtype}
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_size_multiple
        vocab_size = -(-config.vocab_size // multiple) * multiple
        self.backbone = MixerModel(
            d_model=config.d_model,
            n_layer=config.n_layer,
            d_intermediate=config.d_intermediate,
            vocab_size=vocab_size,
            ssm_cfg=config.ssm_cfg,
            attn_layer_idx=config.attn_layer_idx,
            attn_cfg=config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            **factory_kwargs,
        )
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, **factory_kwargs)
        self.tie_weights()

    def tie_weights(self):
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        input_ids,
        position_ids=None,
        inference_params=None,
        num_last_tokens=0,
        **mixer_kwargs,
    ):
        """Logits (batch, seqlen, padded vocabulary), of the last num_last_tokens tokens if > 0.

        position_ids are ignored: a recurrent model needs none.
        """
        hidden_states = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
        return CausalLMOutput(logits=self.lm_head(hidden_states))

    def save_pretrained(self, save_directory):
        """Writes config.json and model.safetensors into save_directory.

        A tied head is not written a second time.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = asdict(self.config)
        if "dt_limit" in config["ssm_cfg"]:  # JSON knows no infinity
            limits = config["ssm_cfg"]["dt_limit"]
            config["ssm_cfg"]["dt_limit"] = [None if end == math.inf else end for end in limits]
        text = json.dumps(config, indent=2, allow_nan=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        state_dict = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        if self.config.tie_embeddings:
            del state_dict["lm_head.weight"]
        save_safetensors(state_dict, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, pretrained_model_name, device=None, dtype=None, **kwargs):
        """Model from a local folder with config.json and model.safetensors.

        Further keyword arguments go to the constructor. Loading runs no code from the folder.
        """
        folder = Path(pretrained_model_name)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"MambaLMHeadModel.from_pretrained: {folder / name} does not exist; expected a "
                    "folder with config.json and model.safetensors, as save_pretrained writes it"
                )
        config = MambaConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        model = cls(config, device=device, dtype=dtype, **kwargs)
        state_dict = load_safetensors(folder / "model.safetensors")
        if config.tie_embeddings:  # a writer may have kept either name or both
            embedding, head = "backbone.embedding.weight", "lm_head.weight"
            for name, twin in ((embedding, head), (head, embedding)):
                if name not in state_dict and twin in state_dict:
                    state_dict[name] = state_dict[twin]
        model.load_state_dict(state_dict)
        return model
