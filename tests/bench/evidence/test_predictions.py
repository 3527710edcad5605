"""Predictions of `engram-place` against every committed measurement: how far off each kind may be; none is left out."""

import statistics
from pathlib import Path

import pytest

from bench.evidence import predictions
from bench.evidence.predictions import NOT_PREDICTED, lines, table
from engram_ref.place.machine import ASSUMED, Rate

RESULTS = Path(predictions.__file__).resolve().parents[1] / "results"

PAGE = RESULTS.parents[1] / "docs" / "where-should-my-table-live.md"


@pytest.fixture(scope="module")
def found():
    return lines(RESULTS)


def test_every_results_file_is_held_against_or_says_why_not(found):
    files = {path.stem for path in RESULTS.glob("*.json")}
    new = {name for name in files if name.startswith(("end_to_end_", "gpu_wall_", "lookup_speed_"))}
    assert files - NOT_PREDICTED.keys() - new <= {line.file for line in found}
    assert not {line.file for line in found} & NOT_PREDICTED.keys()


def kind(found, formula, *words):
    ratios = [line.ratio for line in found if line.formula == formula and all(word in line.case for word in words)]
    assert ratios, (formula, words)
    return ratios


def test_bytes_are_exact_and_pages_nearly(found):
    assert set(kind(found, "rows")) == set(kind(found, "exchange.bytes")) == {1.0}
    assert all(abs(ratio - 1) < 1e-6 for ratio in kind(found, "held"))
    assert all(0.95 < ratio < 1.05 for ratio in kind(found, "time.file", "bytes of pages"))


def test_fetches_by_themselves(found):
    assert all(0.6 < ratio < 1.5 for ratio in kind(found, "time.file", "cold"))
    layer = [line.ratio for line in found if line.file == "layer_speed" and line.formula == "time.memory"]
    assert layer and all(0.7 < ratio < 1.5 for ratio in layer)


def test_a_slow_bus_costs_what_the_window_does_not_hide(found):
    buses = [line for line in found if line.file == "end_to_end_cpu" and line.formula == "beyond"]
    wide = [line for line in buses if line.predicted > 5e-4]  # others drown in the noise
    assert len(wide) >= 8 and all(0.7 < line.ratio < 1.1 for line in wide)
    assert all(line.measured < 5e-4 for line in buses if line not in wide)


def test_lookups_on_a_gpu(found):
    """In place to a tenth and out of its memory to a quarter; what the CPU stages takes up to twice as long as said."""
    for way, low, high in (("uva", 0.95, 1.15), ("resident", 0.75, 1.05), ("staged", 0.5, 1.05)):
        ratios = [line.ratio for line in found if line.file == "lookup_speed_h200" and line.case.endswith(f", {way}")]
        assert len(ratios) == 6 and all(low < ratio < high for ratio in ratios), way


def test_a_prompt_takes_no_less_than_its_operations(found):
    assert all(0.4 < ratio < 1 for ratio in kind(found, "window"))


def test_prices(found):
    """Steps of any size: the formula knows one reuse for all of them, and rows of a large step are read near by."""
    ratios, experts = kind(found, "price"), kind(found, "price", "expected experts")
    assert all(0.8 < ratio < 1.2 for ratio in set(ratios) - set(experts)) and max(ratios) > 1.1
    assert 0.4 < min(experts) < 0.5 and "half of the truth" in PAGE.read_text(encoding="utf-8")


def rate_of(line):
    """The rate of what a step loses beside the fetch that this line speaks of."""
    if line.file == "end_to_end_cpu":
        return "beside_file"
    return next(rate for word, rate in BESIDE_OF.items() if word in line.case)


BESIDE_OF = {"offload_prefetch": "beside_staged", "offload_uva": "beside_uva", "offload_hot": "beside_hot"}


def test_what_blocks_lose_is_the_median_of_what_is_committed(found, monkeypatch):
    """The assumed rates are this evidence and nothing else: a new measurement moves them."""
    losses = [line for line in found if line.formula == "exposed"]
    plain, twice = {}, {}
    for rates, factor in ((plain, 0.0), (twice, 1.0)):
        for rate in {*BESIDE_OF.values(), "beside_file"}:
            monkeypatch.setitem(ASSUMED, rate, Rate(factor, "given"))
        rates.update({(line.file, line.case): line.predicted for line in lines(RESULTS) if line.formula == "exposed"})
    assert plain.keys() == twice.keys() == {(line.file, line.case) for line in losses} and len(losses) == 34
    samples = {}
    for line in losses:
        beyond, rate = plain[line.file, line.case], rate_of(line)
        fetch = twice[line.file, line.case] - beyond if rate == "beside_uva" else 1.0
        samples.setdefault(rate, []).append((line.measured - beyond) / fetch)
    monkeypatch.undo()
    medians = {rate: float(f"{statistics.median(found):.2g}") for rate, found in samples.items()}
    assert medians == {rate: ASSUMED[rate].value for rate in samples} and len(samples) == 4


def test_what_a_step_loses_is_of_its_order(found):
    """Medians of such unlike steps are off by as much as the page says, and never leave a loss out."""
    near = {}
    for line in found:
        if line.formula == "exposed":
            assert 1 / 3 < line.ratio < 8
            near.setdefault(line.file.endswith("_cpu"), []).append(1 / 2 < line.ratio < 2)
    assert {on_cpu: (sum(which), len(which)) for on_cpu, which in near.items()} == {True: (16, 16), False: (9, 18)}
    assert "all sixteen of a CPU within a factor of two, nine of eighteen" in PAGE.read_text(encoding="utf-8")


def test_what_is_known_to_be_wrong_is_still_shown(found):
    """Inside a step of a CPU a fetch from memory takes far longer than by itself; the page says so."""
    inside = kind(found, "time.memory", "waited")
    assert max(inside) < 0.5 and "0.04" in table(RESULTS)
    page = PAGE.read_text(encoding="utf-8")
    assert table(RESULTS) in page and "Inside a step of a CPU" in page
    waited_for = kind(found, "time.host", "offload_naive, lost")
    assert len(waited_for) == 3 and max(waited_for) < 0.6 and "waited for" in page


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [(1.632, "x", "1.632 x"), (0.4, "x", "0.4 x"), (25_952_256, "B", "25,952,256 B"), (5.7e-6, "s", "5.7 us")],
)
def test_figures_have_their_digits(value, unit, shown):
    assert predictions._figure(value, unit) == shown
