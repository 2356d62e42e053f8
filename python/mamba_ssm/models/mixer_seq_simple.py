"""Language model: embedding, a stack of Mamba, Mamba-2 or attention blocks, norm, head."""

import json
import math
import os
import shutil
import tempfile
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.modules._parts import look_up, step_linear
from mamba_ssm.modules.block import Block, add_norm
from mamba_ssm.modules.mamba2 import Mamba2
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.modules.mha import MHA
from mamba_ssm.modules.mlp import GatedMLP
from mamba_ssm.ops.triton.layer_norm import RMSNorm
from mamba_ssm.utils._safetensors import save_safetensors
from mamba_ssm.utils.generation import GenerationMixin, load_kernels
from mamba_ssm.utils.hf import (
    CONFIG,
    SAFETENSORS,
    index_of,
    load_config_hf,
    load_state_dict_hf,
    split_into_shards,
)

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])
# So that exported programs that return one can be saved.
torch.utils._pytree._register_namedtuple(
    CausalLMOutput, serialized_type_name="mamba_ssm.models.mixer_seq_simple.CausalLMOutput"
)

MIXERS = {"Mamba1": Mamba, "Mamba2": Mamba2}
EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"


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
    """Block layer_idx of a model.

    ssm_cfg has the keyword arguments of the mixer, and in "layer" its kind, "Mamba1" (the default)
    or "Mamba2". Blocks in attn_layer_idx have MHA(**attn_cfg) as their mixer. d_intermediate is the
    width of a GatedMLP behind the mixer, 0: none. Raises ValueError for an unknown kind.
    """
    factory_kwargs = {"device": device, "dtype": dtype}
    if layer_idx in (attn_layer_idx or ()):
        mixer_cls = partial(MHA, layer_idx=layer_idx, **(attn_cfg or {}), **factory_kwargs)
    else:
        ssm_cfg = dict(ssm_cfg or {})
        layer = ssm_cfg.pop("layer", "Mamba1")
        if layer == "Mamba3":
            raise NotImplementedError('create_block: layer "Mamba3" is not available yet')
        if layer not in MIXERS:
            raise ValueError(f"create_block: unknown ssm_cfg layer {layer!r}")
        mixer_cls = partial(MIXERS[layer], layer_idx=layer_idx, **ssm_cfg, **factory_kwargs)
    mlp_cls = nn.Identity
    if d_intermediate != 0:
        mlp_cls = partial(
            GatedMLP, hidden_features=d_intermediate, out_features=d_model, **factory_kwargs
        )
    norm_cls = RMSNorm if rms_norm else nn.LayerNorm
    block = Block(
        d_model,
        mixer_cls,
        mlp_cls,
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
            if name in ("out_proj.weight", "fc2.weight") and not parameter.is_meta:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                with torch.no_grad():
                    parameter /= math.sqrt(n_residuals_per_layer * n_layer)


class MixerModel(nn.Module):
    """Token ids (batch, seqlen) to normalized hidden states (batch, seqlen, d_model).

    Arguments as the fields of MambaConfig, and
        vocab_size: rows of the embedding, as they are. Without it the third argument is the
            vocabulary, as in mamba_ssm 1.x, which had no MLP.
        norm_epsilon: what the norms add to the variance.
        initializer_cfg: keyword arguments of _init_weights.
    """

    def __init__(
        self,
        d_model,
        n_layer,
        d_intermediate=0,
        vocab_size=None,
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
        if vocab_size is None:
            if d_intermediate == 0:
                raise TypeError("MixerModel: vocab_size is missing")
            d_intermediate, vocab_size = 0, d_intermediate
        attn_layer_idx = frozenset(attn_layer_idx or ())
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
        residuals = 1 if d_intermediate == 0 else 2
        initializer_cfg = {"n_residuals_per_layer": residuals, **(initializer_cfg or {})}
        self.apply(partial(_init_weights, n_layer=n_layer, **initializer_cfg))

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """States of every layer by layer index."""
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for i, layer in enumerate(self.layers)
        }

    def forward(self, input_ids, inference_params=None, **mixer_kwargs):
        """mixer_kwargs, such as seq_idx, go to every mixer; not all kinds take the same ones."""
        hidden_states = look_up(self.embedding, input_ids)
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(
                hidden_states, residual, inference_params=inference_params, **mixer_kwargs
            )
        return add_norm(self.norm_f, hidden_states, residual, self.residual_in_fp32)[0]


def _complete_tied(model, state_dict, prefix, *_):
    """Gives a tied matrix both of its names: a writer may have kept either."""
    if model.config.tie_embeddings:
        embedding, head = prefix + EMBEDDING, prefix + HEAD
        for name, twin in ((embedding, head), (head, embedding)):
            if name not in state_dict and twin in state_dict:
                state_dict[name] = state_dict[twin]
    model._were_tied = model.lm_head.weight is model.backbone.embedding.weight


def _tie_assigned(model, incompatible_keys):
    """load_state_dict(assign=True) makes one parameter for each name of a tied matrix."""
    if vars(model).pop("_were_tied"):
        model.tie_weights()


class _WithoutFills(torch.overrides.TorchFunctionMode):
    """Parameters are not filled with random numbers: for a model whose weights are read.

    Beside the time of the numbers, this saves that of torch._dynamo, 1 to 5 s, which torch imports
    for normal numbers on the meta device.
    """

    FILLS = (
        *(torch.Tensor.normal_, nn.init.normal_),
        *(torch.Tensor.uniform_, nn.init.uniform_, nn.init.kaiming_uniform_),
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """MixerModel with a linear head, whose weight is the embedding's when tie_embeddings.

    The vocabulary is padded up to a multiple of pad_vocab_size_multiple. initializer_cfg has
    keyword arguments of _init_weights. A model that comes to a GPU has the kernels of torch loaded
    that a first `generate` would wait for, once for a type: about 0.3 s.
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
        self.register_load_state_dict_pre_hook(_complete_tied)
        self.register_load_state_dict_post_hook(_tie_assigned)
        load_kernels(self.lm_head.weight)

    def _apply(self, fn, recurse=True):
        """What `to`, `cuda`, `bfloat16` and the like call."""
        super()._apply(fn, recurse)
        load_kernels(getattr(self.lm_head, "weight", None))
        return self

    @property
    def reads_positions(self):
        """Whether forward looks at position_ids: attention layers do."""
        return bool(self.config.attn_layer_idx)

    def tie_weights(self):
        """Makes the head's weight the embedding's, if the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """See MixerModel."""
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

        position_ids are ignored: the blocks know positions by their states.
        """
        hidden_states = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
        return CausalLMOutput(logits=step_linear(self.lm_head, hidden_states))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name, device=None, dtype=None, *, use_safetensors=True, **kwargs
    ):
        """Model from a folder, or of the Hugging Face hub; see utils.hf for the files.

        Parameters get the dtypes of a model made with `dtype`, whatever the files hold. Further
        keyword arguments go to the constructor. Loading runs no code of the checkpoint.

        Raises FileNotFoundError for missing files, ValueError for a config that describes no model
        or another than the weights, RuntimeError that lists missing, unexpected and differently
        shaped weights; memory for the model is asked for only when all of that fits: the constructor
        runs on the meta device first.
        """
        where = f"{pretrained_model_name}: config.json"
        values = load_config_hf(pretrained_model_name)
        try:
            config = MambaConfig.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        state_dict = load_state_dict_hf(pretrained_model_name, use_safetensors=use_safetensors)
        with _WithoutFills():
            cls.from_state_dict(config, state_dict, pretrained_model_name, dtype=dtype, **kwargs)
            model = cls(config, device=device, dtype=dtype, **kwargs)
        model.load_state_dict(state_dict)
        return model

    @classmethod
    def from_state_dict(cls, config, state_dict, name, dtype=None, **kwargs):
        """A model whose parameters are the tensors of state_dict themselves, with their dtypes.

        name: of the checkpoint, for messages. dtype, kwargs: of the constructor. Raises as
        from_pretrained does for a config and weights that do not fit.
        """
        where = f"{name}: config.json"
        if config.n_layer > len(state_dict):
            raise ValueError(
                f"{where}: n_layer is {config.n_layer}, but there are {len(state_dict)} weights"
            )
        embedding, head = state_dict.get(EMBEDDING), state_dict.get(HEAD)
        if config.tie_embeddings and embedding is not None and head is not None:
            if not torch.equal(embedding, head):
                raise ValueError(f"{where}: ties {EMBEDDING} and {HEAD}, but the weights differ")
        for key, tensor in state_dict.items():
            if not tensor.is_floating_point():
                raise ValueError(f"{name}: {key} is {tensor.dtype}, not floating")
        try:
            model = cls(config, device="meta", dtype=dtype, **kwargs)
        except NotImplementedError:
            raise
        except Exception as error:
            raise ValueError(f"{where}: no such model can be made: {error}") from error
        model.load_state_dict(state_dict, assign=True)  # compares names and shapes
        model.tie_weights()
        return model

    def save_pretrained(self, save_directory, *, max_shard_size=None):
        """Writes config.json and model.safetensors into save_directory, made if it is not there.

        max_shard_size: bytes, or a text such as "5GB" (units KB, MB, GB, TB of 1000). Weights that
        take more go into several files of at most that many bytes of weights (a larger tensor has a
        file of its own) and the index that names them, instead of model.safetensors.

        A tied head is not written a second time. All files are complete on the disk before the
        first of them takes the place of a former one, so that whatever fails before that leaves a
        former checkpoint as it was. Raises ValueError if the config ties weights that differ or
        max_shard_size is no size, and what writing raises.
        """
        text = self.config.to_json()
        state_dict = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        if self.config.tie_embeddings:
            head = state_dict.pop(HEAD)
            if self.lm_head.weight is not self.backbone.embedding.weight and not torch.equal(
                head, state_dict[EMBEDDING]
            ):
                raise ValueError(
                    f"MambaLMHeadModel.save_pretrained: the config ties {EMBEDDING} and {HEAD}, "
                    "but they differ; tie_weights() makes them one"
                )
        shards, index = split_into_shards(state_dict, max_shard_size)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
            config = Path(name, CONFIG)
            config.write_text(text, encoding="utf-8")
            written = [Path(name, shard) for shard in shards]
            for path in written:
                save_safetensors(shards[path.name], path)
                shutil.copymode(config, path)  # safetensors makes files for their owner only
            if index is not None:
                written.append(Path(name, index_of(SAFETENSORS)))
                written[-1].write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            written.append(config)
            for path in written:
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
            for path in written:
                os.replace(path, folder / path.name)
            if index is not None:  # which a reader would take first
                (folder / SAFETENSORS).unlink(missing_ok=True)
