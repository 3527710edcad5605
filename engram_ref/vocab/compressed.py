"""The map from token ids to compressed ids: made of a tokenizer or given, and applied to batches.

Torch is not imported here.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_ref.config import MOST_IDS, EngramConfig, require_int
from engram_ref.ids import DEAD, check_ids
from engram_ref.quoting import one_line
from engram_ref.vocab import kept
from engram_ref.vocab.forms import build_map, is_numbered
from engram_ref.vocab.published import check_published, fingerprint, map_digest
from engram_ref.vocab.tokenizer_file import panics, parse, tokenizer_json


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
        if not is_numbered(array):
            raise ValueError("not a compressed map: ids must be numbered 0, 1, 2, … in order of first appearance")
        array.flags.writeable = False
        return cls(array, int(array.max()) + 1, map_digest(array))

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
            cache: Path | None = kept.cache_file(cache_dir, sha256)
        except OSError as error:
            cache = None
            _warn_uncached(error)
        ids = None if cache is None else kept.read(cache, text, sha256)
        if ids is not None:
            return cls.from_map(ids)
        tokenizer = parse(text, origin)
        with panics(origin):
            vocab = cls.from_map(build_map(tokenizer))
        check_published(fingerprint(tokenizer), vocab.digest)
        if cache is not None:
            try:
                kept.write(cache, vocab.ids)
            except (OSError, ValueError) as error:
                _warn_uncached(error)
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


def _warn_uncached(error: Exception) -> None:
    message = f"the compressed vocabulary could not be cached ({one_line(error)}); it is built on every start"
    warnings.warn(message, stacklevel=4)  # at whoever asked for the vocabulary of a tokenizer
