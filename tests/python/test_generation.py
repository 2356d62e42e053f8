"""Generation: filters and draws against plain loops, and the loop over tokens."""

import gc
import math
from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode

from harness import replay
from harness.registration import fused_only, import_bindings
from mamba_ssm import MambaLMHeadModel, bench
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import CausalLMOutput
from mamba_ssm.modules._parts import look_up
from mamba_ssm.utils import generation
from mamba_ssm.utils.generation import (
    InferenceParams,
    decode,
    modify_logit_for_repetition_penalty,
    modify_logits_for_min_p_filtering,
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
)


VOCAB = 50
ATTENTION = {"num_heads": 4, "num_heads_kv": 2, "causal": True, "rotary_emb_dim": 4, "d_conv": 3}
LAYERS = {
    "Mamba": {"ssm_cfg": {"d_state": 4}},
    "Mamba2": {"ssm_cfg": {"layer": "Mamba2", "d_state": 4, "headdim": 8}},
}
HYBRID = {"n_layer": 3, "attn_layer_idx": [1], "attn_cfg": ATTENTION, "d_intermediate": 8}
layers = pytest.mark.parametrize("layers", [*LAYERS.values(), HYBRID], ids=[*LAYERS, "hybrid"])
recurrent_layers = pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])


def make(device="cpu", layers=LAYERS["Mamba"], dtype=torch.float64):
    """A small model whose distributions are not flat."""
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(**{"n_layer": 2, **layers}, d_model=16, vocab_size=VOCAB))
    with torch.no_grad():
        model.backbone.embedding.weight *= 20
    return model.to(device, dtype)


def prompts(device="cpu", batch=3, seqlen=6):
    return torch.randint(VOCAB, (batch, seqlen), generator=seeded()).to(device)


def seeded(device="cpu", seed=1):
    return torch.Generator(device).manual_seed(seed)


def filter_cases():
    """Logits (batch, vocab): random ones, and such with ties and impossible tokens."""
    torch.manual_seed(0)
    random = 3 * torch.randn(4, 33, dtype=torch.float64)
    ties = torch.randint(3, (4, 8)).double()
    ties[1] = 1.0
    impossible = random[:, :9].clone()
    impossible[:, ::2] = -math.inf
    return {"random": random, "ties": ties, "impossible": impossible}


filtered = pytest.mark.parametrize("logits", filter_cases().values(), ids=filter_cases())


def keep(logits, chosen):
    """Each row with -inf instead of tokens that chosen(row as a list) does not contain."""
    rows = []
    for row in logits.tolist():
        tokens = chosen(row)
        rows.append([x if i in tokens else -math.inf for i, x in enumerate(row)])
    return torch.tensor(rows, dtype=logits.dtype)


def ranked(row):
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


def probabilities(row):
    total = math.fsum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def top_p_tokens(row, top_p):
    p, tokens, mass = probabilities(row), set(), 0.0
    for i in ranked(row):
        if mass < top_p:
            tokens.add(i)
        mass += p[i]
    return tokens


def min_p_tokens(row, min_p):
    p = probabilities(row)
    return {i for i in range(len(row)) if p[i] >= min_p * max(p)}


@filtered
@dtypes
@pytest.mark.parametrize("top_k", [0, 1, 2, 5, 8, 100])
def test_top_k(device, logits, dtype, top_k):
    logits = logits.to(dtype)
    got = logits.to(device, copy=True)
    modify_logits_for_top_k_filtering(got, top_k)
    count = min(top_k, logits.shape[1])

    def chosen(row):
        least = sorted(row)[-count] if count else -math.inf
        return {i for i, x in enumerate(row) if x >= least}

    assert torch.equal(got.cpu(), keep(logits, chosen))


@filtered
@dtypes
@pytest.mark.parametrize("top_p", [-1.0, 0.0, 1e-9, 0.24, 0.5, 0.7, 0.93, 1.0])
def test_top_p(device, logits, dtype, top_p):
    logits = logits.to(dtype)
    got = logits.to(device, copy=True)
    modify_logits_for_top_p_filtering(got, top_p)
    if 0 < top_p < 1:
        logits = keep(logits, lambda row: top_p_tokens(row, top_p))
    assert torch.equal(got.cpu(), logits)


def test_top_p_of_equal_tokens():
    """Exactly as many as reach top_p, those of lower index."""
    logits = torch.zeros(2, 4)
    modify_logits_for_top_p_filtering(logits, 0.5)
    assert torch.equal(logits, torch.tensor([[0.0, 0.0, -math.inf, -math.inf]] * 2))


@filtered
@dtypes
@pytest.mark.parametrize("min_p", [-1.0, 0.0, 1e-9, 0.02, 0.3, 0.9, 1.0])
def test_min_p(device, logits, dtype, min_p):
    logits = logits.to(dtype)
    got = logits.to(device, copy=True)
    modify_logits_for_min_p_filtering(got, min_p)
    if min_p > 0:
        logits = keep(logits, lambda row: min_p_tokens(row, min_p))
    assert torch.equal(got.cpu(), logits)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_penalty(device, penalty):
    logits = torch.randn(3, 7, generator=seeded(), dtype=torch.float64)
    previous = torch.tensor([[0, 0, 6], [1, 2, 3], [5, 5, 5]])
    expected = logits.clone()
    for row, tokens in enumerate(previous.tolist()):
        for i in set(tokens):
            x = logits[row, i]
            expected[row, i] = x * penalty if x < 0 else x / penalty
    got = logits.to(device, copy=True)
    assert modify_logit_for_repetition_penalty(got, previous.to(device), penalty) is got
    torch.testing.assert_close(got.cpu(), expected)


OPTIONS = [
    dict(top_k=0),
    dict(top_k=0, temperature=0.5),
    dict(top_k=3),
    dict(top_k=0, top_p=0.7),
    dict(top_k=0, min_p=0.3),
    dict(top_k=4, top_p=0.8, min_p=0.1, temperature=2.0),
    dict(top_k=100, top_p=1.0, min_p=1.0),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_frequencies(device, options):
    """A chi-square test of draws: each row has its distribution, tempered and filtered."""
    draws = 40_000
    torch.manual_seed(0)
    rows = torch.randn(2, 6, dtype=torch.float64)
    rows[1, 0] = -math.inf
    logits = rows.repeat_interleave(draws, 0).to(device)
    tokens = sample(logits, **options, generator=seeded(device)).view(2, draws).cpu()
    for row, got in zip((rows / options.get("temperature", 1.0)).tolist(), tokens):
        best = set(ranked(row)[: options["top_k"] or len(row)])
        row = [x if i in best else -math.inf for i, x in enumerate(row)]
        chosen = best & top_p_tokens(row, options.get("top_p", 1.0))
        chosen &= min_p_tokens(row, options.get("min_p", 0.0))
        p = probabilities([x if i in chosen else -math.inf for i, x in enumerate(row)])
        counts = torch.bincount(got, minlength=6).tolist()
        assert all(n == 0 for n, q in zip(counts, p) if q == 0)
        statistic = sum((n - draws * q) ** 2 / (draws * q) for n, q in zip(counts, p) if q > 0)
        assert statistic < 35.9  # 5 degrees of freedom: exceeded once in a million


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_no_impossible_token_at_the_ends(monkeypatch, u):
    def rand(shape, **kwargs):
        return torch.full(shape, u, dtype=kwargs["dtype"])

    monkeypatch.setattr(torch, "rand", rand)
    torch.manual_seed(0)
    logits = torch.randn(200, 50)
    logits[:, :3] = logits[:, -3:] = -math.inf
    tokens = sample(logits, top_k=0)
    assert (tokens == (3 if u == 0 else 46)).all()


def test_sample_leaves_the_logits():
    logits = torch.randn(3, 9)
    before = logits.clone()
    for options in OPTIONS:
        sample(logits, **options)
    assert torch.equal(logits, before)
    assert torch.equal(sample(logits, temperature=0.0), logits.argmax(-1))


def test_sample_refuses():
    logits = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="top_p must be at most 1, got 1.5"):
        sample(logits, top_k=0, top_p=1.5)
    with pytest.raises(ValueError, match="min_p must be at most 1, got 2"):
        sample(logits, top_k=0, min_p=2)
    with pytest.raises(ValueError, match="temperature must be positive"):
        sample(logits, top_k=0, temperature=0.0)


@layers
def test_greedy_is_the_best_of_one_pass(device, layers):
    """At every length, with the padded vocabulary and without."""
    model, tokens = make(device, layers), prompts(device)
    for vocab_size in (None, VOCAB, 7):
        out = model.generate(tokens, 20, vocab_size=vocab_size)
        assert out.shape == (3, 20) and torch.equal(out[:, :6], tokens)
        with torch.no_grad():
            logits = model(out).logits[..., :vocab_size]
        assert torch.equal(out[:, 6:], logits[:, 5:-1].argmax(-1))


@layers
def test_scores_are_the_logits(device, layers):
    """Before penalty and filters, one for each new token."""
    model, tokens = make(device, layers), prompts(device)
    out = model.generate(
        tokens,
        12,
        top_k=5,
        top_p=0.9,
        repetition_penalty=1.5,
        vocab_size=VOCAB,
        generator=seeded(device),
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert isinstance(out.scores, tuple) and len(out.scores) == 6
    with torch.no_grad():
        logits = model(out.sequences).logits[:, 5:-1, :VOCAB]
    torch.testing.assert_close(torch.stack(out.scores, 1), logits)
    out = model.generate(tokens, 12, return_dict_in_generate=True)
    assert out.scores is None and torch.equal(out.sequences, model.generate(tokens, 12))


@layers
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 6, 100])
def test_prefill_in_pieces(device, layers, chunk_size):
    model, tokens = make(device, layers), prompts(device)
    whole = decode(tokens, model, 12, output_scores=True)
    pieces = decode(tokens, model, 12, output_scores=True, prefill_chunk_size=chunk_size)
    assert torch.equal(pieces.sequences, whole.sequences)
    torch.testing.assert_close(pieces.scores, whole.scores)


def test_repetition_penalty_of_a_generation(device):
    model, tokens = make(device), prompts(device)
    expected = tokens
    with torch.no_grad():
        for _ in range(10):
            logits = model(expected).logits[:, -1]
            logits = modify_logit_for_repetition_penalty(logits, expected, 1.8)
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
    got = model.generate(tokens, 16, repetition_penalty=1.8)
    assert torch.equal(got, expected)
    assert not torch.equal(got, model.generate(tokens, 16))
    assert torch.equal(got, model.generate(tokens.int(), 16, repetition_penalty=1.8))


def end_rows(sequences, starts, eos, pad):
    """What is left of rows that go on behind their first eos from position starts[i] on."""
    rows = []
    for row, start in zip(sequences.tolist(), starts):
        if eos in row[start:]:
            row = row[: row.index(eos, start) + 1]
        rows.append(row)
    width = max(map(len, rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])


@layers
@pytest.mark.parametrize("pad", [None, 0, -100])
def test_rows_end_by_themselves(device, layers, pad):
    model, tokens = make(device, layers), prompts(device)
    whole = model.generate(tokens, 20)
    ends = set()
    for eos in whole[:, 6:].unique().tolist():
        expected = end_rows(whole, [6] * 3, eos, eos if pad is None else pad)
        got = model.generate(tokens, 20, eos_token_id=eos, pad_token_id=pad)
        assert torch.equal(got.cpu(), expected)
        ends.add(got.shape[1])
    one = model.generate(tokens[:1], 20, eos_token_id=int(whole[0, 8]))
    assert torch.equal(one.cpu(), end_rows(whole[:1], [6], int(whole[0, 8]), 0))
    assert one.shape[1] <= 9


class Streamer:
    def __init__(self):
        self.events = []

    def put(self, value):
        assert value.device.type == "cpu"
        self.events.append(value)

    def end(self):
        self.events.append("end")


def test_streamer(device):
    model, tokens, streamer = make(device), prompts(device), Streamer()
    out = model.generate(tokens, 10, streamer=streamer).cpu()
    prompt, *new, end = streamer.events
    assert torch.equal(prompt, out[:, :6]) and end == "end"
    assert [value.shape for value in new] == [(3, 1)] * 4
    assert torch.equal(torch.cat(new, 1), out[:, 6:])


def test_should_stop(device):
    model, tokens, answers = make(device), prompts(device), iter([False, False, True])
    out = model.generate(tokens, 10, should_stop=lambda: next(answers))
    assert torch.equal(out, model.generate(tokens, 8))


@pytest.mark.parametrize("taught", [4, 9, 12, 30])
def test_teacher_outputs(device, taught):
    model, tokens = make(device), prompts(device)
    teacher = prompts(device, seqlen=taught)
    out = decode(tokens, model, 12, teacher_outputs=teacher, output_scores=True)
    expected = out.sequences.clone()
    expected[:, 6:taught] = teacher[:, 6:12]
    assert torch.equal(out.sequences, expected)
    with torch.no_grad():
        logits = model(expected).logits[:, 5:-1]
    torch.testing.assert_close(torch.stack(out.scores, 1), logits)
    first_free = max(taught, 6)
    assert torch.equal(expected[:, first_free:], logits.argmax(-1)[:, first_free - 6 :])


LENGTHS = [[2, 6, 4, 1], [6, 6, 6, 6], [1, 1, 1, 1], [3, 3, 5, 3]]


@layers
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("penalty", [1.0, 1.8])
def test_prompts_of_any_lengths(device, layers, lengths, chunk_size, penalty):
    """Each row as it would be alone, whatever lies behind its prompt."""
    model, tokens = make(device, layers), prompts(device, batch=4)
    for row, length in zip(tokens, lengths):
        row[length:] = -100
    options = {"prefill_chunk_size": chunk_size, "repetition_penalty": penalty}
    got = model.generate(tokens, 14, lengths=torch.tensor(lengths), **options)
    alone = [model.generate(row[None, :n], 14, **options) for row, n in zip(tokens, lengths)]
    assert torch.equal(got, torch.cat(alone))
    for eos in got.unique().tolist():
        expected = end_rows(got, lengths, eos, -100)
        options["pad_token_id"] = -100
        ended = model.generate(
            tokens, 14, lengths=torch.tensor(lengths), eos_token_id=eos, **options
        )
        assert torch.equal(ended.cpu(), expected)


@layers
def test_scores_of_prompts_of_any_lengths(device, layers):
    model, tokens, lengths = make(device, layers), prompts(device), [2, 6, 1]
    teacher = prompts(device, seqlen=9)
    out = decode(
        tokens,
        model,
        11,
        teacher_outputs=teacher,
        output_scores=True,
        lengths=torch.tensor(lengths),
    )
    for row, length in enumerate(lengths):
        one = decode(
            tokens[row : row + 1, :length],
            model,
            11,
            teacher_outputs=teacher[row : row + 1],
            output_scores=True,
        )
        assert torch.equal(out.sequences[row], one.sequences[0])
        for got, expected in zip(out.scores, one.scores):
            torch.testing.assert_close(got[row], expected[0])


class Positions(torch.nn.Module, generation.GenerationMixin):
    """Draws token n + 1 for a row that has n tokens, and keeps what it is called with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, input_ids, position_ids, inference_params, num_last_tokens, seq_idx=None):
        offset, seqlen = inference_params.seqlen_offset, input_ids.shape[1]
        assert offset + seqlen <= inference_params.max_seqlen
        assert num_last_tokens == 1
        lengths = inference_params.lengths_per_sample
        if position_ids is None:
            assert offset == 0 and lengths is None
            position_ids = torch.arange(seqlen).expand(input_ids.shape)
        elif lengths is None:
            assert (position_ids == torch.arange(offset, offset + seqlen)).all()
        else:
            assert (position_ids == lengths[:, None]).all()
        padding = None if seq_idx is None else (seq_idx < 0).tolist()
        self.calls.append((input_ids.tolist(), position_ids.tolist(), padding))
        logits = torch.nn.functional.one_hot(position_ids[:, -1:] + 2, 12).double()
        return CausalLMOutput(logits=logits)


def test_calls_of_the_model():
    """Tokens, positions and padding; no position lies behind the end of a cache."""
    model = Positions()
    model.generate(torch.tensor([[1, 2, 3], [1, 2, 3]]), 5, prefill_chunk_size=2)
    assert model.calls == [
        ([[1, 2]] * 2, [[0, 1]] * 2, None),
        ([[3]] * 2, [[2]] * 2, None),
        ([[4]] * 2, [[3]] * 2, None),
    ]
    model = Positions()
    ids = torch.tensor([[1, 2, 3, 4], [1, -9, -9, -9], [1, 2, -9, -9]])
    got = model.generate(ids, 4, lengths=torch.tensor([4, 1, 2]), prefill_chunk_size=2)
    assert got.tolist() == [[1, 2, 3, 4]] * 3
    prefill = [[[False, False], [True, True], [False, True]], [[False], [True], [True]]]
    assert model.calls == [
        ([[1, 2], [1, 1], [1, 2]], [[0, 1]] * 3, prefill[0]),
        ([[3], [1], [1]], [[2]] * 3, prefill[1]),
        ([[4], [1], [2]], [[3], [0], [1]], None),
        ([[5], [2], [3]], [[3], [1], [2]], None),
        ([[5], [3], [4]], [[3], [2], [3]], None),
    ]


def test_long_prompts_come_back(device):
    model, tokens = make(device), prompts(device)
    for max_length in (3, 6):
        out = decode(tokens, model, max_length, output_scores=True)
        assert torch.equal(out.sequences, tokens) and out.scores == ()
    got = model.generate(tokens, 4, lengths=torch.tensor([6, 2, 4]), pad_token_id=0)
    expected = torch.zeros_like(tokens)
    expected[0] = tokens[0]
    expected[1, :4] = model.generate(tokens[1:2, :2], 4)[0]
    expected[2, :4] = tokens[2, :4]
    assert torch.equal(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("with_ids", [False, True])
def test_packed_prefill(device, with_ids):
    """Prompts in one row: their logits, and the steps of all of them behind that, are those of each
    prompt alone. A row of the cache belongs to each."""
    model, lengths, total = make(device, LAYERS["Mamba2"]), [5, 1, 3, 7], 12
    tokens = prompts(device, 4, total)
    expected = model(tokens).logits  # of each sequence alone, and causal
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    packed = torch.cat([tokens[i, :n] for i, n in enumerate(lengths)])[None]
    packing = {"cu_seqlens": bounds}
    if with_ids:  # as upstream wants it
        packing["seq_idx"] = torch.repeat_interleave(
            torch.arange(4, dtype=torch.int32), torch.tensor(lengths)
        )[None].to(device)
    params = InferenceParams(max_seqlen=total, max_batch_size=4)
    logits = model(packed, inference_params=params, **packing).logits
    alone = torch.cat([expected[i, :n] for i, n in enumerate(lengths)])[None]
    torch.testing.assert_close(logits, alone)
    assert params.key_value_memory_dict[0][1].shape[0] == 4
    rows = torch.arange(4, device=device)
    for step in range(total - max(lengths)):
        position = torch.tensor(lengths, device=device) + step
        params.seqlen_offset = max(lengths) + step
        logits = model(tokens[rows, position, None], inference_params=params).logits
        torch.testing.assert_close(logits[:, 0], expected[rows, position])


@recurrent_layers
@pytest.mark.parametrize("ragged", [False, True])
def test_state_dtype(device, layers, ragged):
    tokens = prompts(device)
    options = {"lengths": torch.tensor([2, 6, 5])} if ragged else {}

    def scores(model, state_dtype):
        teacher = prompts(device, seqlen=30)
        out = decode(
            tokens,
            model,
            30,
            state_dtype=state_dtype,
            output_scores=True,
            teacher_outputs=teacher,
            **options,
        )
        return torch.stack(out.scores)

    model = make(device, layers, torch.float32)
    for conv_state, ssm_state in model.allocate_inference_cache(
        3, 9, state_dtype=torch.bfloat16
    ).values():
        assert (conv_state.dtype, ssm_state.dtype) == (torch.float32, torch.bfloat16)
    exact = scores(model, None)
    assert torch.equal(scores(model, torch.float32), exact)
    error = (scores(model, torch.bfloat16) - exact).norm() / exact.norm()
    assert 0 < error < 1e-2
    model = model.bfloat16()
    assert torch.equal(scores(model, torch.bfloat16), scores(model, None))


def test_options_without_effect_on_a_cpu():
    model, tokens = make(), prompts()
    assert torch.equal(model.generate(tokens, 12, cg=True), model.generate(tokens, 12))
    assert not hasattr(model, "_decoding_cache")


def test_timing_is_printed(device, capsys):
    make(device).generate(prompts(device), 8, enable_timing=True)
    assert capsys.readouterr().out.startswith("generation: ")


def test_a_model_trains_with_its_tokens(device):
    model = make(device)
    model(model.generate(prompts(device), 9)).logits.sum().backward()


def test_empty_batch(device):
    model, tokens = make(device), prompts(device)[:0]
    assert model.generate(tokens, 8).shape == (0, 8)
    assert model.generate(tokens, 8, top_k=0, lengths=tokens[:, 0]).shape == (0, 8)


def test_refused_arguments():
    model, tokens = make(), prompts()
    for arguments, message in {
        "lengths=torch.tensor([1, 2])": r"lengths must have shape \(batch,\) = \(3,\), got \(2,\)",
        "lengths=torch.tensor([1, 0, 2])": "from 1 to seqlen = 6, got 0 to 2",
        "lengths=torch.tensor([1, 7, 2])": "from 1 to seqlen = 6, got 1 to 7",
        "repetition_penalty=0.0": "repetition_penalty must be positive",
        "prefill_chunk_size=0": "prefill_chunk_size must be positive",
        "top_p=1.1": "top_p must be at most 1",
    }.items():
        with pytest.raises(ValueError, match=message):
            eval(f"model.generate(tokens, 9, {arguments})")
    for bad in (tokens[0], tokens[:, :0]):
        with pytest.raises(ValueError, match=r"\(batch, seqlen\)"):
            model.generate(bad, 9)
    with pytest.raises(NotImplementedError):
        generation.GenerationMixin().allocate_inference_cache(1, 1)


@layers
def test_graphs(device, monkeypatch, layers):
    """Graphs of steps, and of prompts whose shape came before, emulated on a CPU, give the tokens
    of plain calls; graphs are kept."""
    graphs = []
    if device == "cpu":
        graphs = replay.patch(monkeypatch)
        monkeypatch.setattr(generation, "_has_graphs", lambda device: True)
    model = make(device, layers, torch.float32)

    def check(batch, max_length, captured, **options):
        tokens = prompts(device, batch)
        for sampled in ({}, {"top_k": 0}):
            plain, graph = (
                decode(
                    tokens,
                    model,
                    max_length,
                    **sampled,
                    cg=cg,
                    output_scores=True,
                    generator=seeded(device),
                    **options,
                )
                for cg in (False, True)
            )
            assert torch.equal(plain.sequences, graph.sequences)
            torch.testing.assert_close(plain.scores, graph.scores)
        assert device != "cpu" or len(graphs) == captured
        return plain.sequences

    first = check(3, 12, 2)
    check(3, 9, 2)
    check(2, 12, 4)  # in the states of the larger batch
    check(3, 12, 4, lengths=torch.tensor([2, 6, 3]), prefill_chunk_size=2, eos_token_id=9)
    check(3, 12, 4)
    check(3, 20, 6)
    check(4, 12, 8)
    check(4, 12, 10, state_dtype=torch.bfloat16)
    check(4, 12, 12)
    with torch.no_grad():
        model.backbone.norm_f.weight.mul_(-1)  # in place: the graph reads it
    assert not torch.equal(check(3, 12, 14), first)
    model.backbone.norm_f.weight = torch.nn.Parameter(-model.backbone.norm_f.weight.detach())
    assert torch.equal(check(3, 12, 16), first)
    assert model._decoding_cache.max_batch_size == 3


def test_few_graphs_of_prompts_are_kept(monkeypatch):
    """The oldest shape goes when there are too many; a long prompt gets none."""
    graphs = replay.patch(monkeypatch)
    monkeypatch.setattr(generation, "_has_graphs", lambda device: True)
    monkeypatch.setattr(generation, "_MOST_PROMPT_GRAPHS", 2)
    monkeypatch.setattr(generation, "_MOST_PROMPT_TOKENS", 12)
    model = make()
    for seqlen in (3, 3, 4, 4, 5, 5, 3, 7, 7):  # two rows of 7 are too many
        tokens = prompts(batch=2, seqlen=seqlen)
        assert torch.equal(decode(tokens, model, 9, cg=True)[0], decode(tokens, model, 9)[0])
    assert len(graphs) == 1 + 3
    assert list(model._decoding_cache.prompts) == [(2, 5), (2, 3)]


@recurrent_layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        *OPTIONS,
        dict(repetition_penalty=1.4),
        dict(top_k=0, eos_token_id=7, pad_token_id=3),
        dict(top_k=0, vocab_size=20, prefill_chunk_size=4, temperature=1.5),
        dict(top_k=0, state_dtype=torch.float32, repetition_penalty=1.2, top_p=0.9),
        dict(top_k=8, state_dtype=torch.bfloat16),
        dict(lengths=torch.tensor([2, 6, 5]), prefill_chunk_size=3, repetition_penalty=1.3),
        dict(lengths=torch.tensor([6, 1, 4]), top_k=0, eos_token_id=7, pad_token_id=-100),
    ],
    ids=str,
)
def test_cpp_draws_the_same_tokens(tmp_path, layers, dtype, options):
    _C = import_bindings()
    model, tokens = make(layers=layers, dtype=dtype), prompts()
    twin = _C.MambaLMHeadModel.from_pretrained(saved(model, tmp_path), dtype=dtype)
    python, cpp = Streamer(), []
    expected = model.generate(tokens, 40, **options, generator=seeded(), streamer=python)
    got = twin.generate(tokens, 40, **options, generator=seeded(), on_tokens=cpp.append)
    assert torch.equal(got, expected)
    assert torch.equal(torch.cat(cpp, 1), torch.cat(python.events[1:-1], 1))
    stopped = []
    for generate in (model.generate, twin.generate):
        answers = iter([False, False, True])
        stopped.append(
            generate(tokens, 40, **options, generator=seeded(), should_stop=lambda: next(answers))
        )
    assert torch.equal(*stopped)


@recurrent_layers
def test_cpp_graphs(device, tmp_path, layers):
    """Steps of a graph give the tokens of plain steps; on a CPU nothing is captured."""
    _C = import_bindings()
    if device != "cpu" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("torch has graphs in C++ from 2.13 on")
    folder, tokens = saved(make(layers=layers, dtype=torch.float32), tmp_path), prompts(device)
    model = _C.MambaLMHeadModel.from_pretrained(folder, device=torch.device(device))
    for options in ({}, {"lengths": torch.tensor([2, 6, 5]), "eos_token_id": 7}, {"top_k": 0}):
        plain, graph = (
            model.generate(tokens, 20, **options, cg=cg, generator=seeded(device))
            for cg in (False, True)
        )
        assert torch.equal(plain, graph)


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a graph of a GPU")
def test_old_graphs_do_not_spoil_a_capture():
    """Garbage that holds a graph is not collected while another one is made."""
    config = MambaConfig(64, n_layer=1, vocab_size=VOCAB)
    model = MambaLMHeadModel(config, device="cuda").eval()
    model.generate(prompts("cuda"), 9, cg=True)
    garbage = [model._decoding_cache]
    garbage.append(garbage)
    del model._decoding_cache, garbage
    before = gc.get_threshold()
    gc.disable()
    other = MambaLMHeadModel(config, device="cuda").eval()
    plain = other.generate(prompts("cuda"), 9)
    gc.set_threshold(1)
    gc.enable()
    try:
        assert torch.equal(other.generate(prompts("cuda"), 9, cg=True), plain)
    finally:
        gc.set_threshold(*before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts the kernels of a GPU")
@pytest.mark.parametrize("layer, most", [("Mamba1", 6), ("Mamba2", 4)])
def test_launches_of_a_step(layer, most):
    """Of a layer, products with weights included."""

    def launches(n_layer):
        config = MambaConfig(256, n_layer=n_layer, vocab_size=VOCAB, ssm_cfg=dict(layer=layer))
        model = MambaLMHeadModel(config, device="cuda", dtype=torch.bfloat16).eval()
        return bench.launches_of_step(model)

    assert launches(4) - launches(2) <= 2 * most


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="the tiles are of compute capability 9.0",
)
@fused_only
@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_first_cuda_call_loads_little(layer):
    """Nothing of a short generation needs torch's library of products, or its kernel for few ids."""
    config = MambaConfig(256, n_layer=2, vocab_size=VOCAB, ssm_cfg=dict(layer=layer))
    model = MambaLMHeadModel(config, device="cuda", dtype=torch.bfloat16).eval()
    with torch.profiler.profile() as profile:
        model.generate(prompts("cuda", batch=2, seqlen=32), 36, cg=True)
        model.generate(prompts("cuda", batch=1, seqlen=20), 24)
    names = {event.key for event in profile.key_averages()}
    assert not names & {"aten::mm", "aten::addmm", "aten::bmm"}
    assert not [name for name in names if "indexSelectSmallIndex" in name]


@pytest.mark.parametrize("count", [0, 1, 2, 16, 17])
def test_look_up(count, device):
    embedding = torch.nn.Embedding(VOCAB, 24, device=device)
    ids = torch.randint(VOCAB, (1, count), generator=seeded()).to(device)
    with torch.inference_mode():
        assert torch.equal(look_up(embedding, ids), embedding(ids))
    assert look_up(embedding, ids).requires_grad


def loaded(work):
    """Which of SOME_KERNELS work() calls."""
    with torch.profiler.profile() as profile:
        work()
    return SOME_KERNELS & {event.key for event in profile.key_averages()}


SOME_KERNELS = {"aten::mm", "aten::gather", "aten::argmax", "aten::topk", "aten::sort"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="loads kernels of a GPU")
def test_cuda_model_has_its_kernels_loaded(monkeypatch):
    """Those of products and of sampling, once for a type, without a draw from the generator."""
    config = MambaConfig(64, n_layer=1, vocab_size=VOCAB)
    monkeypatch.setattr(generation, "_loaded", set())
    model = MambaLMHeadModel(config)
    before = torch.cuda.get_rng_state()
    assert loaded(model.cuda) == SOME_KERNELS
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert not loaded(model.cuda)
    with FakeTensorMode():
        MambaLMHeadModel(config, device="cuda", dtype=torch.bfloat16)
    model.lm_head = torch.nn.Identity()
    assert not loaded(model.half)
    constructor = partial(MambaLMHeadModel, config, device="cuda", dtype=torch.bfloat16)
    assert loaded(constructor) == SOME_KERNELS and not loaded(constructor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="loads kernels of a GPU")
def test_cuda_cpp_model_has_its_kernels_loaded(tmp_path):
    load = import_bindings().MambaLMHeadModel.from_pretrained
    folder = saved(make(dtype=torch.float32), tmp_path)
    assert loaded(lambda: load(folder, device=torch.device("cuda"))) == SOME_KERNELS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="loads kernels of a GPU")
def test_cuda_model_where_kernels_cannot_be_loaded(monkeypatch):
    """A model is made all the same, when memory is short or an algorithm is not allowed."""

    def fails(*args, **kwargs):
        raise RuntimeError

    monkeypatch.setattr(generation, "_loaded", set())
    monkeypatch.setattr(generation, "decode", fails)
    MambaLMHeadModel(MambaConfig(64, n_layer=1, vocab_size=VOCAB), device="cuda")
