"""What is published of DeepSeek's tokenizers, to compare with: maps by their tokens, tokens by their files."""

from __future__ import annotations

import hashlib
import importlib.metadata

import numpy as np
from tokenizers import Tokenizer

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


def fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 over all tokens in the order of their ids: the same however the tokenizer was stored."""
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    return tokens_digest([str(tokenizer.id_to_token(i)) for i in range(size)])


def tokens_digest(tokens: list[str]) -> str:
    """`fingerprint` of tokens in the order of their ids."""
    return hashlib.sha256("\0".join(tokens).encode()).hexdigest()


def map_digest(ids: np.ndarray) -> str:
    """sha256 of a map as little-endian int32, in hexadecimal digits."""
    return hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()


def check_published(tokens_sha256: str, digest: str) -> None:
    """Refuse a map of a DeepSeek tokenizer that is not the published one."""
    published = KNOWN_MAPS.get(tokens_sha256, digest)
    if digest != published:
        raise ValueError(
            f"the map of this DeepSeek tokenizer has digest {digest}, published is {published}: "
            f"tokenizers {importlib.metadata.version('tokenizers')} normalises differently; use another version"
        )
