"""The language model: names, initialization, training, states. Its files: test_checkpoint.py."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mamba_ssm import Mamba, Mamba2, MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MixerModel, _init_weights, create_block
from mamba_ssm.modules import mamba_simple
from mamba_ssm.modules.block import Block
from mamba_ssm.modules.mha import MHA
from mamba_ssm.modules.mlp import GatedMLP
from mamba_ssm.ops.triton.layer_norm import RMSNorm
from mamba_ssm.utils.generation import InferenceParams

MAMBA, MAMBA2 = {"d_state": 4}, {"layer": "Mamba2", "d_state": 4, "headdim": 8}
ATTENTION = {
    "attn_layer_idx": [1],
    "attn_cfg": {"num_heads": 4, "num_heads_kv": 2, "causal": True, "rotary_emb_dim": 4},
}
CONV_ATTENTION = {**ATTENTION, "attn_cfg": {**ATTENTION["attn_cfg"], "d_conv": 4}}
MODELS = {
    "Mamba": {"ssm_cfg": MAMBA},
    "Mamba2": {"ssm_cfg": MAMBA2},
    "Mamba with MLP": {"ssm_cfg": MAMBA, "d_intermediate": 24},
    "Mamba with attention": {"ssm_cfg": MAMBA, **ATTENTION},
    "Mamba2 with all": {"ssm_cfg": MAMBA2, "d_intermediate": 24, **CONV_ATTENTION},
}
models = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())


def make(device="cpu", dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 50, "ssm_cfg": MAMBA, **kwargs}
    return MambaLMHeadModel(MambaConfig(**config), dtype=dtype).to(device)


def ids(device="cpu", seqlen=7):
    torch.manual_seed(1)
    return torch.randint(50, (2, seqlen)).to(device)


def test_names_and_padding():
    model = make()
    names = list(model.state_dict())
    assert names[0] == "backbone.embedding.weight"
    assert names[-2:] == ["backbone.norm_f.weight", "lm_head.weight"]
    assert "backbone.layers.1.mixer.in_proj.weight" in names
    assert "backbone.layers.1.norm.weight" in names
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert model(ids()).logits.shape == (2, 7, 56)  # padded to a multiple of 8
    assert model(ids(), num_last_tokens=1).logits.shape == (2, 1, 56)
    untied = make(tie_embeddings=False)
    assert untied.lm_head.weight is not untied.backbone.embedding.weight


def block_shapes(config, i):
    """Names and shapes of block i with d_model 16, as upstream writes them."""
    inner = 32
    if i in config.get("attn_layer_idx", ()):
        qkv = 4 * (4 + 2 + 2)
        mixer = {
            "in_proj.weight": (qkv, 16),
            "in_proj.bias": (qkv,),
            "out_proj.weight": (16, 16),
            "out_proj.bias": (16,),
        }
        if "d_conv" in config["attn_cfg"]:
            mixer |= {"conv1d.weight": (qkv, 1, 4), "conv1d.bias": (qkv,)}
    elif config["ssm_cfg"] is MAMBA:
        mixer = {
            "A_log": (inner, 4),
            "D": (inner,),
            "in_proj.weight": (2 * inner, 16),
            "conv1d.weight": (inner, 1, 4),
            "conv1d.bias": (inner,),
            "x_proj.weight": (1 + 2 * 4, inner),
            "dt_proj.weight": (inner, 1),
            "dt_proj.bias": (inner,),
            "out_proj.weight": (16, inner),
        }
    else:
        channels, heads = inner + 2 * 4, inner // 8
        mixer = {
            "dt_bias": (heads,),
            "A_log": (heads,),
            "D": (heads,),
            "in_proj.weight": (inner + channels + heads, 16),
            "conv1d.weight": (channels, 1, 4),
            "conv1d.bias": (channels,),
            "norm.weight": (inner,),
            "out_proj.weight": (16, inner),
        }
    shapes = {f"mixer.{name}": shape for name, shape in mixer.items()} | {"norm.weight": (16,)}
    if "d_intermediate" in config:
        shapes |= {"norm2.weight": (16,), "mlp.fc1.weight": (256, 16), "mlp.fc2.weight": (16, 128)}
    return {f"backbone.layers.{i}.{name}": shape for name, shape in shapes.items()}


@models
@pytest.mark.parametrize("rms_norm", [False, True])
def test_state_dict(config, rms_norm):
    expected = {"backbone.embedding.weight": (56, 16), "lm_head.weight": (56, 16)}
    expected |= block_shapes(config, 0) | block_shapes(config, 1)
    expected["backbone.norm_f.weight"] = (16,)
    if not rms_norm:
        expected |= {
            name.removesuffix("weight") + "bias": (16,)
            for name in expected
            if name.endswith(("norm.weight", "norm2.weight", "norm_f.weight"))
            and "mixer" not in name
        }
    state_dict = make(**config, rms_norm=rms_norm).state_dict()
    assert {name: tuple(t.shape) for name, t in state_dict.items()} == expected


# The published models: layers, width, and parameters of Mamba and Mamba-2 (rows of the embedding
# are a multiple of 8 and 16).
SIZES = [
    (24, 768, 129_135_360, 128_989_632),
    (48, 1024, 371_516_416, 368_346_624),
    (48, 1536, 793_204_224, 780_161_280),
    (48, 2048, 1_372_178_432, 1_343_757_312),
    (64, 2560, 2_768_345_600, 2_702_599_680),
]


@pytest.mark.parametrize("n_layer, d_model, mamba, mamba2", SIZES)
def test_published_sizes(n_layer, d_model, mamba, mamba2):
    for expected, options in (
        (mamba, {}),
        (mamba2, {"ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16}),
    ):
        config = MambaConfig(d_model=d_model, n_layer=n_layer, **options)
        model = MambaLMHeadModel(config, device="meta", dtype=torch.float16)
        assert sum(p.numel() for p in model.parameters()) == expected


def check_uniform(weight, bound):
    """Drawn from [-bound, bound]."""
    assert 0.95 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("d_intermediate", [0, 128])
def test_initial_values(d_intermediate):
    config = {"d_model": 64, "n_layer": 4, "vocab_size": 500, "d_intermediate": d_intermediate}
    model = make(**config, **ATTENTION, tie_embeddings=False)
    embedding = model.backbone.embedding.weight
    assert embedding.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(embedding.mean().item()) < 0.001
    check_uniform(model.lm_head.weight, 64**-0.5)
    # Results that are added to the residual stream: kaiming_uniform(a=sqrt(5)) over the square root
    # of their number.
    count = 4 * (2 if d_intermediate else 1)
    mixers = [layer.mixer for layer in model.backbone.layers]
    check_uniform(mixers[0].out_proj.weight, (128 * count) ** -0.5)
    check_uniform(mixers[1].out_proj.weight, (64 * count) ** -0.5)
    assert mixers[1].in_proj.bias.count_nonzero() == mixers[1].out_proj.bias.count_nonzero() == 0
    if d_intermediate:
        check_uniform(model.backbone.layers[0].mlp.fc2.weight, (128 * count) ** -0.5)
        check_uniform(model.backbone.layers[0].mlp.fc1.weight, 64**-0.5)
    biased = make(ssm_cfg={"bias": True}).backbone.layers[0].mixer
    assert (biased.in_proj.bias == 0).all() and (biased.dt_proj.bias != 0).all()


def test_initializer_cfg():
    config = MambaConfig(d_model=64, n_layer=4, vocab_size=500, ssm_cfg=MAMBA)
    wide = {"initializer_range": 0.5, "n_residuals_per_layer": 9}
    model = MambaLMHeadModel(config, initializer_cfg=wide)
    assert model.backbone.embedding.weight.std().item() == pytest.approx(0.5, rel=0.05)
    check_uniform(model.backbone.layers[0].mixer.out_proj.weight, (128 * 36) ** -0.5)
    model = MambaLMHeadModel(config, initializer_cfg={"rescale_prenorm_residual": False})
    check_uniform(model.backbone.layers[0].mixer.out_proj.weight, 128**-0.5)
    linear = nn.Linear(2, 2)
    _init_weights(linear, n_layer=1)
    assert (linear.bias == 0).all()


def plain_norm(norm, x):
    if isinstance(norm, RMSNorm):
        return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


@models
@pytest.mark.parametrize("rms_norm", [False, True])
@pytest.mark.parametrize("fused_add_norm", [False, True])
def test_equals_its_parts(device, config, rms_norm, fused_add_norm):
    options = {"rms_norm": rms_norm, "fused_add_norm": fused_add_norm}
    model = make(device, torch.float64, **config, **options)
    with torch.no_grad():  # what begins as ones and zeros
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.rand_like(parameter) - 0.5
    x = F.embedding(ids(device), model.backbone.embedding.weight)
    for layer in model.backbone.layers:
        x = x + layer.mixer(plain_norm(layer.norm, x))
        if layer.mlp is not None:
            y, gate = (plain_norm(layer.norm2, x) @ layer.mlp.fc1.weight.T).chunk(2, dim=-1)
            x = x + (y * F.silu(gate)) @ layer.mlp.fc2.weight.T
    logits = plain_norm(model.backbone.norm_f, x) @ model.lm_head.weight.T
    torch.testing.assert_close(model(ids(device)).logits, logits)
    last = model(ids(device), num_last_tokens=2).logits
    torch.testing.assert_close(last, logits[:, -2:])
    assert model(ids(device), torch.arange(7), None, 100).logits.shape == logits.shape


@models
@pytest.mark.parametrize("rms_norm", [False, True])
@pytest.mark.parametrize("residual_in_fp32", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_step_equals_forward(device, config, rms_norm, residual_in_fp32, dtype):
    options = {"rms_norm": rms_norm, "residual_in_fp32": residual_in_fp32}
    model = make(device, dtype, **config, **options)
    tokens = ids(device)
    expected = model(tokens).logits
    assert expected.dtype == dtype
    params = InferenceParams(max_seqlen=7, max_batch_size=2)
    outputs = []
    with torch.no_grad():
        for piece in tokens.split([3, 1, 2, 1], dim=1):
            outputs.append(model(piece, inference_params=params).logits)
            params.seqlen_offset += piece.shape[1]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=tolerance, atol=tolerance)


@models
def test_allocated_caches_are_used(config):
    model, tokens = make(**config), ids()
    params = InferenceParams(max_seqlen=7, max_batch_size=2)
    params.key_value_memory_dict = model.allocate_inference_cache(2, 7)
    states = dict(params.key_value_memory_dict)
    with torch.no_grad():
        model(tokens, inference_params=params)
    assert all(params.key_value_memory_dict[i] is states[i] for i in states)
    assert all(s.abs().sum() > 0 for layer in states.values() for s in layer if s is not None)


@models
def test_reset_starts_a_new_sequence(config):
    model, tokens = make(**config), ids()
    params = InferenceParams(max_seqlen=7, max_batch_size=2)
    with torch.no_grad():
        first = model(tokens, inference_params=params).logits
        params.seqlen_offset = 7
        params.reset(7, 2)
        torch.testing.assert_close(model(tokens, inference_params=params).logits, first)


@models
def test_trains(device, config):
    model, tokens = make(device, **config), ids(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("name", ["Mamba2", "Mamba2 with all"])
def test_packed_sequences_are_apart(device, name):
    """cu_seqlens and seq_idx reach every block of the model."""
    model, tokens = make(device, torch.float64, **MODELS[name]), ids(device)
    offsets = torch.tensor([0, 7, 14], device=device)
    seq_idx = torch.tensor([[0] * 7 + [1] * 7], dtype=torch.int32, device=device)
    for packing in ({"cu_seqlens": offsets}, {"seq_idx": seq_idx}):
        packed = model(tokens.view(1, 14), **packing).logits
        torch.testing.assert_close(packed.view(2, 7, -1), model(tokens).logits)


def test_mixers_take_their_own_arguments_only():
    """A mixer that cannot keep packed sequences apart is not asked to."""
    with pytest.raises(TypeError, match="cu_seqlens"):
        make()(ids().view(1, 14), cu_seqlens=torch.tensor([0, 7, 14]))


# Use as any other module ------------------------------------------------------------------------


def test_output():
    outputs = make()(ids())
    assert type(outputs) is type(make()(ids())) and outputs._fields == ("logits",)
    assert torch.equal(pickle.loads(pickle.dumps(outputs)).logits, outputs.logits)


@models
def test_meta_device(config):
    reference = make(**config)
    model = MambaLMHeadModel(reference.config, device="meta")
    with torch.device("meta"):
        assert all(p.is_meta for p in MambaLMHeadModel(reference.config).parameters())
    assert all(p.is_meta for p in model.parameters())
    assert model(ids("meta")).logits.shape == (2, 7, 56)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.load_state_dict(reference.state_dict())
    assert torch.equal(model(ids()).logits, reference(ids()).logits)
    model = MambaLMHeadModel(reference.config, device="meta")
    model.load_state_dict(reference.state_dict(), assign=True)
    assert torch.equal(model(ids()).logits, reference(ids()).logits)


def test_tied_matrix_has_either_name():
    model = make()
    for kept in ("backbone.embedding.weight", "lm_head.weight"):
        state_dict = {n: t.clone() for n, t in model.state_dict().items()}
        weight = state_dict.pop(
            {"lm_head.weight": "backbone.embedding.weight"}.get(kept, "lm_head.weight")
        )
        twin = make()
        with torch.no_grad():
            twin.lm_head.weight.zero_()
        nn.ModuleDict({"model": twin}).load_state_dict(
            {f"model.{name}": tensor for name, tensor in state_dict.items()}
        )
        assert torch.equal(twin.lm_head.weight, weight)
    with pytest.raises(RuntimeError, match="Missing key.*lm_head.weight"):
        untied = make(tie_embeddings=False).state_dict()
        del untied["lm_head.weight"]
        make(tie_embeddings=False).load_state_dict(untied)


def loss_of(model, tokens):
    logits = model(tokens[:, :-1]).logits.float()
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])


@models
@pytest.mark.parametrize("residual_in_fp32", [False, True])
def test_autocast(device, config, residual_in_fp32):
    model = make(device, **config, residual_in_fp32=residual_in_fp32)
    tokens = ids(device)
    expected = loss_of(model, tokens)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert model(tokens).logits.dtype == torch.bfloat16
        loss = loss_of(model, tokens)
        params = InferenceParams(max_seqlen=7, max_batch_size=2)
        with torch.no_grad():
            logits = model(tokens[:, :6], inference_params=params).logits
            params.seqlen_offset = 6
            logits = torch.cat([logits, model(tokens[:, 6:], None, params).logits], dim=1)
            torch.testing.assert_close(logits, model(tokens).logits, rtol=2e-2, atol=2e-2)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


def test_compile():
    model = make(**MODELS["Mamba2 with all"])
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids()).logits, model(ids()).logits)
    tokens = ids(seqlen=11)
    compiled(tokens).logits.square().sum().backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(tokens).logits.square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# Block ------------------------------------------------------------------------------------------


def mixer(dim):
    return Mamba(dim, layer_idx=0)


class Scale(nn.Module):
    """A norm that is none."""

    def __init__(self, dim):
        super().__init__()

    def forward(self, x):
        return 2 * x


NORMS = {
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": RMSNorm,
    "torch.nn.RMSNorm": nn.RMSNorm,
    "no weights": lambda dim: nn.LayerNorm(dim, elementwise_affine=False),
    "own": Scale,
}


@pytest.mark.parametrize("norm_cls", NORMS.values(), ids=NORMS.keys())
@pytest.mark.parametrize("fused_add_norm", [False, True])
@pytest.mark.parametrize("residual_in_fp32", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block(norm_cls, fused_add_norm, residual_in_fp32, dtype):
    block = Block(8, mixer, GatedMLP, norm_cls, fused_add_norm, residual_in_fp32).to(dtype)
    x, stream = torch.randn(2, 2, 5, 8, dtype=dtype)
    hidden, residual = block(x)
    kept = torch.float32 if residual_in_fp32 else dtype
    assert hidden.dtype == dtype and residual.dtype == kept
    residual = stream.to(kept)
    hidden, residual = block(x, residual=residual)
    assert hidden.dtype == dtype and residual.dtype == kept
    exact = copy.deepcopy(block).double()
    total = x.double() + stream.double()
    total = total + exact.mixer(exact.norm(total))
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(residual.double(), total, rtol=tolerance, atol=tolerance)
    expected = exact.mlp(exact.norm2(total))
    torch.testing.assert_close(hidden.double(), expected, rtol=4 * tolerance, atol=4 * tolerance)


def test_hooks_of_norms_run():
    block, calls = Block(8, mixer, GatedMLP), []
    x = torch.randn(2, 5, 8)
    expected = block(x)
    for norm in (block.norm, block.norm2):
        norm.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(block(x), expected)
    assert len(calls) == 2


def test_dropout_of_a_norm():
    block = Block(8, mixer, norm_cls=lambda dim: RMSNorm(dim, dropout_p=0.5))
    x = torch.randn(2, 5, 8)
    block.mixer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for training in (True, False):
        seen = []
        block.train(training)(x)
        assert (seen[0] == 0).any() == training


def test_block_without_mlp():
    block = Block(8, mixer, nn.Identity, norm_cls=RMSNorm)
    assert block.mlp is None and not hasattr(block, "norm2")
    assert {name.split(".")[0] for name in block.state_dict()} == {"norm", "mixer"}


def test_block_of_1x():
    """norm_cls came third."""
    block = mamba_simple.Block(8, mixer, RMSNorm, True, True)
    assert isinstance(block, Block) and block.mlp is None
    assert isinstance(block.norm, RMSNorm) and block.fused_add_norm and block.residual_in_fp32
    hidden, residual = block(torch.randn(2, 5, 8))
    assert hidden.shape == residual.shape == (2, 5, 8)


def test_models_of_1x():
    """They had no d_intermediate."""
    names = set(MixerModel(16, 2, 0, 56, ssm_cfg=MAMBA).state_dict())
    for model in (
        MixerModel(16, 2, 56, ssm_cfg=MAMBA),
        MixerModel(d_model=16, n_layer=2, vocab_size=56, ssm_cfg=MAMBA),
    ):
        assert set(model.state_dict()) == names and model.embedding.num_embeddings == 56
    with pytest.raises(TypeError, match="vocab_size"):
        MixerModel(16, 2)
    block = create_block(16, ssm_cfg=MAMBA, layer_idx=3)
    assert block.layer_idx == block.mixer.layer_idx == 3


def test_create_block():
    block = create_block(16, 32, MAMBA2, [1], {"num_heads": 2}, layer_idx=0, dtype=torch.float64)
    assert type(block.mixer) is Mamba2 and type(block.mlp) is GatedMLP
    assert block.mlp.fc2.weight.shape == (16, 128) and type(block.norm2) is nn.LayerNorm
    assert block.norm.weight.dtype == block.mlp.fc1.weight.dtype == torch.float64
    block = create_block(16, 0, MAMBA2, [1], {"num_heads": 2}, 1e-3, True, True, True, layer_idx=1)
    assert type(block.mixer) is MHA and block.mixer.layer_idx == 1 and block.mlp is None
    assert type(block.norm) is RMSNorm and block.norm.eps == 1e-3
    assert block.residual_in_fp32 and block.fused_add_norm
    assert type(create_block(16).mixer) is Mamba and MAMBA2["layer"] == "Mamba2"
    with pytest.raises(NotImplementedError, match="Mamba3"):
        create_block(16, ssm_cfg={"layer": "Mamba3"})
    with pytest.raises(ValueError, match="Mamba9"):
        create_block(16, ssm_cfg={"layer": "Mamba9"})
