"""The C++ examples: what they compute, against Python, and that no Python is in their processes."""

import json
import math
import os
import random
import re
import subprocess
import unicodedata
from pathlib import Path

import pytest
import torch
from harness.examples import program

from mamba_ssm import Mamba, Mamba2, MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils._safetensors import save_safetensors

ROOT = Path(__file__).parents[2]
PROMPT = "The state of a scan"


def run(tmp_path, name, *arguments, code=0, **options):
    """The finished process of an example, which has loaded our library and no Python."""
    log = tmp_path / "loaded"
    environment = {**os.environ, "LD_DEBUG": "files", "LD_DEBUG_OUTPUT": str(log)}
    result = subprocess.run(
        [program(name), *map(str, arguments)], capture_output=True, env=environment, **options
    )
    assert result.returncode == code, result.stderr.decode()
    loaded = "".join(path.read_text() for path in tmp_path.glob("loaded.*"))
    assert "libmamba_ssm_ops.so" in loaded
    assert not re.search(r"libpython|libtorch_python|_C\.cpython", loaded)
    return result


def test_ops(tmp_path):
    text = run(tmp_path, "ops").stdout.decode()
    assert text.count("largest difference") == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of the training example, and what the example printed."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text").write_text("to be or not to be, that is the question. " * 200)
    options = ("--steps", 60, "--lr", 0.01, "--seqlen", 64, "--layers", 1, "--d-model", 32)
    result = run(folder, "train", folder / "text", folder / "checkpoint", *options)
    return folder / "checkpoint", result.stdout.decode()


def test_train(trained):
    checkpoint, text = trained
    losses = [float(loss) for loss in re.findall(r"([0-9.]+) bits/byte", text)]
    assert len(losses) == 11 and losses[0] > 7 and losses[-1] < 4
    model = MambaLMHeadModel.from_pretrained(checkpoint)
    tokens = torch.tensor([list(b"to be or not to be, that is the question. ")])
    with torch.no_grad():
        logits = model(tokens).logits[0, :-1]
    bits = torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).item() / math.log(2)
    assert bits < losses[0] / 1.5


OPTIONS = {
    "greedy": (["--greedy"], {"top_k": 1}),
    "sampled": (["--temperature", 0.7, "--seed", 3], {"top_k": 0, "temperature": 0.7}),
    "filtered": (
        ["--temperature", 1, "--top-k", 9, "--top-p", 0.9, "--min-p", 0.02, "--seed", 3]
        + ["--repetition-penalty", 1.3],
        {"top_k": 9, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
    ),
}


@pytest.mark.parametrize("flags, options", OPTIONS.values(), ids=OPTIONS.keys())
def test_generate_bytes(tmp_path, trained, flags, options):
    checkpoint, _ = trained
    model = MambaLMHeadModel.from_pretrained(checkpoint)
    prompt = torch.tensor([list(PROMPT.encode())])
    generator = torch.Generator().manual_seed(3)
    length = prompt.shape[1] + 40
    expected = model.generate(prompt, length, vocab_size=256, generator=generator, **options)[0]
    arguments = (checkpoint, "--tokens", 40, *flags)
    result = run(tmp_path, "generate", *arguments, "--prompt", PROMPT)
    assert result.stdout == bytes(expected.tolist()) + b"\n"
    assert re.search(rb"40 tokens after a prompt of 19, [0-9.e+]+ tokens/s", result.stderr)
    ids = " ".join(map(str, prompt[0].tolist())).encode()
    result = run(tmp_path, "generate", *arguments, "--ids", input=ids)
    assert list(map(int, result.stdout.split())) == expected[prompt.shape[1] :].tolist()


def test_generate_refuses(tmp_path, trained):
    checkpoint, _ = trained
    for arguments, code, message in (
        (["--tokens", "x"], 2, "--tokens must be a number"),
        (["--wrong"], 2, "unknown argument --wrong"),
        (["--dtype", "int8"], 2, "--dtype must be float32 or bfloat16"),
        (["--prompt", ""], 1, "the prompt must not be empty"),
        (["--temperature", "-1"], 1, "temperature must be positive"),
    ):
        result = run(tmp_path, "generate", checkpoint, *arguments, code=code)
        assert message in result.stderr.decode()
    for ids, message in ((b"1 300", "has token 300"), (b"1 x", "x is no token id")):
        result = run(tmp_path, "generate", checkpoint, "--ids", code=1, input=ids)
        assert message in result.stderr.decode()


# Tokenizers ---------------------------------------------------------------------------------------

TEXTS = [
    "Hello, world! I'm sure they'll say it's 42 o'clock; we've 'd 'S x''s.",
    "  two  spaces\tand\n\n  lines \r\n end   ",
    " ",
    "\n \n",
    "   a",
    "naïve café – “quotes” … €5½ ²³ Ⅷ ١٢٣",
    "Привет, мир! 你好世界 こんにちは 한국어 हिन्दी ภาษาไทย שלום",
    "😀👩‍👩‍👧 flags 🇩🇪 e\u0301 n\u0303 \u212b \u1e9b\u0323 \uac00\u1100\u1161",
    "a\u00a0b\u2003c\u3000d\u0085e\u2028f\x1cg",
    "def f(x):\n        return x  # eight spaces\n",
    "<|endoftext|>text<|endoftext|> <|endoftext",
    "ÅÅ ﬁ ①",
]


def tokenizer_of(tokenizers, **kinds):
    """A byte-level BPE tokenizer of 400 tokens, as GPT-NeoX's in its parts."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    space = kinds.get("add_prefix_space", False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
    )
    tokenizer.train_from_iterator([(ROOT / "README.md").read_text(), *TEXTS], trainer)
    if kinds.get("nfc"):
        tokenizer.normalizer = tokenizers.normalizers.NFC()
        runs = [" " * n for n in range(2, 9)] + ["A\u030a"]
        tokenizer.add_tokens([tokenizers.AddedToken(run, normalized=True) for run in runs])
    if kinds.get("template"):
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
        )
    return tokenizer


KINDS = {
    "GPT-2": {},
    "GPT-NeoX": {"nfc": True},
    "prefix": {"add_prefix_space": True},
    "template": {"template": True, "nfc": True},
}


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("as_text", [False, True], ids=["pairs", "text"])
def test_tokenizer(tmp_path, kinds, as_text):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizer_of(tokenizers, **kinds)
    path = tmp_path / "tokenizer.json"
    content = json.loads(tokenizer.to_str())
    if as_text:  # merges as older files have them
        merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
        content["model"]["merges"] = merges
    path.write_text(json.dumps(content))
    characters = "".join(TEXTS) + "'  \n"
    rng = random.Random(0)
    texts = [*TEXTS, (ROOT / "README.md").read_text()]
    texts += ["".join(rng.choices(characters, k=rng.randint(1, 40))) for _ in range(300)]
    result = subprocess.run(
        [program("tokenize"), path],
        input=b"".join(text.encode() + b"\0" for text in texts),
        capture_output=True,
        check=True,
    )
    lines = result.stdout.decode().splitlines()
    assert len(lines) == 2 * len(texts)
    for text, ids, decoded in zip(texts, lines[::2], lines[1::2]):
        expected = tokenizer.encode(text).ids
        assert list(map(int, ids.split())) == expected, repr(text)
        inner = (
            bytes.fromhex(decoded)
            .decode()
            .removeprefix("<|endoftext|>" * bool(kinds.get("template")))
        )
        if not kinds.get("add_prefix_space"):
            whole = unicodedata.normalize("NFC", text) if kinds.get("nfc") else text
            whole += "<|endoftext|>" * bool(kinds.get("template"))
            assert unicodedata.normalize("NFC", inner) == unicodedata.normalize("NFC", whole)


def test_generate_text(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizer_of(tokenizers, nfc=True)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    program("tokenize")  # is there where tokenizers are supported
    torch.manual_seed(0)
    vocabulary = tokenizer.get_vocab_size()
    config = MambaConfig(d_model=16, n_layer=1, vocab_size=vocabulary, ssm_cfg={"d_state": 4})
    model = MambaLMHeadModel(config)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    prompt = torch.tensor([tokenizer.encode(PROMPT).ids])
    length = prompt.shape[1] + 20
    tokens = model.generate(prompt, length, vocab_size=vocabulary)[0, prompt.shape[1] :]
    arguments = (tmp_path, "--tokens", 20, "--greedy", "--prompt", PROMPT)
    result = run(tmp_path, "generate", *arguments)
    text = result.stdout.decode(errors="replace").removeprefix(PROMPT).removesuffix("\n")
    assert text == tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": {"type": "WordPiece"}}, "model WordPiece is not supported"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase is not supported"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer Whitespace is not supported"),
        ({"post_processor": {"type": "BertProcessing"}}, "post_processor BertProcessing"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, 'no token "ab"'),
        ({"model": {"type": "BPE", "vocab": 3, "merges": []}}, "tokenizer.json"),
        (None, "tokenizer.json"),
    ],
)
def test_tokenizer_refuses(tmp_path, change, message):
    path = tmp_path / "tokenizer.json"
    content = {"model": {"type": "BPE", "vocab": {}, "merges": []}, **(change or {})}
    path.write_text("{" if change is None else json.dumps(content))
    result = subprocess.run([program("tokenize"), path], input=b"", capture_output=True)
    assert result.returncode == 1 and message in result.stderr.decode()


# AOTInductor --------------------------------------------------------------------------------------


class Blocks(torch.nn.Module):
    """Each kind of block, and so the scans, convolutions and norms of both."""

    def __init__(self):
        super().__init__()
        self.mamba = Mamba(16, d_state=4)
        self.mamba2 = Mamba2(16, d_state=4, headdim=8)

    def forward(self, x):
        y = self.mamba(x)
        return y, self.mamba2(y)


def test_compiled_package(tmp_path):
    """A package made here runs there, for a length that it was not traced with."""
    program("aoti_run")
    torch.manual_seed(0)
    model, x = Blocks().eval(), torch.randn(2, 13, 16)
    with torch.no_grad():
        seqlen = torch.export.Dim("seqlen", min=2, max=100)
        exported = torch.export.export(
            model, (torch.randn(2, 8, 16),), dynamic_shapes=({1: seqlen},)
        )
        package = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(tmp_path / "blocks.pt2")
        )
        outputs = model(x)
    tensors = {"input.0": x, **{f"output.{i}": output for i, output in enumerate(outputs)}}
    save_safetensors(tensors, tmp_path / "right.safetensors")
    save_safetensors({**tensors, "output.1": outputs[0].clone()}, tmp_path / "wrong.safetensors")
    save_safetensors({"input.0": x}, tmp_path / "inputs.safetensors")
    text = run(tmp_path, "aoti_run", package, tmp_path / "right.safetensors").stdout.decode()
    assert text.count(", as expected") == 2 and "(2, 13, 16)" in text.replace("[", "(").replace(
        "]", ")"
    )
    result = run(tmp_path, "aoti_run", package, tmp_path / "wrong.safetensors", code=1)
    assert "output.1: Float [2, 13, 16], NOT as expected" in result.stdout.decode()
    result = run(tmp_path, "aoti_run", package, tmp_path / "inputs.safetensors")
    assert "output.1: Float [2, 13, 16]\n(1,.,.)" in result.stdout.decode()
