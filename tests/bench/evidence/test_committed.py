"""What the finding about ByteDMD says in words is what the committed results say in numbers."""

import math
import re
from pathlib import Path

import pytest

from bench import verdict
from bench.evidence import price, stress
from bench.evidence.committed import RESULTS, Evidence, rounded_up
from bench.evidence.price import ANSWERED
from bench.instruments.claim import classify
from bench.instruments.reading import read_results
from bench.price.table import verdict as classified
from bench.rows.cases import LAYOUTS
from bench.rows.table import by_step_table, claim_weights, placed, reuse, row_share, select, under_claim
from bench.rows.whole_model import step_price
from tests import commands

ROOT = Path(verdict.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def evidence():
    return Evidence()


@pytest.mark.parametrize(("boundary", "label"), [("lookup", "INCONCLUSIVE"), ("layer", "WIN"), ("block", "WIN")])
def test_the_classes_of_the_toy(evidence, boundary, label):
    assert classified(evidence.toy, "engram", boundary).label == label


def test_layer_and_block_win_at_ten_times_the_padding(evidence):
    for boundary in ("layer", "block"):
        assert classify(evidence.swept("padding", 10**7, "engram", boundary, "offload_prefetch"), None).label == "WIN"


def test_the_whole_model_wins_where_the_finding_says(evidence):
    """Against a pinned table, which the rows alone lose; against no Engram but for V4.1 with one token's experts."""
    for model, experts in ANSWERED.values():
        for layout in LAYOUTS:
            lookup, whole = evidence.pinned(model, experts, layout)
            assert lookup > 1.5 and classify(whole, None).label == "WIN"
            assert (evidence.added(model, "in all", experts, layout) < 0.03) == (experts != "one")
        assert 0 < evidence.step(model, experts) < evidence.prefetched_share(model, experts) < 0.011
    assert classify(evidence.pinned("dense-4b", "", "compacted")[0], None).label == "LOSS"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_that_would_decide_what_an_upper_bound_leaves_open(evidence, layout):
    """Priced anew over so many bytes, what Engram adds is just under the claim."""
    record = evidence.model_step("v41-flash", "one", layout=layout)
    assert under_claim(record) == "not decided" and under_claim(evidence.model_step("dense-4b")) == "yes"
    nbytes, blocks = round(claim_weights(record)), 40
    weights, heavier = step_price(nbytes, blocks), math.sqrt(nbytes / record["read_bytes"])
    # Reads below other things: at a depth that grows by less than the weights do.
    rows = record["prefetch_one_use"] / record["steps"] * heavier
    own = step_price(record["engram_weight_bytes"], 2, above=nbytes)
    buried = step_price(nbytes, blocks, above=record["engram_weight_bytes"]) - weights
    assert 0.029 < (rows + own + buried) / weights < 0.03
    claim = "model.v41-flash.one.claim_gb"
    assert (
        price.values(evidence)[claim] == f"{claim_weights(evidence.model_step('v41-flash', 'one')) / 1e9:.2g}" == "17"
    )
    (qwen, *_) = (r for r in evidence["production_qwen"]["records"] if r["part"] == "whole_model")
    assert under_claim(qwen) == "no bound"  # much that lies above its rows is not known


def test_the_class_of_the_lookups_goes_by_step_and_text(evidence):
    table = by_step_table(evidence.production, (1, 64, 512, 16_384), 512)
    line = next(line for line in table.splitlines() if line.startswith("Dense-8B") and "compacted" in line)
    ratios = [evidence.uncopied("dense-8b", layout="compacted", tokens=tokens) for tokens in (1, 64, 512, 16_384)]
    assert ratios == sorted(ratios, reverse=True)
    marks = ("L", "L", "i", "i", "L")
    cells = zip((*ratios, evidence.uncopied_later("dense-8b", "compacted")), marks)
    assert line.split()[2:] == [text for ratio, mark in cells for text in (f"{ratio:.3g}", mark)]


def test_random_rows_reach_the_claim_in_proportion(evidence):
    """From the largest step that was priced, and only where a token costs the same in smaller ones."""
    tokens = int(evidence.in_proportion("dense-4b").replace(",", ""))
    largest = evidence.model_step("dense-4b", stream="uniform", tokens=16_384)
    assert tokens == pytest.approx(16_384 * 0.03 / row_share(largest), rel=0.05) and tokens > 16_384
    with pytest.raises(ValueError, match="of a larger one"):
        evidence.in_proportion("v41-flash")


def test_a_step_size_that_the_finding_shows_has_steps_enough(evidence):
    assert evidence.least_steps() >= 32


def test_copies_saved_nothing_on_the_streams(evidence):
    """What the finding says of both kinds of copy; that one never can is not so: tests/toy/models/test_copies.py."""
    for kind in ("prefetch_stands", "prefetch_one_use"):
        assert min(evidence.copies(kind)) > 0


@pytest.mark.parametrize(
    ("value", "said"), [(0.0164, "0.02"), (0.0092, "0.01"), (0.02, "0.02"), (0.095, "0.1"), (3.2, "4"), (1.0, "1")]
)
def test_less_than_is_never_less(value, said):
    assert rounded_up(value) == said and float(said) >= value


def test_a_boundary_is_rounded_to_its_safe_side():
    assert [rounded_up(value, 2) for value in (0.2218, 0.0442, 0.22)] == ["0.23", "0.045", "0.22"]


def test_the_lookups_class_depends_on_the_padding(evidence):
    """A WIN up to one crossing, a LOSS from another: the finding calls the class the choice of whoever pads."""
    found = [evidence.swept("padding", padding, "engram", "lookup", "offload_prefetch") for padding in (10**4, 10**7)]
    assert [classify(ratio, None).label for ratio in found] == ["WIN", "LOSS"]


def test_text_is_reused_and_random_ids_are_not(evidence):
    """The order that the analysis states, at production scale and in the toy."""
    reused = [reuse(evidence.compared("v41-flash", stream)) for stream in ("python-stdlib", "zipf", "uniform")]
    assert reused == sorted(reused, reverse=True) and reused[0] > 0.5
    toy = [evidence.swept("reuse", name, "engram", "lookup", "offload_prefetch") for name in ("uniform", "text")]
    assert toy[0] > toy[1]


def test_no_copy_was_cheaper(evidence):
    assert evidence.cheaper_copies() == 0


def test_place_follows_the_bytes_above_against_those_of_the_table(evidence):
    """Hardly anything below less than the table's own size, a factor of more than two far above it, in every layout."""
    for record in select(evidence.production, part="place", prefetch=False):
        above = record["padding_bytes"] / record["live_bytes"]
        if above < 0.02:
            assert placed(record) < 1.15
        if above > 30:
            assert placed(record) > 2
    assert evidence.placed("v41-flash", "compacted", 10**10) > 2 * evidence.placed("v41-flash", "held live", 10**10)


def test_idle_experts_bury_first_reads_alone(evidence):
    """V4.1-Flash with one token's experts, compacted: between what its first and its later reads must and can cost.

    A first read lies under all 307 GB; a later one under the 8 GB that a step reads, or among the rows of its own step.
    """
    r = evidence.model_step("v41-flash", experts="one", layout="compacted")
    first, later = r["distinct_rows"] * 264, (r["reads"] - r["distinct_rows"]) * 264
    rows = r["distinct_rows"] * 264  # bytes that can lie above one at most, beside the weights
    least = first * 307e9**0.5
    most = first * (307e9 + rows) ** 0.5 + later * (8e9 + rows) ** 0.5
    assert least < r["offload_naive"] < most
    weights = r["steps"] * 8e9**1.5
    assert 0.0019 < least / weights < evidence.step("v41-flash", "one", layout="compacted") < most / weights < 0.0026


def test_every_block_and_value_can_be_filled(evidence):
    assert all(price.values(evidence).values()) and all(fill() for fill in price.blocks(evidence).values())


def test_the_command_prints_both_halves(tmp_path):
    done = commands.run(verdict)
    assert done.returncode == 0, done.stderr
    assert "whole model" in done.stdout and "INCONCLUSIVE" in done.stdout
    failed = commands.run(verdict, "--results", tmp_path)
    assert failed.returncode == 2 and "make findings writes it" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1


def test_kills_that_what_was_finished_outlived_are_told():
    """The others fell before anything was saved, and test less."""
    head, _, *lines = stress.report(read_results(RESULTS / "stress.json")).splitlines()
    (kills,) = (line.split() for line in lines if line.startswith("kills"))
    assert re.split(r"\s{2,}", head).index("at work") == 3 and kills[3] == "12" and int(kills[1]) == 50
