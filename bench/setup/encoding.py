"""Text to token ids, piece by piece: the ids of encoding it whole, in bounded memory and on all cores.

    ids = encode_texts(load_tokenizer(), [text])        # int64 [tokens]

A long text is cut before a letter that begins a line, or before the blank between two words, and only where the
tokenizer says so itself: what stands around it must have the same ids in one part as in two. A text without such a
place, one that is a single word for instance, is encoded whole.

    python -m pytest tests/bench/setup/test_encoding.py
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer

PIECE = 1 << 16  # characters, about
_AT_ONCE = 32  # pieces that are encoded together; a token takes some hundred bytes until its id is taken out
_CONTEXT = 1 << 10  # characters on either side of a cut that are tried; no token and hardly a word is longer
_TRIED = 8  # places, before a piece grows
# Where a pre-tokenizer has a border in any context: one line break behind something that is none, and letters around a
# blank. What is more of either could be joined.
_BORDER = re.compile(r"(?<=[^\s]\n)(?=[A-Za-z])|(?<=[a-z])(?= [A-Za-z])")
_SECONDS = 2.0  # between two lines of progress


def encode_texts(tokenizer: Tokenizer, texts: Iterable[str], piece: int = PIECE) -> np.ndarray:
    """Token ids of all texts one after the other, int64 [tokens]; no special tokens are added.

    Args:
        piece: characters that are encoded together, about; the ids do not depend on it.
    """
    found, waiting, progress = [np.empty(0, np.int64)], [], _Progress()
    for part in (part for text in texts for part in _cut(tokenizer, text, piece)):
        waiting.append(part)
        if len(waiting) == _AT_ONCE:
            found += _encode(tokenizer, waiting, progress)
            waiting = []
    return np.concatenate(found + _encode(tokenizer, waiting, progress))


def _encode(tokenizer: Tokenizer, parts: list[str], progress: _Progress) -> list[np.ndarray]:
    encodings = tokenizer.encode_batch_fast(parts, add_special_tokens=False)  # in parallel
    progress.advance(sum(map(len, parts)))
    return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]


def _cut(tokenizer: Tokenizer, text: str, piece: int) -> Iterator[str]:
    """The text in parts of about `piece` characters, larger ones where it cannot be cut."""
    start = 0
    for end in range(piece, len(text), piece):
        at = _last_cut(tokenizer, text, max(start + 1, end - piece), end) if tokenizer.pre_tokenizer else None
        if at is not None:
            yield text[start:at]
            start = at
    yield text[start:]


def _last_cut(tokenizer: Tokenizer, text: str, first: int, end: int) -> int | None:
    """The last place in first .. end at which a text may be cut, None if there is none among those that are tried."""
    places = [found.start() for found in _BORDER.finditer(text, max(first, end - _CONTEXT), end)]
    return next((at for at in reversed(places[-_TRIED:]) if _is_border(tokenizer, text, at)), None)


def _is_border(tokenizer: Tokenizer, text: str, at: int) -> bool:
    left, right = text[max(0, at - _CONTEXT) : at], text[at : at + _CONTEXT]
    one, two, both = (tokenizer.encode(part, add_special_tokens=False).ids for part in (left, right, left + right))
    return one + two == both


class _Progress:
    """A line on stderr every few seconds; nothing for a text that takes no longer."""

    def __init__(self) -> None:
        self._done, self._said = 0, time.monotonic()

    def advance(self, characters: int) -> None:
        self._done += characters
        if time.monotonic() - self._said >= _SECONDS:
            self._said = time.monotonic()
            print(f"encoding    {self._done / 1e6:,.1f} million characters of text", file=sys.stderr, flush=True)
