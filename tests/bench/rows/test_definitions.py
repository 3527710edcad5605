"""Rows under every definition: one small stream worked out by hand, and what the committed file says."""

from math import isqrt

import jsonschema
import numpy as np
import pytest

pytest.importorskip("numba", reason="row prices are compiled: pip install numba")

from bench.evidence.committed import Evidence
from bench.rows.definitions import (
    DEFINITIONS,
    FLOOR,
    KEPT,
    PADDINGS,
    ROWS,
    TABLES,
    best_manager,
    definitions_table,
    price,
    ratio,
)
from bench.schemas import definitions
from engram_toy.fast.last_reads import Linker
from engram_toy.fast.rows import start
from tests.schemas import validator


def rows(*deepest: int) -> int:
    """Price of rows of four bytes, the last byte of each at this depth."""
    return sum(isqrt(d - 1) + 1 for last in deepest for d in range(last - 3, last + 1))


# Three rows of four bytes, row 2 on top; read 0, 1, 0. Depths in rows, under 8 bytes that nobody reads.
#   lru         0 at the third place, 1 at the third (0 lies above), 0 at the second; held live
#   classic, live, opt   first reads at their addresses 3 and 2; then 0 below 1, which live drops after its last read
#   stationary  3, 2, 3, each below the padding
#   kept copies 0 copied at 3, used from place 1; 1 read once at 2; 0 again from place 1
#   floor       the two first reads, and for 0 once more a unit a byte, two where it does not fit: 1 lies in between
BY_HAND = {
    "lru": rows(12 + 8, 12 + 8, 8),
    "classic": rows(12 + 8, 8 + 8, 8),
    "live": rows(12 + 8, 8 + 8, 4),
    "opt": rows(12 + 8, 8 + 8, 4),
    "stationary": rows(12 + 8, 8 + 8, 12 + 8),
    "kept copies": rows(12 + 8, 8 + 8, 4, 4),
}


@pytest.mark.parametrize("definition", BY_HAND)
def test_three_reads_by_hand(definition):
    linker = Linker(3, 1, 1)
    linker.add_layer(np.array([[0], [1], [0]]), [0, 3])
    reads = linker.finish()
    low, high = price(definition, reads, start(reads, held=True), 4, 8)
    assert low == high == BY_HAND[definition]
    floor, at_most = price(FLOOR, reads, start(reads, held=True), 4, 8)
    # One interval fits wherever the first four bytes are: of its bytes one costs 1, three cost 2.
    assert floor == rows(12 + 8, 8 + 8) + 1 + 3 * 2
    assert floor <= at_most <= 1.01 * floor and floor <= BY_HAND[definition]


@pytest.fixture(scope="module")
def results():
    return Evidence()["row_definitions"]


def test_the_committed_file_holds_every_case_once(results):
    schema = validator(definitions.Results)
    schema.validate(results)
    with pytest.raises(jsonschema.ValidationError):
        schema.validate({**results, "best": "floor"})
    names = ("table", "tokens", "layout", "definition", "padding_bytes")
    cases = {tuple(r[name] for name in names) for r in results["records"]}
    streams = {(r["table"], r["tokens"]) for r in results["records"]}
    assert streams == {(table, tokens) for table in TABLES for tokens in (10**5, 10**6)}
    assert len(cases) == len(results["records"]) == len(streams) * 2 * len(ROWS) * len(PADDINGS)
    assert definitions_table(results).count("\n") == 1 + len(cases) / len(PADDINGS)


def test_the_best_lies_between_floor_and_kept_copies(results):
    prices = {
        (r["table"], r["tokens"], r["layout"], r["padding_bytes"], r["definition"]): r for r in results["records"]
    }
    for (*key, definition), r in prices.items():
        assert r["price"] <= r["price_at_most"] <= 1.011 * r["price"]
        if definition == FLOOR:
            assert r["price"] <= prices[(*key, KEPT)]["price"]
            assert r["price"] <= prices[(*key, "classic")]["price"]


def test_lru_is_the_price_at_production_scale(results):
    """The same streams were priced by another command."""
    scale = [r for r in Evidence().production["records"] if r["part"] == "scale" and r["stream"] == "python-stdlib"]
    compared = 0
    for r in results["records"]:
        if r["definition"] == "lru" and not r["padding_bytes"]:
            key = (r["table"], r["tokens"], r["layout"])
            assert [r["price"]] == [s["price"] for s in scale if (s["table"], s["tokens"], s["layout"]) == key]
            compared += 1
    assert compared == 2 * 2 * len(TABLES)


@pytest.mark.parametrize("tokens", [10**5, 10**6])
def test_ratios_are_of_the_same_definition(results, tokens):
    at = ("v41-flash", tokens, "compacted", 10**11)
    found = {name: ratio(results, name, *at) for name in (*DEFINITIONS, KEPT, FLOOR) if name != "two-stack"}
    assert min(found.values()) > 1
    low, high = best_manager(results, *at)
    assert low < found[FLOOR] < high and low < found[KEPT] < high


def test_the_best_managers_ratio_lies_between_bounds_of_both_its_prices():
    """Floors 2 and 10, prices of a memory that can be built 4 and 12: the best pays 2 to 4, and below 10 to 12."""
    about = {"table": "t", "tokens": 1, "layout": "held live"}
    prices = {("floor", 0): 2, ("floor", 9): 10, ("kept copies", 0): 4, ("kept copies", 9): 12}
    results = {"records": [{**about, "definition": d, "padding_bytes": p, "price": v} for (d, p), v in prices.items()]}
    assert best_manager(results, "t", 1, "held live", 9) == (10 / 4, 12 / 2)
