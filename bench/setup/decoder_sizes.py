"""Sizes of published dense decoders, as numbers: what a block holds and weighs. Torch is not needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# As published in the models' config.json; the theta of the rotary embedding is left out, since it costs no time.
_QWEN3 = dict(model_type="qwen3", num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
SIZES: dict[str, dict[str, Any]] = {
    "qwen3-4b": {**_QWEN3, "hidden_size": 2560, "intermediate_size": 9728},
    "qwen3-8b": {**_QWEN3, "hidden_size": 4096, "intermediate_size": 12288},
}
QWEN3_VOCABULARY = 151_936  # token ids with an embedding


@dataclass(frozen=True)
class BlockShape:
    """Sizes of one decoder block with grouped-query attention and a gated feed-forward part."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, size: dict[str, Any]) -> BlockShape:
        """From the fields of a model's config.json."""
        hidden, heads = size["hidden_size"], size["num_attention_heads"]
        head_dim = size.get("head_dim") or hidden // heads
        return cls(hidden, size["intermediate_size"], heads, size["num_key_value_heads"], head_dim)

    def parameters(self) -> int:
        """Weights of the block's matrices; norms are left out."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)  # Q, O; K, V
        return attention + 3 * self.hidden * self.intermediate  # gate, up and down
