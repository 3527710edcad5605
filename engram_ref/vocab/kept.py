"""Maps that are kept on disk between starts: building one takes about a second.

A file stands under the name of all that its map depends on. What it gives is compared with the published map where
there is one, and else with what the tokenizer's tokens of ASCII letters and digits read like: who may write there can
forge the rest of such a map, as its signature has no secret.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from engram_ref.files.replacing import replacing
from engram_ref.files.small_files import read_small
from engram_ref.vocab.forms import NORMALIZER, is_numbered
from engram_ref.vocab.published import KNOWN_FILES, KNOWN_MAPS, map_digest, tokens_digest
from engram_ref.vocab.tokenizer_file import tokens_of

_DIGEST_BYTES = 32  # of the sha256 in front of a kept map


def cache_file(cache_dir: str | os.PathLike[str] | None, text_sha256: str) -> Path:
    """Where the map of a tokenizer is kept, under the name of all that it depends on."""
    # The tokenizer, the library that normalises, and the code and the steps that build.
    code = hashlib.sha256(_source() + NORMALIZER.__getstate__()).hexdigest()
    version = importlib.metadata.version("tokenizers")
    return _cache_folder(cache_dir) / f"{text_sha256}-tokenizers-{version}-{code[:16]}.map"


@functools.cache
def _source() -> bytes:
    """This folder's code."""
    # Any change may change a map, or what is believed: none goes on with what an earlier state kept.
    return b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))


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


def read(file: Path, text: bytes, text_sha256: str) -> np.ndarray | None:
    """The map kept there, int32 [tokens]; None where there is none, or not the one of this tokenizer.

    Args:
        file: `cache_file` of the tokenizer.
        text: of its tokenizer.json.
        text_sha256: of that.
    """
    try:
        stored = read_small(file)
    except (OSError, ValueError):
        return None
    signature, content = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    if not content or len(content) % 4 or signature != _signature(file.name, content):
        return None
    ids = np.frombuffer(content, dtype="<i4")
    return ids if is_numbered(ids) and _fits(ids, text, text_sha256) else None


def _fits(ids: np.ndarray, text: bytes, text_sha256: str) -> bool:
    """Whether a map can be this tokenizer's: the published one where there is one, else one that fits its tokens."""
    known, digest = KNOWN_FILES.get(text_sha256), map_digest(ids)
    if known is not None:
        return digest == KNOWN_MAPS[known]
    try:
        tokens = tokens_of(text)
    except (ValueError, TypeError, KeyError, RecursionError):  # a form of file that only its library knows
        return False
    if len(ids) != len(tokens) or KNOWN_MAPS.get(tokens_digest(tokens), digest) != digest:
        return False
    return _plain_words_agree(ids, tokens)


def _plain_words_agree(ids: np.ndarray, tokens: list[str]) -> bool:
    """Whether tokens of ASCII letters and digits have one id if and only if they differ in nothing but case."""
    # Every decoder in use gives such a token as it is; after another one, maps are built at every start, and right.
    number: dict[str, int] = {}
    for token, compressed in zip(tokens, ids.tolist()):
        if token.isascii() and token.isalnum() and number.setdefault(token.lower(), compressed) != compressed:
            return False
    return len(set(number.values())) == len(number)


def write(file: Path, ids: np.ndarray) -> None:
    """Keep a map as little-endian int32, behind a sha256 of the file's name and the map.

    Raises:
        OSError, ValueError: it cannot be written.
    """
    content = ids.astype("<i4").tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part:
        part.write(_signature(file.name, content) + content)


def _signature(name: str, ids: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + ids).digest()
