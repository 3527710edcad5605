"""What is priced at production scale: real index streams on real table sizes, each case by itself.

A case names a table, a stream and how it is cut into steps; `price_case` reads the stream, hashes it, links the reads
and prices them in every layout of the case. The records hold prices and counts only: they are the same on every
machine. How long it takes is another benchmark (`bench.row_speed`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bench.rows.whole_model import ALL_MODELS, AROUND, Surroundings, WholeModel, step_price
from bench.setup.streams import Source, random_source, standard_library
from engram_ref.config import PRESETS, EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.vocab import CompressedVocab, vocab_for
from engram_toy.fast.last_reads import Linker, RowReads
from engram_toy.fast.placing import Events, as_read, prefetched, price_steps
from engram_toy.fast.rows import Priced, among, price_rows, price_starts, start

LAYOUTS = {"held live": True, "compacted": False}  # name in results -> whether the whole table is held live
LEAST_STEPS = 32  # of a size, that its second half may be called steady
_WHOLE_TEXT = 1 << 62  # bytes: more than there are
_SHORT_TEXT, _SHORT_TOKENS = 1 << 20, 1 << 16  # a megabyte of sources has several times as many tokens

Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One stream of row reads.

    Attributes:
        part: of the results that it belongs to: "scale", "hot", "place" or "whole_model".
        table: a preset, or for "whole_model" a name of `whole_model.AROUND`.
        stream: "python-stdlib", "uniform" or "zipf".
        tokens: of the stream; None for all.
        mode: "token" (token by token), or the steps of "decode" or "prefill".
        tokens_per_step: of those steps.
        values: what the part varies: shares of hot rows, or bytes above the table.
        prefetch: whether "place" and "whole_model" price copies, too.
        row_bytes: of a stored row; None for those of the table's own format.
    """

    part: str
    table: str
    stream: str = "python-stdlib"
    tokens: int | None = None
    mode: str = "token"
    tokens_per_step: int = 1
    values: tuple[float, ...] = ()
    prefetch: bool = False
    row_bytes: int | None = None

    def row_size(self, config: EngramConfig) -> int:
        """Bytes of a stored row of the table."""
        return config.row_bytes() if self.row_bytes is None else self.row_bytes


def as_they_are(table: str) -> bool:
    """Whether a table is one whose hash takes token ids as they are."""
    return table in PRESETS and EngramConfig.preset(table).form == "qwen"


@functools.cache
def _vocabulary(raw: bool) -> CompressedVocab:
    return vocab_for(EngramConfig.preset("qwen38-flash-next" if raw else "demo"))


@functools.cache
def _library(nbytes: int, raw: bool) -> Source:
    return standard_library(_vocabulary(raw), nbytes=nbytes)


@functools.cache
def source(name: str, tokens: int | None, raw: bool = False) -> Source:
    """A stream of so many tokens, compressed or `raw`; kept, since the cases of a worker read it again and again.

    Raises:
        ValueError: the text is shorter.
    """
    if name != "python-stdlib":
        if tokens is None:
            raise ValueError(f"the stream {name} does not end: say how many tokens")
        return random_source(name, len(_vocabulary(raw)), tokens)
    text = _library(_WHOLE_TEXT if tokens is None or tokens > _SHORT_TOKENS else _SHORT_TEXT, raw)
    if tokens is not None and len(text.ids) < tokens:
        raise ValueError(f"{name} has {len(text.ids):,} tokens: {tokens:,} need a longer text")
    return text.part(0, tokens)


def _source(case: Case) -> Source:
    return source(case.stream, case.tokens, as_they_are(case.table))


def plan_of(config: EngramConfig) -> HashPlan:
    """The hash constants for the packaged tokenizer, or for token ids as they are."""
    return HashPlan.for_vocab(config, _vocabulary(config.form == "qwen"))


def read_rows(ids: np.ndarray, config: EngramConfig, mode: str = "token", tokens_per_step: int = 1) -> RowReads:
    """The linked row reads of a stream of compressed ids [T].

    In the mode "prefill" a step is the next tokens of the text. In the mode "decode" the text is cut into as many parts
    as a step has tokens, and each step reads the next token of every part. Tokens that fill no step are left out.
    """
    plan = plan_of(config)
    hasher = NgramHasher(plan)
    steps = len(ids) // tokens_per_step
    ids = ids[: steps * tokens_per_step]
    linker = Linker(ids.size, len(plan.layers), config.columns, tokens_per_step)
    for layer in plan.layers:
        # As a whole: a part then begins in the middle of a sequence, as on a running server, and not with padding.
        rows = hasher(ids[None], layer.layer_id)[0]  # [T, C]
        if mode == "decode":
            rows = rows.reshape(tokens_per_step, steps, config.columns).transpose(1, 0, 2)  # [steps, tokens, C]
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
        {**about, "layout": name, **_priced(price_rows(reads, start(reads, held), case.row_size(config)))}
        for name, held in LAYOUTS.items()
    ]


def _first_by_order(reads: RowReads, config: EngramConfig) -> dict[str, int]:
    """Reads of a row that was not read before, by the order of the n-gram."""
    shape = (-1, len(config.layer_ids), len(config.orders), config.heads)  # [T, L, orders, heads], token by token
    first = (reads.links < 0).reshape(shape).sum(axis=(0, 1, 3))
    return {str(order): int(count) for order, count in zip(config.orders, first)}


def _hot(case: Case) -> list[Record]:
    """A hot tier of the rows that are most frequent in the first half of a text, charged on the second half."""
    config, stream = EngramConfig.preset(case.table), _source(case)
    half = len(stream.ids) // 2
    calibration = read_rows(stream.ids[:half], config)
    ranked = calibration.ranked()
    reads = read_rows(stream.ids[half:], config)
    frequency = reads.frequency()
    about = _about(case, stream, config, reads)
    hot_rows = [np.sort(ranked[: int(share * reads.table_rows)]) for share in case.values]
    tiers = {len(hot): hot for hot in hot_rows}  # those that the text cannot fill hold the same rows
    priced: dict[str, dict[int, Record]] = {}
    for name, held in LAYOUTS.items():
        found = price_starts(reads, (start(reads, held, hot) for hot in tiers.values()), case.row_size(config))
        priced[name] = dict(zip(tiers, map(_priced, found)))
    records = []
    for share, hot in zip(case.values, hot_rows):
        hit = among(reads.rows, hot)[1]
        facts = {
            "hot_share": share,
            "tier_rows": int(share * reads.table_rows),
            "tier_rows_filled": len(hot),
            "tier_rows_read": int(hit.sum()),
            "reads_of_tier": int(frequency[hit].sum()),
        }
        records += [{**about, **facts, "layout": name, **priced[name][len(hot)]} for name in LAYOUTS]
    return records


def _place(case: Case) -> list[Record]:
    """The lookup boundary: the same reads with the table above so many bytes that are never read, and below them."""
    config, stream = EngramConfig.preset(case.table), _source(case)
    reads = read_rows(stream.ids, config)
    about = _about(case, stream, config, reads)
    records = []
    for name, held in LAYOUTS.items():
        begin = start(reads, held)
        places = [0, *map(int, case.values)]
        priced = {}
        for schedule, events in _schedules(reads, held, case.prefetch):
            # Nothing is read in between: those bytes bury a row until it is first read.
            one_step = replace(events, begins=events.begins[[0, -1]])
            above = [[nbytes] for nbytes in places]
            priced[schedule] = price_steps(one_step, begin, case.row_size(config), above).prices.sum(axis=1).tolist()
        live = (reads.table_rows if held else len(reads.rows)) * case.row_size(config)
        for at, padding in enumerate(places):
            sizes = {"padding_bytes": padding, "live_bytes": live, "resident": priced["offload_naive"][0]}
            records.append({**about, "layout": name, **sizes, **{key: prices[at] for key, prices in priced.items()}})
    return records


def _schedules(reads: RowReads, held: bool, prefetch: bool) -> Iterator[tuple[str, Events]]:
    """Without a prefetch, and with copies one step ahead, by the names of their prices."""
    # One at a time: they are large.
    yield "offload_naive", as_read(reads, held)
    if prefetch:
        yield "prefetch_stands", prefetched(reads, held, for_one_use=False)
        yield "prefetch_one_use", prefetched(reads, held, for_one_use=True)


def _whole_model(case: Case) -> list[Record]:
    """The rows of a table in the steps of the models around it, pinned above all else and below it."""
    stream = _source(case)
    check_steps(len(stream.ids), case.tokens_per_step)
    step = case.tokens_per_step
    places = [
        (name, around)
        for name in AROUND.get(case.table, (case.table,))
        for around in ALL_MODELS[name].surroundings(case.mode, step)
    ]
    config = ALL_MODELS[places[0][0]].table
    row_bytes = case.row_size(config)
    reads = read_rows(stream.ids, config, case.mode, case.tokens_per_step)
    about = _about(case, stream, config, reads)
    above = [[0], *(ALL_MODELS[name].above(around, step) for name, around in places)]  # 0: pinned
    records = []
    for layout, held in LAYOUTS.items():
        begin = start(reads, held)
        priced = {
            schedule: price_steps(events, begin, row_bytes, above)
            for schedule, events in _schedules(reads, held, case.prefetch)
        }
        # Bytes of rows that a step brings to the top, in the mean, rounded up: the weights come to lie below them.
        touched = -(-int(priced["offload_naive"].fresh.sum()) * row_bytes // _steps(reads))
        for at, (name, around) in enumerate(places, start=1):
            prices = {schedule: found.prices[at] for schedule, found in priced.items()}
            prices["pinned"] = priced["offload_naive"].prices[0]
            facts = {"table": name, "experts": around.experts, "context": around.context, "layout": layout}
            copies = case.tokens_per_step * config.rows_per_token() * row_bytes if case.prefetch else 0
            weights = _weights(ALL_MODELS[name], around, touched + copies)
            records.append({**about, **facts, **_steady(prices), **weights})
    return records


def check_steps(tokens: int, tokens_per_step: int) -> None:
    """Raise ValueError for a text that has too few steps of this size to tell its second half from its first."""
    if tokens // tokens_per_step < LEAST_STEPS:
        raise ValueError(
            f"{tokens:,} tokens are {tokens // tokens_per_step} steps of {tokens_per_step:,}: take a text of "
            f"{LEAST_STEPS} steps, {LEAST_STEPS * tokens_per_step:,} tokens, or smaller steps"
        )


def _steps(reads: RowReads) -> int:
    return len(reads.links) // reads.step_reads


def _steady(prices: dict[str, np.ndarray]) -> Record:
    """Sums over all steps, and over the second half of them, when much has been read before."""
    steps = len(prices["pinned"])
    second = {name: int(of_steps[steps // 2 :].sum()) for name, of_steps in prices.items()}
    whole = {name: int(of_steps.sum()) for name, of_steps in prices.items()}
    return {"steps": steps, **whole, "second_half": {"steps": steps - steps // 2, **second}}


def _weights(model: WholeModel, around: Surroundings, rows_above: int) -> Record:
    """What a step costs without Engram, and what Engram adds beside its rows."""
    nbytes, own = around.read_bytes, model.engram_weight_bytes()
    without = step_price(nbytes, model.blocks)
    # Its own weights are read in every step. They and the rows of a step, with their copies, come to lie above the
    # model's weights, and make those dearer.
    return {
        "read_bytes": nbytes,
        "live_bytes": around.live_bytes,
        "weights_step_price": without,
        "engram_weight_bytes": own,
        "engram_weights_step_price": step_price(own, len(model.table.layer_ids), above=nbytes + rows_above),
        "buried_step_price": step_price(nbytes, model.blocks, above=own + rows_above) - without,
    }


def _about(case: Case, stream: Source, config: EngramConfig, reads: RowReads) -> Record:
    links = hashlib.sha256(reads.links.astype("<i4").tobytes())
    links.update(reads.rows.astype("<i8").tobytes())
    return {
        "part": case.part,
        "table": case.table,
        "stream": stream.name,
        "stream_sha256": stream.sha256,
        "asked_tokens": case.tokens,
        "tokens": len(reads.links) // config.rows_per_token(),
        "mode": case.mode,
        "tokens_per_step": case.tokens_per_step,
        "prefetch": case.prefetch,
        "table_rows": reads.table_rows,
        "row_bytes": case.row_size(config),
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
