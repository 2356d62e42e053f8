"""Every module, small, and how it is run: what a treatment of modules is tried on."""

import functools

import torch
import torch.nn as nn
from mamba_ssm import Mamba, Mamba2, MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.modules.block import Block
from mamba_ssm.modules.mamba2_simple import Mamba2Simple
from mamba_ssm.modules.mha import MHA
from mamba_ssm.modules.mlp import GatedMLP
from mamba_ssm.ops.triton import layernorm_gated
from mamba_ssm.ops.triton.layer_norm import RMSNorm
from mamba_ssm.utils.generation import InferenceParams

WIDTH, VOCABULARY = 16, 40
MAMBA1 = {"layer": "Mamba1", "d_state": 4}
MAMBA2 = {"layer": "Mamba2", "d_state": 4, "headdim": 8}


def _block(device, dtype):
    factory_kwargs = {"device": device, "dtype": dtype}
    mixer = functools.partial(Mamba2, d_state=4, headdim=8, layer_idx=0, **factory_kwargs)
    mlp = functools.partial(GatedMLP, hidden_features=24, multiple_of=8, **factory_kwargs)
    return Block(WIDTH, mixer, mlp, functools.partial(RMSNorm, **factory_kwargs), True, True)


def _model(device, dtype, **config):
    config = MambaConfig(d_model=WIDTH, n_layer=2, vocab_size=VOCABULARY, **config)
    return MambaLMHeadModel(config, device=device, dtype=dtype)


def _of(cls, *arguments, **options):
    return lambda device, dtype: cls(*arguments, **options, device=device, dtype=dtype)


ATTENTION = {"num_heads": 4, "num_heads_kv": 2, "causal": True, "d_conv": 3, "rotary_emb_dim": 2}
MODULES = {
    "Mamba": _of(Mamba, WIDTH, d_state=4, layer_idx=0),
    "Mamba, unfused": _of(Mamba, WIDTH, d_state=4, bias=True, use_fast_path=False, layer_idx=0),
    "Mamba2": _of(Mamba2, WIDTH, d_state=4, headdim=8, layer_idx=0),
    "Mamba2, unfused": _of(
        Mamba2, WIDTH, d_state=4, headdim=8, use_mem_eff_path=False, layer_idx=0
    ),
    "Mamba2, MLP and biases": _of(Mamba2, WIDTH, headdim=8, d_ssm=16, bias=True, layer_idx=0),
    "Mamba2Simple": _of(Mamba2Simple, WIDTH, headdim=8, learnable_init_states=True),
    "MHA": _of(MHA, WIDTH, mlp_dim=8, layer_idx=0, **ATTENTION),
    "GatedMLP": _of(GatedMLP, WIDTH, 24, multiple_of=8, bias=True),
    "Block": _block,
    "MambaLMHeadModel": functools.partial(_model, ssm_cfg=MAMBA1),
    "MambaLMHeadModel, hybrid": functools.partial(
        _model, ssm_cfg=MAMBA2, d_intermediate=24, attn_layer_idx=[1], attn_cfg=ATTENTION
    ),
}
WITH_CACHE = [name for name in MODULES if name not in ("Mamba2Simple", "GatedMLP")]


def make(name, device="cpu", dtype=torch.float64):
    """The module, with the same weights in every call, none of them at a special value."""
    torch.manual_seed(0)
    module = MODULES[name](device, dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.is_meta:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


def inputs(module, device="cpu", dtype=torch.float64, batch=2, seqlen=7):
    """What run takes: tokens, or activations."""
    torch.manual_seed(1)
    if isinstance(module, MambaLMHeadModel):
        return torch.randint(VOCABULARY, (batch, seqlen)).to(device)
    return torch.randn(batch, seqlen, WIDTH, dtype=dtype).to(device)


def run(module, x, **arguments):
    """One tensor: logits of a model, of a block the sum of its two results."""
    result = module(x, **arguments)
    if hasattr(result, "logits"):
        return result.logits
    return sum(result) if isinstance(result, tuple) else result


@torch.no_grad()
def run_in_pieces(module, x, pieces):
    """run over a cache: a prefill, more of the prompt, and steps."""
    params = InferenceParams(max_seqlen=x.shape[1], max_batch_size=x.shape[0])
    outputs = []
    for piece in x.split(pieces, dim=1):
        outputs.append(run(module, piece, inference_params=params))
        params.seqlen_offset += piece.shape[1]
    return torch.cat(outputs, dim=1)


def gradients(module, x):
    """run, and the gradient of every parameter that has one, by name."""
    module.zero_grad()
    x = x.detach().requires_grad_() if x.is_floating_point() else x
    out = run(module, x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device)
    out.backward(weights.view_as(out))
    return out.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


LAYERS = (nn.Linear, nn.Conv1d, RMSNorm, layernorm_gated.RMSNorm)  # what a fused path may bypass


def layers(module, *kinds):
    """Its submodules of these very types: {path: layer}."""
    return {name: layer for name, layer in module.named_modules() if type(layer) in kinds}


def replace(module, path, layer):
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, layer)


def linears(module):
    """Its nn.Linear layers but a head, whose weight may be an embedding's."""
    return {n: layer for n, layer in layers(module, nn.Linear).items() if n != "lm_head"}
