"""Trains a small byte-level model, compares it with an order-2 model, and samples from it.

The checkpoint is then read by the C++ example, which must generate the same bytes.
"""

import shutil
import subprocess
import sysconfig
import time
from pathlib import Path

import torch

from mamba_ssm import Mamba, Mamba2, MambaLMHeadModel, _library
from mamba_ssm._command import ArgumentError, default_device, device, natural, positive
from mamba_ssm.text import ByteTokenizer, Corpus, bits_per_byte, windows
from mamba_ssm.train import Settings, Trainer, save_loss_curve

SAMPLE_BYTES, TEMPERATURE = 256, 0.8

EPILOG = """\
examples:
  mamba-ssm demo                                     three minutes on Python's standard library
  mamba-ssm demo --layer Mamba --text book.txt --minutes 10 --prompt "It was "
"""


def add_arguments(parser):
    parser.add_argument(
        "--layer",
        choices=("Mamba", "Mamba2"),
        default="Mamba2",
        help="kind of the blocks (default: Mamba2)",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="text to learn (default: the source of Python's standard library)",
    )
    parser.add_argument("--minutes", type=positive, default=3.0, help="training time (default: 3)")
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="output folder")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--prompt", default="def ", help="start of the sample")
    parser.add_argument(
        "--device", type=device, help="where to train (default: a GPU if there is one)"
    )
    parser.add_argument(
        "--cpp-example",
        type=Path,
        metavar="PROGRAM",
        help="mamba_generate (default: found beside the package or on PATH)",
    )


def run(args):
    torch.manual_seed(args.seed)
    where = args.device or default_device()

    for kind, seqlen, d_model in ((Mamba, 32, 16), (Mamba2, 64, 1024)):
        block = kind(d_model=d_model, d_state=64, d_conv=4, expand=2).to(where)
        shape = tuple(block(torch.randn(2, seqlen, d_model, device=where)).shape)
        parameters = sum(p.numel() for p in block.parameters())
        arguments = f"d_model={d_model}, d_state=64, d_conv=4, expand=2"
        print(f"{kind.__name__}({arguments}): {parameters} parameters, {shape}", flush=True)

    text = args.text or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = [str(path.absolute()) for path in text]
    settings = Settings(text=text, layer=args.layer, minutes=args.minutes, seed=args.seed)
    tokenizer = ByteTokenizer()
    try:
        corpus = Corpus.read(text, tokenizer, settings.seqlen)
    except (ValueError, FileNotFoundError) as error:
        raise ArgumentError(error) from error
    print(f"text: {len(corpus.train):,} bytes to learn, {len(corpus.held_out):,} held out")
    trainer = Trainer(settings, corpus, tokenizer, where)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"model: {parameters:,} parameters, {settings.n_layer} {args.layer} blocks, on {where}")
    before = bits_per_byte(trainer.model, corpus)
    order2 = order2_bits_per_byte(corpus.train, corpus.held_out)
    print(f"held out: {before:.3f} bits per byte before training", flush=True)
    checkpoint = args.out / "checkpoint"
    trainer.run(checkpoint)
    print(f"order-2 model: {order2:.3f}")
    if trainer.held_out[-1][1] >= order2:
        print("the model is not better than the order-2 model yet: give it more --minutes")
    save_loss_curve(trainer, {"held out, order-2 model": order2}, args.out / "loss.png")
    print(f"checkpoint: {checkpoint}")
    return 0 if compare_languages(checkpoint, args) else 1


def order2_bits_per_byte(train, text):
    """Predicts each byte from the two before it: Witten-Bell estimates of orders 2, 1, 0.

    p(c | ctx) = (count(ctx c) + kinds(ctx) p(c | shorter ctx)) / (count(ctx) + kinds(ctx)), where
    kinds(ctx) is the number of different bytes seen after ctx.
    """
    t = train.long()
    probability = torch.full((1, 256), 1 / 256)
    for order in range(3):  # contexts of `order` bytes, as numbers in base 256
        codes = sum(t[i : len(t) - order + i] << (8 * (order - i)) for i in range(order + 1))
        counts = torch.bincount(codes, minlength=256 ** (order + 1)).view(-1, 256).float()
        kinds = (counts > 0).sum(1, keepdim=True)
        shorter = probability.repeat(counts.shape[0] // probability.shape[0], 1)
        total = counts.sum(1, keepdim=True) + kinds
        probability = torch.where(total > 0, (counts + kinds * shorter) / total, shorter)
    w = windows(text)
    context = (w[:, :-2] << 8) + w[:, 1:-1]
    return -probability[context, w[:, 2:]].log2().mean().item()


def compare_languages(checkpoint, args):
    """Samples from the checkpoint in Python and with the C++ example: whether they agree."""
    model = MambaLMHeadModel.from_pretrained(checkpoint).eval()
    program = find_cpp_example(args.cpp_example)
    prompt = args.prompt.encode()
    agree = True
    for greedy in (False, True):
        name = "greedy" if greedy else f"temperature {TEMPERATURE}, seed {args.seed}"
        start = time.monotonic()
        tokens = model.generate(
            torch.tensor([list(prompt)]),
            len(prompt) + SAMPLE_BYTES,
            top_k=1 if greedy else 0,
            temperature=TEMPERATURE,
            generator=torch.Generator().manual_seed(args.seed),
        )
        speed = SAMPLE_BYTES / (time.monotonic() - start)
        sample = bytes(tokens[0].tolist())  # with the prompt
        text = sample.decode("utf-8", errors="replace")
        print(f"--- Python, {name}, {speed:,.0f} bytes/s\n{text}\n---")
        if program is None:
            continue
        command = [program, checkpoint, "--prompt", args.prompt, "--tokens", str(SAMPLE_BYTES)]
        command += ["--seed", str(args.seed), "--temperature", str(TEMPERATURE)]
        result = subprocess.run(command + ["--greedy"] * greedy, stdout=subprocess.PIPE)
        if result.returncode != 0:
            verdict = f"FAILED with exit code {result.returncode}"
        elif result.stdout == sample + b"\n":
            verdict = "the same bytes"
        else:
            verdict = "DIFFERENT bytes:\n" + result.stdout.decode("utf-8", errors="replace")
        print(f"C++, {name}: {verdict}")
        agree &= verdict == "the same bytes"
    if program is None:
        print("C++: skipped, mamba_generate was not found; give it as --cpp-example")
    return agree


def find_cpp_example(path):
    if path is not None:
        if not path.is_file():
            raise ArgumentError(f"--cpp-example {path} does not exist")
        return path.resolve()
    beside = _library.LIBRARY_DIR.parent / "bin" / "mamba_generate"
    return beside if beside.is_file() else shutil.which("mamba_generate")
