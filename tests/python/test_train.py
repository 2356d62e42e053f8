"""`mamba-ssm train`: what it writes, and that a training goes on as if nothing had happened."""

import contextlib
import errno
import functools
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
from harness.registration import bindings_only

from mamba_ssm import MambaLMHeadModel, text, train
from mamba_ssm.__main__ import main
from mamba_ssm.utils._safetensors import load_safetensors

HARNESS = pathlib.Path(__file__).parents[1] / "harness"
TINY = ["--d-model", "16", "--n-layer", "1", "--d-state", "4", "--seqlen", "16"]
TINY += ["--batch-size", "2", "--device"]
RANKS = 2
SECONDS = 120  # until a process counts as hung


def start(folder, *options, texts=(HARNESS / "cases.py",), device="cpu"):
    where = ["--out", str(folder), *TINY, device]
    return main(["train", *map(str, texts), *where, *map(str, options)])


def resume(folder, *options):
    return main(["train", "--resume", str(folder), "--device", "cpu", *map(str, options)])


def state_of(folder):
    """What trainer.json says, and the tensors that it names."""
    state = json.loads((folder / train.STATE).read_text())
    return state, load_safetensors(folder / state["tensors"])


def assert_same_training(folder, other):
    """Equal to the last bit: weights, moments, losses, the generator, what was measured."""
    (state, tensors), (other_state, other_tensors) = state_of(folder), state_of(other)
    del state["seconds"], other_state["seconds"]
    assert state == other_state
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[name]), name
    weights = load_safetensors(folder / "model.safetensors")
    for name, tensor in load_safetensors(other / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


@contextlib.contextmanager
def interrupted_in_step(n):
    """Trainings get SIGINT, as from Ctrl-C, in their n-th step."""
    train_step = train.Trainer.train_step

    def interrupted_step(trainer):
        if trainer.step + 1 == n:
            signal.raise_signal(signal.SIGINT)
        return train_step(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "train_step", interrupted_step)
        yield


@pytest.mark.parametrize("layer", ["Mamba", "Mamba2"])
def test_train(layer, device, tmp_path, capsys):
    """Learns files and folders, tells how well, and writes a model that others read."""
    headdim = ["--headdim", 8] if layer == "Mamba2" else []
    texts, folder = [HARNESS / "cases.py", HARNESS], tmp_path / "a" / "b"
    options = ["--steps", 60, "--save-every", 30, "--lr", 0.02, "--seed", 3, "--layer", layer]
    assert start(folder, *options, *headdim, texts=texts, device=device) == 0
    output = capsys.readouterr().out
    bits = [float(n) for n in re.findall(r"held out: ([0-9.]+) bits per byte", output)]
    assert len(bits) == 2 and bits[1] < bits[0] < 8

    names = {path.name for path in folder.iterdir()} - {"loss.png"}
    assert names == {"config.json", "model.safetensors", "trainer-60.safetensors", train.STATE}
    model = MambaLMHeadModel.from_pretrained(folder)
    assert (model.config.d_model, model.config.n_layer, model.config.vocab_size) == (16, 1, 256)
    ssm_cfg = {"layer": {"Mamba": "Mamba1"}.get(layer, layer), "d_state": 4}
    assert model.config.ssm_cfg == ssm_cfg | ({"headdim": 8} if headdim else {})
    settings = state_of(folder)[0]["settings"]
    assert (settings["lr"], settings["seed"], settings["batch_size"]) == (0.02, 3, 2)

    size = sum(len(path.read_bytes()) for path in [texts[0], *HARNESS.glob("*.py")])
    counts = re.search(r"text: ([0-9,]+) tokens to learn, ([0-9,]+)", output).groups()
    assert size == sum(int(n.replace(",", "")) for n in counts)
    corpus = text.Corpus.read(texts, text.ByteTokenizer(), 16)
    assert text.bits_per_byte(model, corpus) == pytest.approx(bits[1], abs=1e-3)


OPTIONS = {
    "Mamba": ["--layer", "Mamba"],
    "Mamba2, accumulate": ["--headdim", 8, "--accumulate", 2],
    "Mamba2, bf16": ["--headdim", 8, "--bf16"],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_interrupted_training_goes_on(options, tmp_path, capsys):
    options = [*options, "--steps", 6, "--save-every", 4]
    assert start(tmp_path / "whole", *options) == 0
    with interrupted_in_step(3):
        assert start(tmp_path / "parts", *options) == 130
    assert f"--resume {tmp_path / 'parts'}" in capsys.readouterr().out
    state, tensors = state_of(tmp_path / "parts")
    assert state["step"] == 3 and len(tensors["losses"]) == 3
    MambaLMHeadModel.from_pretrained(tmp_path / "parts")
    torch.manual_seed(77)  # what another process may have
    assert resume(tmp_path / "parts") == 0
    assert_same_training(tmp_path / "parts", tmp_path / "whole")
    assert len(list((tmp_path / "parts").glob("trainer-*"))) == 1


def test_options_matter(tmp_path):
    """Each of them leads to other weights."""
    common = ["--steps", 3, "--headdim", 8]
    changes = [[], ["--bf16"], ["--accumulate", 2], ["--seed", 1], ["--lr", 0.001]]
    changes += [["--seqlen", 20], ["--batch-size", 3], ["--steps", 4]]
    weights = []
    for i, change in enumerate(changes):
        assert start(tmp_path / str(i), *common, *change) == 0
        weights.append(load_safetensors(tmp_path / str(i) / "model.safetensors"))
    name = "backbone.embedding.weight"
    for i, j in ((i, j) for i in range(len(weights)) for j in range(i)):
        assert not torch.equal(weights[i][name], weights[j][name]), (changes[i], changes[j])


def test_accumulated_batches_are_one_batch(tmp_path, monkeypatch):
    """Two batches of two sequences give the gradients of one of four."""
    monkeypatch.setattr(train, "MAX_GRADIENT_NORM", 1e9)  # clipped ones have lost their scale
    common = ["--steps", 3, "--headdim", 8]
    assert start(tmp_path / "two", *common, "--accumulate", 2) == 0
    assert start(tmp_path / "one", *common, "--batch-size", 4) == 0
    (_, two), (_, one) = state_of(tmp_path / "two"), state_of(tmp_path / "one")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)


# A checkpoint puts four files in their places: tensors, trainer.json, model, config.json.
@pytest.mark.parametrize("failing", range(5, 9))
def test_failed_checkpoint_leaves_a_training(failing, tmp_path, monkeypatch, capsys):
    """Whatever file of the second checkpoint fails, a resumed training ends the same."""
    options = ["--headdim", 8, "--steps", 5, "--save-every", 2]
    assert start(tmp_path / "whole", *options) == 0
    replace, calls = os.replace, []

    def full_disk(source, target):
        calls.append(target)
        if len(calls) >= failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        assert start(tmp_path / "parts", *options) == 1
    assert "No space left" in capsys.readouterr().err
    MambaLMHeadModel.from_pretrained(tmp_path / "parts")
    assert state_of(tmp_path / "parts")[0]["step"] == (4 if failing > 6 else 2)
    assert resume(tmp_path / "parts") == 0
    assert_same_training(tmp_path / "parts", tmp_path / "whole")
    assert not list((tmp_path / "parts").glob(".*"))


def test_what_may_change(tmp_path, capsys):
    folder = tmp_path / "model"
    copy = tmp_path / "copy.py"
    copy.write_bytes((HARNESS / "cases.py").read_bytes())
    assert start(folder, "--headdim", 8, "--steps", 3) == 0
    assert resume(folder) == 0  # nothing is left to do
    assert state_of(folder)[0]["step"] == 3
    assert resume(folder, copy, "--steps", 5, "--save-every", 1, "--seqlen", 16) == 0
    state, tensors = state_of(folder)
    assert state["step"] == 5 and len(tensors["losses"]) == 5
    assert [step for step, _ in state["held_out"]] == [3, 4, 5]
    assert state["settings"]["text"] == [str(copy)]

    capsys.readouterr()
    assert resume(folder, "--seqlen", 17) == 2
    assert "--seqlen was 16" in capsys.readouterr().err
    assert resume(folder, "--layer", "Mamba") == 2
    assert resume(folder, HARNESS / "oracle.py", "--steps", 9) == 1
    assert "not the text" in capsys.readouterr().err
    assert start(folder, "--headdim", 8) == 2  # there is a training already
    assert "--resume" in capsys.readouterr().err

    state["settings"]["ranks"] = 4
    (folder / train.STATE).write_text(json.dumps(state))
    assert resume(folder) == 2
    assert "4 ranks" in capsys.readouterr().err
    for damage in ("{", "[]", '{"settings": {"wheels": 4}}'):
        (folder / train.STATE).write_text(damage)
        assert resume(folder) == 1
        assert "is damaged" in capsys.readouterr().err


def test_minutes(tmp_path, monkeypatch):
    """The time of a resumed training goes on, by a clock that shows a second more at each look."""
    clock = types.SimpleNamespace(monotonic=functools.partial(next, itertools.count()))
    monkeypatch.setattr(train, "time", clock)
    options = ["--headdim", 8, "--minutes", 1]
    assert start(tmp_path / "whole", *options) == 0
    whole = state_of(tmp_path / "whole")[0]
    assert 60 <= whole["seconds"] < 65
    with interrupted_in_step(4):
        assert start(tmp_path / "parts", *options) == 130
    before = state_of(tmp_path / "parts")[0]
    assert before["step"] == 4 and 4 <= before["seconds"] < 20
    assert resume(tmp_path / "parts") == 0
    after = state_of(tmp_path / "parts")[0]
    assert after["step"] == whole["step"]
    assert resume(tmp_path / "parts", "--minutes", 0.5) == 0  # less than it has had
    assert state_of(tmp_path / "parts")[0]["step"] == after["step"]


def test_learning_rate():
    """A line up to the largest one, and half a cosine down to LAST_LR of it, over time or steps."""
    trainer = train.Trainer.__new__(train.Trainer)
    trainer.settings = train.Settings(text=[], lr=2.0, steps=1000)
    rates = []
    for trainer.step in range(1000):
        rates.append(trainer.learning_rate())
    top = rates.index(max(rates))
    assert 0 < rates[0] < 0.05 and 40 <= top <= 60 and 1.9 < rates[top] <= 2
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:])[::-1]
    assert rates[-1] == pytest.approx(2 * train.LAST_LR)
    assert rates[499] == pytest.approx(1 + train.LAST_LR)
    trainer.settings = train.Settings(text=[], lr=2.0, minutes=1.0)
    trainer.seconds = 30.0
    assert trainer.learning_rate() == pytest.approx(1 + train.LAST_LR)


@bindings_only  # without the package safetensors
def test_without_extras(tmp_path, monkeypatch, capsys):
    """Lines instead of a bar, no curve, and the files' format from our own library."""
    monkeypatch.setattr(train, "tqdm", None)
    for name in ("matplotlib", "safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(train, "SECONDS_BETWEEN_LINES", 0)
    assert start(tmp_path, "--headdim", 8, "--steps", 2) == 0
    output = capsys.readouterr().out
    assert re.search(r"\b1/2 steps, step 1, [0-9.]+ bits per byte\n", output)
    assert "matplotlib is not installed" in output
    assert not (tmp_path / "loss.png").exists()
    assert resume(tmp_path, "--steps", 3) == 0


def test_loss_curve(tmp_path):
    pytest.importorskip("matplotlib")
    assert start(tmp_path, "--headdim", 8, "--steps", 2) == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "--out FOLDER or --resume FOLDER"),
        (["--out", "a", "--resume", "b"], "--out FOLDER or --resume FOLDER"),
        (["--out", "a"], "no TEXT"),
        (["missing.txt", "--out", "a"], "missing.txt"),
        (["--resume", "missing"], "no training to resume"),
        (["short.txt", "--out", "a"], "the text has 5 tokens; at least 2570"),
        (["--headdim", "4", "--layer", "Mamba", str(HARNESS), "--out", "a"], "--headdim"),
        (["--headdim", "7", str(HARNESS), "--out", "a"], "headdim must divide"),
        (["--steps", "0"], "must be a positive integer, got '0'"),
        (["--minutes", "nan"], "must be a positive number, got 'nan'"),
        (["--seed", "-1"], "an integer of at least 0, got '-1'"),
        (["--device", "abacus"], "torch cannot use 'abacus'"),
        (["--steps", "2", "--minutes", "2"], "not allowed with"),
    ],
)
def test_wrong_arguments(arguments, told, tmp_path, monkeypatch, capsys):
    """One sentence, exit code 2, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    try:
        code = main(["train", *arguments])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and told in error and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_texts(tmp_path):
    """Folders stand for their UTF-8 files; hidden and other ones are left out."""
    contents = {"b.txt": "b", "a/z.py": "z", "é.txt": "é", ".git/x": "x", "a/.hidden": "h"}
    for name, content in contents.items():
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    (tmp_path / "texts" / "picture").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "texts" / "empty").write_bytes(b"")
    assert text.read_texts([tmp_path / "texts"]) == [b"z", b"b", "é".encode()]
    picture = tmp_path / "texts" / "picture"
    assert text.read_texts([picture, tmp_path / "texts" / "a"]) == [b"\xff\xd8\xff", b"z"]
    with pytest.raises(FileNotFoundError, match="no text in"):
        text.read_texts([tmp_path / "texts" / "empty"])


def test_held_out_text_is_not_learned(tmp_path):
    """Every tenth piece, in order; nothing is lost, nothing is in both parts."""
    numbers = "".join(f"{i:07d}\n" for i in range(12_000))
    (tmp_path / "numbers").write_text(numbers)
    corpus = text.Corpus.read([tmp_path / "numbers"], text.ByteTokenizer(), 16)
    learned, held_out = (bytes(t.tolist()) for t in (corpus.train, corpus.held_out))
    assert len(learned) + len(held_out) == len(numbers)
    assert sorted((learned + held_out).split()) == sorted(numbers.encode().split())
    assert 0.08 < len(held_out) / len(numbers) < 0.12
    assert corpus.bytes_per_token == 1


def test_bits_per_byte():
    """A model without an opinion needs the logarithm of its vocabulary, over bytes."""
    config = train.MambaConfig(d_model=16, n_layer=1, vocab_size=64, ssm_cfg={"d_state": 4})
    model = MambaLMHeadModel(config)
    torch.nn.init.zeros_(model.backbone.embedding.weight)
    tokens = torch.randint(64, (2000,))
    corpus = text.Corpus(tokens, tokens, bytes_per_token=1.5, digest="")
    assert text.bits_per_byte(model, corpus) == pytest.approx(6 / 1.5)


def test_sum_over_ranks_waits_for_gloo(monkeypatch):
    """A process that ends while a thread of Gloo still has a tensor of Python aborts."""
    held = []

    def all_reduce(tensor):
        held.append(tensor)
        threading.Timer(0.1, held.clear).start()

    monkeypatch.setattr(train.dist, "all_reduce", all_reduce)
    assert train.sum_over_ranks([0.5, 2.0], torch.device("cpu")) == [0.5, 2.0]
    assert not held


# Processes ---------------------------------------------------------------------------------------


def process(*arguments, ranks=1):
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return subprocess.Popen(
        [*command, "mamba_ssm", "train", *map(str, arguments)],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def interrupted(running, folder, number):
    """Sends a signal when there is a first checkpoint. Returns the exit code and the output."""
    deadline = time.monotonic() + SECONDS
    while not (folder / train.STATE).exists():
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()[0]
        time.sleep(0.05)
    running.send_signal(number)
    output, _ = running.communicate(timeout=SECONDS)
    return running.returncode, output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_with_a_checkpoint(number, tmp_path):
    options = [
        HARNESS / "cases.py",
        *TINY,
        "cpu",
        "--headdim",
        8,
        "--steps",
        10**6,
        "--save-every",
        3,
    ]
    running = process(*options, "--out", tmp_path)
    code, output = interrupted(running, tmp_path, number)
    assert code == 128 + number, output
    stopped = re.search(r"stopped at step (\d+)", output)
    assert state_of(tmp_path)[0]["step"] == int(stopped.group(1))


def test_ranks(tmp_path):
    """Two ranks learn what one does from both their batches."""
    common = ["--headdim", 8, "--steps", 4, "--accumulate", 2]
    options = [HARNESS / "cases.py", *TINY, "cpu", *common, "--batch-size", 1]
    running = process(*options, "--out", tmp_path / "two", ranks=RANKS)
    output, _ = running.communicate(timeout=SECONDS)
    assert running.returncode == 0, output
    assert output.count("checkpoint:") == 1 and output.count("held out:") == 1
    assert start(tmp_path / "one", *common) == 0
    (two, tensors), (one, expected) = state_of(tmp_path / "two"), state_of(tmp_path / "one")
    assert (two["step"], two["settings"]["ranks"], one["settings"]["ranks"]) == (4, RANKS, 1)
    assert torch.equal(tensors["generator"], expected["generator"])
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-5)


def test_interrupted_ranks_leave_a_checkpoint(tmp_path):
    options = [
        HARNESS / "cases.py",
        *TINY,
        "cpu",
        "--headdim",
        8,
        "--steps",
        10**6,
        "--save-every",
        3,
    ]
    running = process(*options, "--out", tmp_path, ranks=RANKS)
    code, output = interrupted(running, tmp_path, signal.SIGINT)
    assert code != 0
    stopped = re.search(r"stopped at step (\d+)", output)
    assert stopped, output
    assert state_of(tmp_path)[0]["step"] == int(stopped.group(1))
