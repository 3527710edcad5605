"""The `config.json` of a DeepSeek-V4.1 checkpoint as an `EngramConfig`, and back.

    config = read_config("/models/DeepSeek-V4.1-Flash")
    assert config == EngramConfig.preset("v41-flash")

What the layer needs stands in `text_config`, or at the top level where there is no such object. A field that is missing
or that contradicts another is refused: each of them moves rows or changes their values, and none raises an error later.
Torch is not imported here.

    python -m pytest tests/ref/checkpoint/test_config_json.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from engram_ref.config import (
    MOST_IDS,
    MOST_TABLE_SIZE,
    SCALE_BLOCK,
    V41_NORM_EPS,
    EngramConfig,
    require_columns,
    require_int,
)
from engram_ref.files.header import read_json
from engram_ref.hashing.plan import HashPlan
from engram_ref.quoting import quoted

CONFIG_FILE = "config.json"
MODEL_TYPE = "deepseek_v41"
QUANTISATION = {"quant_method": "fp8", "weight_block_size": [SCALE_BLOCK, SCALE_BLOCK], "scale_fmt": "ue8m0"}
MEND = f"take the {CONFIG_FILE} that came with the weights"

# Field of EngramConfig -> name in text_config, and the least value.
_INTEGERS = {
    "hidden": ("hidden_size", 1),
    "hc_mult": ("hc_mult", 1),
    "max_ngram": ("engram_max_ngram_size", 2),
    "heads": ("engram_n_heads", 1),
    "row_width": ("engram_head_dim", 1),
    "pad_id": ("engram_pad_token_id", 0),
    "compressed_size": ("engram_compressed_vocab_size", 1),
}
# `engram_vocab_size` counts no ids: it is where the search for primes begins, in every order.
_LAYERS, _ROWS, _SIZE = "engram_layer_ids", "engram_num_embeddings", "engram_vocab_size"
_DEPTH, _TOKENS, _EPS = "num_hidden_layers", "vocab_size", "rms_norm_eps"


def read_config(folder: str | os.PathLike[str]) -> EngramConfig:
    """The geometry of a checkpoint's Engram layers.

    Args:
        folder: that holds `config.json`.

    Raises:
        ValueError: no such file, another kind of model, or a field that is missing, of a wrong type or in
            contradiction to another; the message names file, field and value.
        OSError: it cannot be read.
    """
    path, root, text = read_text_config(folder, (MODEL_TYPE,))
    _check_quantisation(path, root)
    _check_one_meaning(path, root, text)
    config = _geometry(path, text)
    _check_blocks(path, config)
    _check_rows(path, config, _integers(path, text, _ROWS))
    return config


def read_text_config(
    folder: str | os.PathLike[str], model_types: tuple[str, ...]
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A checkpoint's `config.json`, all that it says, and what of it is of the language model; refused if of others."""
    path = Path(folder) / CONFIG_FILE
    if not path.exists():
        raise ValueError(f"no {CONFIG_FILE} in {folder}: give the folder of a checkpoint")
    root = read_json(path)
    if root.get("model_type") not in model_types:
        raise ValueError(
            f"{path}: model_type={quoted(root.get('model_type'))}, not {' or '.join(map(repr, model_types))}: {MEND}"
        )
    text = root.get("text_config", root)
    if not isinstance(text, dict):
        raise ValueError(f"{path}: text_config={quoted(text)} is not an object: {MEND}")
    return path, root, text


def config_fields(config: EngramConfig, rows: tuple[int, ...], vocab_size: int, depth: int) -> dict[str, Any]:
    """The content of a `config.json` from which `read_config` gives `config`.

    Args:
        config: of form v41.
        rows: of each layer's table.
        vocab_size: token ids of the model.
        depth: its decoder layers.
    """
    text = {name: getattr(config, field) for field, (name, _) in _INTEGERS.items()}
    text |= {_LAYERS: list(config.layer_ids), _ROWS: list(rows), _SIZE: config.table_size_per_order[0]}
    text |= {_DEPTH: depth, _TOKENS: vocab_size, _EPS: V41_NORM_EPS}
    return {
        "architectures": ["DeepseekV41ForCausalLM"],
        "model_type": MODEL_TYPE,
        "quantization_config": {"activation_scheme": "dynamic", **QUANTISATION},
        "text_config": text,
    }


def _check_quantisation(path: Path, root: dict[str, Any]) -> None:
    given = root.get("quantization_config")
    if not isinstance(given, dict):
        raise ValueError(f"{path}: quantization_config={quoted(given)} is not an object: {MEND}")
    for name, needed in QUANTISATION.items():
        if given.get(name) != needed:
            raise ValueError(
                f"{path}: quantization_config has {name}={quoted(given.get(name))}; the rows are stored with "
                f"{needed!r}, and with anything else they decode to wrong values: {MEND}"
            )


def _check_one_meaning(path: Path, root: dict[str, Any], text: dict[str, Any]) -> None:
    """Refuse a field that stands at the top level and in `text_config` with different values."""
    for name in (*(name for name, _ in _INTEGERS.values()), _LAYERS, _ROWS, _SIZE, _DEPTH, _TOKENS, _EPS):
        if name in root and name in text and root[name] != text[name]:
            raise ValueError(
                f"{path}: {name} is {quoted(root[name])} at the top level and {quoted(text[name])} in text_config: "
                f"{MEND}"
            )


def _geometry(path: Path, text: dict[str, Any]) -> EngramConfig:
    eps = _field(path, text, _EPS)
    if eps != V41_NORM_EPS:
        raise ValueError(f"{path}: {_EPS}={quoted(eps)}; the gate of this model computes with {V41_NORM_EPS}: {MEND}")
    integers = {field: _integer(path, text, name, least) for field, (name, least) in _INTEGERS.items()}
    layer_ids = _integers(path, text, _LAYERS)
    _check_below(path, text, _LAYERS, max(layer_ids, default=0), _DEPTH)  # counted from 0
    _check_below(path, text, "engram_pad_token_id", integers["pad_id"], _TOKENS)
    _check_below(path, text, "engram_compressed_vocab_size", integers["compressed_size"] - 1, _TOKENS)
    size = _integer(path, text, _SIZE, 2, MOST_TABLE_SIZE)
    try:
        require_columns(
            len(layer_ids), (integers["max_ngram"] - 1) * integers["heads"]
        )  # before so long a tuple is made
        # The file has one size for all orders.
        sizes = (size,) * (integers["max_ngram"] - 1)
        return EngramConfig(
            layer_ids=layer_ids,
            table_size_per_order=sizes,
            kernel_size=0,  # this form has no convolution
            form="v41",
            row_dtype="float8_e4m3fn",
            **integers,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {MEND}") from error


def _check_below(path: Path, text: dict[str, Any], name: str, largest: int, limit_name: str) -> None:
    limit = _integer(path, text, limit_name, 1)
    if largest >= limit:
        raise ValueError(f"{path}: {name}={quoted(text[name])} does not fit {limit_name}={limit}: {MEND}")


def _field(path: Path, text: dict[str, Any], name: str) -> Any:
    if name not in text:
        raise ValueError(f"{path}: {name} is missing: {MEND}")
    return text[name]


def _integer(path: Path, text: dict[str, Any], name: str, least: int, most: int = MOST_IDS) -> int:
    value = _field(path, text, name)
    require_int(f"{path}: {name}", value, least, most)
    return int(value)


def _integers(path: Path, text: dict[str, Any], name: str) -> tuple[int, ...]:
    values = _field(path, text, name)
    # `isinstance` would take a bool for an integer.
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(f"{path}: {name}={quoted(values)}: must be a list of integers; {MEND}")
    return tuple(values)


def _check_blocks(path: Path, config: EngramConfig) -> None:
    outputs = (config.hc_mult + 1) * config.hidden  # a key for each copy, and the value
    if outputs % SCALE_BLOCK:
        raise ValueError(
            f"{path}: (hc_mult + 1) * hidden_size = {outputs}: a projection in fp8 is made of blocks of "
            f"{SCALE_BLOCK} x {SCALE_BLOCK}, so it must be a multiple of {SCALE_BLOCK}; {MEND}"
        )


def _check_rows(path: Path, config: EngramConfig, rows: tuple[int, ...]) -> None:
    """Refuse table sizes that the primes do not add up to."""
    if len(rows) != len(config.layer_ids):
        raise ValueError(
            f"{path}: {_ROWS} has {len(rows)} entries and {_LAYERS} {len(config.layer_ids)}; there is one for each "
            f"layer: {MEND}"
        )
    size = config.table_size_per_order[0]
    primes_give = table_rows(config)
    for layer_id, given, needed in zip(config.layer_ids, rows, primes_give):
        if given != needed:
            raise ValueError(
                f"{path}: {_ROWS} gives layer {layer_id} {given} rows; the {config.columns} primes from "
                f"{_SIZE}={size} up give {needed}: {MEND}"
            )


def table_rows(config: EngramConfig) -> tuple[int, ...]:
    """Rows of each layer's table."""
    # Primes depend on the configuration alone, and multipliers are not asked for: any vocabulary's size will do.
    plan = HashPlan.build(config, config.compressed_size or 1, pad_compressed=0)
    return tuple(layer.rows for layer in plan.layers)
