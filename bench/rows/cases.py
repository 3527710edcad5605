"""What is priced at production scale: real index streams on real table sizes, each case by itself.

A case names a table, a stream and how it is cut into steps; `price_case` reads the stream, hashes it, links the reads
and prices them in every layout of the case. The records hold prices and counts only: they are the same on every
machine. How long it takes is another benchmark (`bench.row_speed`).
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from bench.rows.whole_model import MODELS, OTHERS, step_price
from bench.setup.streams import random_source
from bench.setup.token_batches import Corpus, standard_library
from engram_ref.config import PRESETS, EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.vocab import CompressedVocab, vocab_for
from engram_toy.fast.last_reads import Linker, RowReads
from engram_toy.fast.rows import Priced, Start, among, price_rows, start
from engram_toy.tracer.stack import read_price

LAYOUTS = {"held live": True, "compacted": False}
_WHOLE_TEXT = 1 << 62  # bytes
_SHORT_TEXT, _SHORT_TOKENS = 1 << 20, 1 << 16  # a megabyte of sources has several times as many tokens

Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One stream of row reads.

    Attributes:
        part: of the results that it belongs to: "scale", "hot", "place" or "whole_model".
        table: a preset, or for "whole_model" a name of `whole_model.MODELS`.
        stream: "python-stdlib", "uniform" or "zipf".
        tokens: of the stream; None for all.
        mode: "token" (token by token), or the steps of "decode" or "prefill".
        tokens_per_step: of those steps.
        values: what the part varies: shares of hot rows, or bytes above the table.
    """

    part: str
    table: str
    stream: str = "python-stdlib"
    tokens: int | None = None
    mode: str = "token"
    tokens_per_step: int = 1
    values: tuple[float, ...] = ()


class Ids(NamedTuple):
    """A stream of tokens."""

    name: str
    sha256: str  # of the text, or of the ids where they were drawn
    ids: np.ndarray  # compressed, int64 [T]


def as_they_are(table: str) -> bool:
    """Whether a table is one whose hash takes token ids as they are."""
    return table in PRESETS and EngramConfig.preset(table).form == "qwen"


@functools.cache
def _vocabulary(raw: bool) -> CompressedVocab:
    return vocab_for(EngramConfig.preset("qwen38-flash-next" if raw else "demo"))


@functools.cache
def _library(nbytes: int, raw: bool) -> Corpus:
    return standard_library(_vocabulary(raw), nbytes=nbytes)


@functools.cache
def source(name: str, tokens: int | None, raw: bool = False) -> Ids:
    """A stream of so many tokens, compressed or `raw`; kept, since the cases of a worker read it again and again.

    Raises:
        ValueError: the text is shorter.
    """
    if name != "python-stdlib":
        if tokens is None:
            raise ValueError(f"the stream {name} does not end: say how many tokens")
        drawn = random_source(name, len(_vocabulary(raw)), tokens)
        return Ids(name, drawn.sha256, np.array(drawn.ids))
    corpus = _library(_WHOLE_TEXT if tokens is None or tokens > _SHORT_TOKENS else _SHORT_TEXT, raw)
    if tokens is not None and len(corpus.ids) < tokens:
        raise ValueError(f"{name} has {len(corpus.ids):,} tokens: {tokens:,} need a longer text")
    return Ids(name, corpus.sha256, corpus.ids[:tokens])


def _source(case: Case) -> Ids:
    return source(case.stream, case.tokens, as_they_are(case.table))


def plan_of(config: EngramConfig) -> HashPlan:
    """The hash constants for the packaged tokenizer, or for token ids as they are."""
    return HashPlan.for_vocab(config, _vocabulary(config.form == "qwen"))


def read_rows(ids: np.ndarray, config: EngramConfig, mode: str = "token", tokens_per_step: int = 1) -> RowReads:
    """The linked row reads of a stream of compressed ids [T].

    In the mode "prefill" a step is the next tokens of one text. In the mode "decode" the stream is divided into as many
    texts as a step has tokens, and each step reads the next token of every text. Tokens that fill no step are left out.
    """
    plan = plan_of(config)
    hasher = NgramHasher(plan)
    steps = len(ids) // tokens_per_step
    ids = ids[: steps * tokens_per_step]
    texts = ids.reshape(tokens_per_step, steps) if mode == "decode" else ids[None]  # [B, T]
    linker = Linker(ids.size, len(plan.layers), config.columns, tokens_per_step)
    for layer in plan.layers:
        rows = hasher(texts, layer.layer_id)  # [B, T, C]
        if mode == "decode":
            rows = rows.transpose(1, 0, 2)
        linker.add_layer(rows.reshape(ids.size, config.columns), [*layer.offsets, layer.rows])
    return linker.finish()


def price_case(case: Case) -> list[Record]:
    """The records of one case."""
    return _PARTS[case.part](case)


def _scale(case: Case) -> list[Record]:
    """Price, depths and reuse of a stream, token by token."""
    config, stream = EngramConfig.preset(case.table), _source(case)
    reads = read_rows(stream.ids, config)
    about = _about(case, stream, config, reads)
    about["first_reads_by_order"] = _first_by_order(reads, config)
    return [
        {**about, "layout": name, **_priced(price_rows(reads, start(reads, held), config.row_bytes()))}
        for name, held in LAYOUTS.items()
    ]


def _first_by_order(reads: RowReads, config: EngramConfig) -> dict[str, int]:
    """Reads of a row that was not read before, by the order of the n-gram."""
    shape = (-1, len(config.layer_ids), len(config.orders), config.heads)
    first = (reads.links < 0).reshape(shape).sum(axis=(0, 1, 3))
    return {str(order): int(count) for order, count in zip(config.orders, first)}


def _hot(case: Case) -> list[Record]:
    """A hot tier of the rows that are most frequent in the first half of a text, charged on the second half."""
    config, stream = EngramConfig.preset(case.table), _source(case)
    half = len(stream.ids) // 2
    calibration = read_rows(stream.ids[:half], config)
    ranking = np.argsort(-calibration.frequency(), kind="stable")  # of equals, the smaller row first
    reads = read_rows(stream.ids[half:], config)
    frequency = reads.frequency()
    about = _about(case, stream, config, reads)
    records = []
    priced: dict[tuple[str, int], Record] = {}  # tiers that the text cannot fill hold the same rows
    for share in case.values:
        tier = int(share * reads.table_rows)
        hot = np.sort(calibration.rows[ranking[:tier]])
        hit = among(reads.rows, hot)[1]
        facts = {
            "hot_share": share,
            "tier_rows": tier,
            "tier_rows_filled": len(hot),
            "tier_rows_read": int(hit.sum()),
            "reads_of_tier": int(frequency[hit].sum()),
        }
        for name, held in LAYOUTS.items():
            if (name, len(hot)) not in priced:
                priced[name, len(hot)] = _priced(price_rows(reads, start(reads, held, hot), config.row_bytes()))
            records.append({**about, **facts, "layout": name, **priced[name, len(hot)]})
    return records


def _place(case: Case) -> list[Record]:
    """The lookup boundary: the same reads with the table above so many bytes that are never read, and below them."""
    config, stream = EngramConfig.preset(case.table), _source(case)
    reads = read_rows(stream.ids, config)
    one_step = replace(reads, step_reads=max(1, len(reads.links)))  # nothing is read in between
    about = _about(case, stream, config, reads)
    records = []
    for name, held in LAYOUTS.items():
        begin = start(reads, held)
        resident = price_rows(one_step, begin, config.row_bytes()).total
        for padding in case.values:
            below = price_rows(one_step, begin, config.row_bytes(), between_steps=int(padding)).total
            sizes = {"padding_bytes": int(padding), "resident": resident, "offload_naive": below}
            records.append({**about, "layout": name, **sizes})
    return records


def _whole_model(case: Case) -> list[Record]:
    """The rows of a table in the steps of a whole model, and the price of its weights."""
    model, stream = {**OTHERS, **MODELS}[case.table], _source(case)
    config = model.table
    reads = read_rows(stream.ids, config, case.mode, case.tokens_per_step)
    nbytes = model.step_bytes(case.mode)
    about = _about(case, stream, config, reads)
    steps = len(reads.links) // reads.step_reads
    weights = {
        "steps": steps,
        "weight_bytes": nbytes,
        "weights_step_price": step_price(nbytes, model.blocks),
        "engram_weight_bytes": model.engram_weight_bytes(),
        "engram_weights_step_price": model.engram_weight_bytes() * _root(nbytes),
    }
    records = []
    for name, held in LAYOUTS.items():
        begin = start(reads, held)
        below, on_top = (_steps_of(reads, begin, model.table, nbytes, place) for place in (False, True))
        prices = {
            "offload_naive": below.total,
            "resident": on_top.total,
            "staged_at_most": _staged(case, config, nbytes),
        }
        records.append({**about, **weights, "layout": name, **prices})
    return records


def _steps_of(reads: RowReads, begin: Start, config: EngramConfig, nbytes: int, on_top: bool) -> Priced:
    return price_rows(reads, begin, config.row_bytes(), between_steps=nbytes, on_top=on_top)


def _staged(case: Case, config: EngramConfig, nbytes: int) -> int:
    """What the second read of prefetched rows adds to a step, at most.

    A copy lies under what was touched since it was made: at most all weights, and twice the rows of the step.
    """
    staged = case.tokens_per_step * config.bytes_per_token()
    return staged * _root(nbytes + 2 * staged)


def _root(n: int) -> int:
    """ceil(sqrt(n)): the price of one byte at depth n."""
    return read_price(n)


def _about(case: Case, stream: Ids, config: EngramConfig, reads: RowReads) -> Record:
    links = hashlib.sha256(reads.links.astype("<i4").tobytes())
    links.update(reads.rows.astype("<i8").tobytes())
    return {
        "part": case.part,
        "table": case.table,
        "stream": stream.name,
        "stream_sha256": stream.sha256,
        "tokens": len(reads.links) // config.rows_per_token(),
        "mode": case.mode,
        "tokens_per_step": case.tokens_per_step,
        "table_rows": reads.table_rows,
        "row_bytes": config.row_bytes(),
        "reads": len(reads.links),
        "distinct_rows": len(reads.rows),
        "row_reads_sha256": links.hexdigest(),
    }


def _priced(priced: Priced) -> Record:
    names = ("first", "later")
    return {
        "price": priced.total,
        "price_by_value": priced.by_value,
        "reads_by_depth": {name: _bins(counts) for name, counts in zip(names, priced.reads)},
        "price_by_depth": {name: _bins(prices) for name, prices in zip(names, priced.cost)},
    }


def _bins(values: np.ndarray) -> dict[str, int]:
    """Power of two of the depth in bytes -> count, of the bins that hold something."""
    return {str(b): int(value) for b, value in enumerate(values) if value}


_PARTS = {"scale": _scale, "hot": _hot, "place": _place, "whole_model": _whole_model}
