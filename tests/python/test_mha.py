"""Attention against a plain float64 reference, alone and with a cache."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from mamba_ssm.modules.mha import MHA, _update_kv_cache
from mamba_ssm.utils.generation import InferenceParams

OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "grouped": {"causal": True, "num_heads_kv": 2},
    "one head of keys": {"num_heads_kv": 1, "causal": True},
    "head_dim": {"causal": True, "head_dim": 10},
    "scale": {"causal": True, "softmax_scale": 1.5},
    "no biases": {"qkv_proj_bias": False, "out_proj_bias": False},
    "conv": {"causal": True, "d_conv": 4},
    "rotary": {"causal": True, "rotary_emb_dim": 6},
    "part rotary": {"causal": True, "rotary_emb_dim": 2, "rotary_emb_base": 50.0},
    "interleaved": {"causal": True, "rotary_emb_dim": 4, "rotary_emb_interleaved": True},
    "MLP": {"causal": True, "mlp_dim": 30},
    "all": {
        "causal": True,
        "num_heads_kv": 2,
        "head_dim": 8,
        "d_conv": 3,
        "rotary_emb_dim": 6,
        "rotary_emb_interleaved": True,
        "softmax_scale": 0.2,
        "mlp_dim": 256,
        "qkv_proj_bias": False,
    },
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
CAUSAL = {name: o for name, o in OPTIONS.items() if o.get("causal")}
causal_options = pytest.mark.parametrize("options", CAUSAL.values(), ids=CAUSAL.keys())


def make(device="cpu", dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    return MHA(24, 4, layer_idx=0, dtype=dtype, **kwargs).to(device)


def tokens(device="cpu", seqlen=7, batch=2, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(batch, seqlen, 24, dtype=dtype).to(device)


def rotate(vector, position, dim, base, interleaved):
    """The first dim numbers of vector (head_dim), turned pair by pair."""
    turned = list(vector)
    for i in range(dim // 2):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
        angle = position / base ** (2 * i / dim)
        a, b = vector[first], vector[second]
        turned[first] = a * math.cos(angle) - b * math.sin(angle)
        turned[second] = a * math.sin(angle) + b * math.cos(angle)
    return torch.stack(turned)


def reference(mha, x, options):
    """Row by row, head by head, query by query."""
    heads = 4
    heads_kv = options.get("num_heads_kv", heads)
    head_dim = options.get("head_dim", 24 // heads)
    mlp_dim = -(-options.get("mlp_dim", 0) // 256) * 256
    qkv_dim = head_dim * (heads + 2 * heads_kv)
    rows = []
    for row in x:
        projected = row @ mha.in_proj.weight.T
        if mha.in_proj.bias is not None:
            projected = projected + mha.in_proj.bias
        qkv, up, gate = projected.split([qkv_dim, mlp_dim // 2, mlp_dim // 2], dim=-1)
        if options.get("d_conv"):
            width = options["d_conv"]
            padded = F.pad(qkv, (0, 0, width - 1, 0))
            taps = mha.conv1d.weight[:, 0]
            qkv = mha.conv1d.bias + sum(taps[:, k] * padded[k : k + len(row)] for k in range(width))
        q, k, v = (
            part.view(len(row), -1, head_dim)
            for part in qkv.split([head_dim * n for n in (heads, heads_kv, heads_kv)], dim=-1)
        )
        if options.get("rotary_emb_dim"):
            how = (
                options["rotary_emb_dim"],
                options.get("rotary_emb_base", 10000.0),
                options.get("rotary_emb_interleaved", False),
            )
            q, k = (
                torch.stack([torch.stack([rotate(h, t, *how) for h in m]) for t, m in enumerate(p)])
                for p in (q, k)
            )
        out = []
        for t in range(len(row)):
            last = t + 1 if options.get("causal") else len(row)
            for h in range(heads):
                of = h // (heads // heads_kv)
                scale = options.get("softmax_scale") or head_dim**-0.5
                weights = torch.exp(scale * (k[:last, of] @ q[t, h]))
                out.append(weights @ v[:last, of] / weights.sum())
        out = torch.stack(out).view(len(row), heads * head_dim)
        out = torch.cat([out, up * gate * torch.sigmoid(gate)], dim=-1) @ mha.out_proj.weight.T
        rows.append(out if mha.out_proj.bias is None else out + mha.out_proj.bias)
    return torch.stack(rows)


@options
def test_state_dict(options):
    heads_kv, head_dim = options.get("num_heads_kv", 4), options.get("head_dim", 6)
    qkv_dim, mlp_dim = head_dim * (4 + 2 * heads_kv), 256 if "mlp_dim" in options else 0
    expected = {"in_proj.weight": (qkv_dim + mlp_dim, 24)}
    if options.get("qkv_proj_bias", True):
        expected["in_proj.bias"] = (qkv_dim + mlp_dim,)
    if "d_conv" in options:
        expected["conv1d.weight"] = (qkv_dim, 1, options["d_conv"])
        expected["conv1d.bias"] = (qkv_dim,)
    expected["out_proj.weight"] = (24, head_dim * 4 + mlp_dim // 2)
    if options.get("out_proj_bias", True):
        expected["out_proj.bias"] = (24,)
    state_dict = make(**options).state_dict()
    assert {name: tuple(t.shape) for name, t in state_dict.items()} == expected
    assert list(state_dict) == list(expected)


@options
def test_equals_reference(device, options):
    mha, x = make(device, **options), tokens(device)
    outs, gradients = [], []
    for function in (mha, lambda x: reference(mha, x, options)):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).to(device)
        out.backward(dout)
        outs.append(out.detach())
        gradients.append({"x": leaf.grad, **{n: p.grad for n, p in mha.named_parameters()}})
        mha.zero_grad()
    torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_other_dtypes(device, dtype, name):
    """The error is a few roundings of what the numbers are made of."""
    options = OPTIONS[name]
    mha, x = make(device, dtype, **options), tokens(device, dtype=dtype)
    out = mha(x)
    assert out.dtype == dtype
    exact = reference(copy.deepcopy(mha).double(), x.double(), options)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)


def test_long_rotary_positions_keep_their_precision():
    """Also in 16 bit, where positions themselves have no place."""
    mha = make(dtype=torch.bfloat16, rotary_emb_dim=6).to(torch.bfloat16)
    x = torch.zeros(1, 1, 1, 6, dtype=torch.bfloat16)
    x[..., 0] = 1
    turned = mha.rotary_emb(x, torch.tensor([100_001]))
    assert turned[0, 0, 0, 0].item() == pytest.approx(math.cos(100_001), abs=4e-3)
    assert turned[0, 0, 0, 3].item() == pytest.approx(math.sin(100_001), abs=4e-3)


# With a cache -----------------------------------------------------------------------------------


def run_in_pieces(mha, x, pieces, lengths=False):
    params = InferenceParams(max_seqlen=x.shape[1], max_batch_size=x.shape[0])
    if lengths:
        params.lengths_per_sample = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
    outs = []
    for piece in x.split(pieces, dim=1):
        outs.append(mha(piece, inference_params=params))
        params.seqlen_offset += piece.shape[1]
        if lengths:
            params.lengths_per_sample += piece.shape[1]
    states = params.key_value_memory_dict[0]
    assert not any(state.requires_grad for state in states if state is not None)
    return torch.cat(outs, dim=1)


@causal_options
@pytest.mark.parametrize("pieces", [[7], [3, 4], [1, 1, 1, 1, 1, 1, 1], [4, 1, 2]], ids=str)
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_pieces_equal_the_whole(device, options, pieces, lengths, grad):
    mha, x = make(device, **options), tokens(device)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(run_in_pieces(mha, x, pieces, lengths), mha(x))


@pytest.mark.parametrize("lengths", [False, True])
def test_without_causal_all_keys_so_far_are_seen(device, lengths):
    mha, x = make(device, rotary_emb_dim=6), tokens(device)
    out = run_in_pieces(mha, x, [3, 3, 1], lengths)
    for begin, end in ((0, 3), (3, 6), (6, 7)):
        torch.testing.assert_close(out[:, begin:end], mha(x[:, :end])[:, begin:end])


@pytest.mark.parametrize("name", ["grouped", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_in_other_dtypes(device, name, dtype):
    mha, x = make(device, dtype, **OPTIONS[name]), tokens(device, dtype=dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    with torch.no_grad():
        torch.testing.assert_close(
            run_in_pieces(mha, x, [4, 1, 1, 1]), mha(x), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("name", ["rotary", "all"])
def test_gradient_of_continued_tokens(device, lengths, name):
    mha, x = make(device, **OPTIONS[name]), tokens(device)
    expected_x, got_x = (x[:, 4:].clone().requires_grad_() for _ in range(2))
    mha(torch.cat([x[:, :4], expected_x], dim=1))[:, 4:].square().sum().backward()
    got = run_in_pieces(mha, torch.cat([x[:, :4], got_x], dim=1), [4, 3], lengths)
    got[:, 4:].square().sum().backward()
    torch.testing.assert_close(got_x.grad, expected_x.grad)


def test_rows_of_different_lengths(device):
    """lengths_per_sample says where each row is."""
    mha, x = make(device, causal=True, rotary_emb_dim=6, num_heads_kv=2), tokens(device)
    whole, lengths = mha(x), [2, 5]
    params = InferenceParams(max_seqlen=7, max_batch_size=2)
    with torch.no_grad():
        mha(x[:, :5], inference_params=params)
        params.seqlen_offset = 5
        params.lengths_per_sample = torch.tensor(lengths, dtype=torch.int32, device=device)
        pieces = torch.stack([x[b, n : n + 2] for b, n in enumerate(lengths)])
        out = mha(pieces, inference_params=params)
    expected = torch.stack([whole[b, n : n + 2] for b, n in enumerate(lengths)])
    torch.testing.assert_close(out, expected)


def test_rows_of_a_larger_cache(device):
    mha, x = make(device, causal=True, d_conv=3), tokens(device)
    params = InferenceParams(max_seqlen=7, max_batch_size=5, batch_size_offset=2)
    params.key_value_memory_dict[0] = states = mha.allocate_inference_cache(5, 7)
    with torch.no_grad():
        outs = [mha(x[:, :3], inference_params=params)]
        params.seqlen_offset = 3
        outs.append(mha(x[:, 3:], inference_params=params))
    torch.testing.assert_close(torch.cat(outs, dim=1), mha(x))
    assert params.key_value_memory_dict[0] is states
    for state in states:
        assert state[2:4].abs().sum() > 0
        assert state[:2].abs().sum() == state[4:].abs().sum() == 0


def test_cache():
    mha = make(num_heads_kv=2, d_conv=4, dtype=torch.bfloat16)
    kv_cache, conv_state = mha.allocate_inference_cache(3, 9)
    assert kv_cache.shape == (3, 9, 2, 2, 6) and conv_state.shape == (3, 48, 4)
    assert kv_cache.dtype == conv_state.dtype == torch.bfloat16
    assert kv_cache.count_nonzero() == conv_state.count_nonzero() == 0
    kv_cache, conv_state = make().allocate_inference_cache(3, 9, dtype=torch.float32)
    assert kv_cache.dtype == torch.float32 and conv_state is None


def test_cache_of_another_dtype(device):
    mha, x = make(device, **OPTIONS["all"]), tokens(device)
    params = InferenceParams(max_seqlen=7, max_batch_size=2)
    params.key_value_memory_dict[0] = mha.allocate_inference_cache(2, 7, dtype=torch.float32)
    with torch.no_grad():
        first = mha(x[:, :4], inference_params=params)
        params.seqlen_offset = 4
        rest = mha(x[:, 4:], inference_params=params)
    torch.testing.assert_close(torch.cat([first, rest], 1), mha(x), rtol=1e-5, atol=1e-5)


def test_conv_state_holds_inputs():
    """Of the convolution, not its results."""
    mha, x = make(causal=True, d_conv=4), tokens()
    params = InferenceParams(max_seqlen=7, max_batch_size=2)
    with torch.no_grad():
        mha(x[:, :2], inference_params=params)
        state = params.key_value_memory_dict[0][1]
        torch.testing.assert_close(state, F.pad(mha.in_proj(x[:, :2]).mT, (2, 0)))
        params.seqlen_offset = 2
        mha(x[:, 2:], inference_params=params)
        torch.testing.assert_close(state, mha.in_proj(x[:, 3:]).mT)


def test_update_kv_cache():
    kv = torch.randn(2, 3, 2, 1, 4)
    cache = torch.zeros(4, 6, 2, 1, 4)
    params = InferenceParams(6, 4, seqlen_offset=2, batch_size_offset=1)
    params.key_value_memory_dict[7] = (cache, None)
    result = _update_kv_cache(kv, params, 7)
    assert result.shape == (2, 5, 2, 1, 4) and torch.equal(result[:, 2:], kv)
    assert torch.equal(cache[1:3, 2:5], kv) and cache.count_nonzero() == kv.numel()
    params.seqlen_offset = 4
    with pytest.raises(ValueError, match=r"\(4, 6\), too small .* positions 4 to 7"):
        _update_kv_cache(kv, params, 7)
    assert cache.count_nonzero() == kv.numel()


def test_cache_grows_for_a_longer_sequence_only():
    mha, x = make(causal=True), tokens()
    params = InferenceParams(max_seqlen=4, max_batch_size=2)
    with torch.no_grad():
        mha(x[:, :4], inference_params=params)
        params.seqlen_offset = 4
        with pytest.raises(ValueError, match="too small"):
            mha(x[:, 4:5], inference_params=params)
        params.reset(7, 2)
        torch.testing.assert_close(mha(x, inference_params=params), mha(x))
    with pytest.raises(ValueError, match="layer_idx"):
        MHA(24, 4, dtype=torch.float64)(x, inference_params=params)


def test_graph_replays_at_any_position(device):
    if device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    mha, x = make(device, **OPTIONS["all"]), tokens(device)
    params = InferenceParams(max_seqlen=7, max_batch_size=2)
    params.lengths_per_sample = torch.full((2,), 6, dtype=torch.int32, device=device)
    piece = x[:, :1].clone()
    with torch.no_grad():
        params.seqlen_offset = 6
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            mha(piece, inference_params=params)
        with torch.cuda.graph(graph, stream=stream):
            out = mha(piece, inference_params=params)
        params.seqlen_offset = 0
        outs = [mha(x[:, :3], inference_params=params)]
        for t in range(3, 7):
            params.lengths_per_sample.fill_(t)
            piece.copy_(x[:, t : t + 1])
            graph.replay()
            outs.append(out.clone())
        torch.testing.assert_close(torch.cat(outs, dim=1), mha(x))


# Packed sequences -------------------------------------------------------------------------------


@options
@pytest.mark.parametrize("packing", ["seq_idx", "cu_seqlens", "both"])
def test_packed_sequences_are_apart(device, options, packing):
    """Each as it would be alone; padding has results and gradients of nothing."""
    mha, x = make(device, **options), tokens(device, seqlen=9, batch=1).requires_grad_()
    ids = [[4, 4, 4, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, -1, 1, 1, -7]][packing == "both"]
    kwargs = {}
    if packing != "cu_seqlens":
        kwargs["seq_idx"] = torch.tensor([ids], device=device)
    if packing != "seq_idx":
        kwargs["cu_seqlens"] = torch.tensor([0, 3, 4, 4, 9], dtype=torch.int32, device=device)
    pieces = [(0, 3), (3, 4), (4, 9)] if packing != "both" else [(0, 3), (3, 4), (4, 5), (6, 8)]
    out = mha(x, **kwargs)
    for begin, end in pieces:
        torch.testing.assert_close(out[:, begin:end], mha(x[:, begin:end]))
    if packing == "both":
        nothing = torch.zeros_like(out[:, 5])
        if mha.out_proj.bias is not None:
            nothing = nothing + mha.out_proj.bias
        assert torch.equal(out[:, 5], nothing) and torch.equal(out[:, 8], nothing)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        assert gradient[0, [5, 8]].count_nonzero() == 0 and gradient[0, 4].count_nonzero() > 0


@causal_options
@pytest.mark.parametrize("pieces", [[5], [2, 1, 2]], ids=str)
def test_rows_of_different_lengths_from_the_start(device, options, pieces):
    """Prompts with padding behind them are continued where they end."""
    mha, x, lengths = make(device, **options), tokens(device), torch.tensor([2, 5], device=device)
    whole = mha(x)
    seq_idx = torch.where(torch.arange(5, device=device) < lengths[:, None], 0, -1)
    params = InferenceParams(max_seqlen=7, max_batch_size=2)
    with torch.no_grad():
        for piece, ids in zip(x[:, :5].split(pieces, 1), seq_idx.split(pieces, 1), strict=True):
            out = mha(piece, inference_params=params, seq_idx=ids)
            start, stop = params.seqlen_offset, params.seqlen_offset + piece.shape[1]
            torch.testing.assert_close(out[1], whole[1, start:stop])
            params.seqlen_offset = stop
        for t in range(2):
            params.lengths_per_sample = lengths + t
            params.seqlen_offset = 5 + t
            piece = torch.stack([x[b, n + t] for b, n in enumerate(lengths)])[:, None]
            out = mha(piece, inference_params=params)
            expected = torch.stack([whole[b, n + t] for b, n in enumerate(lengths)])
            torch.testing.assert_close(out[:, 0], expected)


def test_bad_packing():
    mha, x = make(d_conv=3), tokens()
    params = InferenceParams(max_seqlen=7, max_batch_size=2)
    with pytest.raises(ValueError, match=r"\(batch, seqlen\) = \(2, 7\), got \(2, 6\)"):
        mha(x, seq_idx=torch.zeros(2, 6, dtype=torch.int32))
    with pytest.raises(ValueError, match="batch = 1"):
        mha(x, cu_seqlens=torch.tensor([0, 7]))
    for ids in ([0, 0, 0, 1, 1, 1, 1], [-1, 0, 0, 0, 0, 0, 0]):
        with pytest.raises(ValueError, match="one sequence per row"):
            mha(x, params, seq_idx=torch.tensor([[0] * 7, ids]))
    with pytest.raises(NotImplementedError, match="cu_seqlens"):
        mha(x[:1], params, cu_seqlens=torch.tensor([0, 7]))
    mha.conv1d.register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="plain"):
        mha(x, seq_idx=torch.zeros(2, 7, dtype=torch.int32))


# As a module ------------------------------------------------------------------------------------


def test_empty(device):
    mha = make(device, **OPTIONS["all"])
    assert mha(tokens(device)[:, :0]).shape == (2, 0, 24)
    assert mha(tokens(device)[:0]).shape == (0, 7, 24)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_heads": 5}, "num_heads must divide embed_dim = 24, got 5"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": 4, "num_heads_kv": 3}, "num_heads_kv must divide num_heads = 4, got 3"),
        ({"num_heads": 4, "rotary_emb_dim": 3}, "rotary_emb_dim must be even"),
        ({"num_heads": 4, "rotary_emb_dim": 8}, "at most head_dim = 6, got 8"),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        MHA(24, **arguments)


def test_bad_input():
    with pytest.raises(ValueError, match=r"embed_dim=24\), got \(7, 24\)"):
        make()(tokens()[0])
