"""A Qwen3.8-Flash-Next checkpoint on disk, opened where it lies: its tables are checked, nothing is copied.

    folder = QwenFolder.open("/models/Qwen3.8-Flash-Next")
    rows = NgramHasher(folder.plan)(token_ids, layer_id=1)              # [B, T, C]
    table = make_table("file", folder.stored_rows(), device="cuda")     # 95 GiB in 128 tensors, read in place

The table of a layer is one tensor or, as published, many: `ngram_embedding.shard_<k>.weight`, whose rows follow each
other in the order of k. Opening reads `config.json`, the index and the headers of the files that hold tensors of these
layers. What could make a row wrong without an error is refused by name: a shard that is missing, twice there, of
another width or dtype or one too many, rows that the primes do not add up to, a layer of another model, and hash
constants of the checkpoint (multipliers, primes and offsets, which transformers saves) that are not the plan's; a
warning says where it has none.
`engram_ref.checkpoint.qwen` loads whole layers. Torch is imported only where rows are asked for.

    python -m pytest tests/ref/checkpoint/test_qwen_folder.py
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engram_ref.checkpoint.folder import INDEX_FILE, entry_of, read_shard, read_weight_map, require_same_rows
from engram_ref.checkpoint.qwen_config import CONFIG_FILE, read_qwen_config
from engram_ref.config import EngramConfig
from engram_ref.files.header import TensorEntry, require_written
from engram_ref.hashing.plan import HashPlan, LayerPlan
from engram_ref.quoting import listed, one_line, quoted

if TYPE_CHECKING:
    from engram_ref.files.stored_rows import StoredRows

ROW_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
FUSION_PARTS = (
    "key_proj.weight", "value_proj.weight", "norm_key.weight", "norm_query.weight", "norm_conv.weight", "conv1d.weight",
)  # fmt: skip
_TABLE = "ple_embedding.ngram_embedding."
CONSTANTS = {  # name in the checkpoint -> of a layer's plan
    "ple_embedding.layer_multipliers": "multipliers",
    "ple_embedding.ngram_heads_vocab_sizes": "primes",
    "ple_embedding.ngram_heads_offsets": "offsets",
}
_NAME = re.compile(r"(?P<prefix>(?:[a-z_]+\.)*)layers\.(?P<block>\d+)\.ple\.(?P<part>.+)")
_NUMBER = re.compile("0|[1-9][0-9]{0,5}")  # as transformers writes it: 01 and digits of other scripts are 1, too
_SHARD = re.compile(rf"shard_({_NUMBER.pattern})\.weight")
_MEND = "download the checkpoint again"


@dataclass(frozen=True, eq=False)
class QwenFolder:
    """A checkpoint whose n-gram tables are known to be whole.

    Attributes:
        path: the folder.
        config: geometry, from `config.json`; `row_dtype` is what the files hold.
        plan: hash constants, of token ids as they are.
        weight_map: file name of every tensor of the model.
        shards: of each layer's table, in the order of its rows.
        tensors: of each layer, the others that it has, by the end of their names.
        sparse: whether holes in the files are meant as zeros.
    """

    path: Path
    config: EngramConfig
    plan: HashPlan = field(repr=False)
    weight_map: dict[str, str] = field(repr=False)
    shards: dict[int, tuple[TensorEntry, ...]] = field(repr=False)
    tensors: dict[int, dict[str, TensorEntry]] = field(repr=False)
    sparse: bool = False

    @classmethod
    def open(cls, folder: str | os.PathLike[str], sparse: bool = False) -> QwenFolder:
        """Check a checkpoint and say where its tables lie.

        Args:
            folder: with `config.json`, `model.safetensors.index.json` and the files it names, or `model.safetensors`.
            sparse: take holes in these files, where nothing was ever written, for zeros that are meant.

        Raises:
            ValueError: something is missing, damaged, or contradicts something else; the message says what to do.
            OSError: a file cannot be read.
        """
        path = Path(folder)
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder: give the folder of a checkpoint")
        config = read_qwen_config(path)
        assert config.compressed_size is not None  # a `config.json` of this kind always says it
        # No vocabulary: token ids are hashed as they are.
        plan = HashPlan.build(config, config.compressed_size, config.pad_id)
        weight_map = read_weight_map(path)
        layers = _find_layers(path, weight_map, config)
        shards, tensors, silent = {}, {}, []
        for layer in plan.layers:
            found = layers[layer.layer_id]
            table = {name: entry for name, entry in found.items() if name.startswith(_TABLE)}
            shards[layer.layer_id] = _check_table(path, config, layer, table)
            tensors[layer.layer_id] = {name: entry for name, entry in found.items() if name not in table}
            _check_fusion(path, config, layer.layer_id, tensors[layer.layer_id])
            if not sparse:  # before constants are read there
                require_written([*shards[layer.layer_id], *tensors[layer.layer_id].values()])
            lacking = _check_constants(layer, tensors[layer.layer_id])
            silent += [f"layers.{layer.layer_id}.ple.{name}" for name in lacking]
        if silent:
            warnings.warn(
                f"{path} has no {listed(silent)}, so what {CONFIG_FILE} says of seed, ids and sizes is "
                "believed: with others, every row would be wrong and nothing would tell",
                stacklevel=2,
            )
        dtypes = {entry.dtype for entries in shards.values() for entry in entries}
        if len(dtypes) > 1:
            raise ValueError(f"{path}: tables of {' and '.join(sorted(dtypes))}: {_MEND}")
        # `config.json` does not say what the rows are stored as; their files do.
        config = config.replace(row_dtype=ROW_DTYPES[dtypes.pop()])
        return cls(path, config, plan, weight_map, shards, tensors, sparse)

    def stored_rows(self, layer_id: int | None = None) -> StoredRows:
        """The rows of a layer's table where they lie; for `make_table`.

        Args:
            layer_id: None where the model has one.

        Raises:
            ValueError: no such layer, several, or a file that was changed since the folder was opened.
        """
        from engram_ref.files.stored_rows import StoredRows

        if layer_id is None:
            if len(self.shards) > 1:
                raise ValueError(f"this model has tables in layers {list(self.shards)}: say which, layer_id=")
            (layer_id,) = self.shards
        entries = self.shards[self.plan.layer(layer_id).layer_id]
        stored = StoredRows.find_shards([(entry.path, entry.name) for entry in entries], sparse=self.sparse)
        require_same_rows(stored, entries, "QwenFolder.open")
        return stored


def _find_layers(path: Path, weight_map: Mapping[str, str], config: EngramConfig) -> dict[int, dict[str, TensorEntry]]:
    """Every tensor of the layers with a table, by layer and the end of its name, in the file that the index names."""
    named = {name: match for name in weight_map if (match := _NAME.fullmatch(name))}
    if not named:
        raise ValueError(f"{path} has no tensor of an n-gram layer (…layers.<k>.ple.…): {_MEND}, its index included")
    strange = [name for name, match in named.items() if not _NUMBER.fullmatch(match["block"])]
    if strange:
        raise ValueError(
            f"{path} has {listed(strange)}: its layer's number is not written as transformers does, so that the "
            f"tensor may be there twice: {_MEND}"
        )
    _refuse_other_layers(path, named.values(), config)
    headers = {file: read_shard(path / file) for file in sorted({weight_map[name] for name in named})}
    layers: dict[int, dict[str, TensorEntry]] = {layer: {} for layer in config.layer_ids}
    for name, match in named.items():
        layers[int(match["block"])][match["part"]] = entry_of(path, name, weight_map, headers)
    left_out = sorted({n for header in headers.values() for n in header if _NAME.fullmatch(n)} - named.keys())
    if left_out:
        raise ValueError(f"{path / INDEX_FILE} does not name {listed(left_out)}, which its files have: {_MEND}")
    return layers


def _refuse_other_layers(path: Path, matches: Iterable[re.Match[str]], config: EngramConfig) -> None:
    matches = list(matches)
    prefixes = sorted({match["prefix"] for match in matches})
    if len(prefixes) > 1:
        raise ValueError(f"{path} has n-gram layers under {' and '.join(map(quoted, prefixes))}: give one model's")
    blocks = sorted({int(match["block"]) for match in matches})
    if blocks != list(config.layer_ids):
        raise ValueError(
            f"{path} has n-gram tensors in layers {quoted(blocks)}; {CONFIG_FILE} has ple_layer_ids="
            f"{quoted([layer + 1 for layer in config.layer_ids])}, counted from 1: use config.json and weights of one "
            "model"
        )


def _check_table(
    path: Path, config: EngramConfig, layer: LayerPlan, table: Mapping[str, TensorEntry]
) -> tuple[TensorEntry, ...]:
    """The tensors of a table in the order of their rows."""
    where = f"{path}, table of layer {layer.layer_id}:"
    if f"{_TABLE}weight" in table and len(table) == 1:  # in one piece; beside shards it would be there twice
        numbers = {0: table[f"{_TABLE}weight"]}
    else:
        numbers = {}
        for name, entry in table.items():
            match = _SHARD.fullmatch(name.removeprefix(_TABLE))
            if match is None:
                raise ValueError(
                    f"{where} {one_line(entry.name, 200)} is no shard, or one that is there twice: {_MEND}"
                )
            numbers[int(match[1])] = entry
    if not numbers:
        raise ValueError(f"{where} no tensor …{_TABLE}shard_<k>.weight: {_MEND}")
    missing = [f"shard_{k}" for k in range(max(numbers)) if k not in numbers]
    if missing:
        raise ValueError(f"{where} {listed(missing)} missing, of shards up to {max(numbers)}: {_MEND}")
    shards = tuple(numbers[k] for k in sorted(numbers))
    for entry in shards:
        if entry.dtype not in ROW_DTYPES or entry.dtype != shards[0].dtype:
            raise ValueError(
                f"{where} {entry.name} is {entry.dtype}, the first is {shards[0].dtype}: rows are one of "
                f"{', '.join(ROW_DTYPES)}; use the weights as they were published, not converted"
            )
        if len(entry.shape) != 2 or entry.shape[1] != config.row_width or not entry.shape[0]:
            raise ValueError(
                f"{where} {entry.name} has shape {list(entry.shape)}; configuration and columns need rows of "
                f"{config.row_width} values: {_MEND}"
            )
    rows = sum(entry.shape[0] for entry in shards)
    if rows != layer.rows:
        raise ValueError(
            f"{where} {rows} rows in {len(shards)} tensors; the {config.columns} primes from "
            f"{config.table_size_per_order[0]} up, filled up to a multiple of {config.rows_multiple}, give "
            f"{layer.rows}: use config.json and weights of one model, and every shard"
        )
    return shards


def fusion_shapes(config: EngramConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's weights beside its table, by the end of their names."""
    wide, inputs = config.hc_mult * config.hidden, config.embedding_width
    shapes = ((wide, inputs), (config.hidden, inputs), (wide,), (wide,), (wide,), (wide, 1, config.kernel_size))
    return dict(zip(FUSION_PARTS, shapes))


def _check_fusion(path: Path, config: EngramConfig, layer_id: int, tensors: Mapping[str, TensorEntry]) -> None:
    shapes = fusion_shapes(config)
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise ValueError(f"{path} has no {listed([f'layers.{layer_id}.ple.{name}' for name in missing])}: {_MEND}")
    others = sorted(tensors.keys() - shapes.keys() - CONSTANTS.keys())
    if others:
        raise ValueError(f"{path}: layer {layer_id} has {listed(others)}, which such a layer has not: {_MEND}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{tensors[name].path}, tensor {tensors[name].name!r}: shape {list(tensors[name].shape)}; the "
                f"configuration needs {list(shape)}: use config.json and weights of one model"
            )


def _check_constants(layer: LayerPlan, tensors: Mapping[str, TensorEntry]) -> list[str]:
    """Compare the plan with the hash constants that the checkpoint has; the names of those that it has not."""
    for name, mine in CONSTANTS.items():
        entry = tensors.get(name)
        if entry is None:
            continue
        needed = list(getattr(layer, mine))
        if entry.dtype != "I64" or entry.shape != (len(needed),):
            raise ValueError(
                f"{entry.path}, {entry.name} is {entry.dtype} {list(entry.shape)}, not I64 [{len(needed)}]"
            )
        found = np.fromfile(entry.path, "<i8", len(needed), offset=entry.offset).tolist()  # without torch
        if found != needed:
            raise ValueError(
                f"{entry.path}, {entry.name} is {quoted(found)}; the plan of {CONFIG_FILE} has {quoted(needed)}: the "
                "rows were hashed otherwise, use config.json and weights of one model"
            )
    return [name for name in CONSTANTS if name not in tensors]
