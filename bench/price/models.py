"""The toy models, filled with reproducible numbers: same seed, same bits on every machine.

Each has the form of a preset of `engram_ref.config`. V4.1-Flash and Qwen3.8-Flash-Next are scaled down to what a laptop
traces; `scale_of` says by how much. V4.1's rows hold one number per stored byte: codes, then a scale for each 32 of
them.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Sequence

import numpy as np

from bench.schemas.toy import Scale
from engram_ref.config import SCALE_BLOCK, EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher
from engram_toy import fp8
from engram_toy.fusion.demo import EngramWeights
from engram_toy.fusion.qwen import QwenWeights
from engram_toy.fusion.v41 import V41Weights
from engram_toy.models.attention import AttentionWeights
from engram_toy.models.cuts import CUTS
from engram_toy.models.kv_bank import BankWeights
from engram_toy.models.programs import MODELS, Workload

MODELS_OF = {"tiny": MODELS, "v41-flash": ("engram",), "qwen38-flash-next": ("engram",)}  # these have no bank


def toy_config(model: str, hidden: int, preset: str = "tiny") -> EngramConfig:
    """The toy's geometry: 16 narrow rows a position for Engram, or V4.1-Flash's 24; 8 key-and-value rows for the bank.

    Raises:
        ValueError: a model that the preset does not have.
    """
    if model not in MODELS_OF[preset]:
        raise ValueError(f"model {model} has no form of preset {preset}: use {' or '.join(MODELS_OF[preset])}")
    config = EngramConfig.preset(preset).replace(hidden=hidden, **CUTS[preset])
    if model == "engram":
        return config
    # Two orders of four heads: 8 rows a position, each a key and a value.
    return config.replace(heads=4, table_size_per_order=(64, 64), row_width=2 * hidden)


def scale_of(config: EngramConfig, plan: HashPlan, preset: str) -> Scale:
    """What was cut, as pairs: here, and in the preset as published. Rows are those of the one layer that is run."""
    full, layer_id = EngramConfig.preset(preset), config.layer_ids[0]
    full_plan = HashPlan.build(full, plan.compressed_size, plan.pad_compressed)
    return {
        "table_rows": [plan.layer(layer_id).rows, full_plan.layer(layer_id).rows],
        "row_width": [config.row_width, full.row_width],
        "hidden": [config.hidden, full.hidden],
        "hc_mult": [config.hc_mult, full.hc_mult],
        "layers": [1, len(full.layer_ids)],
    }


class Numbers:
    """Uniform numbers, the same bits on every machine."""

    def __init__(self, seed: int) -> None:
        # The one generator that Python promises never to change; no library function in between.
        self._random = random.Random(seed).random

    def vector(self, width: int, scale: float = 1.0) -> list[float]:
        """[width] values in -scale .. scale."""
        return [(2.0 * self._random() - 1.0) * scale for _ in range(width)]

    def matrix(self, rows: int, width: int, scale: float | None = None) -> list[list[float]]:
        """[rows][width]; by default scaled like a projection of `width` inputs."""
        scale = width**-0.5 if scale is None else scale
        return [self.vector(width, scale) for _ in range(rows)]

    def scaled_row(self, width: int) -> list[float]:
        """`width` codes, any but NaN, then a scale of 2^-9 .. 2^-6 for each 32 of them; the values are at most 7."""
        codes = [int(self._random() * 254) for _ in range(width)]  # 0 .. 253: the sign is the last bit
        scales = [118 + int(self._random() * 4) for _ in range(width // SCALE_BLOCK)]
        return fp8.numbers([code >> 1 | (code & 1) << 7 for code in codes] + scales)


def make_workload(model: str, config: EngramConfig, plan: HashPlan, ids: Sequence[int], seed: int) -> Workload:
    """A model with random weights and a random table, about to read the compressed ids `ids`."""
    numbers = Numbers(seed)  # drawn in this order: table, stream, layer, attention
    layer_id = config.layer_ids[0]
    hidden, rows = config.hidden, plan.layer(layer_id).rows
    if config.row_dtype == "float8_e4m3fn":
        table = [numbers.scaled_row(config.row_width) for _ in range(rows)]
    else:
        table = numbers.matrix(rows, config.row_width, scale=1.0)
    return Workload(
        model=model,
        plan=json.loads(plan.to_json()),
        layer_id=layer_id,
        compressed_ids=ids,
        table=table,
        hidden=numbers.matrix(len(ids), hidden, scale=1.0),
        layer=_layer_weights(model, numbers, config),
        attention=AttentionWeights(*(numbers.matrix(hidden, hidden) for _ in range(4))),
    )


def _layer_weights(
    model: str, numbers: Numbers, config: EngramConfig
) -> EngramWeights | V41Weights | QwenWeights | BankWeights:
    copies, hidden, width = range(config.hc_mult), config.hidden, config.embedding_width
    if model == "kv-bank":
        return BankWeights(numbers.matrix(hidden, hidden), numbers.matrix(hidden, hidden))
    if config.form == "v41":
        wkv = numbers.matrix((config.hc_mult + 1) * hidden, width)
        return V41Weights(wkv, [numbers.vector(hidden) for _ in copies], [numbers.vector(hidden) for _ in copies])
    if config.form == "qwen":
        return QwenWeights(
            key_proj=[numbers.matrix(hidden, width) for _ in copies],
            value_proj=numbers.matrix(hidden, width),
            norm_key=[numbers.vector(hidden) for _ in copies],
            norm_query=[numbers.vector(hidden) for _ in copies],
            norm_conv=[numbers.vector(hidden) for _ in copies],
            conv1d=[numbers.matrix(hidden, config.kernel_size) for _ in copies],
        )
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


def row_stream(plan: HashPlan, layer_id: int, ids: Sequence[int]) -> np.ndarray:
    """Row indices [T, C] as the reference computes them."""
    return NgramHasher(plan, backend="numpy")(np.array([ids]), layer_id)[0]


def digest(values: np.ndarray | array) -> str:
    """sha256 of integers as little-endian int64."""
    return hashlib.sha256(np.asarray(values).astype("<i8").tobytes()).hexdigest()
