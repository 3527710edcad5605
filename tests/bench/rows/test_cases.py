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
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("numba", reason="row prices are compiled: pip install numba")

from bench.rows import cases
from bench.rows.cases import Case, price_case, read_rows, source
from bench.rows.table import TEXT
from bench.rows.whole_model import WholeModel, step_price
from bench.setup.streams import Source
from engram_ref.config import EngramConfig
from engram_ref.place.model import Experts
from engram_toy import hashing

TABLE = EngramConfig.preset("tiny").replace(
    layer_ids=(1, 3), heads=2, max_ngram=3, row_width=3, table_size_per_order=(50, 70), compressed_size=None
)
ROW_BYTES = 12
TOKENS = 48


@pytest.fixture(autouse=True)
def small_table(monkeypatch):
    class Presets:
        preset = staticmethod(lambda name: TABLE if name == "small" else EngramConfig.preset(name))

    monkeypatch.setattr(cases, "EngramConfig", Presets)


class ByHand:
    """The same stream of rows, and an LRU stack that is a list.

    Attributes:
        rows: of the tables of all layers.
        steps: rows by step, in the order of reading.
    """

    def __init__(self, ids: list[int], mode: str = "token", tokens_per_step: int = 1) -> None:
        plan = cases.plan_of(TABLE)
        self.sizes = [layer.rows for layer in plan.layers]
        self.rows = sum(self.sizes)
        count = len(ids) // tokens_per_step
        ids = ids[: count * tokens_per_step]
        twin = hashing.NgramHasher(json.loads(plan.to_json()))
        hashed = [twin(ids, layer_id) for layer_id in TABLE.layer_ids]  # [layer][token][column]
        self.steps = []
        for step in range(count):
            if mode == "decode":  # of every part of the text the next token
                tokens = [part * count + step for part in range(tokens_per_step)]
            else:
                tokens = list(range(step * tokens_per_step, (step + 1) * tokens_per_step))
            read = [sum(self.sizes[:n]) + row for n, rows in enumerate(hashed) for t in tokens for row in rows[t]]
            self.steps.append(read)

    def flat(self) -> list[int]:
        return [row for step in self.steps for row in step]

    def depths(self, held: bool, hot=(), between=0) -> list[tuple[int, bool, int]]:
        """Per read its depth in bytes, whether it is the row's first, and its step.

        `between` lies above what its step has not read yet; a function of the steps since it was read, None for never.
        """
        above = between if callable(between) else lambda since: between
        left = Counter(self.flat())
        stack = [row for row in range(self.rows) if (held or row in left) and row not in hot]
        stack += [row for row in sorted(hot) if held or row in left]
        found, last_step = [], {}
        for step, rows in enumerate(self.steps):
            for row in rows:
                depth = ROW_BYTES * (len(stack) - stack.index(row))
                if last_step.get(row) != step:
                    depth += above(step - last_step[row] if row in last_step else None)
                found.append((depth, row not in last_step, step))
                stack.remove(row)
                left[row] -= 1
                if held or left[row]:
                    stack.append(row)
                last_step[row] = step
        return found

    def price(self, *layout, **weights) -> int:
        return sum(price_of(depth) for depth, _, _ in self.depths(*layout, **weights))

    def copied_prices(self, held: bool, between, for_one_use: bool, padding: int = 0) -> list[int]:
        """Price of every step where each row is copied one step ahead; blocks are rows, or (step, place) of a copy.

        `between` lies above what no event of the same step touched before, `padding` above what none did.
        """
        above = between if callable(between) else lambda since: between
        flat, blocks = self.flat(), []
        for step, rows in enumerate(self.steps):
            ahead = [0, 1] if step == 0 else [step + 1]
            copies = [(n, at, row) for n in ahead if n < len(self.steps) for at, row in enumerate(self.steps[n])]
            blocks.append(
                [("copy", *copy) for copy in copies] + [("use", step, at, row) for at, row in enumerate(rows)]
            )
        touched = Counter(row for step in blocks for kind, _, _, row in step if kind == "copy" or not for_one_use)
        stack = [row for row in range(self.rows) if held or row in set(flat)]
        step_of, prices = {}, []
        for number, events in enumerate(blocks):
            price = 0
            for kind, step, at, row in events:
                used = (step, at) if kind == "use" and for_one_use else row
                depth = ROW_BYTES * (len(stack) - stack.index(used))
                depth += padding * (used not in step_of)
                if step_of.get(used) != number:
                    depth += above(number - step_of[used] if used in step_of else None)
                price += price_of(depth)
                stack.remove(used)
                step_of[used] = number
                if used == row:
                    touched[row] -= 1
                    if held or touched[row]:
                        stack.append(row)
                if kind == "copy" and for_one_use:
                    stack.append((step, at))
                    step_of[step, at] = number
            prices.append(price)
        return prices


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


@pytest.mark.parametrize("stream", [TEXT, "zipf"])
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
    ids = source(TEXT, 2 * TOKENS).ids.tolist()
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


@pytest.mark.parametrize("prefetch", [False, True])
def test_place(prefetch):
    paddings = (100.0, 1e5)
    case = Case("place", "small", tokens=TOKENS, values=paddings, prefetch=prefetch)
    by_hand = ByHand(source(TEXT, TOKENS).ids.tolist())
    once = ByHand(source(TEXT, TOKENS).ids.tolist())
    once.steps = [by_hand.flat()]  # padding is never read again: it buries a row until it is read once
    records = price_case(case)
    assert [(r["layout"], r["padding_bytes"]) for r in records] == [
        (layout, padding) for layout in ("held live", "compacted") for padding in (0, 100, 10**5)
    ]
    for record in records:
        held = record["layout"] == "held live"
        check_facts(record, by_hand, case)
        assert record["live_bytes"] == ROW_BYTES * (by_hand.rows if held else len(set(by_hand.flat())))
        assert record["resident"] == once.price(held)
        assert record["offload_naive"] == once.price(held, between=record["padding_bytes"])
        assert ("prefetch_stands" in record) == ("prefetch_one_use" in record) == prefetch
        if prefetch:
            for kind, for_one_use in (("prefetch_stands", False), ("prefetch_one_use", True)):
                assert record[kind] == sum(by_hand.copied_prices(held, 0, for_one_use, record["padding_bytes"]))


@pytest.mark.parametrize("part", ["scale", "hot", "place", "whole_model"])
def test_rows_of_another_size(monkeypatch, part):
    """As an engine may keep them: the same reads, five bytes each instead of the table's own twelve."""
    monkeypatch.setitem(globals(), "ROW_BYTES", 5)  # of what is found by hand
    small_model(monkeypatch, kv_bytes=None)
    table, mode = ("small-table", "decode") if part == "whole_model" else ("small", "token")
    values = (0.0,) if part == "hot" else (100.0,)
    case = Case(part, table, tokens=TOKENS, mode=mode, values=values, prefetch=True, row_bytes=5)
    ids = source(TEXT, TOKENS).ids.tolist()
    by_hand = ByHand(ids[TOKENS // 2 :] if part == "hot" else ids, mode)
    for record in price_case(case):
        held = record["layout"] == "held live"
        check_facts(record, by_hand, replace(case, table="small-model") if part == "whole_model" else case)
        if part in ("scale", "hot"):
            check_prices(record, by_hand.depths(held))
        elif part == "place":
            assert record["live_bytes"] == 5 * (by_hand.rows if held else len(set(by_hand.flat())))
            by_hand.steps = [by_hand.flat()]
            assert record["offload_naive"] == by_hand.price(held, between=record["padding_bytes"])
        else:
            above = above_by_hand(record, 1000, 1)
            assert record["offload_naive"] == by_hand.price(held, between=above)
            assert record["prefetch_stands"] == sum(by_hand.copied_prices(held, above, for_one_use=False))
            touched = -(-5 * sum(len(set(step)) for step in by_hand.steps) // TOKENS) + 5 * 2 * TABLE.columns
            own = [TABLE.projection_macs() * 2] * 2
            assert record["buried_step_price"] == cycle_price(1000, 7, own, touched)[0] - cycle_price(1000, 7)


def small_model(monkeypatch, **facts):
    model = WholeModel("Small", 7, 1000, 600, 1500, TABLE, **facts)
    monkeypatch.setitem(cases.ALL_MODELS, "small-model", model)
    monkeypatch.setitem(cases.AROUND, "small-table", ("small-model",))
    return model


STEPS = [("decode", 1), ("decode", 4), ("prefill", 5)]


@pytest.mark.parametrize(("mode", "tokens_per_step"), STEPS)
@pytest.mark.parametrize("experts", [None, Experts(900, 10, 2)])
def test_whole_model(monkeypatch, mode, tokens_per_step, experts):
    small_model(monkeypatch, experts=experts, kv_bytes=None if experts else 1)
    length = 40 * tokens_per_step
    case = Case("whole_model", "small-table", TEXT, length, mode, tokens_per_step, prefetch=True)
    by_hand = ByHand(source(TEXT, length).ids.tolist(), mode, tokens_per_step)
    weights = 1000 if mode == "decode" else 600
    expected = around_by_hand(mode, weights, tokens_per_step) if experts else caches_by_hand(mode, tokens_per_step)
    records = price_case(case)
    assert [(r["layout"], r["experts"], r["context"], r["read_bytes"], r["live_bytes"]) for r in records] == [
        (layout, *around) for layout in ("held live", "compacted") for around in expected
    ]
    distinct = -(-ROW_BYTES * sum(len(set(step)) for step in by_hand.steps) // 40)  # bytes of a step, on average
    copies = tokens_per_step * 2 * TABLE.columns * ROW_BYTES
    own = sum(TABLE.projection_macs() * 2 for _ in TABLE.layer_ids)
    for record in records[:2] + records[len(expected) - 1 :: len(expected)]:
        held = record["layout"] == "held live"
        check_facts(record, by_hand, replace(case, table="small-model"))
        assert record["steps"] == len(by_hand.steps) == 40
        check_placed(record, by_hand, held, above_by_hand(record, weights, tokens_per_step))
        above = distinct + copies
        nbytes = record["read_bytes"]
        assert record["engram_weight_bytes"] == own
        if nbytes < 5000:
            assert record["weights_step_price"] == cycle_price(nbytes, 7)
            with_engram = cycle_price(nbytes, 7, others=[own // 2, own // 2], unread=above)
            assert record["buried_step_price"] + record["weights_step_price"] == with_engram[0]
            assert record["engram_weights_step_price"] == with_engram[1]


def around_by_hand(mode, weights, tokens):
    """One token's experts, the expected union over a step's, all of them; 180 of 900 bytes are of one token."""
    union = weights - 180 + round(900 * (1 - 0.8**tokens))
    return [("one", 0, weights, 1500), ("expected", 0, union, 1500), ("all", 0, 1500, 1500)]


def caches_by_hand(mode, tokens):
    weights, idle, sequences = (1000, 500, tokens) if mode == "decode" else (600, 900, 1)
    sizes = [weights + sequences * context for context in (0, 4096, 32768, 131072)]
    return [("", context, size, size + idle) for context, size in zip((0, 4096, 32768, 131072), sizes)]


def above_by_hand(record, weights, tokens):
    """What lies above a row, by the steps since it was read: the expected union of their experts, or the same ones."""

    def above(since):
        if since is None:
            return record["live_bytes"]
        if record["experts"] == "expected":
            return max(0, weights - 180) + round(900 * (1 - 0.8 ** (since * tokens)))
        return record["read_bytes"]

    return above


def check_placed(record, by_hand, held, above):
    """Prices of all steps, and of their second half, by hand."""
    for place, between in (("offload_naive", above), ("pinned", 0)):
        steps = [0] * 40
        for depth, _, step in by_hand.depths(held, between=between):
            steps[step] += price_of(depth)
        assert (record[place], record["second_half"][place]) == (sum(steps), sum(steps[20:]))
    for kind, for_one_use in (("prefetch_stands", False), ("prefetch_one_use", True)):
        steps = by_hand.copied_prices(held, above, for_one_use)
        assert (record[kind], record["second_half"][kind]) == (sum(steps), sum(steps[20:]))
    assert record["second_half"]["steps"] == 20


def test_the_pinned_table_can_lose(monkeypatch):
    """A control that no run can fail shows nothing: here it costs more than a tenth of what offloaded rows do."""
    small_model(monkeypatch, kv_bytes=1)
    for record in price_case(Case("whole_model", "small-table", TEXT, 160, "decode", 4)):
        assert 0.01 * record["offload_naive"] < record["pinned"] < record["offload_naive"]


@pytest.mark.parametrize("tokens_per_step", [1, 3, 8, 16])
def test_steps_read_what_the_text_reads(tokens_per_step):
    """The rows of all decode steps, as a multiset, are those of the text read at one go; so are a prefill's."""
    ids = source(TEXT, 160).ids
    whole = Counter(ByHand(ids[: 160 - 160 % tokens_per_step].tolist()).flat())
    for mode in ("decode", "prefill"):
        reads = read_rows(ids, TABLE, mode, tokens_per_step)
        assert dict(zip(reads.rows.tolist(), reads.frequency().tolist())) == whole


def test_a_step_size_needs_its_steps(monkeypatch):
    small_model(monkeypatch, kv_bytes=1)
    with pytest.raises(ValueError, match="124 tokens are 31 steps of 4: take a text of 32 steps, 128 tokens"):
        price_case(Case("whole_model", "small-table", TEXT, 124, "decode", 4))
    assert price_case(Case("whole_model", "small-table", TEXT, 128, "decode", 4))


def test_bytes_that_are_read_lower_the_share_and_idle_ones_raise_it():
    """Why a model is bounded from above where read bytes are left out, and not where idle ones are."""
    table_row, row_bytes = 10**11, 160
    for weights, left_out in itertools.product((10**7, 8 * 10**9), (10**6, 10**9, 10**11)):
        without = price_between(table_row, row_bytes) / step_price(weights, 36)
        share = price_between(table_row + weights, row_bytes) / step_price(weights, 36)
        more_read = price_between(table_row + weights + left_out, row_bytes) / step_price(weights + left_out, 36)
        idle = price_between(table_row + weights + left_out, row_bytes) / step_price(weights, 36)
        assert more_read < share and idle >= share > without


def price_between(depth: int, nbytes: int) -> int:
    return sum(root(byte) for byte in range(depth - nbytes + 1, depth + 1))


def cycle_price(nbytes: int, blocks: int, others: Sequence[int] = (), unread: int = 0):
    """Reading every block in turn, each by one instruction, in a step that is not the first.

    With other blocks in the cycle the price of the first ones and that of the others; `unread` bytes lie above all.
    """
    edges = [nbytes * i // blocks for i in range(blocks + 1)]
    sizes = [*(b - a for a, b in itertools.pairwise(edges)), *others]
    stack = list(enumerate(sizes))  # the deepest first
    prices = [0, 0]
    for block, size in list(stack):
        deepest = unread + sum(other for _, other in stack[stack.index((block, size)) :])
        prices[block >= blocks] += price_between(deepest, size)
        stack.remove((block, size))
        stack.append((block, size))
    return prices if others else prices[0]


@pytest.mark.parametrize("nbytes, blocks", [(1, 1), (24, 8), (25, 8), (100, 3)])
def test_weights_in_a_cycle(nbytes, blocks):
    assert step_price(nbytes, blocks) == cycle_price(nbytes, blocks)


def test_a_stream_is_cut_where_it_says(monkeypatch):
    """Up to a number of tokens a short text will do, beyond it all of it is read."""
    asked = []

    def library(nbytes, raw):
        asked.append(nbytes)
        return Source(TEXT, "of the text", np.arange(1 << 17), np.arange(1 << 17))

    monkeypatch.setattr(cases, "_library", library)
    cut = source.__wrapped__  # what is kept from other tests does not count
    for tokens, length in (
        (5, 5),
        (1 << 16, 1 << 16),
        ((1 << 16) + 1, (1 << 16) + 1),
        (1 << 17, 1 << 17),
        (None, 1 << 17),
    ):
        found = cut(TEXT, tokens)
        assert found.ids.tolist() == list(range(length)) and (found.name, found.sha256) == (TEXT, "of the text")
    assert asked[0] == asked[1] == 1 << 20 and asked[2] == asked[3] > 1 << 40
    with pytest.raises(ValueError, match="131,073 need a longer text"):
        cut(TEXT, (1 << 17) + 1)
    for name in ("uniform", "zipf"):
        drawn = cut(name, 7)
        assert drawn.name == name and drawn.ids.shape == (7,) and drawn.ids.tolist() != cut(name, 8).ids.tolist()
        with pytest.raises(ValueError, match="does not end"):
            cut(name, None)
