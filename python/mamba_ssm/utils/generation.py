"""Generation: how a token is drawn from logits, the loop over tokens, CUDA graphs of a step."""

import contextlib
import gc
import itertools
import math
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_ssm.modules._parts import upcast


@dataclass
class InferenceParams:
    """Caches of all layers, filled by the first call of a model and advanced by later ones."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0  # tokens already in the caches
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)  # layer_idx -> states
    # (batch,), tokens of each row already in the caches; seqlen_offset is then their upper bound
    lengths_per_sample: Optional[Tensor] = None

    def reset(self, max_seqlen, max_batch_size):
        """Starts a new sequence in the same caches."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


class GenerateDecoderOnlyOutput(NamedTuple):
    """sequences (batch, total length) with the prompt, and if asked for, the logits (batch, vocab)
    of each new token before any penalty or filter."""

    sequences: Tensor
    scores: Optional[tuple] = None


def modify_logits_for_min_p_filtering(logits, min_p):
    """Sets to -inf, in place, every token less probable than min_p times the most probable one.

    logits (..., vocab). A min_p that is not in (0, 1] does nothing. Source: arXiv 2407.01082.
    """
    if not 0.0 < min_p <= 1.0:
        return
    # p_i >= min_p * p_max, in logits: the normalization drops out.
    values = upcast(logits)
    threshold = values.amax(dim=-1, keepdim=True) + math.log(min_p)
    logits.masked_fill_(values < threshold, -math.inf)


def modify_logits_for_top_k_filtering(logits, top_k):
    """Sets to -inf, in place, every token less probable than the top_k most probable ones.

    logits (..., vocab). Tokens as probable as the last of them stay too. top_k <= 0 does nothing.
    """
    if top_k <= 0:
        return
    threshold = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
    logits.masked_fill_(logits < threshold, -math.inf)


def modify_logits_for_top_p_filtering(logits, top_p):
    """Sets to -inf, in place, all but the most probable tokens whose sum reaches top_p.

    logits (..., vocab). Of equally probable tokens those of lower index stay. A top_p that is not
    in (0, 1) does nothing. Source: nucleus sampling (arXiv 1904.09751).
    """
    if not 0.0 < top_p < 1.0:
        return
    values, tokens = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = values.double().softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # of all more probable tokens
    removed = torch.empty_like(before, dtype=torch.bool).scatter_(-1, tokens, before >= top_p)
    logits.masked_fill_(removed, -math.inf)


def modify_logit_for_repetition_penalty(logits, prev_output_tokens, repetition_penalty=1.0):
    """Makes tokens that occurred less probable, in place, and returns logits.

    logits (batch, vocab), prev_output_tokens (batch, seqlen). A positive logit is divided by the
    penalty and a negative one multiplied, once however often the token occurred.
    Source: CTRL (arXiv 1909.05858), section 4.1.
    """
    if repetition_penalty == 1.0:
        return logits
    seen = logits.gather(1, prev_output_tokens)
    seen = torch.where(seen < 0, seen * repetition_penalty, seen / repetition_penalty)
    return logits.scatter_(1, prev_output_tokens, seen)


def _check_sampling(top_k, top_p, min_p, temperature):
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if not value <= 1.0:
            raise ValueError(f"sample: {name} must be at most 1, got {value}")
    if top_k != 1 and not temperature > 0.0:
        raise ValueError(
            f"sample: temperature must be positive, got {temperature}; top_k=1 is greedy"
        )


def sample(logits, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0, *, generator=None):
    """A token for each row: logits (batch, vocab) to (batch,), int64. logits stay as they are.

    top_k = 1 takes the most probable one. Else the logits are divided by the temperature; the
    top_k most probable tokens stay (0: all), of these the nucleus of top_p (0: all), of these the
    ones at least min_p times as probable as the best; and one of them is drawn, with the
    torch.Generator of the logits' device (None: the default one). Raises ValueError for top_p or
    min_p above 1 and for a temperature that is not positive.

    The draw inverts the cumulative distribution at a uniform number in float64, so that equal
    generators draw equal tokens in Python and in C++.
    """
    _check_sampling(top_k, top_p, min_p, temperature)
    if top_k == 1:
        return logits.argmax(dim=-1)
    logits = upcast(logits) / temperature
    tokens = None
    if 0 < top_k < logits.shape[-1]:
        logits, tokens = logits.topk(top_k, dim=-1)
    modify_logits_for_top_p_filtering(logits, top_p)
    modify_logits_for_min_p_filtering(logits, min_p)
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[..., -1:]
    u = torch.rand(total.shape, dtype=total.dtype, device=total.device, generator=generator)
    # u <= 1 - 2^-53, so that u * total rounds to less than the total: never behind the last token
    # that has a probability.
    index = torch.searchsorted(cumulative, u * total, right=True)
    return (index if tokens is None else tokens.gather(-1, index)).squeeze(-1)


def _check_prompt(input_ids, lengths):
    """Longest and shortest prompt of the batch."""
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            "decode: input_ids must have shape (batch, seqlen) with at least one token, "
            f"got {tuple(input_ids.shape)}"
        )
    batch_size, seqlen = input_ids.shape
    if lengths is None or batch_size == 0:
        return seqlen, seqlen
    if lengths.shape != (batch_size,):
        raise ValueError(
            f"decode: lengths must have shape (batch,) = ({batch_size},), "
            f"got {tuple(lengths.shape)}"
        )
    longest, shortest = int(lengths.max()), int(lengths.min())
    if shortest < 1 or longest > seqlen:
        raise ValueError(
            f"decode: lengths must be from 1 to seqlen = {seqlen}, got {shortest} to {longest}"
        )
    return longest, shortest


def _prefill(model, input_ids, inference_params, chunk_size, seq_idx=None):
    """Takes input_ids (batch, seqlen) into the caches; returns logits (batch, vocab) of the last.

    seq_idx (batch, seqlen), negative at padding. In pieces of chunk_size tokens, if given.
    """
    batch_size, seqlen = input_ids.shape
    for start in range(0, seqlen, chunk_size or seqlen):
        stop = min(start + (chunk_size or seqlen), seqlen)
        position_ids, mixer_kwargs = None, {}
        if start > 0:
            position_ids = torch.arange(start, stop, device=input_ids.device)
            position_ids = position_ids.expand(batch_size, -1)
        if seq_idx is not None:
            mixer_kwargs["seq_idx"] = seq_idx[:, start:stop]
        inference_params.seqlen_offset = start
        if inference_params.lengths_per_sample is not None:
            inference_params.lengths_per_sample.fill_(start)
        logits = model(
            input_ids[:, start:stop],
            position_ids=position_ids,
            inference_params=inference_params,
            num_last_tokens=1,
            **mixer_kwargs,
        ).logits
    return logits[:, -1]


def _has_graphs(device):
    return device.type == "cuda"


def _clock(device):
    """Milliseconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * time.perf_counter()


@torch.inference_mode()
def decode(
    input_ids,
    model,
    max_length,
    top_k=1,
    top_p=0.0,
    min_p=0.0,
    temperature=1.0,
    repetition_penalty=1.0,
    eos_token_id=None,
    teacher_outputs=None,
    vocab_size=None,
    cg=False,
    enable_timing=False,
    output_scores=False,
    streamer=None,
    *,
    lengths=None,
    pad_token_id=None,
    generator=None,
    prefill_chunk_size=None,
    state_dtype=None,
    should_stop=None,
):
    """Continues each row of input_ids until it has max_length tokens or emits eos_token_id.

    Arguments:
        input_ids: (batch, seqlen), integers, the prompts. One of max_length tokens or more comes
            back as it is.
        model: called as MambaLMHeadModel is.
        top_k, top_p, min_p, temperature, generator: see `sample`.
        repetition_penalty: for tokens of prompt and continuation, see
            `modify_logit_for_repetition_penalty`.
        eos_token_id: ends a row; the other rows go on.
        teacher_outputs: (batch, n), tokens that are taken instead of drawn ones at the first n
            positions of a row.
        vocab_size: no token from here on, those of the padded vocabulary, is drawn.
        cg: on a GPU, replay a step of the model as one CUDA graph, captured at the first call for
            a batch size and kept in model._decoding_cache. No effect on a CPU.
        enable_timing: print the time from prompt to last token.
        output_scores: return the logits.
        streamer: gets .put(input_ids), .put(tokens (batch, 1)) as they arise, .end(), on the CPU.
        lengths: (batch,), integers: row i is a prompt of lengths[i] tokens and what follows them
            is not looked at. Each row continues behind its own prompt, as it would alone.
        pad_token_id: behind the end of rows that end early; else eos_token_id, else 0.
        prefill_chunk_size: tokens of the prompt per call of the model; None: all in one.
        state_dtype: of the scan's states in the caches; None: that of the weights.
        should_stop: called without arguments before each token; true ends the generation with the
            tokens that there are.

    Returns GenerateDecoderOnlyOutput. Raises ValueError for arguments out of range.
    """
    _check_sampling(top_k, top_p, min_p, temperature)
    longest, shortest = _check_prompt(input_ids, lengths)
    if not repetition_penalty > 0.0:
        raise ValueError(f"decode: repetition_penalty must be positive, got {repetition_penalty}")
    if prefill_chunk_size is not None and prefill_chunk_size < 1:
        raise ValueError(f"decode: prefill_chunk_size must be positive, got {prefill_chunk_size}")
    batch_size, device = input_ids.shape[0], input_ids.device
    start_time = _clock(device) if enable_timing else None
    if streamer is not None:
        streamer.put(input_ids.cpu())
    input_ids = input_ids[:, :longest].long()
    ragged = shortest < longest
    if ragged:
        ends = lengths.to(device, torch.int64)[:, None]  # (batch, 1)
        is_prompt = torch.arange(longest, device=device) < ends
        # What is not a prompt need not even be a token.
        input_ids = torch.where(is_prompt, input_ids, input_ids[:, :1])
    else:
        ends = torch.full((batch_size, 1), longest, device=device)
    if pad_token_id is None:
        pad_token_id = 0 if eos_token_id is None else eos_token_id

    steps = max(max_length - shortest, 0)
    max_seqlen = max(max_length, longest)  # of the caches
    cg = cg and _has_graphs(device) and steps > 0
    if cg:
        model._decoding_cache = update_graph_cache(
            model,
            getattr(model, "_decoding_cache", None),
            batch_size,
            longest,
            max_seqlen,
            n_warmups=1,
            state_dtype=state_dtype,
        )
        inference_params = model._decoding_cache.inference_params
        inference_params.reset(max_seqlen, batch_size)
    else:
        inference_params = InferenceParams(max_seqlen, batch_size)
        if state_dtype is not None:
            inference_params.key_value_memory_dict = model.allocate_inference_cache(
                batch_size, max_seqlen, state_dtype=state_dtype
            )

    def step(tokens, i):
        """Logits (batch, vocab) of new token i, behind tokens (batch, 1)."""
        position_ids, lengths = None, None
        if getattr(model, "reads_positions", True):
            # As many tokens of each row are in the caches; rows that have ended stay at the last.
            position_ids = (ends + (i - 1)).clamp(max=max_seqlen - 1)
            lengths = position_ids[:, 0]
        if cg:
            run = model._decoding_cache.run
            return run(tokens, position_ids, lengths, copy=output_scores)[:, -1]
        inference_params.seqlen_offset = min(longest + i, max_seqlen) - 1
        if ragged:
            inference_params.lengths_per_sample = None if lengths is None else lengths.int()
        return model(
            tokens,
            position_ids=position_ids,
            inference_params=inference_params,
            num_last_tokens=1,
        ).logits[:, -1]

    seen = input_ids  # with padding that repeats a token of the row
    rows_differ = ragged or eos_token_id is not None
    if rows_differ:
        finished = ends >= max_length  # (batch, 1)
        counts = torch.zeros_like(ends)  # new tokens of each row
    new_tokens, scores = [], []
    tokens = None  # (batch, 1), the last ones
    for i in range(steps):
        if should_stop is not None and should_stop():
            break
        if i > 0:
            logits = step(tokens, i)
        elif ragged:
            # The last token of each prompt is a step, since its logits are in different columns.
            seq_idx = torch.where(is_prompt[:, 1:], 0, -1).int()
            _prefill(model, input_ids[:, :-1], inference_params, prefill_chunk_size, seq_idx)
            logits = step(input_ids.gather(1, ends - 1), i)
        else:
            run = None
            if cg and prefill_chunk_size is None:
                run = _prompt_graph(model, model._decoding_cache, batch_size, longest)
            if run is None:
                logits = _prefill(model, input_ids, inference_params, prefill_chunk_size)
            else:
                logits = run(input_ids, None, 0, copy=output_scores)[:, -1]
        logits = logits[:, :vocab_size]
        if output_scores:
            scores.append(logits)
        if repetition_penalty != 1.0:
            logits = modify_logit_for_repetition_penalty(logits.clone(), seen, repetition_penalty)
        tokens = sample(logits, top_k, top_p, min_p, temperature, generator=generator)[:, None]
        if teacher_outputs is not None and shortest + i < teacher_outputs.shape[1]:
            position = ends + i
            last = teacher_outputs.shape[1] - 1
            taught = teacher_outputs.gather(1, position.clamp(max=last))
            tokens = torch.where(position <= last, taught, tokens)
        if repetition_penalty != 1.0:
            seen = torch.cat([seen, tokens], dim=1)
        new_tokens.append(tokens)
        if rows_differ:
            new_tokens[-1] = tokens.masked_fill(finished, pad_token_id)
            counts += ~finished
            finished = finished | (ends + (i + 1) >= max_length)
            if eos_token_id is not None:
                finished = finished | (tokens == eos_token_id)
        if streamer is not None:
            streamer.put(new_tokens[-1].cpu())
        if eos_token_id is not None and bool(finished.all()):
            break

    sequences = torch.cat([input_ids, *new_tokens], dim=1)
    if ragged:  # each row's new tokens directly behind its prompt
        behind = ends + torch.arange(len(new_tokens), device=device)
        placed = input_ids.masked_fill(~is_prompt, pad_token_id)
        placed = F.pad(placed, (0, len(new_tokens)), value=pad_token_id)
        sequences = placed.scatter_(1, behind, sequences[:, longest:])
        sequences = sequences[:, : int((ends + counts).max())]
    with torch.inference_mode(False):  # a tensor that a model may also be trained with
        sequences = sequences.clone()
    if streamer is not None:
        streamer.end()
    if enable_timing:
        print(f"generation: {_clock(device) - start_time:.0f} ms")
    return GenerateDecoderOnlyOutput(sequences, tuple(scores) if output_scores else None)


_loaded = set()  # (device, dtype)


@torch.inference_mode()
def load_kernels(weight):
    """Has a GPU load the kernels of torch that a first `generate` would wait for.

    weight: (vocab, d_model), of the head of a model, a parameter on that GPU in float32 or 16 bits.
    Does nothing for anything else, or a second time for a device and dtype.

    A kernel is loaded, or a module of many, when it is first launched. The library of products
    takes 70 to 110 ms for that, and what `decode` and `sample` consist of as long again (torch
    2.11, H200, 2026-11-26): several times what a prompt and the steps behind it take.
    """
    if (
        type(weight) is not torch.nn.Parameter  # as are fake tensors, and sharded ones
        or not weight.is_cuda
        or weight.dim() != 2
        or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16)
        or (weight.device, weight.dtype) in _loaded
    ):
        return
    _loaded.add((weight.device, weight.dtype))
    vocab, d_model = weight.shape
    ids = torch.zeros(1, 2, dtype=torch.int64, device=weight.device)
    logits = weight.new_zeros(1, 1, vocab)

    def model(*args, **kwargs):
        return SimpleNamespace(logits=logits)

    # What cannot run here, for want of memory or of a deterministic algorithm, is reported where
    # it is called for.
    with torch.cuda.device(weight.device), contextlib.suppress(RuntimeError):
        F.linear(weight[:256], weight[:4096])  # as in a prompt
        F.linear(weight[:1], weight)  # as in a step
        weight.gather(0, ids[:, :1].expand(1, d_model))  # as the embedding of one token
        decode(ids, model, 4)
        sampling = dict(top_p=0.9, generator=torch.Generator(weight.device))
        decode(ids, model, 4, top_k=0, **sampling)
        decode(ids, model, 4, top_k=50, min_p=0.1, repetition_penalty=1.1, **sampling)


class GenerationMixin:
    """Gives a language model `generate`. Its forward is called as MambaLMHeadModel's."""

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """States of all layers, by layer index: for generation with cg or state_dtype."""
        raise NotImplementedError

    def generate(
        self,
        input_ids,
        max_length,
        top_k=1,
        top_p=0.0,
        min_p=0.0,
        temperature=1.0,
        return_dict_in_generate=False,
        output_scores=False,
        **kwargs,
    ):
        """Sequences (batch, total length), or the whole output of `decode`, whose arguments these
        and the further keyword arguments are."""
        output = decode(
            input_ids,
            self,
            max_length,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            temperature=temperature,
            output_scores=output_scores,
            **kwargs,
        )
        return output if return_dict_in_generate else output.sequences


@dataclass
class DecodingCGCache:
    """CUDA graphs of decode steps, and the states that they update."""

    max_batch_size: int = 0
    max_seqlen: int = 0
    callables: dict = field(default_factory=dict)  # (batch size, tokens per row) -> run of a graph
    inference_params: Optional[InferenceParams] = None
    # The run of capture_graph, of the graph for the shape of its ids.
    run: Optional[Callable] = None
    # As callables, of prompts; None: the shape came once, and has no graph yet.
    prompts: dict = field(default_factory=dict, init=False)
    device = None
    dtype = None
    mempool = None
    state_dtype = None
    addresses = None  # of the weights: a graph reads those of its capture
    states = None  # of max_batch_size rows, of which inference_params has the first ones
    lengths = None  # (max_batch_size,), likewise


@torch.inference_mode()
def update_graph_cache(
    model,
    cache,
    batch_size,
    seqlen_og,
    max_seqlen,
    decoding_seqlens=(1,),
    dtype=None,
    n_warmups=2,
    *,
    state_dtype=None,
):
    """A cache whose `run` decodes batch_size rows of up to max_seqlen tokens on the model's GPU.

    It is `cache` (None: a new one), with a graph for each of decoding_seqlens, tokens per row and
    call, captured where it is not there yet. A larger batch or length, other types, and weights
    that moved start it anew; smaller batches share its states. dtype: of all states; state_dtype:
    of the scan's; None: that of the weights. seqlen_og, tokens of the prompt, does not matter.
    """
    cache = DecodingCGCache() if cache is None else cache
    example = next(model.parameters())
    weights = itertools.chain(model.parameters(), model.buffers())
    kind = (
        example.device,
        example.dtype if dtype is None else dtype,
        state_dtype,
        [weight.data_ptr() for weight in weights],
    )
    if (
        kind != (cache.device, cache.dtype, cache.state_dtype, cache.addresses)
        or batch_size > cache.max_batch_size
        or max_seqlen > cache.max_seqlen
    ):
        # What the old graphs hold is freed before more is asked for.
        cache.callables, cache.prompts = {}, {}
        cache.inference_params, cache.states, cache.run = None, None, None
        cache.device, cache.dtype, cache.state_dtype, cache.addresses = kind
        cache.max_batch_size, cache.max_seqlen = batch_size, max_seqlen
        options = {} if state_dtype is None else {"state_dtype": state_dtype}
        cache.states = model.allocate_inference_cache(
            batch_size, max_seqlen, cache.dtype, **options
        )
        cache.lengths = torch.zeros(batch_size, dtype=torch.int32, device=cache.device)
        cache.mempool = torch.cuda.graph_pool_handle()
    cache.inference_params = InferenceParams(
        max_seqlen=cache.max_seqlen,
        max_batch_size=batch_size,
        key_value_memory_dict={
            layer: tuple(None if state is None else state[:batch_size] for state in states)
            for layer, states in cache.states.items()
        },
        lengths_per_sample=cache.lengths[:batch_size],
    )
    for decoding_seqlen in decoding_seqlens:
        if (batch_size, decoding_seqlen) not in cache.callables:
            cache.callables[batch_size, decoding_seqlen] = capture_graph(
                model,
                cache.inference_params,
                batch_size,
                cache.max_seqlen,
                decoding_seqlen=decoding_seqlen,
                mempool=cache.mempool,
                n_warmups=n_warmups,
            )

    callables = cache.callables  # not the cache: in a cycle its graphs would wait for a collection

    def run(input_ids, *args, **kwargs):
        return callables[tuple(input_ids.shape)](input_ids, *args, **kwargs)

    cache.run = run
    return cache


# A longer prompt keeps the GPU busy while the CPU launches its kernels one by one.
_MOST_PROMPT_TOKENS = 8192
_MOST_PROMPT_GRAPHS = 8


def _prompt_graph(model, cache, batch_size, seqlen):
    """The `run` of a graph for prompts (batch_size, seqlen), or None.

    Captured when a shape comes for the second time, since a capture takes longer than a call.
    """
    shape = (batch_size, seqlen)
    if batch_size * seqlen > _MOST_PROMPT_TOKENS:
        return None
    if shape not in cache.prompts:
        if len(cache.prompts) == _MOST_PROMPT_GRAPHS:
            del cache.prompts[next(iter(cache.prompts))]  # the oldest
        cache.prompts[shape] = None
        return None
    if cache.prompts[shape] is None:
        cache.prompts[shape] = capture_graph(
            model,
            cache.inference_params,
            batch_size,
            cache.max_seqlen,
            decoding_seqlen=seqlen,
            mempool=cache.mempool,
            n_warmups=1,
            is_prompt=True,
        )
    return cache.prompts[shape]


@contextlib.contextmanager
def _no_collection():
    """No garbage is collected inside: an old graph that goes then would spoil a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@torch.inference_mode()
def capture_graph(
    model,
    inference_params,
    batch_size,
    max_seqlen,
    decoding_seqlen=1,
    mempool=None,
    n_warmups=2,
    *,
    is_prompt=False,
):
    """Captures a call of the model with decoding_seqlen tokens per row as a CUDA graph.

    inference_params have the states of batch_size rows, whose contents are lost, and
    lengths_per_sample. is_prompt: the tokens are the first ones, and the logits those of the last.

    Returns run(input_ids (batch, decoding_seqlen), position_ids (the same), seqlen: tokens already
    in the caches, a number or (batch,)) -> logits (batch, decoding_seqlen or 1, vocab); None
    leaves position_ids or seqlen as they were, for models that do not read them. With
    run(..., copy=False) the next run overwrites the logits. A graph reads the memory of its
    capture: weights and states must stay where they are.
    """
    device = next(model.parameters()).device
    input_ids = torch.zeros(batch_size, decoding_seqlen, dtype=torch.int64, device=device)
    position_ids = torch.zeros_like(input_ids)
    lengths, seqlen_offset = inference_params.lengths_per_sample, inference_params.seqlen_offset
    # Behind a prompt, with room for the tokens.
    inference_params.seqlen_offset = 0 if is_prompt else max(max_seqlen - decoding_seqlen, 1)
    lengths.fill_(0 if is_prompt else max_seqlen - decoding_seqlen)

    def call():
        return model(
            input_ids,
            position_ids=None if is_prompt else position_ids,
            inference_params=inference_params,
            num_last_tokens=1 if is_prompt else decoding_seqlen,
        ).logits

    with torch.cuda.device(device):
        # What libraries set up at a first call cannot be captured; warm-ups run, like a capture,
        # on a stream of their own.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(n_warmups):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with _no_collection(), torch.cuda.graph(graph, pool=mempool):
            logits = call()
    inference_params.seqlen_offset = seqlen_offset

    @torch.inference_mode()
    def run(new_input_ids, new_position_ids, seqlen, copy=True):
        input_ids.copy_(new_input_ids)
        if new_position_ids is not None:
            position_ids.copy_(new_position_ids)
        if seqlen is not None:
            lengths[:] = seqlen
        with torch.cuda.device(device):
            graph.replay()
            return logits.clone() if copy else logits

    return run
