"""Continues a text with a trained model, and writes it as it arises."""

import sys
import time

import torch

from mamba_ssm import MambaLMHeadModel
from mamba_ssm._command import (
    ArgumentError,
    count,
    default_device,
    device,
    fraction,
    natural,
    positive,
)
from mamba_ssm.text import checkpoint_tokenizer, load_tokenizer
from mamba_ssm.utils.hf import load_config_hf

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}

EPILOG = """\
examples:
  mamba-ssm generate model --prompt "It was "
  mamba-ssm generate model --prompt "It was " --tokens 1000 --temperature 0.7 --top-k 40 --seed 3
  mamba-ssm generate model --greedy --device cpu --dtype bfloat16 < start.txt > text.txt
  mamba-ssm generate OWNER/NAME --tokenizer OWNER/OTHER --prompt "It was "

Models of `mamba-ssm train` are ready; `mamba-ssm convert` makes others so. Prompt and output are
text with the tokenizer of the model, UTF-8 in models of up to 256 tokens, and else token ids.
Text goes to stdout, speeds go to stderr. Equal arguments give equal text.
"""


def add_arguments(parser):
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder, or a model of the Hugging Face hub")
    add("--prompt", metavar="TEXT", help="start of the text (default: what stdin has)")
    add("--tokens", type=count, default=256, metavar="N", help="new tokens (default: 256)")
    add("--greedy", action="store_true", help="take the most probable token every time")
    add(
        "--temperature",
        type=positive,
        default=0.8,
        metavar="X",
        help="below 1: less surprising (default: 0.8)",
    )
    add("--top-k", type=natural, default=0, metavar="N", help="of the N most probable tokens")
    add("--top-p", type=fraction, default=0.0, metavar="X", help="of the most probable X in total")
    add("--min-p", type=fraction, default=0.0, metavar="X", help="at least X of the best's")
    add(
        "--repetition-penalty",
        type=positive,
        default=1.0,
        metavar="X",
        help="above 1: tokens that occurred are less probable (default: 1)",
    )
    add("--seed", type=natural, default=0, metavar="N", help="of the draw (default: 0)")
    add("--tokenizer", metavar="NAME", help="as for train (default: the model's own)")
    add("--device", type=device, help="where to run (default: a GPU if there is one)")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")


def run(args):
    where = args.device or default_device()
    model = load_model(args.model, where, DTYPES[args.dtype])
    vocab_size = model.config.vocab_size
    if args.tokenizer is None:
        tokenizer = checkpoint_tokenizer(args.model, vocab_size)
    else:
        tokenizer = load_tokenizer(args.tokenizer)
    prompt = args.prompt
    if prompt is None:
        prompt = sys.stdin.buffer.read().decode("utf-8", errors="replace")
    try:
        ids = tokenizer.encode(prompt)
    except ValueError as error:
        raise ArgumentError(error) from error
    if not ids:
        raise ArgumentError("the prompt is empty: give it as --prompt or on stdin")
    if max(ids) >= vocab_size:
        raise ArgumentError(
            f"the tokenizer gives token {max(ids)}, the model has {vocab_size} tokens: they do not "
            "belong together"
        )
    input_ids = torch.tensor([ids], device=where)
    options = dict(
        max_length=len(ids) + args.tokens,
        top_k=1 if args.greedy else args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        temperature=args.temperature,
        repetition_penalty=args.repetition_penalty,
        eos_token_id=tokenizer.end,
        vocab_size=vocab_size,
        generator=torch.Generator(where).manual_seed(args.seed),
        cg=True,
    )
    if where.type == "cuda":  # the capture of the step is no part of the prompt's time
        model.generate(input_ids, **options, should_stop=lambda: True)
    stream = TextStream(prompt, tokenizer)
    try:
        model.generate(input_ids, **options, streamer=stream)
    finally:
        stream.end()
    stream.print_speed()
    return 0


def load_model(name, where, dtype):
    """The model of a folder or of the hub. Errors name `convert` where that may help."""
    if isinstance(config := load_config_hf(name), dict) and "model_type" in config:
        raise ValueError(
            f"{name} has the layout of transformers: mamba-ssm convert {name} FOLDER makes a "
            "folder that generate reads"
        )
    try:
        model = MambaLMHeadModel.from_pretrained(name, device=where, dtype=dtype)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{name} has no model.safetensors; if it has a pytorch_model.bin, mamba-ssm convert "
            f"{name} FOLDER makes a folder that generate reads"
        ) from error
    return model.eval()


class TextStream:
    """Takes tokens as `generate` draws them, and writes characters to stdout when complete."""

    def __init__(self, prompt, tokenizer):
        self.prompt, self.step = prompt, tokenizer.stream()
        self.times = []  # of the call, then of each new token
        self.prompt_tokens = 0

    def put(self, tokens):
        """tokens (1, n): first the prompt, then each new one."""
        self.times.append(time.perf_counter())
        if len(self.times) == 1:
            self.prompt_tokens = tokens.shape[1]
            write(self.prompt)
        else:
            write(self.step(tokens.item()))

    def end(self):
        """Writes what is left, once."""
        if self.step is not None:
            write(self.step(None) + "\n")
            self.step = None

    def print_speed(self):
        """Tokens per second of the prompt, up to the first new token, and of the others."""
        start, first, *others = self.times
        rate = self.prompt_tokens / (first - start)
        print(f"prompt: {self.prompt_tokens} tokens, {rate:,.0f} tokens/s", file=sys.stderr)
        if others:
            rate = len(others) / (others[-1] - first)
            print(f"new: {1 + len(others)} tokens, {rate:,.0f} tokens/s", file=sys.stderr)


def write(text):
    """Writes UTF-8 whatever the locale."""
    sys.stdout.buffer.write(text.encode("utf-8", errors="replace"))
    sys.stdout.buffer.flush()
