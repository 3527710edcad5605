"""The `config.json` of a Qwen3.8-Flash-Next checkpoint (`qwen4_exp`) as an `EngramConfig`.

    config = read_qwen_config("/models/Qwen3.8-Flash-Next")
    assert config == EngramConfig.preset("qwen38-flash-next")

What the layer needs stands in `text_config`, or at the top level where there is no such object. Of what is left out,
transformers' class has defaults, which hold here too; what is there and cannot be is refused. Layers are numbered from
1 there and from 0 here. Torch is not imported here.

    python -m pytest tests/ref/checkpoint/test_qwen_folder.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from engram_ref.checkpoint.config_json import CONFIG_FILE, MEND, read_text_config
from engram_ref.config import MOST_IDS, MOST_TABLE_SIZE, EngramConfig, require_columns, require_int
from engram_ref.files.header import read_json
from engram_ref.quoting import quoted

MODEL_TYPES = ("qwen4_exp", "qwen4_exp_text")

# Name in the file -> least value, most, and what the class takes where it is left out.
_INTEGERS = {
    "vocab_size": (1, MOST_IDS, 248_320),
    "hidden_size": (1, 1 << 20, 2048),
    "hc_count": (1, 256, 4),
    "num_hidden_layers": (1, 1 << 16, 40),
    "ple_conv_kernel_size": (1, 1024, 4),
    "ngram_size": (2, 64, 3),
    "heads_per_ngram": (1, 1024, 8),
    "ngram_vocab_size_base": (2, MOST_TABLE_SIZE, 20_000_000),
    "make_ngram_vocab_size_divisible_by": (1, 1 << 20, 128),
    "seed": (0, 2**63 - 1, 1234),
}
_LAYERS, _WIDTH, _EOS, _EPS = "ple_layer_ids", "ple_embed_dim", "eos_token_id", "rms_norm_eps"


def read_qwen_config(folder: str | os.PathLike[str]) -> EngramConfig:
    """The geometry of a checkpoint's n-gram tables; of rows in bfloat16, whatever its files hold.

    Args:
        folder: that holds `config.json`.

    Raises:
        ValueError: no such file, another kind of model, one without a table, or a field of a wrong type or out of
            range; the message names file, field and value.
        OSError: it cannot be read.
    """
    path, _, text = read_text_config(folder, MODEL_TYPES)
    try:
        return _geometry(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {MEND}") from error


def text_fields(config: EngramConfig, depth: int) -> dict[str, Any]:
    """What `text_config` says of such a geometry, in a model of so many decoder blocks; `read_qwen_config` reads it."""
    return {
        "vocab_size": config.compressed_size,
        "hidden_size": config.hidden,
        "hc_count": config.hc_mult,
        "num_hidden_layers": depth,
        "ple_conv_kernel_size": config.kernel_size,
        "ngram_size": config.max_ngram,
        "heads_per_ngram": config.heads,
        "ngram_vocab_size_base": config.table_size_per_order[0],
        "make_ngram_vocab_size_divisible_by": config.rows_multiple,
        "seed": config.seed,
        _LAYERS: [layer + 1 for layer in config.layer_ids],  # counted from 1 there
        _WIDTH: config.embedding_width,
        _EOS: config.pad_id,
        _EPS: config.norm_eps,
    }


def read_model_type(folder: str | os.PathLike[str]) -> object:
    """What a checkpoint's `config.json` calls its model; None without such a file."""
    path = Path(folder) / CONFIG_FILE
    return read_json(path).get("model_type") if path.is_file() else None


def _geometry(text: dict[str, Any]) -> EngramConfig:
    given = {name: _integer(text, name) for name in _INTEGERS}
    orders = given["ngram_size"] - 1
    layers = _layers(text, given["num_hidden_layers"])
    require_columns(len(layers), orders * given["heads_per_ngram"])  # before so long a tuple is made
    eps = text.get(_EPS, 1e-6)  # where it is left out, the class takes this
    return EngramConfig(
        layer_ids=layers,
        max_ngram=given["ngram_size"],
        heads=given["heads_per_ngram"],
        row_width=_row_width(text, given["hidden_size"], orders * given["heads_per_ngram"]),
        table_size_per_order=(given["ngram_vocab_size_base"],) * orders,
        hidden=given["hidden_size"],
        hc_mult=given["hc_count"],
        kernel_size=given["ple_conv_kernel_size"],
        # No pad in this form: what ends a text stands before its start, too.
        pad_id=_end_of_text(text, given["vocab_size"]),
        seed=given["seed"],
        form="qwen",
        compressed_size=given["vocab_size"],  # token ids are hashed as they are
        rows_multiple=given["make_ngram_vocab_size_divisible_by"],
        norm_eps=eps,
    )


def _integer(text: dict[str, Any], name: str) -> int:
    least, most, default = _INTEGERS[name]
    value = text.get(name, default)
    require_int(name, value, least, most)
    return int(value)


def _layers(text: dict[str, Any], depth: int) -> tuple[int, ...]:
    """Decoder blocks with a table, numbered from 0."""
    given = text.get(_LAYERS)
    if not isinstance(given, list) or not given:
        raise ValueError(f"{_LAYERS}={quoted(given)}: this model has no n-gram table")
    for layer in given:
        require_int(_LAYERS, layer, 1, depth)
    return tuple(sorted({layer - 1 for layer in given}))


def _row_width(text: dict[str, Any], hidden: int, columns: int) -> int:
    width = text.get(_WIDTH)
    width = hidden if width is None else width
    require_int(_WIDTH, width, 1, 1 << 24)
    if width % columns:
        raise ValueError(f"{_WIDTH}={width}: must be a multiple of its {columns} columns")
    return int(width // columns)


def _end_of_text(text: dict[str, Any], vocab_size: int) -> int:
    """The id that ends a text: the first, where there are several."""
    given = text.get(_EOS)
    first = given[0] if isinstance(given, list) and given else given
    require_int(_EOS, first, 0, vocab_size - 1)
    return int(first)  # type: ignore[arg-type]
