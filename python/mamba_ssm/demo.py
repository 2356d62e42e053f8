"""Trains a small byte-level model, compares it with an order-2 model, and samples from it.

The checkpoint is then read by the C++ example, which must generate the same bytes.
"""

import math
import shutil
import subprocess
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from mamba_ssm import Mamba, Mamba2, MambaLMHeadModel, _library
from mamba_ssm.models.config_mamba import MambaConfig

CONFIG = dict(d_model=128, n_layer=3, vocab_size=256)
SSM_CFG = {
    "Mamba": {"layer": "Mamba1", "d_state": 16},
    "Mamba2": {"layer": "Mamba2", "d_state": 64, "headdim": 32},
}
BATCH, SEQLEN = 8, 256
MAX_LR, WARMUP = 4e-3, 0.05  # WARMUP: fraction of the training time
EVALUATED_WINDOWS, EVALUATED_SEQLEN = 64, 1024
PIECE = 1 << 15  # bytes; every tenth piece of the text is held out
MIN_TEXT = 20_000  # bytes
SAMPLE_BYTES, TEMPERATURE = 256, 0.8


def add_arguments(parser):
    parser.add_argument(
        "--layer", choices=SSM_CFG, default="Mamba2", help="kind of the blocks (default: Mamba2)"
    )
    parser.add_argument(
        "--text",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="text to learn (default: the source of Python's standard library)",
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="training time (default: 3)")
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt", default="def ", help="start of the sample")
    parser.add_argument("--device", help="where to train (default: a GPU if there is one)")
    parser.add_argument(
        "--cpp-example",
        type=Path,
        metavar="PROGRAM",
        help="mamba_generate (default: found beside the package or on PATH)",
    )


def run(args):
    torch.manual_seed(args.seed)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")

    for kind, seqlen, d_model in ((Mamba, 32, 16), (Mamba2, 64, 1024)):
        block = kind(d_model=d_model, d_state=64, d_conv=4, expand=2).to(device)
        shape = tuple(block(torch.randn(2, seqlen, d_model, device=device)).shape)
        parameters = sum(p.numel() for p in block.parameters())
        arguments = f"d_model={d_model}, d_state=64, d_conv=4, expand=2"
        print(f"{kind.__name__}({arguments}): {parameters} parameters, {shape}", flush=True)

    train, held_out = split_text(read_text(args.text))
    print(f"text: {len(train):,} bytes to learn, {len(held_out):,} held out")
    config = MambaConfig(**CONFIG, ssm_cfg=SSM_CFG[args.layer])
    model = MambaLMHeadModel(config, device=device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"model: {parameters:,} parameters, {config.n_layer} {args.layer} blocks, on {device}")
    before = bits_per_byte(model, held_out)
    order2 = order2_bits_per_byte(train, held_out)
    print(f"held out: {before:.3f} bits per byte before training", flush=True)
    curve = fit(model, train, 60 * args.minutes)
    after = bits_per_byte(model, held_out)
    print(f"held out: {after:.3f} bits per byte after training; order-2 model: {order2:.3f}")
    if after >= order2:
        print("the model is not better than the order-2 model yet: give it more --minutes")

    args.out.mkdir(parents=True, exist_ok=True)
    save_loss_curve(curve, after, order2, args.out / "loss.png")
    checkpoint = args.out / "checkpoint"
    model.save_pretrained(checkpoint)
    print(f"checkpoint: {checkpoint}")
    return 0 if compare_languages(checkpoint, args) else 1


def read_text(paths):
    if not paths:
        paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(path.read_bytes() for path in paths)
    if len(text) < MIN_TEXT:
        raise SystemExit(f"demo: the text has {len(text)} bytes; at least {MIN_TEXT} are needed")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def split_text(text):
    """Every tenth piece of the text is held out: the same kind of text, none of it seen."""
    pieces = text.split(min(PIECE, len(text) // 10))
    train = [piece for i, piece in enumerate(pieces) if i % 10 != 9]
    return torch.cat(train), torch.cat(pieces[9::10])


def windows(text):
    """(windows, EVALUATED_SEQLEN + 2) bytes spread over the text: two of context, then targets."""
    length = min(EVALUATED_SEQLEN + 2, len(text))
    starts = torch.linspace(0, len(text) - length, EVALUATED_WINDOWS).long()
    return text[starts[:, None] + torch.arange(length)].long()


@torch.no_grad()
def bits_per_byte(model, text):
    device = model.lm_head.weight.device
    total = []
    for batch in windows(text).to(device).split(8):
        logits = model(batch[:, 1:-1]).logits.float()
        total.append(F.cross_entropy(logits.transpose(1, 2), batch[:, 2:]) / math.log(2))
    return torch.stack(total).mean().item()


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


def fit(model, text, seconds):
    """Trains for the given time. Returns [(seconds, bits per byte of the batch), ...]."""
    device = model.lm_head.weight.device
    decayed = [p for p in model.parameters() if p.dim() > 1 and not hasattr(p, "_no_weight_decay")]
    others = [p for p in model.parameters() if not any(p is q for q in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=MAX_LR, betas=(0.9, 0.95))
    text = text.to(device)
    offsets = torch.arange(SEQLEN + 1, device=device)
    curve = []
    start = time.monotonic()
    with _progress(seconds) as report:
        while (elapsed := time.monotonic() - start) < seconds:
            done = elapsed / seconds
            lr = MAX_LR * min(done / WARMUP, 1.0) * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))
            for group in optimizer.param_groups:
                group["lr"] = lr
            starts = torch.randint(len(text) - SEQLEN, (BATCH, 1), device=device)
            batch = text[starts + offsets].long()
            logits = model(batch[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            curve.append((elapsed, loss.item() / math.log(2)))
            report(elapsed, f"step {len(curve)}, {curve[-1][1]:.3f} bits per byte")
    elapsed = time.monotonic() - start
    tokens = len(curve) * BATCH * SEQLEN
    print(f"trained {len(curve)} steps of {BATCH * SEQLEN} bytes, {tokens / elapsed:,.0f} bytes/s")
    return curve


class _progress:
    """A bar over the training time with tqdm, else a line every ten seconds."""

    def __init__(self, seconds):
        self.seconds = seconds
        try:
            from tqdm import tqdm
        except ImportError:
            self.bar = None
        else:
            form = "{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}"
            self.bar = tqdm(total=seconds, desc="training", bar_format=form)
        self.next_line = 0.0

    def __enter__(self):
        return self.report

    def report(self, elapsed, text):
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(min(elapsed, self.seconds) - self.bar.n)
        elif elapsed >= self.next_line:
            print(f"{elapsed:5.0f}/{self.seconds:.0f} s, {text}", flush=True)
            self.next_line = elapsed + 10

    def __exit__(self, *exception):
        if self.bar is not None:
            self.bar.close()


def save_loss_curve(curve, after, order2, path):
    try:
        import matplotlib
    except ImportError:
        print("loss curve: not drawn, matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    seconds, bits = zip(*curve) if curve else ((), ())
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(seconds, bits, linewidth=0.6, label="training batches")
    axes.axhline(after, color="C1", label=f"held out, after training: {after:.3f}")
    axes.axhline(order2, color="C2", linestyle="--", label=f"held out, order-2 model: {order2:.3f}")
    axes.set(xlabel="seconds", ylabel="bits per byte")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(f"loss curve: {path}")


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
        command = [program, checkpoint, "--prompt", args.prompt, "--bytes", str(SAMPLE_BYTES)]
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
            raise SystemExit(f"demo: --cpp-example {path} does not exist")
        return path.resolve()
    beside = _library.LIBRARY_DIR.parent / "bin" / "mamba_generate"
    return beside if beside.is_file() else shutil.which("mamba_generate")
