"""Are the rows that a prefetcher brings the rows of these tokens? Fetched by one way, computed again by another.

    python examples/same_rows.py                     on a small checkpoint that is made for the purpose
    python examples/same_rows.py FOLDER              on a download of DeepSeek-V4.1-Flash, opened in place

The first way is the one for use: `engram_ref` hashes, a prefetcher reads the rows from the checkpoint in the
background, and they arrive as bfloat16. The second shares no code with it from the compressed ids on: the pure Python
twin `engram_toy` hashes, every row is read by itself, and every value is computed from its code and scale.
"""

from __future__ import annotations

import json
import sys
import tempfile
from array import array
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from engram_ref import cli
from engram_ref.checkpoint.folder import ModelFolder
from engram_ref.checkpoint.sample import sample_config, write_sample
from engram_ref.hashing import NgramHasher
from engram_ref.prefetch import Prefetcher
from engram_ref.tables import make_table
from engram_ref.vocab import load_tokenizer
from engram_toy import hashing as twin
from engram_toy.fp8 import dequantise, numbers

PROG = "same_rows"
TEXT = "The addresses are known before the forward pass, so the table can live off the GPU."
SHOWN = 3  # tokens of each layer
VALUES = 4  # of each row


def prefetched(folder: ModelFolder, compressed_ids: np.ndarray) -> dict[int, list[list[list[float]]]]:
    """Per layer the values [T][C][D], read by a prefetcher from the checkpoint's own files."""
    tables = {layer.layer_id: make_table("file", folder.stored_rows(layer.layer_id)) for layer in folder.plan.layers}
    found = {}
    with Prefetcher(NgramHasher(folder.plan), tables) as prefetcher, prefetcher.start(compressed_ids) as fetch:
        for layer_id in tables:
            values = fetch[layer_id].wait()  # [T*C, D]
            found[layer_id] = values.view(compressed_ids.shape[1], -1, folder.config.row_width).tolist()
    for table in tables.values():
        table.close()
    return found


def recomputed(folder: ModelFolder, compressed_ids: list[int]) -> dict[int, list[list[list[float]]]]:
    """The same by the twin, row by row."""
    hasher = twin.NgramHasher(json.loads(folder.plan.to_json()))
    return {
        layer.layer_id: [
            [read_row(folder, layer.layer_id, row) for row in rows] for rows in hasher(compressed_ids, layer.layer_id)
        ]
        for layer in folder.plan.layers
    }


def read_row(folder: ModelFolder, layer_id: int, row: int) -> list[float]:
    """One row of a layer's table, codes and scales read from where the headers say that they are."""
    stored = b""
    for part in ("embed.weight", "embed.scale"):
        tensor = folder.tensor(layer_id, part)
        with open(tensor.path, "rb") as file:
            file.seek(tensor.offset + row * tensor.shape[1])
            stored += file.read(tensor.shape[1])
    return dequantise(numbers(stored))


def report(folder: ModelFolder, text: str) -> list[str]:
    """What the comparison found, as lines; some values of each layer, then a count."""
    ids = load_tokenizer(folder.tokenizer_path).encode(text, add_special_tokens=False).ids
    if not ids:
        raise ValueError("the text has no tokens: give some")
    compressed_ids = folder.vocab([ids])  # [1, T]
    ways = prefetched(folder, compressed_ids), recomputed(folder, compressed_ids[0].tolist())
    lines = [f"{len(ids)} tokens, {folder.config.columns} rows each, layers {', '.join(map(str, ways[0]))}"]
    same = total = 0
    for layer_id in ways[0]:
        first, second = (way[layer_id] for way in ways)
        for position, pair in enumerate(zip(first, second)):
            same += sum(array("d", a).tobytes() == array("d", b).tobytes() for a, b in zip(*pair))
            total += len(pair[0])
            if position < SHOWN:
                shown = ["[" + ", ".join(f"{x:.4g}" for x in rows[0][:VALUES]) + ", ...]" for rows in pair]
                lines += [
                    f"layer {layer_id}, token {ids[position]}, first of its rows",
                    *(f"  {name} {values}" for name, values in zip(("prefetched", "recomputed"), shown)),
                ]
    lines.append(f"{same:,} of {total:,} rows agree in all {folder.config.row_width} values")
    if same != total:
        raise ValueError(f"{total - same:,} of {total:,} rows differ: the prefetched rows are not those of the tokens")
    return lines


def report_on_sample(text: str = TEXT) -> list[str]:
    """The same on a small checkpoint that exists only meanwhile."""
    with tempfile.TemporaryDirectory() as scratch:
        write_sample(Path(scratch, "sample"), sample_config())
        return report(ModelFolder.open(Path(scratch, "sample")), text)


def main() -> None:
    """The command."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="a checkpoint (default: a small one)")
    parser.add_argument("--text", default=TEXT, help="whose rows to fetch (default: a sentence)")
    options = parser.parse_args()
    with cli.one_line_errors(PROG):
        given = options.folder
        print("\n".join(report(ModelFolder.open(given), options.text) if given else report_on_sample(options.text)))


if __name__ == "__main__":
    cli.run(main, PROG)
