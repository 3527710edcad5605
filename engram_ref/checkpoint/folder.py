"""A DeepSeek-V4.1 checkpoint on disk, opened where it lies: everything is checked, nothing is copied.

    folder = ModelFolder.open("/models/DeepSeek-V4.1-Flash")
    compressed = folder.vocab(token_ids)
    rows = NgramHasher(folder.plan)(compressed, layer_id=1)             # [B, T, C]
    table = make_table("file", folder.stored_rows(1), device="cuda")    # 95 GiB, read in place

Opening reads `config.json`, the tokenizer, the index and the headers of the files that hold Engram tensors, and asks
whether these were reserved and never filled; the other files of the model need not be there. What could make a row
wrong without an error is refused: a configuration that contradicts the table, another tokenizer, a table of another
layer, scales of other blocks, a file that is cut off.
Which token pads, and how columns are divided into orders and heads, moves rows and shows in no shape: of the published
model it is known, other files record it beside their tables (as those of `engram_ref.checkpoint.sample`), and where
neither says it, a warning does.
`engram_ref.checkpoint.v41` loads whole layers; `engram_ref.checkpoint.sample` writes a small folder of this kind.
Torch is imported only where rows are asked for.

    python -m pytest tests/ref/checkpoint/test_folder.py tests/ref/checkpoint/test_damaged_folder.py
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_ref.checkpoint.config_json import read_config
from engram_ref.config import SCALE_BLOCK, EngramConfig
from engram_ref.files.header import TensorEntry, read_header, read_json, read_metadata, require_written
from engram_ref.hashing.plan import HashPlan, LayerPlan
from engram_ref.quoting import listed, one_line, quoted
from engram_ref.vocab import KNOWN_MAPS, CompressedVocab, tokenizer_json

if TYPE_CHECKING:
    from torch import Tensor

    from engram_ref.files.stored_rows import StoredRows

__all__ = ["INDEX_FILE", "ModelFolder", "expected_tensors", "read_config", "tensor_name"]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
LAYER_PLAN = "layer_plan"  # beside the tensors of a layer, in the metadata of the file that holds its table
_ENGRAM_NAME = re.compile(r"layers\.\d+\.engram\.")
_MEND = "download the checkpoint again"
_PUBLISHED_BY = ("layer_ids", "compressed_size", "seed")


def tensor_name(layer_id: int, part: str) -> str:
    """Name in the checkpoint of a layer's tensor, for instance of its `embed.weight`."""
    return f"layers.{layer_id}.engram.{part}"


def expected_tensors(config: EngramConfig, layer_plan: LayerPlan) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The six tensors of a layer: dtype as safetensors calls it, and shape, by the end of their name."""
    outputs, inputs = (config.hc_mult + 1) * config.hidden, config.embedding_width
    gains = (config.hc_mult, config.hidden)
    return {
        "embed.weight": ("F8_E4M3", (layer_plan.rows, config.row_width)),
        "embed.scale": ("F8_E8M0", (layer_plan.rows, config.row_width // SCALE_BLOCK)),
        "wkv.weight": ("F8_E4M3", (outputs, inputs)),
        "wkv.scale": ("F8_E8M0", (outputs // SCALE_BLOCK, inputs // SCALE_BLOCK)),
        "q_weight": ("BF16", gains),
        "k_weight": ("BF16", gains),
    }


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """A checkpoint whose Engram layers are known to be whole and to belong together.

    Attributes:
        path: the folder.
        config: geometry, from `config.json`.
        vocab: compressed vocabulary of its tokenizer.
        plan: hash constants of both.
        tokenizer_sha256: of the tokenizer's file.
        tokenizer_path: that file; None where the folder has none and the packaged one is used.
        weight_map: file name of every tensor of the model.
        tensors: where the Engram tensors lie, by their full names.
        sparse: whether holes in their files are meant as zeros.
    """

    path: Path
    config: EngramConfig
    vocab: CompressedVocab = field(repr=False)
    plan: HashPlan = field(repr=False)
    tokenizer_sha256: str
    tokenizer_path: Path | None
    weight_map: dict[str, str] = field(repr=False)
    tensors: dict[str, TensorEntry] = field(repr=False)
    sparse: bool = False

    @classmethod
    def open(cls, folder: str | os.PathLike[str], sparse: bool = False) -> ModelFolder:
        """Check a checkpoint and say where its Engram layers lie.

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
        config = read_config(path)
        # A link that leads nowhere is a tokenizer that is missing; the packaged one must not stand in for it.
        tokenizer = path / TOKENIZER_FILE if os.path.lexists(path / TOKENIZER_FILE) else None
        text = tokenizer_json(tokenizer)
        vocab = _read_vocab(path, config, tokenizer, text)
        plan = HashPlan.for_vocab(config, vocab)
        weight_map = read_weight_map(path)
        tensors = _find_tensors(path, weight_map, config, plan)
        _check_recorded(path, config, plan, tensors)
        if not sparse:
            require_written(tensors.values())
        digest = hashlib.sha256(text).hexdigest()  # of what was compressed, also where the file is replaced meanwhile
        return cls(path, config, vocab, plan, digest, tokenizer, weight_map, tensors, sparse)

    def tensor(self, layer_id: int, part: str) -> TensorEntry:
        """Where a tensor of a layer lies.

        Args:
            layer_id: one of the configuration's.
            part: embed.weight, embed.scale, wkv.weight, wkv.scale, q_weight or k_weight.
        """
        name = tensor_name(self.plan.layer(layer_id).layer_id, part)
        if name not in self.tensors:
            raise ValueError(
                f"part={quoted(part)}: a layer has {', '.join(expected_tensors(self.config, self.plan.layers[0]))}"
            )
        return self.tensors[name]

    def stored_rows(self, layer_id: int) -> StoredRows:
        """The rows of a layer's table where they lie, codes and scales in two parts; for `make_table`.

        Raises:
            ValueError: no such layer, or a file that was changed since the folder was opened.
        """
        from engram_ref.files.stored_rows import StoredRows

        codes, scales = self.tensor(layer_id, "embed.weight"), self.tensor(layer_id, "embed.scale")
        stored = StoredRows.find(codes.path, codes.name, scale=scales.name, scale_path=scales.path, sparse=self.sparse)
        require_same_rows(stored, (codes, scales), "ModelFolder.open")
        return stored


def require_same_rows(stored: StoredRows, entries: Iterable[TensorEntry], opener: str) -> None:
    """Refuse rows of a file that is not any more what it was when the folder was opened by `opener`."""
    for part, entry in zip(stored.parts, entries):
        if (part.offset, part.nbytes, part.stamp) != (entry.offset, entry.nbytes, entry.stamp):
            raise ValueError(f"{entry.path} was changed after it was checked: call {opener} again")


def read_entry(entry: TensorEntry, sparse: bool, opener: str) -> Tensor:
    """A tensor, of a file that is still what it was when the folder was opened by `opener`."""
    from engram_ref.files.validated import Header

    header = Header.read(entry.path, sparse)
    if header.tensors.get(entry.name) != entry:
        raise ValueError(f"{entry.path} was changed after it was checked: call {opener} again")
    return header.read_tensor(entry.name)


def _read_vocab(path: Path, config: EngramConfig, tokenizer: Path | None, text: bytes) -> CompressedVocab:
    """The vocabulary of the folder's tokenizer, refused unless the table was hashed with it."""
    vocab = CompressedVocab.from_json(text, tokenizer)
    origin = tokenizer or f"the packaged tokenizer, as {path} has none of its own,"
    if len(vocab) != config.compressed_size:
        raise ValueError(
            f"{origin} compresses to {len(vocab)} ids, the checkpoint's {path / 'config.json'} says "
            f"{config.compressed_size}: every row depends on it, so use the tokenizer.json that came with the weights"
        )
    # Of the published size another map is as wrong as another size, and only its digest tells.
    published = EngramConfig.preset("v41-flash").compressed_size
    if config.compressed_size == published and vocab.digest not in KNOWN_MAPS.values():
        raise ValueError(
            f"{origin} compresses to {published} ids as DeepSeek-V4's, but its map has digest {vocab.digest}, which is "
            "not the published one: use the tokenizer.json that came with the weights"
        )
    return vocab


def read_weight_map(path: Path) -> dict[str, str]:
    """File name of every tensor, by the folder's index, or by the header of its only file."""
    index = path / INDEX_FILE
    if not os.path.lexists(index):  # a link that leads nowhere is an index that is missing
        if not (path / SINGLE_FILE).exists():
            raise ValueError(f"{path} has neither {INDEX_FILE} nor {SINGLE_FILE}: {_MEND}")
        return dict.fromkeys(read_header(path / SINGLE_FILE), SINGLE_FILE)
    if not index.exists():
        raise ValueError(f"{index} is a link that leads nowhere: {_MEND}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files: {_MEND}")
    for file in sorted(set(weight_map.values())):
        # A link in the folder is its owner's will, as in the Hugging Face cache; a path in the index is not.
        if file in ("", ".", "..") or any(mark in file for mark in "/\\") or not file.isprintable():
            raise ValueError(f"{index} names the file {quoted(file)}: it must lie in the folder itself; {_MEND}")
    return weight_map


def _find_tensors(
    path: Path, weight_map: dict[str, str], config: EngramConfig, plan: HashPlan
) -> dict[str, TensorEntry]:
    needed = {
        tensor_name(layer.layer_id, part): expected
        for layer in plan.layers
        for part, expected in expected_tensors(config, layer).items()
    }
    missing = [name for name in needed if name not in weight_map]
    if missing:
        raise ValueError(f"{path} has no {listed(missing)}: {_MEND}, its index included")
    headers = {file: read_shard(path / file) for file in sorted({weight_map[name] for name in needed})}
    _refuse_unexpected(path, {*weight_map, *(name for header in headers.values() for name in header)}, needed)
    found = {}
    for name, (dtype, shape) in needed.items():
        found[name] = entry_of(path, name, weight_map, headers)
        _check_tensor(found[name], dtype, shape, plan)
    return found


def entry_of(
    path: Path, name: str, weight_map: Mapping[str, str], headers: Mapping[str, Mapping[str, TensorEntry]]
) -> TensorEntry:
    """A tensor in the file that the index names, refused if it is in another one that was opened."""
    homes = [file for file, header in headers.items() if name in header]
    if homes != [weight_map[name]]:
        raise ValueError(
            f"{path / INDEX_FILE} says that {name} is in {one_line(weight_map[name], 100)}; it is in "
            f"{' and '.join(homes) or 'no file that was looked at'}: {_MEND}"
        )
    return headers[homes[0]][name]


def _check_recorded(path: Path, config: EngramConfig, plan: HashPlan, tensors: Mapping[str, TensorEntry]) -> None:
    """Compare the plan with what the tables' files record of theirs, or with what is published of this model."""
    silent = []
    for layer in plan.layers:
        home = tensors[tensor_name(layer.layer_id, "embed.weight")].path
        recorded = read_metadata(home).get(tensor_name(layer.layer_id, LAYER_PLAN))
        if recorded is None:
            silent.append(layer.layer_id)
        else:
            layer.require_recorded(recorded, str(home))
    if silent and not _is_published(path, config):
        warnings.warn(
            f"{path}: nothing beside the tables of layers {quoted(silent)} records how they were hashed, so "
            f"engram_pad_token_id={config.pad_id}, engram_max_ngram_size={config.max_ngram} and engram_n_heads="
            f"{config.heads} of config.json are believed: with others, every row would be wrong and nothing would tell",
            stacklevel=3,  # whoever called `ModelFolder.open`
        )


def _is_published(path: Path, config: EngramConfig) -> bool:
    """Whether these are the tables of the published model; a configuration that hashes them otherwise is refused."""
    published = EngramConfig.preset("v41-flash")
    # What tells another model apart comes first: only of the published one are other fields known to be wrong.
    if any(getattr(config, name) != getattr(published, name) for name in _PUBLISHED_BY):
        return False
    if config.table_size_per_order[0] != published.table_size_per_order[0]:
        return False
    for name in ("pad_id", "max_ngram", "heads", "row_width"):
        given, needed = getattr(config, name), getattr(published, name)
        if given != needed:
            raise ValueError(
                f"{path / 'config.json'} gives {name}={given}; the tables are of the published size, and were hashed "
                f"with {needed}: take the config.json that came with the weights"
            )
    return True


def read_shard(path: Path) -> dict[str, TensorEntry]:
    """The header of a file of the checkpoint, which must be there."""
    if not path.exists():
        raise ValueError(f"{path} is missing, and it holds Engram tensors: download it")
    return read_header(path)


def _refuse_unexpected(path: Path, found: Iterable[str], needed: Mapping[str, Any]) -> None:
    """A tensor that this layer does not have means that the layer is another one."""
    unexpected = sorted(name for name in found if _ENGRAM_NAME.match(name) and name not in needed)
    if unexpected:
        layers = sorted({name.split(".engram.")[0] for name in needed})
        raise ValueError(
            f"{path} has {listed(unexpected)}; Engram as configured is {', '.join(layers)} with "
            f"{len(needed) // len(layers)} tensors each: use config.json and weights of one model"
        )


def _check_tensor(entry: TensorEntry, dtype: str, shape: tuple[int, ...], plan: HashPlan) -> None:
    what = f"{entry.path}, tensor {entry.name!r}:"
    if entry.dtype != dtype:
        raise ValueError(f"{what} {entry.dtype}, not {dtype}: use the weights as they were published, not converted")
    if entry.shape != shape:
        # Another layer has as many rows as this tensor.
        others = [layer.layer_id for layer in plan.layers if entry.shape[:1] == (layer.rows,) != shape[:1]]
        hint = f" (so many rows has layer {others[0]}: the tables were exchanged)" if others else ""
        raise ValueError(
            f"{what} shape {list(entry.shape)}{hint}; configuration and primes need {list(shape)}: {_MEND}"
        )
