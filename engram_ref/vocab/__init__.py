"""The compressed vocabulary: token id -> compressed id, by what a token reads like.

`Great`, ` great` and `GREAT` share one compressed id. Every hash multiplier derives from the number of such forms, so
the map must be exact.

    vocab = CompressedVocab.from_tokenizer()          # the packaged DeepSeek-V4 tokenizer
    compressed = vocab(token_ids)                     # [B, T] -> [B, T]

    compressed      the map, and how it is applied
    forms           what a token reads like
    tokenizer_file  the tokenizer.json that a path or a name means
    published       digests to compare with
    kept            maps kept on disk between starts; an empty `cache_dir` believes nobody

Sources: the public demo `deepseek-ai/Engram`; DeepSeek-V4.1-Flash. Torch is not imported here.
"""

from engram_ref.vocab.compressed import CompressedVocab, vocab_for
from engram_ref.vocab.published import KNOWN_MAPS, fingerprint, map_digest
from engram_ref.vocab.tokenizer_file import configured_pad, load_tokenizer, tokenizer_json

__all__ = [
    "KNOWN_MAPS",
    "CompressedVocab",
    "configured_pad",
    "fingerprint",
    "load_tokenizer",
    "map_digest",
    "tokenizer_json",
    "vocab_for",
]
