"""The fourth boundary: what a whole model reads in one step, priced from below, and a table beside it.

    model = MODELS["dense-4b"]
    step_price(model.decode_bytes, model.blocks)      # ByteDMD price of reading every active weight once

A step reads all active weights once, block by block, whatever the batch: reuse across the batch is perfect, and
activations, keys and values are free. In a steady run every block was last read one step ago, so that all other weights
lie above it; table rows that lie there too are left out. A block is read by one instruction. All of this makes the
model cheaper than any real one, so that Engram's share of the price comes out as an upper bound.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from bench.setup.decoder_sizes import QWEN3_VOCABULARY, SIZES, BlockShape
from engram_ref.config import EngramConfig
from engram_toy.tracer.stack import cumulative_price

_BFLOAT16 = 2
# The paper's table: 100 B parameters in one layer, at the geometry of Engram-27B, rows of 80 bfloat16 values.
PAPER_TABLE_PARAMETERS = 100e9
# DeepSeek-V4.1-Flash by public audits of its files: 8 B parameters are active on a prefill token, 16 B on a decode
# token; the narrowest format in them is fp4, half a byte. All files without the tables: 289 GB of experts, 18 GB dense.
_V41_ACTIVE = {"prefill": 8 * 10**9, "decode": 16 * 10**9}
_V41_ALL_BYTES = (289 + 18) * 10**9


@dataclass(frozen=True)
class WholeModel:
    """A backbone by the bytes that a step reads.

    Attributes:
        name: as shown.
        blocks: decoder blocks of equal size; the weights are divided among them.
        decode_bytes, prefill_bytes: weights read in a step, at least.
        table: geometry of its Engram layers.
    """

    name: str
    blocks: int
    decode_bytes: int
    prefill_bytes: int
    table: EngramConfig

    def step_bytes(self, mode: str) -> int:
        """Weights read in a step of "decode" or "prefill"."""
        return self.decode_bytes if mode == "decode" else self.prefill_bytes

    def engram_weight_bytes(self) -> int:
        """Key and value projections of the Engram layers, in the width of the model's weights."""
        width = 1 if self.table.form == "v41" else _BFLOAT16
        return len(self.table.layer_ids) * self.table.projection_macs() * width


def step_price(nbytes: int, blocks: int) -> int:
    """Price of reading `nbytes` of weights once, each of `blocks` blocks by one instruction, all others above it."""
    edges = [nbytes * i // blocks for i in range(blocks + 1)]
    return sum(cumulative_price(nbytes) - cumulative_price(nbytes - (b - a)) for a, b in itertools.pairwise(edges))


def paper_table(hidden: int) -> EngramConfig:
    """The paper's table beside a dense model of this width: one layer before the second block, one residual copy."""
    config = EngramConfig.preset("paper-27b").replace(layer_ids=(1,), hidden=hidden, hc_mult=1)
    rows = round(PAPER_TABLE_PARAMETERS / config.embedding_width)
    return config.replace(table_size_per_order=(rows,) * len(config.orders))


def _dense(name: str, size: str) -> WholeModel:
    shape, blocks = BlockShape.of(SIZES[size]), SIZES[size]["num_hidden_layers"]
    nbytes = _BFLOAT16 * (
        blocks * shape.parameters() + QWEN3_VOCABULARY * shape.hidden
    )  # embeddings: the output's only
    return WholeModel(name, blocks, nbytes, nbytes, paper_table(shape.hidden))


_V41 = EngramConfig.preset("v41-flash")
MODELS = {
    "dense-4b": _dense("Dense-4B", "qwen3-4b"),
    "dense-8b": _dense("Dense-8B", "qwen3-8b"),
    "v41-flash": WholeModel("V4.1-Flash", 40, _V41_ACTIVE["decode"] // 2, _V41_ACTIVE["prefill"] // 2, _V41),
    "v41-flash-all": WholeModel("V4.1-Flash, every expert", 40, _V41_ALL_BYTES, _V41_ALL_BYTES, _V41),
}
# Another maker's, priced by `bench/production.py --preset qwen38-flash-next`: 6 B active parameters in bfloat16.
_QWEN = EngramConfig.preset("qwen38-flash-next")
OTHERS = {"qwen38-flash-next": WholeModel("Qwen3.8-Flash-Next", 48, 6 * 10**9 * 2, 6 * 10**9 * 2, _QWEN)}
ALL_MODELS = {**MODELS, **OTHERS}
