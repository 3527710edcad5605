"""transformers' own n-gram table, the class `qwen4_exp`, as an oracle: it shares no code with this repository.

    rows = class_rows(config, vocab_size, layer_index, ids)       # what the class looks up, [B, T, C]

The class came with transformers 5.16; a transformers without it makes the tests that need it skip, and say so.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engram_ref.config import EngramConfig

qwen4 = pytest.importorskip(
    "transformers.models.qwen4_exp.modeling_qwen4_exp",
    reason="this transformers has no qwen4_exp, the class to compare with: pip install 'transformers>=5.17'",
)


def text_config(**changes: Any) -> Any:
    """A small text model of the class: four blocks, two with a table."""
    from transformers.models.qwen4_exp import Qwen4ExpTextConfig

    sizes: dict[str, Any] = dict(
        vocab_size=1000, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
        ngram_vocab_size_base=1009, ple_embed_dim=128, ple_layer_ids=[1], eos_token_id=7, pad_token_id=0,
        make_ngram_vocab_size_divisible_by=128, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16,
        indexer_budget=64, indexer_compress_ratio=4,
    )  # fmt: skip
    return Qwen4ExpTextConfig(**{**sizes, **changes})


def new_cache() -> Any:
    """An empty cache whose first layer keeps the last token ids."""
    from transformers import DynamicCache

    return DynamicCache(config=text_config())


class ClassRows:
    """The row numbers that the class computes, taken where it would look them up.

    Args:
        config: of form qwen.
        vocab_size: of the class.
        index: the how many-th layer with a table.
    """

    def __init__(self, config: EngramConfig, vocab_size: int, index: int = 0) -> None:
        given = SimpleNamespace(
            vocab_size=vocab_size,
            ngram_size=config.max_ngram,
            heads_per_ngram=config.heads,
            ngram_vocab_size_base=config.table_size_per_order[0],
            seed=config.seed,
            eos_token_id=config.pad_id,
            make_ngram_vocab_size_divisible_by=config.rows_multiple,
        )
        with torch.device("meta"):  # its table may be large
            meta = qwen4.Qwen4ExpTextNGramEmbedding(given, config.embedding_width, 0, index)
        self.table_rows = meta.ngram_embedding.num_embeddings
        self.embedding = meta.to_empty(device="cpu") if self.table_rows < 1 << 20 else meta
        for name, values in (
            ("layer_multipliers", qwen4._build_layer_multipliers(vocab_size, config.max_ngram, index, config.seed)),
            ("ngram_heads_vocab_sizes", torch.tensor(meta.head_vocab_sizes)),
            ("ngram_heads_offsets", torch.tensor(meta.head_offsets)),
        ):
            setattr(self.embedding, name, nn.Buffer(values))
        self._taken = _Taken()
        self.embedding.ngram_embedding = self._taken

    def __call__(self, ids: Tensor, cache: Any = None) -> Tensor:
        """Row numbers [B, T, C] of token ids [B, T]; a cache has what came before, and is moved on."""
        self.embedding(ids, cache)
        return self._taken.rows

    def in_chunks(self, ids: Tensor, cuts: Sequence[int]) -> Tensor:
        """The same, one chunk after the other, through a cache."""
        cache = new_cache()
        parts = [part for part in torch.tensor_split(ids, list(cuts), dim=1) if part.shape[1]]
        return torch.cat([self(part, cache) for part in parts], dim=1)


class _Taken(nn.Module):
    """Stands where the table was."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.empty(0)
        self.rows = torch.empty(0)

    def forward(self, rows: Tensor) -> Tensor:
        self.rows = rows
        return torch.zeros(*rows.shape, 1)
