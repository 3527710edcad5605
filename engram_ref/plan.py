"""The constants of a published Engram, for those who build another engine; and a check of a checkpoint against them.

    python -m engram_ref.plan --preset v41-flash                    JSON on stdout, a summary on stderr
    python -m engram_ref.plan --preset v41-flash --out plan.json    the JSON into a file, complete or not at all
    python -m engram_ref.plan --preset demo --tokenizer FILE        with another tokenizer.json
    python -m engram_ref.plan --preset qwen38-flash-next            Qwen3.8-Flash-Next, which has no tokenizer in it
    python -m engram_ref.plan --check /models/DeepSeek-V4.1-Flash --preset v41-flash
                                                                    configuration, tokenizer and Engram tensors

The JSON has the geometry (`config`), the tokenizer it was computed with and its compressed map (`tokenizer`), sizes
(`cost`), and the hash plan: multipliers, primes and offsets of every layer, and the digest of the vocabulary that they
belong to (`plan`), which `HashPlan.from_json` reads.
Both the whole and the plan in it carry a `checksum`: the sha256 of the object without this field, written as JSON with
sorted keys, no white space, and escapes for all that is not ASCII:

    json.dumps(object, sort_keys=True, separators=(",", ":"))

The paper's tables were hashed with DeepSeek-V3's tokenizer; the packaged one is DeepSeek-V4's, so name a V3
tokenizer.json for the presets demo and paper-*. Torch is not needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engram_ref import cli
from engram_ref.checkpoint.folder import ModelFolder
from engram_ref.checkpoint.qwen_config import CONFIG_FILE, MODEL_TYPES, read_model_type
from engram_ref.checkpoint.qwen_folder import QwenFolder
from engram_ref.config import PRESETS, EngramConfig
from engram_ref.files.replacing import replacing
from engram_ref.hashing.plan import HashPlan, checksum
from engram_ref.quoting import one_line, quoted
from engram_ref.vocab import CompressedVocab, configured_pad, load_tokenizer, tokenizer_json, vocab_for

PROG = "engram-plan"
CHECKSUM_METHOD = (
    "sha256 of this object without its field checksum, as JSON with sorted keys, separators ',' and ':', ASCII only"
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line options; see `--help`."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), help="the published geometry")
    add(
        "--tokenizer", metavar="PATH", help="a tokenizer.json, its folder or a Hugging Face name (default: DeepSeek-V4)"
    )
    add("--out", type=Path, metavar="FILE", help="write the JSON here instead of on stdout")
    add("--check", type=Path, metavar="FOLDER", help="check this checkpoint, against the preset if one is named")
    options = parser.parse_args(argv)
    if options.check and (options.tokenizer or options.out):
        parser.error(
            "--check takes the checkpoint's own tokenizer and writes no JSON: leave --tokenizer and --out away"
        )
    if not options.check and not options.preset:
        parser.error("name a --preset, or a checkpoint with --check")
    return options


def constants(preset: str, tokenizer: str | None = None) -> dict[str, Any]:
    """Everything that another engine needs, computed from the preset and a tokenizer, with its checksum.

    Args:
        preset: name of a published geometry.
        tokenizer: as for `CompressedVocab.from_tokenizer`.

    Raises:
        ValueError: no such preset or tokenizer, or one that the preset's trained table was not hashed with.
    """
    config = EngramConfig.preset(preset)
    if config.form == "qwen" and tokenizer is not None:
        raise ValueError(f"tokenizer {quoted(tokenizer)}: preset {preset} hashes token ids as they are, leave it away")
    vocab = vocab_for(config, tokenizer)
    plan = HashPlan.for_vocab(config, vocab)
    body = {
        "what": "constants of n-gram layers" if config.form == "qwen" else "constants of DeepSeek's Engram layers",
        "preset": preset,
        "config": asdict(config),
        "tokenizer": _token_ids(config, vocab) if config.form == "qwen" else _tokenizer(config, vocab, tokenizer),
        "cost": _cost(config, plan),
        "plan": json.loads(plan.to_json()),  # with a checksum of its own: it may be cut out and read alone
        "checksum_method": CHECKSUM_METHOD,
    }
    return {**body, "checksum": checksum(body)}


def _token_ids(config: EngramConfig, vocab: CompressedVocab) -> dict[str, Any]:
    """What stands in the tokenizer's place where token ids are hashed as they are."""
    return {
        "sha256": None,
        "token_ids": len(vocab.ids),
        "compressed_size": len(vocab),
        "map_sha256": vocab.digest,
        "map_digest_of": "all token ids in order, as little-endian int32",
        "pad_id": config.pad_id,
        "pad_compressed": config.pad_id,  # the same: nothing is compressed
    }


def _tokenizer(config: EngramConfig, vocab: CompressedVocab, origin: str | None) -> dict[str, Any]:
    """What the compressed vocabulary was made from."""
    tokenizer = load_tokenizer(origin)
    named = configured_pad(origin)
    return {
        "sha256": hashlib.sha256(tokenizer_json(origin)).hexdigest(),
        "token_ids": len(vocab.ids),
        "compressed_size": len(vocab),
        "map_sha256": vocab.digest,
        "map_digest_of": "compressed ids of all token ids in order, as little-endian int32",
        "pad_id": config.pad_id,
        "pad_token": tokenizer.id_to_token(config.pad_id),
        "pad_compressed": vocab.pad(config.pad_id),
        # Not what the hash pads with: see `_pad_note`.
        "configured_pad_id": None if named is None else tokenizer.token_to_id(named),
        "configured_pad_token": named,
    }


def _cost(config: EngramConfig, plan: HashPlan) -> dict[str, Any]:
    """Sizes in rows and bytes, as stored."""
    rows = sum(layer.rows for layer in plan.layers)
    return {
        "columns": config.columns,
        "row_bytes": config.row_bytes(),
        "layers": [
            {"layer_id": layer.layer_id, "rows": layer.rows, "table_bytes": layer.rows * config.row_bytes()}
            for layer in plan.layers
        ],
        "rows": rows,
        "table_bytes": rows * config.row_bytes(),
        "rows_per_token": config.rows_per_token(),
        "bytes_per_token": config.bytes_per_token(),
    }


def summary(found: dict[str, Any]) -> str:
    """What `constants` gave, for a reader."""
    cost, tokenizer = found["cost"], found["tokenizer"]
    lines = [f"{found['preset']}: {cost['columns']} columns, rows of {cost['row_bytes']} B"]
    for layer in cost["layers"]:
        lines.append(f"  layer {layer['layer_id']:<3} {layer['rows']:>13,} rows  {_gib(layer['table_bytes'])}")
    lines.append(f"  together  {cost['rows']:>13,} rows  {_gib(cost['table_bytes'])}")
    lines.append(f"  per token {cost['rows_per_token']:>13,} rows  {cost['bytes_per_token']:,} B")
    if tokenizer["sha256"] is None:
        lines.append(f"tokenizer: none, {tokenizer['token_ids']:,} token ids are hashed as they are")
        lines.append(f"  id {tokenizer['pad_id']} ends a text: it closes a segment, and stands before its start")
    else:
        lines.append(f"tokenizer: sha256 {tokenizer['sha256']}")
        lines.append(f"  {tokenizer['token_ids']:,} token ids, {tokenizer['compressed_size']:,} compressed ids")
        lines.append(f"  map: sha256 {tokenizer['map_sha256']}")
        lines.append(f"  {_pad_note(tokenizer)}")
    lines.append(f"checksum: {found['checksum']}")
    return "\n".join(lines)


def _gib(count: int) -> str:
    return f"{count / 2**30:9.3f} GiB"


def _pad_note(tokenizer: dict[str, Any]) -> str:
    """Users ask whether the pad of the hash is the tokenizer's."""
    pad, configured, token = tokenizer["pad_id"], tokenizer["configured_pad_id"], tokenizer["configured_pad_token"]
    token = token and one_line(token, 80)  # from a file: it may hold any characters, and be long
    note = (
        f"pad of the hash: id {pad}, {one_line(tokenizer['pad_token'], 80)}, compressed {tokenizer['pad_compressed']}"
    )
    if token is None:
        return f"{note}; the tokenizer's configuration names none"
    if configured == pad:
        return f"{note}; the same in the tokenizer's configuration"
    other = f"{token}, which is none of its tokens" if configured is None else f"id {configured}, {token}"
    return f"{note}; the tokenizer's configuration names another, {other}: the hash does not use it"


def check(folder: Path, preset: str | None = None) -> list[str]:
    """Check a checkpoint; one line for each thing that was found right.

    Args:
        folder: the checkpoint.
        preset: whose geometry it must have; None for that of its own `config.json`.

    Raises:
        ValueError: something is wrong; the message says what, and what to do.
        OSError: a file cannot be read.
    """
    # First, since either reader refuses the config.json of the other model.
    if read_model_type(folder) in MODEL_TYPES:
        return _check_qwen(folder, preset)
    model = ModelFolder.open(folder)
    config = model.config
    if preset is not None:
        _compare(folder, config, preset)
    origin = model.tokenizer_path or "the packaged tokenizer"
    lines = [
        f"{folder / 'config.json'}: form {config.form}, layers {', '.join(map(str, config.layer_ids))}"
        + (f", as preset {preset}" if preset else ""),
        f"{origin}: sha256 {model.tokenizer_sha256}",
        f"compressed vocabulary: {len(model.vocab)} ids, sha256 of its map {model.vocab.digest}",
        f"weights: {len(model.weight_map)} tensors in {len(set(model.weight_map.values()))} files",
    ]
    for entry in model.tensors.values():
        shape = f"{entry.dtype} {list(entry.shape)}"
        lines.append(
            f"{entry.name}: {shape}, {entry.nbytes} bytes from byte {entry.offset} of {one_line(entry.path.name)}"
        )
    return lines


def _check_qwen(folder: Path, preset: str | None) -> list[str]:
    model = QwenFolder.open(folder)
    config = model.config
    if preset is not None:
        _compare(folder, config, preset)
    named = f", as preset {preset}" if preset else ""
    lines = [
        f"{folder / CONFIG_FILE}: form qwen, layers {', '.join(map(str, config.layer_ids))}{named}",
        f"{config.compressed_size} token ids, hashed as they are; {config.pad_id} ends a text",
        f"weights: {len(model.weight_map)} tensors in {len(set(model.weight_map.values()))} files",
    ]
    for layer in model.plan.layers:
        shards, others = model.shards[layer.layer_id], model.tensors[layer.layer_id]
        lines.append(
            f"layer {layer.layer_id}: {layer.rows} rows of {config.row_width} values, {shards[0].dtype}, in "
            f"{len(shards)} tensors from {one_line(shards[0].name, 200)} on; {len(others)} other tensors"
        )
    return lines


def _compare(folder: Path, config: EngramConfig, preset: str) -> None:
    """Refuse a geometry that is not the preset's."""
    needed = asdict(EngramConfig.preset(preset))
    for name, value in asdict(config).items():
        if value != needed[name]:
            raise ValueError(
                f"{folder / 'config.json'} gives {name}={value!r}, preset {preset} has {needed[name]!r}: "
                "name the preset that it belongs to, or leave --preset away"
            )


def main(argv: list[str] | None = None) -> None:
    """The command; see `--help`."""
    options = parse(argv)
    with cli.one_line_errors(PROG):
        if options.check:
            print("\n".join(check(options.check, options.preset)), flush=True)
            return
        found = constants(options.preset, options.tokenizer)
        text = json.dumps(found, indent=1) + "\n"
        if options.out:
            with replacing(options.out) as file:
                file.write(text.encode())
        else:
            print(text, end="", flush=True)
        print(summary(found), file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, PROG)
