"""The classification at every boundary of its thresholds, and the table that shows it."""

import copy

import pytest

from bench.instruments.claim import classify
from bench.price.table import claimed_overhead, most_ratio, rows_ratio, verdict, verdict_table, wall_overhead

UP = 1e-9


@pytest.mark.parametrize(
    ("ratio", "label", "words"),
    [
        (0.5, "WIN", "below 2x"),
        (2.0 - UP, "WIN", "below 2x"),
        (2.0, "WIN", "up to 5x"),
        (5.0, "WIN", "up to 5x"),
        (5.0 + UP, "INCONCLUSIVE", "between"),
        (20.0, "INCONCLUSIVE", "between"),
        (20.0 + UP, "LOSS", "wall-time gaming"),
    ],
)
def test_price_thresholds(ratio, label, words):
    verdict = classify(ratio, wall_overhead=0.01)
    assert verdict.label == label
    assert words in verdict.reason


@pytest.mark.parametrize(
    ("overhead", "words"),
    [(None, "half is missing"), (0.03 - UP, "gaming"), (0.03, "over 3 %"), (-0.1, "gaming"), (4.0, "over 3 %")],
)
def test_wall_time_decides_what_kind_of_loss(overhead, words):
    verdict = classify(31.6, overhead)
    assert verdict.label == "LOSS"
    assert words in verdict.reason


@pytest.mark.parametrize("ratio", [1.0, 10.0, 100.0])
def test_what_is_invalid_is_never_a_win(ratio):
    assert classify(ratio, 0.0, valid=False).label == "INVALID"


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan")])
def test_impossible_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match="prices are positive"):
        classify(ratio, 0.0)


def run(variant, cost, wall, **changes):
    record = {
        "model": "engram",
        "boundary": "lookup",
        "variant": variant,
        "cost": cost,
        "cost_by_kind": {"row": cost},
        "wall_time_s": wall,
        "escapes": {"index": 3},
        "untracked_outputs": 0,
        "output_sha256": "a",
        "untraced_output_sha256": "a",
    }
    return {**record, **changes}


@pytest.fixture
def results():
    slow = [1.5, 1.52, 1.49, 1.51, 1.5]
    return {
        "noise_floor": [{"model": "engram", "boundary": "lookup", "ratio": {"median": 1.0, "low": 0.99, "high": 1.01}}],
        "runs": [
            run("resident", 100, [1.0, 1.01, 0.99, 1.0, 1.0]),
            run("offload_naive", 3000, [1.0, 1.01, 1.0, 1.0, 0.99]),
            run("offload_prefetch", 3100, slow),
            run("offload_hot", 450, slow),
        ],
    }


def test_the_table_shows_ratios_and_class(results):
    header, _, row, _, meaning, note = verdict_table(results).splitlines()
    assert header.split("  ")[0] == "model"
    assert "30.000" in row and "31.000" in row and "4.500" in row
    assert row.endswith("LOSS") and note.startswith("LOSS: ") and "over 3 %" in note
    assert meaning == "naive, prefetch, hot: ByteDMD price / price of resident"


@pytest.mark.parametrize(
    "change",
    [
        {"output_sha256": "b"},
        {"untraced_output_sha256": "b"},
        {"untracked_outputs": 1},
        {"escapes": {"index": 3, "float": 1}},
        {"escapes": {"index": 4}},
    ],
    ids=str,
)
def test_any_difference_makes_it_invalid(results, change):
    assert verdict(results, "engram", "lookup").label == "LOSS"
    for position in range(4):
        broken = copy.deepcopy(results)
        broken["runs"][position].update(change)
        assert verdict(broken, "engram", "lookup").label == "INVALID"


@pytest.mark.parametrize(
    ("wall", "floor", "shown", "claimed"),
    [
        ([1.5, 1.5], (1.0, 1.0), None, None),  # too few to say anything
        ([1.0, 1.0], (1.0, 1.0), None, None),
        ([1.5] * 5, (0.98, 1.02), 0.5, 0.5),
        ([1.5] * 5, (0.7, 1.6), None, None),  # resident differs from itself by as much
        ([0.8] * 5, (0.98, 1.01), -0.2, 0.01),
        ([0.8] * 5, (0.7, 1.01), None, 0.01),  # not resolved, and surely under 3 %
        ([1.01, 1.02, 0.99, 1.01, 1.0], (0.99, 1.01), None, 0.02),
        ([1.01, 1.02, 0.99, 1.01, 1.0], (0.99, 1.05), None, None),
        ([0.8, 1.3, 0.9, 1.2, 1.1], (1.0, 1.0), None, None),
        # Slower than resident without doubt, but on which side of 3 % is open: neither half of the claim.
        ([1.01, 1.02, 1.02, 1.02, 1.7], (1.0, 1.0), 0.02, None),
        ([1.01, 1.045, 1.045, 1.05, 1.07], (1.0, 1.0), 0.045, None),
    ],
)
def test_wall_time_needs_resolution(wall, floor, shown, claimed):
    baseline = run("resident", 1, [1.0] * len(wall))
    interval = dict(zip(("low", "high"), floor))
    over = wall_overhead(run("x", 1, wall), baseline, interval)
    held = claimed_overhead(run("x", 1, wall), baseline, interval)
    for found, expected in ((over.median if over.resolved else None, shown), (held, claimed)):
        assert found is None if expected is None else found == pytest.approx(expected)


def test_cheaper_reads_of_all_but_rows_change_what_a_boundary_divides_by():
    """Against sums worked out by hand, of a resident table whose rows cost 40 and 10 other reads 60."""
    kinds = dict(cost_by_kind={"row": 40, "weight": 60}, reads_by_kind={"row": 4, "weight": 10})
    copied = dict(
        cost_by_kind={"row": 100, "staged row": 20, "weight": 80},
        reads_by_kind={"row": 4, "staged row": 4, "weight": 10},
    )
    runs = [{**run("resident", 100, [1.0] * 5), **kinds}, {**run("offload_prefetch", 200, [1.0] * 5), **copied}]
    made = {"runs": [{**one, "reads": sum(one["reads_by_kind"].values())} for one in runs]}
    assert rows_ratio(made, "engram", "lookup") == (100 + 20 + 10) / (40 + 10)
    assert most_ratio(made, "engram", "lookup") == 1 + (200 - 100) / 14
