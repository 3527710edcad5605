"""Blocks of the documents that come from the code itself: a phrase from text to rows, the presets, what fits where."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from bench.instruments.words import aligned, markdown
from engram_ref.config import PRESETS, EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.place import command as place
from engram_ref.place.answer import answer
from engram_ref.place.formulas import held_bytes
from engram_ref.place.table import report
from engram_ref.tables import RowFormat
from engram_ref.vocab import CompressedVocab, load_tokenizer

PHRASE = "New York, new york, NEW YORK"
# On hardware that is named, for a text that is the same everywhere.
PLACED = "--preset v41-flash --gpu 40GB --host 512GB --disk 2TB --batch 64 --text LICENSE"
_ROOT = Path(__file__).resolve().parents[2]
_GIB = 2**30
_HOT_SHARE = 0.1  # of the rows, as in the table's words "hot, a tenth"
_BATCH = 4096  # tokens of the staging example: a prompt, since a decode step stages less


def worked_example() -> str:
    """PHRASE through tokenizer, compressed vocabulary and hash of the demo's first layer, a line per token."""
    tokenizer, vocab = load_tokenizer(None), CompressedVocab.from_tokenizer()
    config = EngramConfig.preset("demo")
    layer_id = config.layer_ids[0]
    hasher = NgramHasher(HashPlan.for_vocab(config, vocab))
    ids = tokenizer.encode(PHRASE, add_special_tokens=False).ids
    compressed = vocab([ids])
    rows = hasher(compressed, layer_id)[0]  # [T, C]
    bigram, trigram = 0, config.heads  # the first column of each order
    lines = [["token", "id", "compressed id", "row of (t-1, t)", "row of (t-2, t-1, t)"]]
    for token, known, row in zip(ids, compressed[0], rows):
        text = repr(tokenizer.decode([token], skip_special_tokens=False))
        lines.append([text, *(f"{n:,}" for n in (token, known, row[bigram], row[trigram]))])
    return f"```text\n{aligned(lines, left={0})}\n```"


def placed_example() -> str:
    """A command of `engram-place`, and what it prints."""
    # Run from anywhere; the page shows the path as from the root.
    options = place.parse(PLACED.replace("LICENSE", str(_ROOT / "LICENSE")).split())
    return f"```text\n$ engram-place {PLACED}\n{report(answer(place.question(options)))}\n```"


def what_fits() -> str:
    """Bytes on GPU, in host memory and on disk, per preset and placement."""
    head = ["preset", "parameters", "table", "read per token", "placement", "GPU", "host", "disk"]
    # `tiny` is no published geometry.
    lines = [line for name in PRESETS if name != "tiny" for line in _preset_lines(name, EngramConfig.preset(name))]
    return markdown(head, lines, right={1, 2, 3, 5, 6, 7})


def _preset_lines(name: str, config: EngramConfig) -> list[list[str]]:
    rows = _table_rows(config)
    table = rows * config.row_bytes()
    held = held_bytes(config, [rows], _BATCH, int(_HOT_SHARE * rows))
    places = {"hot, a tenth" if name == "hot" else name: tuple(sizes.values()) for name, sizes in held.items()}
    # In this order, and without the placements of several ranks.
    places = {name: places[name] for name in ("device", "host", "uva", "hot, a tenth", "file")}
    facts = [name, f"{rows * config.row_width / 1e9:.3g} B", _size(table), f"{config.bytes_per_token():,} B"]
    lines = []
    for placement, sizes in places.items():
        lines.append([*facts, placement, *(_size(size) for size in sizes)])
        facts = [""] * len(facts)  # in the first line of a preset alone
    return lines


def _table_rows(config: EngramConfig) -> int:
    """Rows of all layers."""
    return sum(_rows_per_layer(config))


def _rows_per_layer(config: EngramConfig) -> list[int]:
    """Rows of each layer."""
    # They follow from the primes: any size of a vocabulary and any pad will do.
    return [layer.rows for layer in HashPlan.build(config, config.compressed_size or 1000, 0).layers]


def published_forms() -> str:
    """The presets side by side, a line per fact, all computed from their configurations."""
    configs = {name: EngramConfig.preset(name) for name in PRESETS if name != "tiny"}
    lines = [[label, *map(fact, configs.values())] for label, fact in _FACTS.items()]
    return markdown(["", *configs], lines, right=range(1, len(configs) + 1))


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(f"{value:,}" for value in values)


def _reads(config: EngramConfig) -> str:
    """Scattered reads of a token: one per row, two where codes and scales lie apart."""
    rows = config.rows_per_token()
    return f"{rows}, or {2 * rows} split" if RowFormat.of(config).scaled else f"{rows}"


_PROJECTIONS = {"demo": "{}, with bias", "v41": "one, no bias", "qwen": "{}, no bias"}
_FACTS: dict[str, Callable[[EngramConfig], str]] = {
    "layers with a table": lambda c: _numbers(c.layer_ids),
    "residual stream: width, copies": lambda c: _numbers((c.hidden, c.hc_mult)),
    "orders": lambda c: _numbers(c.orders),
    "heads per order": lambda c: str(c.heads),
    "rows per token and layer": lambda c: str(c.columns),
    "values per row": lambda c: str(c.row_width),
    "a row is stored as": lambda c: "e4m3 + scales" if RowFormat.of(c).scaled else c.row_dtype,
    "bytes per row": lambda c: str(c.row_bytes()),
    "first prime from": lambda c: _numbers(sorted(set(c.table_size_per_order))),
    "rows of each layer": lambda c: _numbers(_rows_per_layer(c)),
    "parameters of all tables": lambda c: f"{_table_rows(c) * c.row_width / 1e9:,.1f} B",
    "bytes of all tables": lambda c: _size(_table_rows(c) * c.row_bytes()),
    "scattered reads per token": _reads,
    "bytes read per token": lambda c: f"{c.bytes_per_token():,}",
    "the same as bfloat16": lambda c: f"{c.rows_per_token() * c.row_width * 2:,}",
    "multiply-adds of the projections, per token and layer": lambda c: f"{c.projection_macs() / 1e6:,.1f} M",
    "projections": lambda c: _PROJECTIONS[c.form].format(c.hc_mult + 1),
    "short convolution": lambda c: f"{c.kernel_size} taps, {c.max_ngram} apart" if c.kernel_size else "none",
    "what is hashed": lambda c: "token ids" if c.form == "qwen" else "compressed ids",
    "there must be so many ids": lambda c: f"{c.compressed_size:,}" if c.compressed_size else "any",
}


def _size(nbytes: float) -> str:
    if nbytes == 0:
        return "0"
    return f"{nbytes / _GIB:.1f} GiB" if nbytes >= _GIB else f"{nbytes / 2**20:.1f} MiB"
