"""Every part of the production tables, worked out again by hand on a small table: a list for a stack, the twin's hash.

Nothing here shares code with what it checks, but the text, the vocabulary and the plan: rows come from the twin, depths
from positions in a list, prices from a sum over bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import struct
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("numba", reason="row prices are compiled: pip install numba")

from bench import production
from bench.rows import cases as row_cases
from bench.rows.cases import Case, price_case, source
from bench.rows.whole_model import WholeModel, step_price
from engram_ref.config import EngramConfig
from engram_toy import hashing

TABLE = EngramConfig.preset("tiny").replace(
    layer_ids=(1, 3), heads=2, max_ngram=3, row_width=3, table_size_per_order=(50, 70), compressed_size=None
)
ROW_BYTES = 12
TOKENS = 48


@pytest.fixture(autouse=True)
def small_table(monkeypatch):
    class Presets:
        preset = staticmethod(lambda name: {"small": TABLE}[name])

    monkeypatch.setattr(row_cases, "EngramConfig", Presets)


class ByHand:
    """The same stream of rows, and an LRU stack that is a list.

    Attributes:
        rows: of the tables of all layers.
        steps: rows by step, in the order of reading.
    """

    def __init__(self, ids: list[int], mode: str = "token", tokens_per_step: int = 1) -> None:
        plan = row_cases.plan_of(TABLE)
        self.sizes = [layer.rows for layer in plan.layers]
        self.rows = sum(self.sizes)
        count = len(ids) // tokens_per_step
        texts = [ids[: count * tokens_per_step]]
        if mode == "decode":
            texts = [ids[count * b : count * (b + 1)] for b in range(tokens_per_step)]
        twin = hashing.NgramHasher(json.loads(plan.to_json()))
        hashed = [
            [twin(text, layer_id) for text in texts] for layer_id in TABLE.layer_ids
        ]  # [layer][text][token][column]
        self.steps = []
        for step in range(count):
            read = []
            for layer, of_texts in enumerate(hashed):
                if mode == "decode":
                    tokens = [rows[step] for rows in of_texts]
                else:
                    tokens = of_texts[0][step * tokens_per_step : (step + 1) * tokens_per_step]
                read += [sum(self.sizes[:layer]) + row for token in tokens for row in token]
            self.steps.append(read)

    def flat(self) -> list[int]:
        return [row for step in self.steps for row in step]

    def depths(self, held: bool, hot=(), between: int = 0, on_top: bool = False) -> list[tuple[int, bool, int]]:
        """Per read its depth in bytes, whether it is the row's first, and its step."""
        left = Counter(self.flat())
        stack = [row for row in range(self.rows) if (held or row in left) and row not in hot]
        stack += [row for row in sorted(hot) if held or row in left]
        found, last_step = [], {}
        for step, rows in enumerate(self.steps):
            for row in rows:
                depth = ROW_BYTES * (len(stack) - stack.index(row))
                if last_step.get(row) != step and not (on_top and step == 0):
                    depth += between
                found.append((depth, row not in last_step, step))
                stack.remove(row)
                left[row] -= 1
                if held or left[row]:
                    stack.append(row)
                last_step[row] = step
        return found

    def price(self, *layout, **weights) -> int:
        return sum(price_of(depth) for depth, _, _ in self.depths(*layout, **weights))


def digest_of(rows: list[int]) -> str:
    """Of the read before of the same row, or -1 less the row's place, per read; then of the rows that are read."""
    distinct, last = sorted(set(rows)), {}
    digest = hashlib.sha256()
    for number, row in enumerate(rows):
        digest.update(struct.pack("<i", last.get(row, -1 - distinct.index(row))))
        last[row] = number
    digest.update(struct.pack(f"<{len(distinct)}q", *distinct))
    return digest.hexdigest()


def root(n: int) -> int:
    return math.isqrt(n - 1) + 1


def price_of(depth: int) -> int:
    """Of a row whose deepest byte lies there."""
    return sum(root(byte) for byte in range(depth - ROW_BYTES + 1, depth + 1))


def by_bin(pairs) -> dict[str, int]:
    bins: Counter[str] = Counter()
    for depth, amount in pairs:
        bins[str(depth.bit_length() - 1)] += amount
    return dict(bins)


def check_prices(record, depths) -> None:
    """A record's price, and its split by depth, against depths found by hand."""
    assert record["price"] == sum(price_of(depth) for depth, _, _ in depths)
    assert record["price_by_value"] == sum(ROW_BYTES * root(depth) for depth, _, _ in depths)
    for name, wanted in (("first", True), ("later", False)):
        of_kind = [depth for depth, first, _ in depths if first == wanted]
        assert record["reads_by_depth"][name] == by_bin((depth, 1) for depth in of_kind)
        assert record["price_by_depth"][name] == by_bin((depth, price_of(depth)) for depth in of_kind)


def check_facts(record, by_hand: ByHand, case: Case) -> None:
    rows = by_hand.flat()
    per_token = 2 * TABLE.columns
    assert record["reads"] == len(rows) and record["tokens"] == len(rows) // per_token
    assert record["distinct_rows"] == len(set(rows)) and record["table_rows"] == by_hand.rows
    assert record["row_bytes"] == ROW_BYTES
    assert record["row_reads_sha256"] == digest_of(rows)
    assert [record[name] for name in ("part", "table", "stream", "mode", "tokens_per_step")] == [
        case.part, case.table, case.stream, case.mode, case.tokens_per_step,
    ]  # fmt: skip


@pytest.mark.parametrize("stream", [production.TEXT, "zipf"])
def test_scale(stream):
    case = Case("scale", "small", stream, TOKENS)
    assert case == Case("scale", "small", stream, TOKENS, "token", 1, ())
    by_hand = ByHand(source(stream, TOKENS).ids.tolist())
    records = price_case(case)
    assert [record["layout"] for record in records] == ["held live", "compacted"]
    for record, held in zip(records, (True, False)):
        check_facts(record, by_hand, case)
        check_prices(record, by_hand.depths(held))
        first = Counter()
        for place in {row: i for i, row in reversed(list(enumerate(by_hand.flat())))}.values():
            first[str(2 + place % TABLE.columns // TABLE.heads)] += 1
        assert record["first_reads_by_order"] == first


def test_hot():
    shares = (0.0, 0.02, 0.1, 1.0)
    ids = source(production.TEXT, 2 * TOKENS).ids.tolist()
    case = Case("hot", "small", tokens=2 * TOKENS, values=shares)
    calibration, by_hand = ByHand(ids[:TOKENS]), ByHand(ids[TOKENS:])
    counts = Counter(calibration.flat())
    ranking = sorted(counts, key=lambda row: (-counts[row], row))
    records = price_case(case)
    assert len(records) == 2 * len(shares)
    for share, pair in zip(shares, zip(records[::2], records[1::2])):
        tier = int(share * by_hand.rows)
        hot = set(ranking[:tier])
        for record, (layout, held) in zip(pair, (("held live", True), ("compacted", False))):
            check_facts(record, by_hand, case)
            assert record["layout"] == layout and record["hot_share"] == share
            assert record["tier_rows"] == tier and record["tier_rows_filled"] == len(hot)
            assert record["tier_rows_read"] == len(hot & set(by_hand.flat()))
            assert record["reads_of_tier"] == sum(row in hot for row in by_hand.flat())
            check_prices(record, by_hand.depths(held, hot))
    assert {record["tier_rows_filled"] < record["tier_rows"] for record in records} == {False, True}


def test_place():
    paddings = (100.0, 1e5)
    case = Case("place", "small", tokens=TOKENS, values=paddings)
    by_hand = ByHand(source(production.TEXT, TOKENS).ids.tolist())
    once = ByHand(source(production.TEXT, TOKENS).ids.tolist())
    once.steps = [by_hand.flat()]  # padding is never read again: it buries a row until it is read once
    records = price_case(case)
    assert [(r["layout"], r["padding_bytes"]) for r in records] == [
        (layout, int(padding)) for layout in ("held live", "compacted") for padding in paddings
    ]
    for record in records:
        held = record["layout"] == "held live"
        check_facts(record, by_hand, case)
        assert record["resident"] == once.price(held)
        assert record["offload_naive"] == once.price(held, between=record["padding_bytes"])


@pytest.mark.parametrize(("mode", "tokens_per_step"), [("decode", 1), ("decode", 4), ("prefill", 5)])
def test_whole_model(monkeypatch, mode, tokens_per_step):
    model = WholeModel("Small", 7, 1000, 600, TABLE)
    monkeypatch.setitem(row_cases.MODELS, "small-model", model)
    case = Case("whole_model", "small-model", production.TEXT, TOKENS, mode, tokens_per_step)
    by_hand = ByHand(source(production.TEXT, TOKENS).ids.tolist(), mode, tokens_per_step)
    weights = 1000 if mode == "decode" else 600
    engram = sum(TABLE.projection_macs() * 2 for _ in TABLE.layer_ids)
    staged = tokens_per_step * 2 * TABLE.columns * ROW_BYTES
    for record, held in zip(price_case(case), (True, False)):
        check_facts(record, by_hand, case)
        assert record["steps"] == len(by_hand.steps) == TOKENS // tokens_per_step
        assert record["weight_bytes"] == weights
        assert record["weights_step_price"] == cycle_price(weights, 7)
        assert record["engram_weight_bytes"] == engram
        assert record["engram_weights_step_price"] == engram * root(weights)
        assert record["offload_naive"] == by_hand.price(held, between=weights)
        assert record["resident"] == by_hand.price(held, between=weights, on_top=True)
        assert record["staged_at_most"] == staged * root(weights + 2 * staged)


def cycle_price(nbytes: int, blocks: int) -> int:
    """Reading every block in turn, each by one instruction, in a step that is not the first: bytes in a list."""
    edges = [nbytes * i // blocks for i in range(blocks + 1)]
    parts = [list(range(a, b)) for a, b in itertools.pairwise(edges)]
    stack, price = [byte for part in parts for byte in part], 0
    for part in parts:
        price += sum(root(len(stack) - stack.index(byte)) for byte in part)
        stack = [byte for byte in stack if byte not in set(part)] + part
    return price


@pytest.mark.parametrize("nbytes, blocks", [(1, 1), (24, 8), (25, 8), (100, 3)])
def test_weights_in_a_cycle(nbytes, blocks):
    assert step_price(nbytes, blocks) == cycle_price(nbytes, blocks)


def test_a_stream_is_cut_where_it_says(monkeypatch):
    """Up to a number of tokens a short text will do, beyond it all of it is read."""
    asked = []

    def library(nbytes, raw):
        asked.append(nbytes)
        return SimpleNamespace(ids=np.arange(1 << 17), sha256="of the text")

    monkeypatch.setattr(row_cases, "_library", library)
    cut = source.__wrapped__  # what is kept from other tests does not count
    for tokens, length in (
        (5, 5),
        (1 << 16, 1 << 16),
        ((1 << 16) + 1, (1 << 16) + 1),
        (1 << 17, 1 << 17),
        (None, 1 << 17),
    ):
        found = cut(production.TEXT, tokens)
        assert found.ids.tolist() == list(range(length)) and found[:2] == (production.TEXT, "of the text")
    assert asked[0] == asked[1] == 1 << 20 and asked[2] == asked[3] > 1 << 40
    with pytest.raises(ValueError, match="131,073 need a longer text"):
        cut(production.TEXT, (1 << 17) + 1)
    for name in ("uniform", "zipf"):
        drawn = cut(name, 7)
        assert drawn.name == name and drawn.ids.shape == (7,) and drawn.ids.tolist() != cut(name, 8).ids.tolist()
        with pytest.raises(ValueError, match="does not end"):
            cut(name, None)
