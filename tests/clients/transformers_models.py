"""Tiny models of Hugging Face transformers, and what the tests ask of them.

The same questions are put to a model in two processes: in the tests' own, where transformers
finds our packages, and in `Reference`, where they are hidden and transformers runs its plain
PyTorch path.
"""

import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import importlib
import io
import multiprocessing
import os
import sys
import traceback

import torch

os.environ["USE_HUB_KERNELS"] = "NO"  # read when transformers is imported: installed packages only

VOCABULARY = 29
SEGMENTS = (4, 1, 6)  # lengths of the sequences in a packed row

# The operations behind the functions that transformers resolves.
MAMBA_1 = {"causal_conv1d", "selective_scan"}
MAMBA_2 = {"causal_conv1d", "ssd_chunk_scan"}
DECODE = {"causal_conv1d_update", "selective_state_update"}
CONVOLUTION = {"causal_conv1d"}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: its tiny configuration, and which of our operations it calls.

    odd: changes to config that give sizes no kernel likes.
    evaluate, train: operations of a forward without cache in either mode.
    decode: those that a step with a cache calls beside them.
    packs: how far seq_idx goes. "sequence": into all that mixes tokens, so that each segment must
        come out as if it were alone; "convolution": into the convolutions; None: nowhere.
    vision: the tiny vision tower of a family whose language model does not come alone.
    """

    config: dict
    odd: dict
    evaluate: set
    train: set
    decode: set
    packs: str | None = None
    vision: dict | None = None


def _family(config, odd, kind, packs=None, fused=True, vision=None):
    evaluate, decode, inner = {
        "mamba": (MAMBA_1, DECODE, {"mamba_inner"}),
        "mamba2": (MAMBA_2, DECODE, {"mamba2_inner"}),
        "convolution": (CONVOLUTION, {"causal_conv1d_update"}, None),
    }[kind]
    train = inner if inner and fused else evaluate
    return Family(config, odd, evaluate, train, decode, packs, vision)


_ATTENTION = dict(num_attention_heads=2, num_key_value_heads=1, intermediate_size=24)
_MAMBA_1 = dict(hidden_size=16, state_size=8, num_hidden_layers=2)
_ODD_MAMBA_1 = dict(hidden_size=19, state_size=5, conv_kernel=3, use_bias=True, time_step_rank=3)
_HYBRID_1 = dict(hidden_size=16, num_hidden_layers=2, mamba_d_state=8, **_ATTENTION)
_ODD_HYBRID_1 = dict(hidden_size=18, mamba_d_state=5, mamba_d_conv=3, mamba_dt_rank=3)
_HYBRID_2 = dict(hidden_size=16, num_hidden_layers=2, mamba_n_heads=4, mamba_d_state=8)
_HYBRID_2 |= dict(mamba_chunk_size=4, **_ATTENTION)
_ODD_HYBRID_2 = dict(hidden_size=14, mamba_n_heads=4, mamba_d_state=5, mamba_d_conv=3)
_ODD_HYBRID_2 |= dict(mamba_chunk_size=5, time_step_limit=(0.2, 1.5))
_LINEAR = dict(hidden_size=16, num_hidden_layers=2, head_dim=8, **_ATTENTION)
_LINEAR |= dict(layer_types=["linear_attention", "full_attention"])
_LINEAR |= dict(linear_num_key_heads=2, linear_num_value_heads=4)
_LINEAR |= dict(linear_key_head_dim=8, linear_value_head_dim=8)
_ODD_LINEAR = dict(linear_conv_kernel_dim=3, linear_key_head_dim=5, linear_value_head_dim=7)
# All experts serve every token, so that rounding cannot choose another.
_EXPERTS = dict(num_experts=2, num_experts_per_tok=2, moe_intermediate_size=8)
_DELTA = ("convolution", "convolution")  # the delta rule beside the convolution is not ours

FAMILIES = {
    "mamba": _family(_MAMBA_1, _ODD_MAMBA_1, "mamba"),
    "falcon_mamba": _family(_MAMBA_1, _ODD_MAMBA_1, "mamba"),
    "jamba": _family(
        _HYBRID_1
        | dict(attn_layer_period=2, attn_layer_offset=1, num_experts=2, num_experts_per_tok=2),
        _ODD_HYBRID_1,
        "mamba",
        fused=False,
    ),
    "zamba": _family(
        _HYBRID_1
        | dict(num_hidden_layers=3, layers_block_type=["linear_attention", "hybrid", "hybrid"]),
        _ODD_HYBRID_1,
        "mamba",
        "convolution",
        fused=False,
    ),
    "mamba2": _family(
        dict(hidden_size=16, num_heads=4, head_dim=8, state_size=8, num_hidden_layers=2)
        | dict(n_groups=1, chunk_size=4),
        dict(hidden_size=14, head_dim=7, state_size=5, conv_kernel=3, chunk_size=5, use_bias=True)
        | dict(time_step_limit=[0.2, 1.5]),
        "mamba2",
        "sequence",
    ),
    "bamba": _family(_HYBRID_2 | dict(attn_layer_indices=[1]), _ODD_HYBRID_2, "mamba2", "sequence"),
    "zamba2": _family(
        dict(hidden_size=16, num_hidden_layers=2, layers_block_type=["linear_attention", "hybrid"])
        | dict(mamba_d_state=8, n_mamba_heads=4, mamba_ngroups=2, chunk_size=4)
        | dict(num_attention_heads=2, intermediate_size=24, adapter_rank=4, use_mem_rope=True),
        dict(hidden_size=14, mamba_d_state=5, mamba_d_conv=3, chunk_size=5),
        "mamba2",
        "sequence",
    ),
    "nemotron_h": _family(
        dict(hidden_size=16, layers_block_type=["linear_attention", "full_attention", "mlp"])
        | dict(mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=2, chunk_size=4)
        | dict(head_dim=8, **_ATTENTION),
        dict(hidden_size=14, mamba_head_dim=7, ssm_state_size=5, conv_kernel=3, chunk_size=5)
        | dict(mamba_proj_bias=True),
        "mamba2",
        "sequence",
    ),
    "granitemoehybrid": _family(
        _HYBRID_2
        | dict(layer_types=["linear_attention", "full_attention"], shared_intermediate_size=8)
        | dict(num_local_experts=2, num_experts_per_tok=2),
        _ODD_HYBRID_2,
        "mamba2",
        "sequence",
    ),
    "falcon_h1": _family(
        _HYBRID_2 | dict(mamba_d_ssm=32, mamba_d_head=8, mamba_n_groups=2, head_dim=8),
        dict(hidden_size=14, mamba_d_ssm=28, mamba_d_head=7, mamba_d_state=5, mamba_d_conv=3)
        | dict(mamba_chunk_size=5, mamba_proj_bias=True, time_step_limit=(0.2, 1.5)),
        "mamba2",
        "sequence",
    ),
    "lfm2": _family(
        dict(hidden_size=16, num_hidden_layers=2, layer_types=["conv", "full_attention"])
        | dict(block_multiple_of=8, **_ATTENTION),
        dict(hidden_size=12, conv_L_cache=4, conv_bias=True),
        "convolution",
        "sequence",
    ),
    "lfm2_moe": _family(
        dict(hidden_size=16, num_hidden_layers=2, layer_types=["conv", "full_attention"])
        | dict(num_dense_layers=1, **_EXPERTS, **_ATTENTION),
        dict(hidden_size=12, conv_L_cache=4, conv_bias=True),
        "convolution",
        "sequence",
    ),
    "qwen3_next": _family(
        _LINEAR | _EXPERTS | dict(shared_expert_intermediate_size=8), _ODD_LINEAR, *_DELTA
    ),
    "qwen3_5": _family(_LINEAR, _ODD_LINEAR, *_DELTA),
    "qwen3_5_moe": _family(
        _LINEAR | _EXPERTS | dict(shared_expert_intermediate_size=8), _ODD_LINEAR, *_DELTA
    ),
    "qwen4_exp": _family(
        _LINEAR
        | _EXPERTS
        | dict(shared_expert_intermediate_size=8, hc_count=2, hc_lowrank=4)
        | dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=16)
        | dict(indexer_compress_ratio=4)
        | dict(layer_types=["linear_attention", "qwen_sparse_attention"]),
        _ODD_LINEAR,
        *_DELTA,
    ),
    "olmo_hybrid": _family(_LINEAR, _ODD_LINEAR, *_DELTA),
    "inkling": _family(
        dict(hidden_size=16, num_hidden_layers=2, head_dim=8, swa_head_dim=8, **_ATTENTION)
        | dict(layer_types=["hybrid_sliding", "hybrid"], mlp_layer_types=["dense", "sparse"])
        | dict(swa_num_attention_heads=2, swa_num_key_value_heads=1, sliding_window_size=16)
        | dict(d_rel=4, rel_extent=16, n_routed_experts=2, num_experts_per_tok=2)
        | dict(moe_intermediate_size=8, n_shared_experts=1),
        dict(hidden_size=14, conv_kernel_size=3),
        *_DELTA,
    ),
    "kimi_linear": _family(
        dict(hidden_size=16, num_hidden_layers=2, intermediate_size=24, num_attention_heads=2)
        | dict(num_key_value_heads=2, layer_types=["linear_attention", "full_attention"])
        | dict(kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
        | dict(num_local_experts=2, num_experts_per_tok=2, moe_intermediate_size=8)
        | dict(linear_head_dim=8, linear_num_heads=2),
        dict(hidden_size=14, linear_head_dim=7, linear_conv_kernel_dim=3),
        *_DELTA,
    ),
    "glm5_next": _family(
        dict(hidden_size=16, num_hidden_layers=2, intermediate_size=24, num_attention_heads=2)
        | dict(num_key_value_heads=2, layer_types=["linear_attention", "full_attention"])
        | dict(kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=4, v_head_dim=8)
        | dict(mlp_layer_types=["dense", "sparse"], n_routed_experts=2, num_experts_per_tok=2)
        | dict(moe_intermediate_size=8, index_topk=16, index_head_dim=8, index_n_heads=2)
        | dict(index_kpool=4, hc_mult=2, linear_head_dim=8, linear_num_heads=2),
        dict(hidden_size=14, linear_head_dim=7, linear_conv_kernel_dim=3),
        *_DELTA,
        vision=dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, image_size=28)
        | dict(out_hidden_size=16, projection_intermediate_size=16),
    ),
}


def new_model(name, vision=None, **settings):
    """A language model of the family with transformers' own random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = f"{name}_text" if f"{name}_text" in CONFIG_MAPPING else name
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    config, make = AutoConfig.for_model(model_type, **tokens, **settings), AutoModelForCausalLM
    if vision:
        settings = dict(text_config=config.to_dict(), vision_config=vision)
        config, make = AutoConfig.for_model(name, **settings), AutoModelForImageTextToText
    # The implementations of attention and experts that know float64 and torch.compile.
    plain = dict(attn_implementation="eager", experts_implementation="batched_mm")
    return make.from_config(config, **plain)


@functools.cache
def _random_model(name, odd):
    """A float32 model on the CPU whose weights depend on the arguments alone."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    settings = family.config | (family.odd if odd else {})
    model = new_model(name, family.vision, vocab_size=VOCABULARY, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # none stays at a constant that hides its factor
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def make_model(name, odd, dtype, device, double=False, blur=False):
    """The family's model with weights of dtype; double computes with those weights in float64.

    blur moves the double weights by up to a last place of dtype, for the rounding of the weights
    and of what is computed with them.
    """
    model = copy.deepcopy(_random_model(name, odd)).to(dtype)
    if double:
        model = model.double()
    if blur:
        generator = torch.Generator().manual_seed(2)
        eps = torch.finfo(dtype).eps
        with torch.no_grad():
            for p in model.parameters():
                p *= 1 + eps * (2 * torch.rand(p.shape, generator=generator, dtype=p.dtype) - 1)
    return model.to(device)


def _tokens(batch, length, device):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator).to(device)


def _cache_argument(output):
    """The cache in a model's output, under the name by which the next call takes it."""
    for name in ("past_key_values", "cache_params"):
        if output.get(name) is not None:
            return {name: output[name]}
    raise AssertionError("the model returned no cache")


def _gradients(model, logits):
    """Gradients of a random projection of the logits, by parameter name."""
    generator = torch.Generator().manual_seed(4)
    cotangent = torch.randn(logits.shape, generator=generator).to(logits)
    model.zero_grad()
    (logits * cotangent).sum().backward()
    return {
        f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def _pieces(model, tokens, lengths):
    """Logits of tokens given piece by piece to a model with a cache."""
    logits, cache = [], {}
    for piece in tokens.split(lengths, dim=1):
        output = model(piece, use_cache=True, **cache)
        cache = _cache_argument(output)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def evaluate(model):
    """Forward without a cache, in eval mode."""
    return {"logits": model.eval()(_tokens(2, 11, model.device), use_cache=False).logits}


def train(model):
    """Forward and backward in training mode."""
    logits = model.train()(_tokens(2, 11, model.device), use_cache=False).logits
    return {"logits": logits} | _gradients(model, logits)


@torch.no_grad()
def decode(model):
    """A prompt, then three single tokens."""
    return {"logits": _pieces(model.eval(), _tokens(2, 10, model.device), [7, 1, 1, 1])}


@torch.no_grad()
def chunks(model):
    """A prompt in two chunks, then two single tokens."""
    return {"logits": _pieces(model.eval(), _tokens(2, 12, model.device), [6, 4, 1, 1])}


@torch.no_grad()
def short(model):
    """Prompts of 1, 2 and 3 tokens, shorter than the convolution, then two single tokens."""
    model.eval()
    lengths = (1, 2, 3)
    return {
        f"logits after {n}": _pieces(model, _tokens(2, n + 2, model.device), [n, 1, 1])
        for n in lengths
    }


@torch.no_grad()
def generate(model):
    """Greedy generation from two prompts, the shorter one padded on the left."""
    tokens = _tokens(2, 6, model.device)
    mask = torch.ones_like(tokens)
    tokens[0, :2], mask[0, :2] = 0, 0
    output = model.eval().generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return {"logits": torch.stack(output.logits, dim=1), "sequences": output.sequences}


def packed(model, alone=False):
    """One row of several sequences told apart by seq_idx; with alone, one call for each."""
    tokens = _tokens(1, sum(SEGMENTS), model.device)
    ids = torch.repeat_interleave(torch.arange(len(SEGMENTS)), torch.tensor(SEGMENTS))
    positions = torch.cat([torch.arange(n) for n in SEGMENTS])
    where = dict(seq_idx=ids.int()[None].to(model.device))
    where |= dict(position_ids=positions[None].to(model.device))
    if model.config.model_type == "granitemoehybrid":  # its eager attention ignores the positions
        same = ids[:, None] == ids
        mask = torch.zeros(same.shape, dtype=model.dtype).masked_fill(~same.tril(), float("-inf"))
        where["attention_mask"] = dict(
            full_attention=mask[None, None].to(model.device), linear_attention=None
        )

    def call(tokens, **where):
        if model.config.model_type == "mamba2":  # its language model keeps seq_idx to itself
            return model.backbone(tokens, use_cache=False, **where)[0]
        return model(tokens, use_cache=False, **where).logits

    def logits():
        if not alone:
            return call(tokens, **where)
        return torch.cat([call(piece) for piece in tokens.split(SEGMENTS, dim=1)], dim=1)

    model.eval()
    results = {"logits in eval mode": logits().detach()}
    model.train()
    trained = logits()
    return results | {"logits": trained} | _gradients(model, trained)


CELLS = {f.__name__: f for f in (evaluate, train, decode, chunks, short, generate, packed)}


def ask(name, cell, odd, dtype, device, compiler=None):
    """Answers of the model in this process, on the CPU; compiled when there is a compiler."""
    model = make_model(name, odd, dtype, device)
    if compiler:
        model.compile(backend=compiler, fullgraph=True)
    return _answers(CELLS[cell], model)


def claims_full_graphs(name):
    return bool(_random_model(name, odd=False)._can_compile_fullgraph)


def _answers(question, model):
    return {name: answer.detach().cpu() for name, answer in question(model).items()}


# The other process.


def _start_reference(threads):
    for package in ("mamba_ssm", "causal_conv1d", "mambapy", "fla", "kernels"):
        sys.modules[package] = None  # its import fails as if it were not installed
    torch.set_num_threads(threads)


@contextlib.contextmanager
def _double_throughout():
    """Where a model says float32, it gets float64: what is computed is the truth."""
    patches = {(torch, "float32"): torch.float64, (torch, "float"): torch.float64}
    patches[torch.Tensor, "float"] = torch.Tensor.double
    saved = {key: getattr(*key) for key in patches}
    try:
        for key, value in patches.items():
            setattr(*key, value)
        yield
    finally:
        for key, value in saved.items():
            setattr(*key, value)


def _convolve_segments(convolve):
    """transformers' plain convolution, which ignores seq_idx, on each segment of a packed row."""

    def causal_conv1d_fn(x, weight, bias=None, activation=None, seq_idx=None, **rest):
        if seq_idx is None:
            return convolve(x, weight, bias, activation=activation, **rest)
        pieces = x.split(SEGMENTS, dim=-1)
        return torch.cat([convolve(p, weight, bias, activation=activation) for p in pieces], dim=-1)

    return causal_conv1d_fn


def _falcon_mamba_inner(module):
    """The fused block as it was trained: the norm of dt follows dt_proj, over all channels.

    transformers' plain path normalizes dt before dt_proj, over its rank.
    """

    def mamba_inner_fn(
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        out_proj_weight,
        out_proj_bias,
        A,
        B,
        C,
        D,
        delta_bias,
        delta_softplus,
        b_rms_weight,
        c_rms_weight,
        dt_rms_weight,
        b_c_dt_rms_eps,
    ):
        def norm(x, weight):
            return torch.nn.functional.rms_norm(x, x.shape[-1:], weight.to(x), b_c_dt_rms_eps)

        x, z = xz.chunk(2, dim=1)
        x = module.causal_conv1d_fn(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
        rank, dstate = delta_proj_weight.shape[1], A.shape[1]
        dt, B, C = (x.mT @ x_proj_weight.T).split([rank, dstate, dstate], dim=-1)
        dt = norm(dt @ delta_proj_weight.T, dt_rms_weight)
        B, C = norm(B, b_rms_weight), norm(C, c_rms_weight)
        y = module.mamba_selective_scan(
            x, dt.mT, A, B.mT, C.mT, D, z, delta_bias, delta_softplus=delta_softplus
        )
        bias = None if out_proj_bias is None else out_proj_bias.to(xz.dtype)
        return torch.nn.functional.linear(y.mT.to(xz.dtype), out_proj_weight, bias)

    return mamba_inner_fn


@contextlib.contextmanager
def _reference_functions(name, cell):
    """Puts right what transformers' plain path is known to compute differently."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    patches = {}
    if cell == "packed" and FAMILIES[name].packs == "convolution":
        patches["causal_conv1d_fn"] = _convolve_segments(module.causal_conv1d_fn)
    if name == "falcon_mamba":
        patches["mamba_inner_fn"] = _falcon_mamba_inner(module)
    saved = {key: getattr(module, key) for key in patches}
    try:
        vars(module).update(patches)
        yield
    finally:
        vars(module).update(saved)


@contextlib.contextmanager
def _picklable_errors():
    try:
        yield
    except Exception:
        raise RuntimeError(traceback.format_exc()) from None


def _refer(name, cell, odd, dtype, device):
    """Three answers of the plain path, as bytes: exact, plain and blurred."""
    question = CELLS[cell]
    if cell == "packed" and FAMILIES[name].packs == "sequence":
        question = functools.partial(packed, alone=True)
    make = functools.partial(make_model, name, odd, dtype, device)
    with _reference_functions(name, cell), _picklable_errors():
        plain = _answers(question, make())
        double, blurred = make(double=True), make(double=True, blur=True)
        with _double_throughout():
            exact, blurred = _answers(question, double), _answers(question, blurred)
    written = io.BytesIO()
    torch.save((exact, plain, blurred), written)
    return written.getvalue()


class Reference:
    """A process that cannot import our packages and answers with transformers' plain path."""

    def __init__(self):
        spawn = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(
            1, spawn, _start_reference, (torch.get_num_threads(),)
        )
        self._asked = {}

    def ask(self, *question):
        """Starts on a question (name, cell, odd, dtype, device), unless it was asked before."""
        if question not in self._asked:
            self._asked[question] = self._pool.submit(_refer, *question)
        return self._asked[question]

    def judges(self, *question):
        """(exact, plain, blurred), each a dict of named tensors."""
        return torch.load(io.BytesIO(self.ask(*question).result()), weights_only=True)

    def close(self):
        self._pool.shutdown(cancel_futures=True)
