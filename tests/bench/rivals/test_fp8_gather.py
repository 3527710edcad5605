"""fp8 rows against bfloat16 rows: every way fetches the same rows, fresh ones each time, and says what bounds it."""

import json
import sys

import pytest
import torch

from bench import layer_speed
from bench.rivals import fp8_gather
from bench.rivals.fp8_gather import BF16, FP8, LIMITS, OURS, RIVAL, Race
from bench.setup import table_content

ROWS, MOST = 500, 300


@pytest.fixture
def race():
    with Race(ROWS, MOST) as race:
        yield race


@pytest.mark.parametrize("count", [1, 24, MOST])
def test_every_way_fetches_the_rows_that_were_asked_for(race, count):
    numbers = race.fresh(count)
    stored = table_content.expected_rows(numbers, FP8, 0)
    values = table_content.expected_values(numbers, FP8, 0)
    for name, fetch in race.ways().items():
        found = fetch(numbers)
        assert torch.equal(found, stored if "as stored" in name else values), name


def test_the_tables_are_the_same_rows_in_three_ways(race):
    assert [len(table.parts) for table in (race.bf16, race.packed, race.split)] == [1, 1, 2]
    assert torch.equal(race.split.packed().parts[0], race.packed.parts[0])
    assert torch.equal(race.bf16.values(), race.packed.values())
    assert (race.bf16.format.row_bytes, race.packed.format.row_bytes) == (512, 264)


@pytest.mark.parametrize("damage", [OURS, "split, decoded"])
def test_a_way_that_fetches_other_rows_is_never_timed(damage, monkeypatch):
    real = Race.ways

    def wrong(race):
        ways = real(race)
        return {**ways, damage: lambda numbers: ways[damage](numbers.flip(0))}

    monkeypatch.setattr(Race, "ways", wrong)
    with pytest.raises(ValueError, match=f"{damage} returned other rows than were written: nothing was measured"):
        Race(ROWS, MOST)


def test_without_numba_there_is_nothing_to_measure(monkeypatch):
    monkeypatch.setattr(fp8_gather.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="numba is not installed: pip install numba"):
        Race(ROWS, MOST)


def test_what_bounds_a_fetch_is_measured(race):
    bounds = race.bounds(10)
    assert set(bounds) == set(LIMITS.values())
    assert set(LIMITS) == set(race.ways())
    race._written.zero_()
    bounds["memcpy of 264 B a row"](race.fresh(10))
    assert int(race._written.sum()) == 2640


def test_every_sample_has_fresh_rows(race, monkeypatch):
    asked = []
    real = race.ways()[OURS]
    monkeypatch.setattr(race, "ways", lambda: {OURS: lambda numbers: (asked.append(numbers.clone()), real(numbers))[1]})
    samples = race.samples(count=24, fetches=2, rounds=3)
    assert [len(values) for values in samples.values()] == [3] * 3
    assert [len(numbers) for numbers in asked] == [24] * 8  # four rounds, the first to warm up
    assert len({tuple(numbers.tolist()) for numbers in asked}) == 8


@pytest.fixture
def results(monkeypatch, tmp_path, capsys):
    """The command on a small table: what it prints, and what it writes."""
    monkeypatch.setattr(fp8_gather, "TABLE_ROWS", ROWS)
    monkeypatch.setattr(fp8_gather, "TOKENS", (1, 3))
    monkeypatch.setattr(fp8_gather, "_LEAST_ROWS", 100)
    path = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["layer_speed", "--cases", "fp8_gather", "--repeats", "2", "--out", str(path)])
    layer_speed.main()
    return json.loads(path.read_text(encoding="utf-8")), capsys.readouterr().out


def test_the_command_measures_and_reports(results):
    found, text = results
    assert [(case["tokens"], case["fetches"], case["rows"]) for case in found["cases"]] == [(1, 4, 96), (3, 1, 72)]
    for case in found["cases"]:
        assert case["case"] == "fp8_gather" and (case["ours"], case["rival"]) == (OURS, RIVAL)
        assert all(len(values) == 2 for values in case["samples_s"].values())
        assert case["row_bytes"] == {"bf16": 512, "fp8": 264} and case["table_rows"] == ROWS
    *_, written, last = text.splitlines()
    assert text.startswith(layer_speed.report(found) + "\n") and json.loads(last)["results"] == written


def test_the_report_gives_rates_ratios_and_limits():
    samples = {name: [1e-3, 1e-3, 1e-3] for name in [*LIMITS, *LIMITS.values()]}
    samples[OURS] = [0.5e-3] * 3
    samples["memcpy of 264 B a row"] = [0.1e-3] * 3
    case = {
        **{"case": "fp8_gather", "tokens": 512, "columns": 24, "fetches": 1, "rows": 10_000, "table_rows": 1 << 22},
        **{"row_bytes": {"bf16": 512, "fp8": 264}, "ours": OURS, "rival": RIVAL, "samples_s": samples},
    }
    head, *lines = layer_speed.report({"cases": [case]}).splitlines()
    assert head == "fp8_gather: 24 columns x 512 tokens a fetch, of 4,194,304 rows: 2.0 GiB as bf16, 1.0 GiB as fp8"
    (ours,) = [line for line in lines if line.startswith(f"  {OURS}")]
    assert ours.split() == [
        *("packed,", "as", "stored", "50.0", "ns/row", "20.00", "M", "rows/s", "x2.00", "[2.00,", "2.00]"),
        *("limit", "10.0", "ns/row", "(memcpy", "of", "264", "B", "a", "row),", "20", "%"),
    ]
    assert "10.00 M rows/s" in next(line for line in lines if line.startswith(f"  {RIVAL}"))
    assert len(lines) == len(LIMITS)


def test_tables_are_read_before_anything_is_measured(race, monkeypatch):
    monkeypatch.setattr(fp8_gather, "_WARM_ROWS", MOST)
    read = {id(table): 0 for table in (race.bf16, race.packed, race.split)}
    monkeypatch.setattr(
        race, "_stored", lambda table, numbers: read.__setitem__(id(table), read[id(table)] + len(numbers))
    )
    race.warm()
    assert all(count >= fp8_gather._WARM_TIMES * ROWS for count in read.values())


def test_formats_have_the_published_width():
    assert (BF16.row_bytes, FP8.row_bytes, FP8.split_bytes) == (512, 264, (256, 8))
