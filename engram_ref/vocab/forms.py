"""What a token reads like, and so which tokens share a compressed id.

Tokens are decoded one by one, normalised (NFKC, accents stripped, lower case, white space folded) and numbered in the
order in which a new form first appears.
"""

from __future__ import annotations

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers

_REPLACEMENT = "\ufffd"  # decoding gives it for a partial UTF-8 sequence
# Stands for a token that is exactly one space while the ends are stripped: without it such a token
# would fold together with those that normalise to nothing.
_LONE_SPACE = "\ue000"

NORMALIZER = normalizers.Sequence(
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


def build_map(tokenizer: Tokenizer) -> list[int]:
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
    return NORMALIZER.normalize_str(text) or text


def is_numbered(ids: np.ndarray) -> bool:
    """Whether compressed ids [tokens] are numbered 0, 1, 2, … in order of first appearance."""
    newest = np.maximum.accumulate(ids)
    return bool(ids.min() >= 0 and np.diff(newest, prepend=-1).max() <= 1)
