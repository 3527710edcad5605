"""Production scale: the streams are the twin's, every part gives valid records, and the tables say what they hold."""

import json
import re
from collections import Counter
from dataclasses import replace
from functools import partial

import jsonschema
import numpy as np
import pytest

pytest.importorskip("numba", reason="row prices are compiled: pip install numba")

from bench import production
from bench.instruments.claim import classify
from bench.instruments.results import environment, git_commit
from bench.rows import cases as row_cases
from bench.rows import figures
from bench.rows import table as row_table
from bench.rows.cases import Case, plan_of, price_case, read_rows, source
from bench.rows.table import TEXT, crossing_of
from bench.rows.whole_model import AROUND, MODELS
from bench.schemas.production import Results
from engram_ref.config import EngramConfig
from engram_toy import hashing
from tests.schemas import validator

pytestmark = pytest.mark.slow

TOKENS = 512
SCHEMA = validator(Results)


@pytest.fixture(scope="module")
def results():
    """Every part, on a few hundred tokens of the demo's table, and of the 4B model's."""
    cases = [Case("scale", "demo", stream, TOKENS) for stream in (TEXT, "zipf")]
    cases += [Case("hot", "demo", tokens=2 * TOKENS, values=(0.0, 0.00001, 0.1))]
    cases += [
        Case("place", "demo", tokens=TOKENS, values=(1e6, 1e9, 1e11), prefetch=copies) for copies in (False, True)
    ]
    cases += [
        Case("whole_model", table, stream, 8 * TOKENS, mode, tokens, prefetch=mode == "decode" and stream == TEXT)
        for table in AROUND
        for mode in ("decode", "prefill")
        for stream in (TEXT, "uniform")
        for tokens in (1, 128)
    ]
    return {
        "schema_version": production.SCHEMA_VERSION,
        "benchmark": production.PROG,
        "configuration": {"parts": list(production.PARTS), "quick": True},
        "environment": environment(),
        "git": git_commit(),
        "records": [record for case in cases for record in price_case(case)],
    }


@pytest.fixture(scope="module")
def other():
    """Another maker's table, every part, on a few hundred tokens."""
    cases = production.cases_of(production.PARTS, quick=True, preset="qwen38-flash-next")
    small = [replace(case, tokens=8 * TOKENS if case.part == "whole_model" else TOKENS) for case in cases]
    small = [case for case in small if case.stream == TEXT and case.mode != "prefill"]
    parts = list(production.PARTS)
    records = [record for case in dict.fromkeys(small) for record in price_case(case)]
    return {"configuration": {"parts": parts}, "records": records}


def test_another_makers_rows_are_priced_at_both_sizes(other):
    """16 rows a token, of two bytes a value and of one: the same reads. Half the bytes at half the depth each."""
    for part in production.PARTS:
        large, small = ([r for r in other["records"] if r["part"] == part and r["row_bytes"] == n] for n in (320, 160))
        assert len(large) == len(small) > 0
        for two, one in zip(large, small):
            same = ("layout", "tokens", "reads", "row_reads_sha256", "hot_share", "padding_bytes")
            assert [two.get(name) for name in same] == [one.get(name) for name in same]
            assert two["reads"] == 16 * two["tokens"] and two["table_rows"] == 320_001_536
            if part in ("scale", "hot"):
                assert two["price"] / one["price"] == pytest.approx(2**1.5, rel=0.01)
            elif part == "whole_model":  # weights lie above, whose bytes do not halve
                assert 2 < two["offload_naive"] / one["offload_naive"] < 2**1.5


def test_tables_name_the_size_of_rows_that_come_in_several(other):
    tables = [row_table.scale_table, row_table.hot_table, row_table.place_table, row_table.copies_table]
    tables += [row_table.whole_model_table]
    tables += [partial(table, step=128) for table in (row_table.complete_table, row_table.baseline_table)]
    for table in tables:
        named = Counter(re.findall("8-[Ff]lash-[Nn]ext, ([0-9]+) B a row ", table(other)))
        assert set(named) == {"320", "160"} and named["320"] == named["160"]
    assert {len({r["row_bytes"] for r in line}) for line in row_table.lines(other)} == {1}


def test_figures_of_another_makers_table_are_refused(other, tmp_path):
    with pytest.raises(
        ValueError, match="no records of demo, paper-27b, paper-40b, v41-flash: draw a run of all parts"
    ):
        figures.draw_all(other, tmp_path)


def rows_of(reads) -> list[int]:
    """The row of every read, from links."""
    rows: list[int] = []
    for link in reads.links.tolist():
        rows.append(int(reads.rows[-1 - link]) if link < 0 else rows[link])
    return rows


@pytest.mark.parametrize("preset", ["demo", "v41-flash"])
def test_the_stream_is_the_twins(preset):
    config, ids = EngramConfig.preset(preset), source(TEXT, 60).ids
    plan = plan_of(config)
    twin = hashing.NgramHasher(json.loads(plan.to_json()))
    layers = [twin(ids.tolist(), layer_id) for layer_id in config.layer_ids]
    first = [0, *np.cumsum([layer.rows for layer in plan.layers]).tolist()]
    expected = [first[n] + row for t in range(60) for n, rows in enumerate(layers) for row in rows[t]]
    assert rows_of(read_rows(ids, config)) == expected


def test_decoding_reads_every_part_in_turn():
    """A step of B tokens reads the next token of B parts of one text, hashed as one; what is left over is left out."""
    config, ids = EngramConfig.preset("demo"), source(TEXT, 62).ids
    layers, columns = len(config.layer_ids), config.columns
    whole = np.array(rows_of(read_rows(ids[:60], config))).reshape(60, layers, columns)
    stepped = np.array(rows_of(read_rows(ids, config, "decode", 4))).reshape(15, layers, 4, columns)
    for part in range(4):
        assert (stepped[:, :, part] == whole[15 * part : 15 * (part + 1)]).all()
    prefilled = np.array(rows_of(read_rows(ids, config, "prefill", 4))).reshape(15, layers, 4, columns)
    assert (prefilled == whole.reshape(15, 4, layers, columns).transpose(0, 2, 1, 3)).all()


def test_records_fit_the_schema(results):
    SCHEMA.validate(json.loads(json.dumps(results)))
    broken = json.loads(json.dumps(results))
    broken["records"][0]["price"] = 1.5
    with pytest.raises(jsonschema.ValidationError):
        SCHEMA.validate(broken)


def test_tables_and_figures(results, tmp_path):
    text = row_table.report(results)
    assert "held live" in text and "Dense-4B" in text
    record = row_table.one(results, part="scale", stream="zipf", layout="compacted")
    assert f"{record['price'] / record['tokens']:,.0f}" in text
    assert sum(record["first_reads_by_order"].values()) == record["distinct_rows"]
    # The figures ask for every table; here, let all bear the demo's numbers.
    tables = {"scale": figures.TABLE_COLOURS, "hot": figures.TABLE_COLOURS, "place": figures.TABLE_COLOURS}
    records = [{**r, "table": name} for r in results["records"] for name in tables.get(r["part"], [r["table"]])]
    drawn = figures.draw_all({**results, "records": records}, tmp_path)
    assert [path.stat().st_size > 5000 for path in drawn] == [True] * 4


def test_tables_say_what_the_records_hold(results):
    """Every column of the whole model's tables, worked out again from one record."""
    wanted = dict(part="whole_model", table="dense-4b", mode="decode", stream=TEXT, layout="compacted", context=0)
    r = row_table.one(results, tokens_per_step=128, **wanted)
    weights = r["steps"] * r["weights_step_price"]
    copied = max(r["prefetch_stands"], r["prefetch_one_use"])
    engram = r["steps"] * (r["engram_weights_step_price"] + r["buried_step_price"])
    line = next(x for x in row_table.complete_table(results, 128).splitlines() if "Dense-4B" in x and "compacted" in x)
    numbers = [r["pinned"], r["offload_naive"], copied, r["steps"] * r["engram_weights_step_price"]]
    numbers += [r["steps"] * r["buried_step_price"], copied + engram]
    assert line.split()[-7:] == [*(f"{100 * n / weights:.2g}" for n in numbers), "yes"]
    line = next(x for x in row_table.baseline_table(results, 128).splitlines() if "Dense-4B" in x and "compacted" in x)
    rest = weights + engram
    said = [f"{price / r['pinned']:.3g}" for price in (r["offload_naive"], copied)]
    said.append(f"{(copied + rest) / (r['pinned'] + rest):.5f}")
    classes = [classify(price / r["pinned"], None).label for price in (r["offload_naive"], copied)]
    assert line.split()[2:8:2] == said and line.split()[3:9:2] == [*classes, "WIN"] and classes[1] == "LOSS"
    half = r["second_half"]["offload_naive"] / (r["second_half"]["steps"] * r["weights_step_price"])
    steady = row_table.steady_table(results, 128).splitlines()
    line = next(x for x in steady if "Dense-4B" in x and "decode" in x and "compacted" in x)
    assert line.split()[-3:] == [f"{100 * half:.2g}", "%", f"{half / (r['offload_naive'] / weights):.2f}"]
    place = row_table.one(results, part="place", prefetch=True, layout="held live", padding_bytes=10**9)
    change = 100 * (place["prefetch_stands"] / place["offload_naive"] - 1)
    assert f"{change:+.2f} %" in row_table.copies_table(results)


def test_the_rule_of_place_is_bytes_above_against_bytes_of_the_table(results):
    """The factor follows the quotient: as large where a hundredth of the bytes lies above a hundredth of a table."""
    held, compacted = (
        {r["padding_bytes"]: r for r in row_table.select(results, part="place", prefetch=False, layout=layout)}
        for layout in ("held live", "compacted")
    )
    assert held[10**9]["live_bytes"] > 500 * compacted[10**6]["live_bytes"]
    ratios = [row_table.placed(r) for r in (held[10**9], compacted[10**6], held[10**11], compacted[10**9])]
    assert ratios[0] < 2 and ratios[1] < 2 and ratios[2] > 5 and ratios[3] > 5


def test_hot_tier(results):
    """More rows above never cost more; a tier of no rows changes nothing; the tier serves what was counted."""
    held = row_table.select(results, part="hot", layout="held live")
    assert [r["tier_rows"] for r in held] == [0, 206, 2_069_240]
    assert held[0]["price"] > held[1]["price"] > held[2]["price"]
    assert 0 == held[0]["reads_of_tier"] < held[1]["reads_of_tier"] < held[2]["reads_of_tier"] < held[2]["reads"]
    assert held[1]["tier_rows_filled"] == 206 and held[2]["tier_rows_filled"] < 2_069_240


def test_whole_model_shares_grow_with_the_step(results):
    for line in row_table.lines(results):
        shares = [row_table.row_share(r) for r in line]
        if line[0]["experts"] != "expected":  # at first the union of experts grows faster than the tokens
            assert shares == sorted(shares) and shares[0] > 0
        assert all(r["pinned"] < r["offload_naive"] for r in line)


def test_models_around_one_table_read_the_same_rows():
    """What lets them share a stream: the paper's table beside either width of a model."""
    for names in AROUND.values():
        tables = [MODELS[name].table for name in names]
        assert len({(plan_of(t).layers, t.row_bytes(), t.columns) for t in tables}) == 1


def test_experts_lie_between_the_two_extremes():
    """The expected union: one token's at one token, all of them in the end, and each token adds less than the last."""
    model = MODELS["v41-flash"]
    for mode in ("decode", "prefill"):
        found = []
        for tokens in (1, 8, 64, 512, 4096):
            one, union, every = (around.read_bytes for around in model.surroundings(mode, tokens))
            assert one <= union < every == model.all_bytes
            found.append(union)
        assert found == sorted(found) and found[-1] > 0.9 * model.all_bytes
    assert model.surroundings("decode", 1)[1].read_bytes == model.decode_bytes
    assert {around.live_bytes for around in model.surroundings("decode", 9)} == {model.all_bytes}


def test_crossing():
    assert crossing_of([1, 10, 100], [0.003, 0.03, 0.3]) == pytest.approx(10)
    assert crossing_of([1, 10, 100], [0.0003, 0.003, 0.3]) == pytest.approx(10**1.5)
    assert crossing_of([1, 10], [0.001, 0.002]) is None
    assert crossing_of([4, 10], [0.03, 0.2]) == 4


def test_no_case_that_the_journal_holds_is_priced_again(tmp_path, monkeypatch):
    cases = [Case("scale", "demo", TEXT, 64)]
    monkeypatch.setattr(production, "in_parallel", lambda function, jobs, n: enumerate(map(function, jobs)))
    first = production.price_all(cases, tmp_path / "j", 1)
    monkeypatch.setattr(production, "in_parallel", lambda function, jobs, n: iter([1 / 0 for _ in jobs]))
    assert production.price_all(cases, tmp_path / "j", 1) == first
    with pytest.raises(ZeroDivisionError):  # another length is another case
        production.price_all([Case("scale", "demo", TEXT, 65)], tmp_path / "j", 1)


def test_bad_streams_are_refused(monkeypatch):
    monkeypatch.setattr(row_cases, "_SHORT_TOKENS", 10**10)  # a megabyte will do
    with pytest.raises(ValueError, match="does not end"):
        source("uniform", None)
    with pytest.raises(ValueError, match="need a longer text"):
        source(TEXT, 10**9)
