"""The two toy models, filled with reproducible numbers: same seed, same bits on every machine."""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Sequence

import numpy as np

from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher
from engram_toy.attention import AttentionWeights
from engram_toy.kv_bank import BankWeights
from engram_toy.layer import EngramWeights
from engram_toy.programs import Workload


def toy_config(model: str, hidden: int) -> EngramConfig:
    """The toy's geometry: 16 narrow rows a position for Engram, 8 key-and-value rows for the bank."""
    tiny = EngramConfig.preset("tiny").replace(hidden=hidden)
    if model == "engram":
        return tiny
    return tiny.replace(heads=4, table_size_per_order=(64, 64), row_width=2 * hidden)


class Numbers:
    """Uniform numbers from the one generator that Python promises never to change: no library function in between."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def vector(self, width: int, scale: float = 1.0) -> list[float]:
        """[width] values in -scale .. scale."""
        return [(2.0 * self._random() - 1.0) * scale for _ in range(width)]

    def matrix(self, rows: int, width: int, scale: float | None = None) -> list[list[float]]:
        """[rows][width]; by default scaled like a projection of `width` inputs."""
        scale = width**-0.5 if scale is None else scale
        return [self.vector(width, scale) for _ in range(rows)]


def make_workload(model: str, config: EngramConfig, plan: HashPlan, ids: Sequence[int], seed: int) -> Workload:
    """A model with random weights and a random table, about to read the compressed ids `ids`."""
    numbers = Numbers(seed)
    layer_id = config.layer_ids[0]
    hidden = config.hidden
    return Workload(
        model=model,
        plan=json.loads(plan.to_json()),
        layer_id=layer_id,
        compressed_ids=ids,
        table=numbers.matrix(plan.layer(layer_id).rows, config.row_width, scale=1.0),
        hidden=numbers.matrix(len(ids), hidden, scale=1.0),
        layer=_engram_weights(numbers, config) if model == "engram" else _bank_weights(numbers, hidden),
        attention=AttentionWeights(*(numbers.matrix(hidden, hidden) for _ in range(4))),
    )


def _engram_weights(numbers: Numbers, config: EngramConfig) -> EngramWeights:
    copies, hidden, width = range(config.hc_mult), config.hidden, config.embedding_width
    return EngramWeights(
        key_projs_weight=[numbers.matrix(hidden, width) for _ in copies],
        key_projs_bias=[numbers.vector(hidden) for _ in copies],
        value_proj_weight=numbers.matrix(hidden, width),
        value_proj_bias=numbers.vector(hidden),
        norm1=[numbers.vector(hidden) for _ in copies],
        norm2=[numbers.vector(hidden) for _ in copies],
        short_conv_norms=[numbers.vector(hidden) for _ in copies],
        short_conv_conv=[numbers.matrix(hidden, config.kernel_size) for _ in copies],
    )


def _bank_weights(numbers: Numbers, hidden: int) -> BankWeights:
    return BankWeights(numbers.matrix(hidden, hidden), numbers.matrix(hidden, hidden))


def row_stream(plan: HashPlan, layer_id: int, ids: Sequence[int]) -> np.ndarray:
    """Row indices [T, C] as the reference computes them."""
    return NgramHasher(plan, backend="numpy")(np.array([ids]), layer_id)[0]


def digest(values: np.ndarray | array) -> str:
    """sha256 of integers as little-endian int64."""
    return hashlib.sha256(np.asarray(values).astype("<i8").tobytes()).hexdigest()
