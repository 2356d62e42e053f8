"""`mamba-ssm generate`: the text of a model, whatever splits it into tokens."""

import io
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
from harness.examples import program

from mamba_ssm import MambaLMHeadModel, generate, text
from mamba_ssm.__main__ import main
from mamba_ssm.models.config_mamba import MambaConfig

ROOT = pathlib.Path(__file__).parents[2]
CPU = ["--device", "cpu"]
BPE_TEXT = "für die Größe — 小さな猫 and the small cat, the cat and the mat\n" * 40


def make(folder, vocab_size=256, ssm_cfg=None):
    config = MambaConfig(
        d_model=16, n_layer=1, vocab_size=vocab_size, ssm_cfg=ssm_cfg or {"d_state": 4}
    )
    model = MambaLMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture
def bpe(tmp_path):
    """The folder of a small byte-level BPE tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([BPE_TEXT], trainer)
    folder = tmp_path / "bpe"
    folder.mkdir()
    tokenizer.save(str(folder / text.TOKENIZER))
    (folder / text.TOKENIZER_FILES[1]).write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    return folder


class Drawn:
    """Records what MambaLMHeadModel.generate is called with, and may dictate what it draws."""

    def __init__(self, monkeypatch, new_tokens=None):
        self.calls, self._new_tokens = [], new_tokens
        self._generate = MambaLMHeadModel.generate
        monkeypatch.setattr(MambaLMHeadModel, "generate", lambda *a, **k: self._call(*a, **k))

    def _call(self, model, input_ids, **options):
        self.calls.append((input_ids, options))
        if self._new_tokens is not None:
            teacher = torch.tensor([[*input_ids[0].tolist(), *self._new_tokens]])
            options["teacher_outputs"] = teacher
        return self._generate(model, input_ids, **options)


@pytest.mark.parametrize("greedy", [False, True])
def test_text_of_a_byte_model(greedy, device, tmp_path, capsys):
    """What the model draws behind the prompt, with bytes that are no UTF-8 replaced."""
    model, prompt = make(tmp_path).to(device), "Größe"
    options = ["--greedy"] if greedy else ["--seed", "5", "--temperature", "0.5"]
    options += ["--device", device, "--tokens", "30"]
    assert main(["generate", str(tmp_path), "--prompt", prompt, *options]) == 0
    captured = capsys.readouterr()
    ids = list(prompt.encode())
    expected = model.generate(
        torch.tensor([ids], device=device),
        len(ids) + 30,
        top_k=1 if greedy else 0,
        temperature=0.5,
        generator=torch.Generator(device).manual_seed(5),
        cg=True,
    )
    assert captured.out == bytes(expected[0].tolist()).decode(errors="replace") + "\n"
    assert re.fullmatch(
        r"prompt: 7 tokens, [0-9,]+ tokens/s\nnew: 30 tokens, [0-9,]+ tokens/s\n", captured.err
    )


def test_options_reach_the_model(tmp_path, monkeypatch):
    make(tmp_path)
    drawn = Drawn(monkeypatch)
    arguments = ["--tokens", "3", "--top-k", "7", "--top-p", "0.9", "--min-p", "0.1"]
    arguments += ["--temperature", "0.6", "--repetition-penalty", "1.2", "--dtype", "bfloat16"]
    dtypes = []
    load = MambaLMHeadModel.from_pretrained
    monkeypatch.setattr(
        generate.MambaLMHeadModel,
        "from_pretrained",
        lambda *a, **k: dtypes.append(k["dtype"]) or load(*a, **k),
    )
    assert main(["generate", str(tmp_path), *CPU, "--prompt", "abc", *arguments]) == 0
    assert dtypes == [torch.bfloat16]
    ((input_ids, options),) = drawn.calls
    assert input_ids.tolist() == [[97, 98, 99]]
    expected = {
        "max_length": 6,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "temperature": 0.6,
        "repetition_penalty": 1.2,
        "eos_token_id": None,
        "vocab_size": 256,
    }
    assert expected.items() <= options.items()


def test_prompt_from_stdin(tmp_path, monkeypatch, capsys):
    make(tmp_path)
    arguments = ["generate", str(tmp_path), *CPU, "--tokens", "5"]
    assert main([*arguments, "--prompt", "é\n"]) == 0
    expected = capsys.readouterr().out
    stdin = io.TextIOWrapper(io.BytesIO("é\n".encode()), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(arguments) == 0
    assert capsys.readouterr().out == expected


def test_split_characters_are_held_back(tmp_path, monkeypatch):
    """Each write is whole characters; what never becomes one is replaced."""
    make(tmp_path)
    new = "aé猫".encode() + b"\xe7\x8cb" + "猫".encode()[:2]
    Drawn(monkeypatch, new)
    writes = []
    monkeypatch.setattr(generate, "write", writes.append)
    arguments = ["--prompt", "p", "--tokens", str(len(new))]
    assert main(["generate", str(tmp_path), *CPU, *arguments]) == 0
    assert writes == ["p", "a", "", "é", "", "", "猫", "", "", "\N{REPLACEMENT CHARACTER}b"] + [
        *["", ""],
        "\N{REPLACEMENT CHARACTER}\n",
    ]


def test_text_of_a_tokenizer(bpe, tmp_path, monkeypatch, capsys):
    """Training with a tokenizer.json, and text from what it leaves, up to the end token."""
    (tmp_path / "text").write_text(BPE_TEXT, encoding="utf-8")
    folder = tmp_path / "model"
    options = ["--steps", "2", "--d-model", "16", "--n-layer", "1", "--headdim", "8", *CPU]
    options += ["--seqlen", "16", "--tokenizer", str(bpe)]
    assert main(["train", str(tmp_path / "text"), "--out", str(folder), *options]) == 0
    assert {path.name for path in folder.iterdir()} >= set(text.TOKENIZER_FILES)
    shutil.rmtree(bpe)  # the model has its own copy
    assert main(["train", "--resume", str(folder), "--steps", "3", *CPU]) == 0

    tokenizer = text.load_tokenizer(str(folder))
    corpus = text.Corpus.read([tmp_path / "text"], tokenizer, 16)
    model = MambaLMHeadModel.from_pretrained(folder)
    assert model.config.vocab_size == tokenizer.vocab_size
    assert corpus.bytes_per_token == pytest.approx(
        len(BPE_TEXT.encode()) / len(tokenizer.encode(BPE_TEXT))
    )
    assert 1.2 < corpus.bytes_per_token
    prompt, rest = "für die 小さな", "猫 — and the cat"
    ids = [*tokenizer.encode(rest), tokenizer.end, *tokenizer.encode("never")]
    Drawn(monkeypatch, ids)
    capsys.readouterr()
    assert main(["generate", str(folder), *CPU, "--prompt", prompt]) == 0
    assert capsys.readouterr().out == prompt + rest + "\n"


def test_tokenizer_of_another_folder(bpe, tmp_path, monkeypatch, capsys):
    make(tmp_path / "model", vocab_size=320)
    tokenizer = text.load_tokenizer(str(bpe))
    Drawn(monkeypatch, tokenizer.encode(" and the cat"))
    arguments = ["generate", str(tmp_path / "model"), *CPU, "--prompt", "the cat"]
    arguments += ["--tokens", str(len(tokenizer.encode(" and the cat")))]
    assert main([*arguments, "--tokenizer", str(bpe)]) == 0
    assert capsys.readouterr().out == "the cat and the cat\n"
    make(tmp_path / "small", vocab_size=100)
    arguments[1] = str(tmp_path / "small")
    assert main([*arguments, "--tokenizer", str(bpe)]) == 2
    assert "do not belong together" in capsys.readouterr().err


def test_numbers_without_a_tokenizer(tmp_path, monkeypatch, capsys):
    make(tmp_path, vocab_size=1000)
    arguments = ["generate", str(tmp_path), *CPU, "--tokens", "2", "--prompt"]
    Drawn(monkeypatch, [5, 900])
    assert main([*arguments, "17 999"]) == 0
    assert capsys.readouterr().out == "17 999 5 900\n"
    for prompt in ("17 1000", "-1", "cat"):
        assert main([*arguments[:-1], f"--prompt={prompt}"]) == 2
        assert "must be token ids" in capsys.readouterr().err
    # A tokenizer.json that nothing here can read.
    (tmp_path / text.TOKENIZER).write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert main([*arguments, "17 999"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "17 999 5 900\n" and "pip install mamba_ssm[hub]" in captured.err
    assert main(["generate", str(tmp_path), *CPU, "--tokenizer", str(tmp_path)]) == 1


def test_refusals(tmp_path, monkeypatch, capsys):
    """Sentences that say what to do."""

    def told(code, *arguments):
        assert main(["generate", *arguments]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    model = make(tmp_path / "model")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "prompt is empty" in told(2, str(tmp_path / "model"), *CPU)
    assert "no such folder" in told(1, str(tmp_path / "missing"), *CPU, "--prompt", "a")
    tokenizer = ["--tokenizer", str(tmp_path / "model")]
    assert f"no {text.TOKENIZER}" in told(1, str(tmp_path / "model"), *CPU, *tokenizer)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    error = told(1, "owner/name", *CPU, "--prompt", "a")
    assert "pip install mamba_ssm[hub]" in error and error.count("\n") == 1

    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    assert "mamba-ssm convert" in told(1, str(tmp_path / "model"), *CPU, "--prompt", "a")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "mamba"}')
    assert "mamba-ssm convert" in told(1, str(tmp_path / "model"), *CPU, "--prompt", "a")


def test_model_of_the_hub(tmp_path, monkeypatch, capsys):
    """What huggingface_hub downloads, or why it does not."""
    hub = pytest.importorskip("huggingface_hub")
    make(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path))
    assert main(["generate", "owner/name", *CPU, "--prompt", "a", "--tokens", "2"]) == 0

    def offline(name, allow_patterns):
        raise OSError("no connection")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    assert main(["generate", "owner/name", *CPU, "--prompt", "a"]) == 1
    assert "owner/name: no such folder, and not from the Hugging Face hub: no connection" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("layer", ["Mamba", "Mamba2"])
def test_cpp_program_writes_the_same_bytes(layer, tmp_path):
    """What train leaves, read by the C++ example; seed and temperature draw the same in both."""
    example = program("generate")
    harness = str(ROOT / "tests" / "harness")
    options = ["--steps", "20", "--d-model", "32", "--n-layer", "2", "--seqlen", "32", *CPU]
    assert main(["train", harness, "--out", str(tmp_path), "--layer", layer, *options]) == 0
    command = [sys.executable, "-m", "mamba_ssm", "generate", str(tmp_path), *CPU]
    common = ["--prompt", "def é", "--seed", "3", "--temperature", "0.7"]
    python = subprocess.run([*command, *common, "--tokens", "200"], capture_output=True)
    cpp = subprocess.run([example, tmp_path, *common, "--tokens", "200"], capture_output=True)
    assert python.returncode == cpp.returncode == 0, python.stderr + cpp.stderr
    assert python.stdout == cpp.stdout.decode(errors="replace").encode()
