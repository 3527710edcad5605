"""What do the lookups of a text cost? Each row read of a small Engram priced: ceil(sqrt(d)) at depth d of an LRU stack.

    engram-price                                   128 tokens of Python's help topics, in seconds
    engram-price --text FILE --tokens 64           of a text of your own; --text - reads standard input
    engram-price --padding 0 10^4 10^6             how far away the table lies
    engram-price --preset v41-flash                4-grams and fp8 rows, a number for each stored byte
    engram-price --json

The text goes through a tokenizer and Engram's hash, its last tokens as if nothing came before them; the rows that they
name are read in plain Python, and traced. One layer in the form of a preset, its table small enough to lay out value
by value; what it was cut to is said. Only row reads are priced: with the layer and the block around them the ratios
come close to 1: `make toy` in the repository prices those, too.

  resident          the table above the padding: the baseline
  offload_naive     the table below the padding
  offload_prefetch  the same, the next position's rows copied up before they are needed
  offload_hot       the same, but the rows most frequent in the text before start above
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from engram_ref import cli
from engram_ref.config import SCALE_BLOCK, EngramConfig
from engram_ref.files.texts import read_text
from engram_ref.hashing.plan import HashPlan
from engram_ref.vocab import CompressedVocab, load_tokenizer, vocab_for
from engram_toy.bytedmd import record, trace_to_bytedmd
from engram_toy.fusion.demo import EngramWeights
from engram_toy.fusion.v41 import V41Weights
from engram_toy.hashing import NgramHasher
from engram_toy.models.attention import AttentionWeights
from engram_toy.models.cuts import ROWS
from engram_toy.models.layouts import VARIANTS, Layout, most_frequent
from engram_toy.models.programs import Workload, build
from engram_toy.tracer.first_reads import first_reads

PROG = "engram-price"
MOST_TOKENS = 1 << 12
_CALIBRATION = 1 << 14  # tokens before the priced ones, that hot rows are chosen by
_CHARACTERS = 1 << 18
_NO_LAYER = EngramWeights(*([] for _ in EngramWeights._fields))  # nothing but rows is read
_NO_V41_LAYER = V41Weights(*([] for _ in V41Weights._fields))
_NO_ATTENTION = AttentionWeights(*([] for _ in AttentionWeights._fields))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line options; see `--help`."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    add = parser.add_argument
    add("--preset", choices=sorted(ROWS), default="tiny", help="form of Engram, its table cut to fit (default: tiny)")
    add("--text", metavar="FILE", help="a UTF-8 text, - for standard input (default: Python's help topics)")
    add("--tokenizer", metavar="PATH", help="a tokenizer.json, its folder or a Hub name (default: DeepSeek-V4's)")
    add("--tokens", type=cli.at_least(2, MOST_TOKENS), default=128,
        help="of the end of the text, as a text of their own; the text has twice as many (default: 128)")  # fmt: skip
    add("--padding", type=cli.at_least(0, 10**7), nargs="+", default=[10**6], metavar="VALUES",
        help="that bury the table (default: 10^6)")  # fmt: skip
    add("--hot-share", type=cli.share, default=0.1, help="of all rows, that offload_hot keeps above (default: 0.1)")
    add("--json", action="store_true", help="the prices as JSON")
    return parser.parse_args(argv)


def toy_of(preset: str) -> EngramConfig:
    """A preset's geometry with a table that can be laid out value by value; any tokenizer serves its form."""
    config = EngramConfig.preset(preset).replace(**ROWS[preset])
    return config if config.form == "qwen" else config.replace(compressed_size=None)


def read_ids(
    path: str | None, tokenizer: str | None, tokens: int, vocab: CompressedVocab
) -> tuple[str, list[int], list[int]]:
    """A text's name, its last compressed ids, and those before them.

    Raises:
        ValueError: it has too few tokens, or it is no text.
    """
    name, text = read_text(path, _CHARACTERS)
    ids = load_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids
    if len(ids) < 2 * tokens:
        raise ValueError(f"{name} has {len(ids)} tokens: {tokens} to price need a text of at least {2 * tokens}")
    compressed = vocab([ids])[0].tolist()
    return name, compressed[-tokens:], compressed[-tokens - _CALIBRATION : -tokens]


def prices(
    plan: HashPlan,
    config: EngramConfig,
    ids: Sequence[int],
    before: Sequence[int],
    paddings: Sequence[int],
    hot_share: float,
) -> list[dict[str, int]]:
    """ByteDMD price of the row reads of `ids` in each layout, one byte a value; for each padding.

    Args:
        plan: of the geometry; its first layer is looked up.
        config: geometry.
        before: ids that the hot rows are counted on.
        paddings: values between the table's two parts.
    """
    layer, constants = plan.layers[0], json.loads(plan.to_json())
    hot = most_frequent(NgramHasher(constants)(before, layer.layer_id), int(hot_share * layer.rows))
    table = [[0.0] * stored_values(config) for _ in range(layer.rows)]
    form = _NO_V41_LAYER if config.form == "v41" else _NO_LAYER  # which way rows are read
    workload = Workload("engram", constants, layer.layer_id, ids, table, [], form, _NO_ATTENTION)
    found: list[dict[str, int]] = [{} for _ in paddings]
    for variant in VARIANTS:
        # Recorded without padding, which would be traced value by value: only first reads can be buried under it.
        program = build(workload, "lookup", Layout.variant(variant, layer.rows, hot), padding=0)
        recording = record(program.function, program.arguments, program.kinds, fixed_depths=False)
        depths = recording.trace().depths
        start = first_reads(recording.log, depths).lay(recording.argument_inputs, program.kinds.index("pad"))
        later = trace_to_bytedmd(depths, 1) - trace_to_bytedmd(start.unpadded, 1)
        for padding, of_padding in zip(paddings, found):
            of_padding[variant] = later + trace_to_bytedmd(start.depths(padding), 1)
    return found


def stored_values(config: EngramConfig) -> int:
    """Numbers of a stored row: its values, or its codes and a scale for each 32 of them."""
    scaled = config.row_dtype == "float8_e4m3fn"
    return config.row_width + scaled * config.row_width // SCALE_BLOCK


def price_text(options: argparse.Namespace) -> dict[str, Any]:
    """What the options ask, as JSON takes it."""
    config, published = toy_of(options.preset), EngramConfig.preset(options.preset)
    vocab = vocab_for(config, options.tokenizer)
    name, ids, before = read_ids(options.text, options.tokenizer, options.tokens, vocab)
    plan = HashPlan.for_vocab(config, vocab)
    return {
        "preset": options.preset,
        "text": name,
        "tokens": len(ids),
        "rows_read": len(ids) * config.columns,
        "values_per_row": stored_values(config),
        "values_per_row_published": stored_values(published),
        "table_rows": plan.layers[0].rows,
        "table_rows_published": HashPlan.for_vocab(published.replace(compressed_size=len(vocab)), vocab).layers[0].rows,
        "prices": [
            {"padding": padding, **found}
            for padding, found in zip(
                options.padding, prices(plan, config, ids, before, options.padding, options.hot_share)
            )
        ],
    }


def report(found: dict[str, Any]) -> str:
    """The prices for a terminal."""
    lines = [
        f"{found['text']}, last {found['tokens']:,} tokens: {found['rows_read']:,} rows of "
        f"{found['values_per_row']} values read, from a table of {found['table_rows']:,}",
        f"{found['preset']}, one layer; published: {found['values_per_row_published']} values, "
        f"{found['table_rows_published']:,} rows",
    ]
    for entry in found["prices"]:
        lines += ["", f"padding {entry['padding']:,}"]
        for variant in VARIANTS:
            ratio = entry[variant] / entry["resident"]
            lines.append(f"  {variant:<16} {entry[variant]:>16,}  {ratio:8.3f} x resident")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command; see `--help`."""
    options = parse(argv)
    with cli.one_line_errors(PROG):
        found = price_text(options)
        print(json.dumps(found, indent=1) if options.json else cli.fitted(report(found)), flush=True)
