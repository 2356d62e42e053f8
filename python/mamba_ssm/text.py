"""Texts as tokens, and how well a model predicts them."""

import codecs
import hashlib
import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from mamba_ssm.utils.hf import checkpoint_folder

BYTES = "bytes"  # the name of ByteTokenizer
TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (TOKENIZER, "tokenizer_config.json")
PIECE = 1 << 15  # tokens; every tenth piece of a text is held out
EVALUATED_WINDOWS, EVALUATED_SEQLEN = 64, 1024


class ByteTokenizer:
    """One token for each byte of UTF-8."""

    vocab_size = 256
    end = None  # the token that ends a text

    def encode(self, text):
        """Token ids of a string, as a list."""
        return list(text.encode())

    def encode_file(self, content):
        """Token ids of the bytes of a file, (n,) uint8."""
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    def stream(self):
        """A function from a token id to the text that is complete with it, "" if none is; from None
        to what is left."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

        def step(token):
            return decoder.decode(b"" if token is None else bytes([token]), final=token is None)

        return step

    def save(self, folder):
        """Writes what `checkpoint_tokenizer` needs beside a model: nothing."""


class FileTokenizer:
    """The tokenizer.json of a folder, read by the package tokenizers (extra "hub")."""

    def __init__(self, folder):
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                f"{folder / TOKENIZER} needs tokenizers: pip install mamba_ssm[hub]"
            ) from error
        self._folder = folder
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as error:  # the package raises plain Exceptions
            raise ValueError(f"{folder / TOKENIZER}: {error}") from error
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=0)
        self.end = self._end()

    def _end(self):
        path = self._folder / TOKENIZER_FILES[1]
        if not path.is_file():
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
        token = values.get("eos_token") if isinstance(values, dict) else None
        if isinstance(token, dict):
            token = token.get("content")
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode(self, text):
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_file(self, content):
        text = content.decode("utf-8", errors="replace")
        return torch.tensor(self.encode(text), dtype=torch.int32)

    def stream(self):
        from tokenizers.decoders import DecodeStream

        decoder = DecodeStream(skip_special_tokens=True)

        def step(token):
            return "" if token is None else decoder.step(self._tokenizer, token) or ""

        return step

    def save(self, folder):
        copy_tokenizer(self._folder, folder)


class NumberTokenizer:
    """Token ids themselves, for models that come without a tokenizer: "17 4 1002"."""

    end = None

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def encode(self, text):
        try:
            ids = [int(word) for word in text.split()]
        except ValueError:
            ids = [-1]
        if not all(0 <= i < self.vocab_size for i in ids):
            raise ValueError(
                "without a tokenizer the prompt must be token ids, integers from 0 to "
                f"{self.vocab_size - 1}, like '17 4 102'"
            )
        return ids

    def stream(self):
        return lambda token: "" if token is None else f" {token}"


def load_tokenizer(name):
    """The tokenizer "bytes", or that of a folder or of a model of the hub.

    Raises FileNotFoundError without a tokenizer.json, ImportError without the package tokenizers.
    """
    if name == BYTES:
        return ByteTokenizer()
    folder = checkpoint_folder(name, TOKENIZER_FILES)
    if not (folder / TOKENIZER).is_file():
        raise FileNotFoundError(f"{name}: no {TOKENIZER}")
    return FileTokenizer(folder)


def checkpoint_tokenizer(name, vocab_size):
    """The tokenizer of a model, a folder or of the hub.

    Without a tokenizer.json, models of up to 256 tokens are byte-level ones, as those of `train`;
    others have token ids instead of text, as they have without the package tokenizers.
    """
    folder = checkpoint_folder(name, TOKENIZER_FILES)
    if (folder / TOKENIZER).is_file():
        try:
            return FileTokenizer(folder)
        except ImportError as error:
            print(f"{error}; until then, prompt and output are token ids", file=sys.stderr)
    elif vocab_size <= ByteTokenizer.vocab_size:
        return ByteTokenizer()
    return NumberTokenizer(vocab_size)


def copy_tokenizer(source, target):
    """Copies the tokenizer's files that are in one folder to another."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and source.resolve() != target.resolve():
            shutil.copyfile(source / name, target / name)


@dataclass
class Corpus:
    """A text as tokens: (n,) to learn, (m,) held out, and what identifies it."""

    train: torch.Tensor
    held_out: torch.Tensor
    bytes_per_token: float  # of the whole text
    digest: str  # SHA-256 of the files

    @classmethod
    def read(cls, paths, tokenizer, seqlen):
        """The corpus of `read_texts(paths)`, with enough tokens to learn from seqlen at a time.

        Every tenth piece is held out: the same kind of text, none of it seen. Raises ValueError for
        a text that is too short, and what reading raises.
        """
        contents, digest = read_texts(paths), hashlib.sha256()
        for content in contents:
            digest.update(content)
        tokens = torch.cat([tokenizer.encode_file(content) for content in contents])
        if len(tokens) < 10 * (seqlen + 1):
            raise ValueError(
                f"the text has {len(tokens)} tokens; at least {10 * (seqlen + 1)} are needed"
            )
        pieces = tokens.split(min(PIECE, len(tokens) // 10))
        return cls(
            train=torch.cat([piece for i, piece in enumerate(pieces) if i % 10 != 9]),
            held_out=torch.cat(pieces[9::10]),
            bytes_per_token=sum(map(len, contents)) / len(tokens),
            digest=digest.hexdigest(),
        )


def read_texts(paths):
    """The contents of files, and of all UTF-8 files below folders but hidden ones, as bytes.

    Raises FileNotFoundError for a path that does not exist, and if there is no text at all.
    """
    contents = []
    for path in map(Path, paths):
        if not path.is_dir():
            contents.append(path.read_bytes())
            continue
        for file in sorted(path.rglob("*")):
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if file.is_file() and not hidden and _is_utf8(content := file.read_bytes()):
                contents.append(content)
    contents = [content for content in contents if content]
    if not contents:
        raise FileNotFoundError(f"no text in {', '.join(map(str, paths))}")
    return contents


def _is_utf8(content):
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def windows(tokens):
    """(windows, EVALUATED_SEQLEN + 2) tokens spread over a text: two of context, then targets."""
    length = min(EVALUATED_SEQLEN + 2, len(tokens))
    starts = torch.linspace(0, len(tokens) - length, EVALUATED_WINDOWS).long()
    return tokens[starts[:, None] + torch.arange(length)].long()


@torch.no_grad()
def bits_per_byte(model, corpus):
    """What the model needs to write a byte of the held-out text down, in bits."""
    device = model.lm_head.weight.device
    total = []
    for batch in windows(corpus.held_out).to(device).split(8):
        logits = model(batch[:, 1:-1]).logits.float()
        total.append(F.cross_entropy(logits.transpose(1, 2), batch[:, 2:]))
    return torch.stack(total).mean().item() / math.log(2) / corpus.bytes_per_token
