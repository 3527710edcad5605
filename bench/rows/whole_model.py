"""The fourth boundary: what a whole model reads in one step, priced from below, and what lies above a row of its table.

    model = MODELS["v41-flash"]
    for around in model.surroundings("decode", tokens=512):
        step_price(around.read_bytes, model.blocks)   # ByteDMD price of what a step reads without any Engram
        model.above(around, tokens=512)               # what lies above a row, by the steps since it was last read

A step reads all active weights once, block by block, whatever the batch: reuse across the batch is perfect, and
activations are free. Table rows are left out of what lies above a block, and a block is read by one instruction. All of
this makes the model cheaper than any real one. So Engram's share of the price comes out as an upper bound:

Bytes that a step reads and that are left out on both sides only raise the share. A row at depth D under W bytes costs
its bytes' roots of D + W, the weights cost W times the root of W; so their quotient falls as W grows, for any D >= 0:
the root of (D + W) / W falls, and it is divided by W. Idle experts are no such bytes: they bury rows and cost nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from bench.setup.decoder_sizes import QWEN3_VOCABULARY, SIZES, BlockShape
from engram_ref.config import EngramConfig
from engram_ref.place.model import Experts
from engram_toy.tracer.stack import cumulative_price

_BFLOAT16 = 2
STEP = 512  # tokens of a decode step: the sequences of the paper's run, one token each
CONTEXTS = (0, 4096, 32_768, 131_072)  # tokens whose keys and values a sequence holds; 0 leaves them out
# The paper's table: 100 B parameters in one layer, at the geometry of Engram-27B, rows of 80 bfloat16 values.
PAPER_TABLE_PARAMETERS = 100e9
# DeepSeek-V4.1-Flash by public audits of its files: 8 B parameters are active on a prefill token, 16 B on a decode
# token; the narrowest format in them is fp4, half a byte. All files without the tables: 289 GB of experts, 18 GB dense.
_V41_ACTIVE = {"prefill": 8 * 10**9, "decode": 16 * 10**9}
_V41_EXPERTS, _V41_DENSE = 289 * 10**9, 18 * 10**9


@dataclass(frozen=True)
class Surroundings:
    """What a step reads beside the table.

    Attributes:
        experts: whose weights: those of "one" token, the "expected" union over a step's, or "all"; "" without any.
        context: tokens of keys and values that each sequence holds.
        read_bytes: read by every step, at least.
        live_bytes: read by it or not; all that lies above a row before its first read.
    """

    experts: str
    context: int
    read_bytes: int
    live_bytes: int


@dataclass(frozen=True)
class WholeModel:
    """A backbone by the bytes that a step reads.

    Attributes:
        name: as shown.
        blocks: decoder blocks of equal size; what a step reads is divided among them.
        decode_bytes, prefill_bytes: weights that one token of a step reads, at least.
        all_bytes: of all weights.
        table: geometry of its Engram layers.
        kv_bytes: keys and values of one token; None where they are not known.
        experts: None for a dense model.
    """

    name: str
    blocks: int
    decode_bytes: int
    prefill_bytes: int
    all_bytes: int
    table: EngramConfig
    kv_bytes: int | None = None
    experts: Experts | None = None

    def surroundings(self, mode: str, tokens: int) -> list[Surroundings]:
        """Every way to count what a step of so many tokens reads, in "decode" or "prefill".

        Decoding, each token is of a sequence of its own; in a prefill all are of one.
        """
        weights = self.decode_bytes if mode == "decode" else self.prefill_bytes
        if self.experts:
            # What all tokens read alike; nothing, where the published active weights are less than an even part of the
            # experts, as in a prefill: 4 GB, and six of 384 have 4.5.
            shared = max(0, weights - self.experts.touched(1))
            union = max(weights, shared + self.experts.touched(tokens))
            read = {"one": weights, "expected": union, "all": self.all_bytes}
            return [Surroundings(name, 0, nbytes, self.all_bytes) for name, nbytes in read.items()]
        sequences = tokens if mode == "decode" else 1
        caches = {context: sequences * context * (self.kv_bytes or 0) for context in CONTEXTS}
        if self.kv_bytes is None:
            caches = {0: 0}
        idle = self.all_bytes - weights
        return [Surroundings("", context, weights + kv, weights + kv + idle) for context, kv in caches.items()]

    def decoding(self, experts: str, tokens: int) -> Surroundings:
        """What a decode step reads beside the table, keys and values left out; `experts` as `Surroundings` has it."""
        return next(a for a in self.surroundings("decode", tokens) if (a.experts, a.context) == (experts, 0))

    def above(self, around: Surroundings, tokens: int) -> list[int]:
        """Bytes above a row that was last read 1, 2, ... steps of so many tokens ago; at last, that was never read.

        It ends where more steps read no more. Which experts a step reads is drawn anew each time for "expected" alone.
        """
        # All that is live lies above a row that was never read. What was read passes everything that is not: an expert
        # that no step reads never comes to lie above it again. Above a row of g steps ago lie the weights that g steps
        # have read.
        if self.experts is None or around.experts != "expected":
            return [around.read_bytes, around.live_bytes]
        touched = [self.experts.touched(tokens)]
        while touched[-1] < self.experts.nbytes:
            touched.append(self.experts.touched((len(touched) + 1) * tokens))
        shared = around.read_bytes - touched[0]
        return [*(shared + nbytes for nbytes in touched), around.live_bytes]

    def engram_weight_bytes(self) -> int:
        """Key and value projections of the Engram layers, in the width of the model's weights."""
        width = 1 if self.table.form == "v41" else _BFLOAT16
        return len(self.table.layer_ids) * self.table.projection_macs() * width


def step_price(nbytes: int, blocks: int, above: int = 0) -> int:
    """Price of reading `nbytes` once, each of `blocks` blocks by one instruction, all others above it.

    Args:
        above: bytes of other things that come to lie above each block between two reads of it.
    """
    # In a steady run every block was last read one step ago: all others lie above it.
    edges = [nbytes * i // blocks for i in range(blocks + 1)]
    deepest = nbytes + above
    return sum(cumulative_price(deepest) - cumulative_price(deepest - (b - a)) for a, b in itertools.pairwise(edges))


def paper_table(hidden: int) -> EngramConfig:
    """The paper's table beside a dense model of this width: one layer before the second block, one residual copy."""
    config = EngramConfig.preset("paper-27b").replace(layer_ids=(1,), hidden=hidden, hc_mult=1)
    rows = round(PAPER_TABLE_PARAMETERS / config.embedding_width)
    return config.replace(table_size_per_order=(rows,) * len(config.orders))


def _dense(name: str, size: str) -> WholeModel:
    shape, blocks = BlockShape.of(SIZES[size]), SIZES[size]["num_hidden_layers"]
    nbytes = _BFLOAT16 * (
        blocks * shape.parameters() + QWEN3_VOCABULARY * shape.hidden
    )  # embeddings: the output's only; of the input's, a token reads one row
    kv_bytes = _BFLOAT16 * blocks * 2 * shape.kv_heads * shape.head_dim
    return WholeModel(name, blocks, nbytes, nbytes, nbytes, paper_table(shape.hidden), kv_bytes)


MODELS = {
    "dense-4b": _dense("Dense-4B", "qwen3-4b"),
    "dense-8b": _dense("Dense-8B", "qwen3-8b"),
    # The size of its keys and values is not published in what we could read; a step reads them, so the bound holds.
    "v41-flash": WholeModel(
        "V4.1-Flash",
        40,
        _V41_ACTIVE["decode"] // 2,
        _V41_ACTIVE["prefill"] // 2,
        _V41_EXPERTS + _V41_DENSE,
        EngramConfig.preset("v41-flash"),
        experts=Experts(_V41_EXPERTS, 384, 6),
    ),
}
# Models around the same table read the same rows: by the name of the table.
AROUND = {"paper-100b": ("dense-4b", "dense-8b"), "v41-flash": ("v41-flash",)}
# Another maker's, priced by `bench/production.py --preset qwen38-flash-next`: 6 B active parameters in bfloat16. What
# else it holds is left out, so its rows lie under too little, and its shares are no upper bounds.
_QWEN = EngramConfig.preset("qwen38-flash-next")
_QWEN_BYTES = 6 * 10**9 * _BFLOAT16
OTHERS = {
    "qwen38-flash-next": WholeModel("Qwen3.8-Flash-Next", 48, _QWEN_BYTES, _QWEN_BYTES, _QWEN_BYTES, _QWEN),
}
# Bytes of a row that these are priced at: bfloat16, as in the files, and a byte a value, as engines keep them in fp8.
ROW_SIZES = {name: (model.table.row_bytes(), model.table.row_width) for name, model in OTHERS.items()}
ALL_MODELS = {**MODELS, **OTHERS}
EXPERTS = {"": "", "one": ", one token's experts", "expected": ", expected experts", "all": ", every expert"}


def table_of(model: str) -> str:
    """The table beside a model, by its name in AROUND."""
    return next(table for table, models in AROUND.items() if model in models)


def shown(table: str, experts: str = "") -> str:
    """A model and whose experts it reads, for people."""
    return ALL_MODELS[table].name + EXPERTS[experts]
