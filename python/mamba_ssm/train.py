"""Trains a language model on text files, and continues a training that was interrupted."""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
import weakref
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mamba_ssm import MambaLMHeadModel
from mamba_ssm._command import ArgumentError, count, default_device, device, natural, positive
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.text import BYTES, TOKENIZER, Corpus, bits_per_byte, load_tokenizer
from mamba_ssm.utils._safetensors import load_safetensors, save_safetensors

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

BETAS, WEIGHT_DECAY, MAX_GRADIENT_NORM = (0.9, 0.95), 0.1, 1.0
WARMUP, LAST_LR = 0.05, 0.05  # fractions of the training, and of the largest learning rate
STATE = "trainer.json"  # of a checkpoint: how far it is, and the name of the file of tensors
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
SECONDS_BETWEEN_LINES = 10
SECONDS_FOR_GLOO = 1  # to drop a tensor, at most

EPILOG = """\
examples:
  mamba-ssm train book.txt notes/ --out model --minutes 10
  mamba-ssm train book.txt --out model --layer Mamba --d-model 256 --n-layer 6 --steps 2000
  mamba-ssm train book.txt --out model --steps 2000 --bf16 --accumulate 4 --save-every 100
  mamba-ssm train --resume model
  torchrun --nproc-per-node 2 -m mamba_ssm train book.txt --out model --steps 2000

The folder of --out then has the model, as MambaLMHeadModel.save_pretrained writes it, and all that
--resume needs. Ctrl-C ends a training with a checkpoint, and exit code 130; a second one at once.
On a CPU, a resumed training has the same result, to the bit, as one that was never interrupted.
"""


@dataclass
class Settings:
    """What a training depends on beside its text; trainer.json holds the same names."""

    text: list
    layer: str = "Mamba2"  # kind of the blocks
    d_model: int = 128
    n_layer: int = 3
    d_state: int | None = None  # of the scan; None: 16 in Mamba, 64 in Mamba2
    headdim: int | None = None  # of Mamba2; None: 32
    tokenizer: str = BYTES
    seqlen: int = 256  # tokens of a training sequence
    batch_size: int = 8  # sequences that a rank has in memory at a time
    accumulate: int = 1  # such batches in an optimizer step
    lr: float = 4e-3  # largest learning rate
    bf16: bool = False
    seed: int = 0
    steps: int | None = None  # length of the training, or
    minutes: float | None = None  # its time
    save_every: int = 500  # steps
    ranks: int = 1

    def ssm_cfg(self):
        """Keyword arguments of the blocks. Raises ArgumentError for a headdim in Mamba."""
        if self.layer == "Mamba":
            if self.headdim is not None:
                raise ArgumentError("--headdim is for --layer Mamba2 only")
            return {"layer": "Mamba1", "d_state": self.d_state or 16}
        return {
            "layer": "Mamba2",
            "d_state": self.d_state or 64,
            "headdim": self.headdim or 32,
        }


CHANGEABLE = {"text", "steps", "minutes", "save_every"}  # when a training is resumed


def add_arguments(parser):
    parser.argument_default = argparse.SUPPRESS  # so that --resume knows what was given
    add, default = parser.add_argument, Settings
    add("text", nargs="*", metavar="TEXT", help="files, and folders with UTF-8 files, to learn")
    add("--out", type=Path, metavar="FOLDER", help="where checkpoints go")
    add("--resume", type=Path, metavar="FOLDER", help="continue the training of this --out")
    add("--device", type=device, help="where to train (default: a GPU if there is one)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count, metavar="N", help="optimizer steps to train")
    length.add_argument(
        "--minutes", type=positive, metavar="N", help="time to train (default: 3 minutes)"
    )
    add(
        "--layer",
        choices=("Mamba", "Mamba2"),
        help=f"kind of the blocks (default: {default.layer})",
    )
    for name, text in (
        ("d_model", "width of the model"),
        ("n_layer", "number of blocks"),
        ("d_state", "states per channel (default: 16 for Mamba, 64 for Mamba2)"),
        ("headdim", "channels per head, Mamba2 only (default: 32)"),
        ("seqlen", "tokens of a training sequence"),
        ("batch_size", "sequences that a rank has in memory at a time"),
        ("accumulate", "such batches in an optimizer step"),
        ("save_every", "steps between checkpoints"),
    ):
        value = getattr(default, name)
        text += "" if value is None else f" (default: {value})"
        add(f"--{name.replace('_', '-')}", type=count, metavar="N", help=text)
    add(
        "--tokenizer",
        metavar="NAME",
        help=f"{BYTES}, or a folder or model of the Hugging Face hub with {TOKENIZER} "
        f"(default: {default.tokenizer})",
    )
    add("--lr", type=positive, metavar="X", help=f"largest learning rate (default: {default.lr})")
    add("--bf16", action="store_true", help="compute in bfloat16 (autocast); weights are float32")
    add("--seed", type=natural, metavar="N", help="of weights and batches (default: 0)")


def run(args):
    args = vars(args)
    given = {f.name: args[f.name] for f in fields(Settings) if f.name in args}
    folder, resume = args.get("out"), args.get("resume")
    if (folder is None) == (resume is None):
        raise ArgumentError("either --out FOLDER or --resume FOLDER is needed")
    with process_group(args.get("device") or default_device()) as where:
        if resume is None:
            trainer = start(given, folder, where)
        else:
            trainer = Trainer.resume(resume, given, where)
        folder = folder or resume
        say = trainer.say
        parameters = sum(p.numel() for p in trainer.model.parameters())
        corpus, settings = trainer.corpus, trainer.settings
        learned, held_out = len(corpus.train), len(corpus.held_out)
        say(f"text: {learned:,} tokens to learn, {held_out:,} held out")
        say(f"model: {parameters:,} parameters, {settings.n_layer} {settings.layer}, on {where}")
        with signals(once=trainer.ranks == 1) as received:
            trainer.run(folder, stop=lambda: bool(received))
        if trainer.stopped:
            trainer.save(folder)
            say(f"stopped at step {trainer.step}; to go on: mamba-ssm train --resume {folder}")
        if trainer.rank == 0:
            save_loss_curve(trainer, {}, folder / "loss.png")
        say(f"checkpoint: {folder}")
    return 128 + received[0] if received else 128 + signal.SIGINT if trainer.stopped else 0


def start(given, folder, where):
    """A new training with the settings of the command line."""
    if not given.get("text"):
        raise ArgumentError("no TEXT to learn was given")
    if (folder / STATE).exists():
        raise ArgumentError(f"{folder} has a training already; --resume {folder} continues it")
    if "steps" not in given:
        given.setdefault("minutes", 3.0)
    settings = Settings(**given, ranks=rank_and_ranks()[1])
    settings.text = [str(Path(path).absolute()) for path in settings.text]
    tokenizer = load_tokenizer(settings.tokenizer)
    try:
        corpus = Corpus.read(settings.text, tokenizer, settings.seqlen)
        return Trainer(settings, corpus, tokenizer, where)
    except (ValueError, FileNotFoundError) as error:  # of the text, or sizes that do not fit
        raise ArgumentError(error) from error


class Trainer:
    """A training: model, optimizer, the generator that draws the batches, and how far it is.

    On a CPU the weights after n steps depend on settings, text and n alone, to the bit, however
    often the training was saved and resumed; but its length in minutes sets other learning rates
    every time. Under torchrun each rank has other sequences of the same draw, and rank 0 writes.

    Arguments:
        settings: Settings.
        corpus: what it learns, a Corpus.
        tokenizer: the one that made the corpus.
        where: torch.device of the model.
    """

    def __init__(self, settings, corpus, tokenizer, where):
        self.settings, self.corpus, self.tokenizer, self.device = settings, corpus, tokenizer, where
        self.rank, self.ranks = rank_and_ranks()
        torch.manual_seed(settings.seed)
        config = MambaConfig(
            d_model=settings.d_model,
            n_layer=settings.n_layer,
            vocab_size=tokenizer.vocab_size,
            ssm_cfg=settings.ssm_cfg(),
        )
        self.model = MambaLMHeadModel(config, device=where)
        self.replica = self.model
        if self.ranks > 1:  # averages the gradients
            self.replica = torch.nn.parallel.DistributedDataParallel(self.model)
        named = dict(self.model.named_parameters())
        decayed = [p.dim() > 1 and not hasattr(p, "_no_weight_decay") for p in named.values()]
        groups = [
            {"params": [p for p, d in zip(named.values(), decayed) if d is kind], "weight_decay": w}
            for kind, w in ((True, WEIGHT_DECAY), (False, 0.0))
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=BETAS)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.text = corpus.train.to(where)
        self.step = 0
        self.seconds = 0.0
        self.losses = []  # of each step, in bits per byte
        self.held_out = []  # [step, bits per byte], where measured
        self.stopped = False  # before its end

    def say(self, text):
        """Prints a line, on rank 0."""
        if self.rank == 0:
            (print if tqdm is None else tqdm.write)(text)
            sys.stdout.flush()

    def done(self):
        """The part of the training that is behind it, from 0 to 1."""
        if self.settings.steps is not None:
            return min(self.step / self.settings.steps, 1.0)
        return min(self.seconds / (60 * self.settings.minutes), 1.0)

    def learning_rate(self):
        """Rises linearly during WARMUP, then falls with a cosine to LAST_LR of the largest."""
        done, steps = self.done(), self.settings.steps
        if steps is not None:
            done += 1 / steps  # of the end of the step: the first one is not in vain
        fall = LAST_LR + (1 - LAST_LR) / 2 * (1 + math.cos(math.pi * done))
        return self.settings.lr * min(done / WARMUP, 1.0) * fall

    def train_step(self):
        """An optimizer step. Returns the loss of this rank's tokens in nats per token."""
        settings = self.settings
        draw = (settings.accumulate, self.ranks, settings.batch_size, 1)
        starts = torch.randint(len(self.text) - settings.seqlen, draw, generator=self.generator)
        offsets = torch.arange(settings.seqlen + 1, device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for i, rows in enumerate(starts[:, self.rank].to(self.device)):
            batch = self.text[rows + offsets].long()
            is_last = i + 1 == settings.accumulate
            waits = self.ranks > 1 and not is_last  # gradients are averaged over the ranks once
            with self.replica.no_sync() if waits else contextlib.nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.bf16):
                    logits = self.replica(batch[:, :-1]).logits
                loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
                (loss / settings.accumulate).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.step += 1
        return total.item() / settings.accumulate

    def run(self, folder=None, stop=lambda: False):
        """Trains to the settings' end, or until stop() is true at one of the ranks after a step.

        Every save_every steps and at the end it measures the held-out text, and writes a checkpoint
        into the folder if there is one.
        """
        settings = self.settings
        self.stopped = False
        begin, first, busy = time.monotonic() - self.seconds, self.step, 0.0
        with Progress(self) as progress:
            while self.done() < 1 and not self.stopped:
                busy -= time.monotonic()
                loss = self.train_step()
                busy += time.monotonic()
                self._agree(loss, time.monotonic() - begin, stop())
                progress.report()
                at_end = self.done() >= 1
                if (at_end or self.step % settings.save_every == 0) and not self.stopped:
                    self.measure()
                    if folder is not None:
                        self.save(folder)
        steps = self.step - first
        tokens = steps * settings.accumulate * self.ranks * settings.batch_size * settings.seqlen
        self.say(f"trained {steps} steps, {tokens / max(busy, 1e-9):,.0f} tokens/s")

    def _agree(self, loss, seconds, stop):
        """Takes the mean loss, rank 0's time, and whether one of the ranks wants to stop."""
        if self.ranks > 1:
            values = [loss / self.ranks, seconds * (self.rank == 0), float(stop)]
            loss, seconds, stop = sum_over_ranks(values, self.device)
        self.losses.append(loss / math.log(2) / self.corpus.bytes_per_token)
        self.seconds, self.stopped = seconds, bool(stop)

    def measure(self):
        """Bits per byte of the held-out text, on rank 0."""
        if self.rank == 0:
            bits = bits_per_byte(self.model, self.corpus)
            self.held_out.append([self.step, bits])
            self.say(f"held out: {bits:.3f} bits per byte at step {self.step}")

    def save(self, folder):
        """Writes the model, its tokenizer and what `resume` needs, on rank 0.

        trainer.json names the file of tensors that belongs to it, and takes its former's place when
        that file is complete, so that `resume` always finds one or the other.
        """
        if self.rank != 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "generator": self.generator.get_state(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }
        for name, p in self.model.named_parameters():
            tensors[f"model.{name}"] = p.detach().contiguous()
            for moment in MOMENTS:
                if self.step > 0:
                    tensors[f"{moment}.{name}"] = self.optimizer.state[p][moment].contiguous()
        state = {
            "settings": asdict(self.settings),
            "digest": self.corpus.digest,
            "step": self.step,
            "seconds": self.seconds,
            "held_out": self.held_out,
            "tensors": f"trainer-{self.step}.safetensors",
        }
        text = json.dumps(state, indent=2) + "\n"
        replace(folder / state["tensors"], lambda path: save_safetensors(tensors, path))
        replace(folder / STATE, lambda path: path.write_text(text, encoding="utf-8"))
        self.model.save_pretrained(folder)
        self.tokenizer.save(folder)
        for path in folder.glob("trainer-*.safetensors"):
            if path.name != state["tensors"]:
                path.unlink()

    @classmethod
    def resume(cls, folder, given, where):
        """The training that was saved in a folder. given: settings that changed since."""
        if not (folder / STATE).is_file():
            raise ArgumentError(f"{folder} has no {STATE}: there is no training to resume")
        try:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            settings = Settings(**state["settings"])
            step, seconds, name = int(state["step"]), float(state["seconds"]), state["tensors"]
            digest, held_out = state["digest"], state["held_out"]
            tensors = load_safetensors(folder / Path(name).name)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{folder / STATE} is damaged: {error!r}") from error
        for key in given:
            if key not in CHANGEABLE and given[key] != getattr(settings, key):
                raise ArgumentError(
                    f"--{key.replace('_', '-')} was {getattr(settings, key)} when the training in "
                    f"{folder} began, and stays that"
                )
        if {"steps", "minutes"} & given.keys():
            settings.steps = settings.minutes = None
        for key, value in given.items():
            setattr(settings, key, value)
        if settings.ranks != rank_and_ranks()[1]:
            raise ArgumentError(
                f"the training in {folder} has {settings.ranks} ranks, this is "
                f"{rank_and_ranks()[1]}: see torchrun --nproc-per-node"
            )
        tokenizer = load_tokenizer(BYTES if settings.tokenizer == BYTES else str(folder))
        corpus = Corpus.read(settings.text, tokenizer, settings.seqlen)
        if corpus.digest != digest:
            raise ValueError(
                f"{', '.join(settings.text)}: not the text that the training in {folder} began with"
            )
        trainer = cls(settings, corpus, tokenizer, where)
        trainer.step, trainer.seconds, trainer.held_out = step, seconds, held_out
        try:
            trainer._restore(tensors)
        except KeyError as error:
            raise ValueError(f"{folder / name}: {error} is missing") from error
        return trainer

    def _restore(self, tensors):
        """Takes the tensors that `save` wrote."""
        prefix = "model."
        weights = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
        self.model.load_state_dict(weights)
        self.generator.set_state(tensors["generator"])
        self.losses = tensors["losses"].tolist()
        if self.step == 0:
            return
        names = {p: name for name, p in self.model.named_parameters()}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {}
        for i, p in enumerate(parameters):
            state[i] = {moment: tensors[f"{moment}.{names[p]}"] for moment in MOMENTS}
            state[i]["step"] = torch.tensor(float(self.step))
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def rank_and_ranks():
    """This process's number among those of torchrun, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_ranks(values, where):
    """The sums over the ranks of each of some floats."""
    shared = torch.tensor(values, dtype=torch.float64, device=where)
    dist.all_reduce(shared)
    sums = shared.tolist()
    if where.type == "cpu":
        # A thread of Gloo holds the tensor a little longer, and needs the interpreter to drop it.
        # If that ended first, the rank would abort, and torchrun stop the others while they write.
        held = weakref.ref(shared)
        del shared
        deadline = time.monotonic() + SECONDS_FOR_GLOO
        while held() is not None and time.monotonic() < deadline:
            time.sleep(1e-3)  # leaves the interpreter to that thread
    return sums


@contextlib.contextmanager
def process_group(where):
    """Joins the ranks if torchrun started this process. Gives the device of this one."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield where
        return
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield where
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def signals(once):
    """A list that gets the numbers of SIGINT and SIGTERM instead of what they else do.

    once: they do that the second time. torchrun passes on what a terminal sends to all at once.
    """
    received = []
    former = {}

    def receive(number, frame):
        received.append(number)
        if once:
            for kind, handler in former.items():
                signal.signal(kind, handler)

    for kind in (signal.SIGINT, signal.SIGTERM):
        former[kind] = signal.signal(kind, receive)
    try:
        yield received
    finally:
        for kind, handler in former.items():
            signal.signal(kind, handler)


def replace(path, write):
    """Makes a file with write(path of another name), then puts it in its place: all or nothing."""
    temporary = path.with_name(f".{path.name}.saving")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Progress:
    """A bar over the steps or the time of a training with tqdm, else a line every ten seconds."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.next_line = 0.0
        self.bar = None
        settings = trainer.settings
        self.total, self.unit = settings.steps, "steps"
        if self.total is None:
            self.total, self.unit = 60 * settings.minutes, "s"
        if tqdm is not None:
            form = "{l_bar}{bar}| {n:.0f}/{total:.0f} " + self.unit + "{postfix}"
            options = dict(desc="training", bar_format=form, disable=trainer.rank != 0)
            self.bar = tqdm(total=self.total, initial=self._now(), **options)

    def _now(self):
        return self.trainer.done() * self.total

    def __enter__(self):
        return self

    def report(self):
        """Shows how far the training is."""
        text = f"step {self.trainer.step}, {self.trainer.losses[-1]:.3f} bits per byte"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(self._now() - self.bar.n)
        elif self.trainer.seconds >= self.next_line:
            self.trainer.say(f"{self._now():5.0f}/{self.total:.0f} {self.unit}, {text}")
            self.next_line = self.trainer.seconds + SECONDS_BETWEEN_LINES

    def __exit__(self, *exception):
        if self.bar is not None:
            self.bar.close()


def save_loss_curve(trainer, levels, path):
    """Draws the losses of a training, with matplotlib. levels: further ones, by their names."""
    try:
        import matplotlib
    except ImportError:
        print("loss curve: not drawn, matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    steps = range(1, len(trainer.losses) + 1)
    axes.plot(steps, trainer.losses, linewidth=0.6, label="training batches")
    if trainer.held_out:
        label = f"held out, at the end: {trainer.held_out[-1][1]:.3f}"
        axes.plot(*zip(*trainer.held_out), color="C1", marker="o", label=label)
    for name, bits in levels.items():
        axes.axhline(bits, color="C2", linestyle="--", label=f"{name}: {bits:.3f}")
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(f"loss curve: {path}")
