"""The lookup's endings and its range: small cases worked out by hand, by the oracle, and the committed results."""

import math
from pathlib import Path

import jsonschema
import pytest

from bench.evidence.committed import Evidence
from bench.instruments.claim import by_seed, by_task
from bench.price.models import make_workload, toy_config
from bench.schemas import ranges
from bench.sweeps import lookup_range
from bench.sweeps.lookup_range import floor_ratio, named_class, price_ending, ratio, span
from engram_ref.hashing import HashPlan
from engram_toy.bytedmd import bytedmd
from engram_toy.models.endings import ENDINGS, ended, total
from engram_toy.models.layouts import Layout
from engram_toy.models.programs import build
from tests.schemas import validator
from tests.toy.oracle import oracle_trace

ROOT = Path(lookup_range.__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results():
    return Evidence()["lookup_range"]


@pytest.fixture(scope="module")
def workload():
    config = toy_config("engram", 4).replace(table_size_per_order=(20, 20), compressed_size=None)
    plan = HashPlan.build(config, compressed_size=50, pad_compressed=2)
    return make_workload("engram", config, plan, [7, 8, 7, 8, 49, 0], seed=5)


def test_endings_return_what_they_say():
    rows = [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    kept = {name: ended(name, lambda position: [v for row in position for v in row], iter(rows)) for name in ENDINGS}
    assert kept == {
        "returned": [[1, 2, 3, 4], [5, 6, 7, 8]],
        "dropped": [],
        "row sums": [],
        "position sum": [],
        "position sum, returned": [10, 26],
    }
    assert total([7]) == 7
    with pytest.raises(ValueError, match="no ending 'lost': use one of returned; dropped"):
        ended("lost", list, rows)


def test_only_the_lookup_has_endings(workload):
    with pytest.raises(ValueError, match="only the lookup has endings"):
        build(workload, "layer", Layout.variant("resident", len(workload.table)), 0, ending="dropped")


@pytest.mark.parametrize("ending", ENDINGS)
def test_prices_are_those_of_the_naive_tracer(workload, ending, monkeypatch):
    """Every variant at two paddings, against a tracer that keeps its stack as a list; floors against the exact one."""
    monkeypatch.setattr(lookup_range, "PADDINGS", (0, 300))
    found = {(r["variant"], r["padding"]): (r["cost"], r["floor"]) for r in price_ending(workload, ending)}
    assert len(found) == 6
    for (variant, padding), (cost, least) in found.items():
        layout = Layout.variant(variant, len(workload.table))
        program = build(workload, "lookup", layout, padding, ending=ending)
        depths = oracle_trace(program.function, program.arguments)
        assert cost == sum(math.isqrt(depth - 1) + 1 for depth in depths), (variant, padding)
        program = build(workload, "lookup", layout, padding, hold=False, ending=ending)  # nothing of it is read
        exact = bytedmd(program.function, program.arguments, definition="floor")
        assert exact * (1 - 1e-4) <= least <= exact, (variant, padding)  # the bound is bracketed as closely


@pytest.mark.parametrize(("ending", "price"), list(zip(ENDINGS, [4, 3, 7, 7, 7], strict=True)))
def test_one_row_by_hand(ending, price):
    """A row of two values, read once, the second on top: the first costs 2, and is gone. Its copy lies above the
    second value if it is used again: by the caller, or by the sum, which reads both copies at depths 2 and 1.
    """

    def lookup(row):
        return ended(ending, lambda rows: [+value for value in rows[0]], [[row]])

    assert bytedmd(lookup, ([3.0, 4.0],)) == price


@pytest.mark.parametrize(
    ("price", "wall", "seed", "task"),
    [
        (1.0, None, "WIN", "go"),
        (5.0, 1.0, "WIN", "go"),
        (12.6, 0.566, "INCONCLUSIVE", "ambiguous"),
        (23.5, None, "LOSS", "no-go if wall time is under 3 %"),
        (23.5, 0.0299, "LOSS", "no-go"),
        (23.5, 0.03, "LOSS", "no no-go: wall time +3 %"),
        (23.5, 0.566, "LOSS", "no no-go: wall time +57 %"),
    ],
)
def test_both_rules_side_by_side(price, wall, seed, task):
    assert (by_seed(price), by_task(price, wall)) == (seed, task)


def test_the_committed_file_fits_its_schema(results):
    schema = validator(ranges.LookupRange)
    schema.validate(results)
    with pytest.raises(jsonschema.ValidationError):
        schema.validate({**results, "verdict": "WIN"})
    cases = {(r["toy"], r["ending"], r["variant"], r["padding"]) for r in results["records"]}
    assert len(cases) == len(results["records"]) == len(results["toys"]) * len(ENDINGS) * 3 * 6


def test_returned_at_the_questions_padding_is_the_published_run(results):
    toy = Evidence().toy
    for model in ("engram", "kv-bank"):
        for variant in lookup_range.VARIANTS:
            (ours,) = (
                r["cost"]
                for r in results["records"]
                if (r["toy"], r["ending"], r["variant"], r["padding"]) == (model, "returned", variant, 10**6)
            )
            (theirs,) = (
                r["cost"]
                for r in toy["runs"]
                if (r["model"], r["boundary"], r["variant"]) == (model, "lookup", variant)
            )
            assert ours == theirs


def test_what_the_finding_says_of_the_endings(results):
    """A referee's figures, found with the tracer alone: the published ending is the lowest of five."""
    found = [round(ratio(results, "engram", ending, 10**6), 2) for ending in ENDINGS]
    assert found == [12.61, 23.55, 22.16, 19.82, 19.37]
    assert {by_seed(r) for r in found} == {"INCONCLUSIVE", "LOSS"}
    assert named_class(results, "engram") == "INCONCLUSIVE; WIN to LOSS, 1.2 to 74"
    assert span(results, "engram", endings=["returned"]) == pytest.approx((1.2, 39.2), abs=0.05)
    assert ratio(results, "kv-bank, at most 1,000 values, 3 tokens", "returned", 10**6) == pytest.approx(31, abs=0.5)
    few = next(t for t in results["toys"] if t["toy"] == "kv-bank, at most 1,000 values")
    assert few["distinct_rows"] * few["row_values"] <= 1000
    floors = [floor_ratio(results, "engram", ending) for ending in ENDINGS]
    assert floors == pytest.approx([4.50, 5.85, 5.78, 5.64, 5.63], abs=0.005)  # found apart, before they were kept
