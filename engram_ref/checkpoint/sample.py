"""A small checkpoint in the layout of a published model: to try what opens one, without its 100 or 200 GB of tables.

    python -m engram_ref.checkpoint.sample out/sample                           two tables of some 25,000 rows
    python -m engram_ref.checkpoint.sample out/sample --first-prime 100000      larger ones
    python -m engram_ref.checkpoint.sample out/qwen --preset qwen38-flash-next
    python -m engram_ref.plan --check out/sample

Names, dtypes, files and index are the published model's; tables and projection are smaller, and the numbers in them are
random, the same for the same seed. One more file has a tensor that is none of Engram's.

That of DeepSeek-V4.1-Flash has the packaged tokenizer. Its codes are any but NaN; scales lie between 2^-16 and 2^-9, so
that rows, keys and values are of the size that a gate can work with. Beside each table, in the metadata of its file,
stands what its rows are hashed with: constants, pad and digest of the vocabulary. The other's constants are tensors.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engram_ref import cli
from engram_ref.checkpoint.config_json import CONFIG_FILE, config_fields
from engram_ref.checkpoint.folder import INDEX_FILE, LAYER_PLAN, TOKENIZER_FILE, expected_tensors, tensor_name
from engram_ref.checkpoint.qwen_config import MODEL_TYPES, text_fields
from engram_ref.checkpoint.qwen_folder import CONSTANTS, fusion_shapes
from engram_ref.config import SCALE_BLOCK, EngramConfig
from engram_ref.files.conventions import DTYPES
from engram_ref.files.replacing import replacing
from engram_ref.files.writing import make_header
from engram_ref.hashing.plan import HashPlan
from engram_ref.rows.fp8 import NAN_CODE
from engram_ref.vocab import CompressedVocab, tokenizer_json

PROG = "sample_checkpoint"
PRESETS = ("v41-flash", "qwen38-flash-next")
QWEN_SHARDS = 13  # of a table; the published one has 128
LEFT = "files that were finished stay"
DEPTH = 40  # decoder layers of the model
FIRST_SCALE, LAST_SCALE = 111, 118  # bytes: 2^-16 .. 2^-9
_PIECE = 1 << 22  # bytes that are drawn together
_Tensors = dict[str, tuple[str, tuple[int, ...]]]  # dtype as safetensors calls it, and shape, by name


def sample_config(first_prime: int = 1000, hidden: int = 64, preset: str = "v41-flash") -> EngramConfig:
    """A published preset with smaller tables and a narrower stream.

    Args:
        first_prime: primes of the tables, from here up.
        hidden: width.
        preset: of `PRESETS`.

    Raises:
        ValueError: a width that makes no whole blocks of the projection, where that is stored in blocks.
    """
    config = EngramConfig.preset(preset)
    sizes = (first_prime,) * len(config.orders)
    if config.form == "v41" and hidden % SCALE_BLOCK:
        raise ValueError(f"hidden={hidden}: must be a multiple of {SCALE_BLOCK}, as the projection is made of blocks")
    return config.replace(table_size_per_order=sizes, hidden=hidden)


def write_sample(folder: Path, config: EngramConfig, seed: int = 0) -> None:
    """Write the checkpoint, each file complete or not at all; `config.json` comes last.

    Args:
        folder: new, or empty.
        config: of `sample_config`.
        seed: of all numbers.

    Raises:
        ValueError: a folder that holds something.
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a new folder")
    if config.form == "qwen":
        return _write_qwen(folder, config, seed)
    vocab = CompressedVocab.from_tokenizer()
    plan = HashPlan.for_vocab(config, vocab)
    groups: list[_Tensors] = [{"norm.weight": ("BF16", (config.hidden,))}]
    metadata: list[dict[str, str]] = [{}]
    for layer in plan.layers:
        tensors = expected_tensors(config, layer)
        groups.append({tensor_name(layer.layer_id, part): tensor for part, tensor in tensors.items()})
        metadata.append({tensor_name(layer.layer_id, LAYER_PLAN): layer.to_json()})
    _write_files(folder, groups, metadata, seed, {})
    _write(folder / TOKENIZER_FILE, tokenizer_json())
    rows = tuple(layer.rows for layer in plan.layers)
    # Last: without it, what a cut run has left is no checkpoint.
    _write_json(folder / CONFIG_FILE, config_fields(config, rows, len(vocab.ids), DEPTH))


def _write_qwen(folder: Path, config: EngramConfig, seed: int) -> None:
    """Shards of each table apart from the weights beside them, as published; token ids are hashed as they are."""
    assert config.compressed_size is not None
    plan = HashPlan.build(config, config.compressed_size, config.pad_id)
    groups: list[_Tensors] = [{"model.norm.weight": ("BF16", (config.hidden,))}]
    given: dict[str, np.ndarray] = {}
    for layer in plan.layers:
        beside = f"model.layers.{layer.layer_id}.ple."
        constants = {f"{beside}{part}": np.array(getattr(layer, mine), "<i8") for part, mine in CONSTANTS.items()}
        given |= constants
        groups.append({f"{beside}{part}": ("BF16", shape) for part, shape in fusion_shapes(config).items()})
        groups[-1] |= {name: ("I64", values.shape) for name, values in constants.items()}
        least, more = divmod(layer.rows, QWEN_SHARDS)  # the first few shards have a row more
        table = f"{beside}ple_embedding.ngram_embedding."
        shapes = [(least + (k < more), config.row_width) for k in range(QWEN_SHARDS)]
        groups.append({f"{table}shard_{k}.weight": ("BF16", shape) for k, shape in enumerate(shapes)})
    _write_files(folder, groups, [{}] * len(groups), seed, given)
    # Last, as in `write_sample`.
    _write_json(folder / CONFIG_FILE, {"model_type": MODEL_TYPES[0], "text_config": text_fields(config, DEPTH)})


def _write_files(
    folder: Path,
    groups: list[_Tensors],
    metadata: list[dict[str, str]],
    seed: int,
    given: Mapping[str, np.ndarray],
) -> None:
    """A file for each group of tensors, those of `given` with these values, and the index of all."""
    files = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    total = sum(_nbytes(*tensor) for tensors in groups for tensor in tensors.values())
    if total > (free := shutil.disk_usage(folder).free):
        raise ValueError(f"{total} bytes do not fit onto the disk of {folder}, {free} are free: take smaller tables")
    for file, tensors, texts in zip(files, groups, metadata):
        _write_tensors(folder / file, tensors, texts, seed, given)
    weight_map = {name: file for file, tensors in zip(files, groups) for name in tensors}
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def sample_bytes(name: str, dtype: str, shape: tuple[int, ...], seed: int) -> Iterator[np.ndarray]:
    """The bytes of one tensor, uint8, some at a time; they depend on its name, dtype and size and the seed alone."""
    generator = np.random.default_rng([seed, *name.encode()])  # apart for each tensor, whatever was drawn before
    nbytes = _nbytes(dtype, shape)
    for start in range(0, nbytes, _PIECE):
        count = min(_PIECE, nbytes - start)
        if dtype == "F8_E4M3":
            codes = generator.integers(0, 2 * NAN_CODE, count, dtype=np.uint8)
            yield codes + (codes >= NAN_CODE)  # 0x7F is left out, and 0xFF never comes
        elif dtype == "F8_E8M0":
            yield generator.integers(FIRST_SCALE, LAST_SCALE + 1, count, dtype=np.uint8)
        else:  # gains around 1: float32 cut down to its upper half, which is bfloat16
            gains = 1 + generator.standard_normal(count // 2, dtype=np.float32) / 8
            yield (gains.view("<u4") >> 16).astype("<u2").view(np.uint8)


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def _write_tensors(
    path: Path, tensors: _Tensors, metadata: dict[str, str], seed: int, given: Mapping[str, np.ndarray]
) -> None:
    header = make_header({name: (DTYPES[dtype], shape) for name, (dtype, shape) in tensors.items()}, metadata)
    with replacing(path) as file:
        file.write(header)
        for name, (dtype, shape) in tensors.items():
            for piece in [given[name]] if name in given else sample_bytes(name, dtype, shape, seed):
                file.write(piece.data)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, json.dumps(content, indent=2).encode() + b"\n")


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line options; see `--help`."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="a new folder")
    add(
        "--first-prime",
        type=cli.at_least(2, 16_000_000),
        default=1000,
        metavar="P",
        help="primes from here up (default: 1000)",
    )
    add(
        "--hidden",
        type=cli.at_least(SCALE_BLOCK, 1 << 16),
        default=64,
        metavar="H",
        help="width, 32 times any (default: 64)",
    )
    add("--preset", choices=PRESETS, default=PRESETS[0], help="whose layout (default: %(default)s)")
    add("--seed", type=cli.at_least(0, cli.MOST_SEED), default=0, help="of all numbers (default: 0)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """The command; see `--help`."""
    options = parse(argv)
    with cli.one_line_errors(PROG):
        config = sample_config(options.first_prime, options.hidden, options.preset)
        write_sample(options.folder, config, options.seed)
        print(f"{options.folder} is written; check it with python -m engram_ref.plan --check {options.folder}")


if __name__ == "__main__":
    cli.run(main, PROG, LEFT)
