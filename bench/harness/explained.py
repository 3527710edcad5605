"""Blocks of the documents that come from the code itself: one phrase from text to rows, and what fits where."""

from __future__ import annotations

from bench.harness.table import aligned
from engram_ref.config import PRESETS, EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.vocab import CompressedVocab, load_tokenizer

PHRASE = "New York, new york, NEW YORK"
_GIB = 2**30
_HOT_SHARE = 0.1
_BATCH = 4096  # tokens of the staging example


def worked_example() -> str:
    """PHRASE through tokenizer, compressed vocabulary and hash of the demo's first layer, a line per token."""
    tokenizer, vocab = load_tokenizer(None), CompressedVocab.from_tokenizer()
    config = EngramConfig.preset("demo")
    layer_id = config.layer_ids[0]
    hasher = NgramHasher(HashPlan.build(config, len(vocab), vocab.pad(config.pad_id)))
    ids = tokenizer.encode(PHRASE, add_special_tokens=False).ids
    compressed = vocab([ids])
    rows = hasher(compressed, layer_id)[0]  # [T, C]
    bigram, trigram = 0, config.heads  # the first column of each order
    lines = [["token", "id", "compressed id", "row of (t-1, t)", "row of (t-2, t-1, t)"]]
    for token, known, row in zip(ids, compressed[0], rows):
        text = repr(tokenizer.decode([token], skip_special_tokens=False))
        lines.append([text, *(f"{n:,}" for n in (token, known, row[bigram], row[trigram]))])
    return f"```text\n{aligned(lines, left={0})}\n```"


def what_fits() -> str:
    """Bytes on GPU, in host memory and on disk, per preset and placement."""
    head = ["preset", "parameters", "table", "read per token", "placement", "GPU", "host", "disk"]
    lines = [head, ["---", *["---:"] * 3, "---", *["---:"] * 3]]
    for name in (name for name in PRESETS if name != "tiny"):
        lines += _preset_lines(name, EngramConfig.preset(name))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _preset_lines(name: str, config: EngramConfig) -> list[list[str]]:
    rows = _table_rows(config)
    table = rows * config.row_bytes()
    staging = 2 * _BATCH * config.columns * config.row_bytes()  # two buffers; the layers take turns
    arriving = _BATCH * config.rows_per_token() * config.row_bytes()
    hot = int(_HOT_SHARE * rows) * config.row_bytes()
    places = {
        "device": (table, 0, 0),
        "host": (arriving, table + staging, 0),
        "uva": (arriving, table, 0),
        "hot, a tenth": (arriving + hot, table + staging + 4 * rows, 0),  # with a 4-byte entry per row: hot, or where
        "file": (arriving, staging, table),
    }
    facts = [name, f"{rows * config.row_width / 1e9:.3g} B", _size(table), f"{config.bytes_per_token():,} B"]
    lines = []
    for placement, sizes in places.items():
        lines.append([*facts, placement, *(_size(size) for size in sizes)])
        facts = [""] * len(facts)
    return lines


def _table_rows(config: EngramConfig) -> int:
    """Rows of all layers; they follow from the primes, whatever the vocabulary."""
    plan = HashPlan.build(config, config.compressed_size or 1000, 0)
    return sum(layer.rows for layer in plan.layers)


def _size(nbytes: float) -> str:
    if nbytes == 0:
        return "0"
    return f"{nbytes / _GIB:.1f} GiB" if nbytes >= _GIB else f"{nbytes / 2**20:.1f} MiB"
