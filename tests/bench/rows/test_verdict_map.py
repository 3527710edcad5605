"""The map of classes: prices by hand on a tiny stream, boundaries by bisection, published models by division."""

from math import isqrt
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from bench.evidence.committed import Evidence
from bench.instruments.claim import LOSS_ABOVE, WIN_UP_TO
from bench.rows import map_figure, verdict_map
from bench.rows.table import TEXT
from bench.rows.verdict_map import POINTS, boundary, map_records, map_table, point, points_table, ratio
from bench.schemas import ranges
from engram_ref.config import EngramConfig
from engram_toy.fast.last_reads import Linker
from tests.schemas import validator

ROOT = Path(verdict_map.__file__).resolve().parents[2]
RECORD = {"pinned": 100, "buried": 3000, "row_bytes_read": 10, "price_of_a_byte_below": 5}


@pytest.fixture(scope="module")
def results():
    return Evidence()["verdict_map"]


def price(depth: int, width: int) -> int:
    """A row of so many bytes, its last byte at this depth."""
    return sum(isqrt(d - 1) + 1 for d in range(depth - width + 1, depth + 1))


def test_two_rows_by_hand():
    """A table of two rows of 4 bytes, one layer, one column; steps of one token read row 0, 0 and 1; held live.

    The last row starts on top. Pinned, row 0 lies at 8, then at 4, and row 1 at 8. Buried under 16 bytes, each read
    finds the 16 on top of what was not read since.
    """
    config = EngramConfig.preset("tiny").replace(row_width=1, row_dtype="float32", layer_ids=(1,))
    assert config.row_bytes() == 4
    linker = Linker(3, 1, 1)
    linker.add_layer(np.array([[0], [0], [1]]), [0, 2])
    (held,) = [r for r in map_records(linker.finish(), config, "t", above=(2.0,)) if r["layout"] == "held live"]
    assert held["table_bytes"] == 8 and held["bytes_above"] == 16 and held["row_bytes_read"] == 12
    assert held["pinned"] == price(8, 4) + price(4, 4) + price(8, 4)
    assert held["buried"] == price(24, 4) + price(20, 4) + price(24, 4)
    assert held["price_of_a_byte_below"] == 4


def test_ratios_and_boundaries_by_hand():
    assert ratio(RECORD, 0.0) == 30.0
    assert ratio(RECORD, 2.0) == (3000 + 100) / (100 + 100)
    assert boundary(RECORD, 20.0) == (3000 - 2000) / (19 * 50) and boundary(RECORD, 40.0) == 0.0
    for level in (5.0, 20.0):
        assert ratio(RECORD, boundary(RECORD, level)) == pytest.approx(level)


def test_published_models_by_division():
    """Dense-4B: 8.04 GB over a table of 200 GB; 512 tokens read 2,560 bytes of rows each."""
    x, y = point("dense-4b", "", 512)
    assert x == pytest.approx(8.044e9 / 200e9, rel=1e-3) and y == pytest.approx(8.044e9 / (512 * 2560), rel=1e-3)
    x, y = point("v41-flash", "one", 1)
    assert y == pytest.approx(8e9 / 12_672) and x == pytest.approx(307e9 / 203e9, rel=0.01)  # idle experts lie above


def test_a_models_weights_are_priced_where_they_lie(monkeypatch):
    """Idle experts bury the rows of V4.1-Flash, and no weight: 8 GB in 40 blocks lie at the root of 8e9 at most."""
    row = {"table": "v41-flash", "layout": "held live", "table_bytes": 203 * 10**9, "bytes_above": 10**12}
    record = {**row, "pinned": 1, "buried": 10**17, "row_bytes_read": 3 * 512 * 12_672, "price_of_a_byte_below": 10**6}
    found = verdict_map.point_ratio({"records": [record]}, "held live", "v41-flash", "one", 512)
    assert found == pytest.approx(1 + 10**17 / (3 * 8e9 * 8e9**0.5), rel=0.01)


def test_a_model_beyond_the_map_is_refused():
    """Bytes above V4.1-Flash's table are 1.51 times the table's."""
    row = {"table": "v41-flash", "layout": "held live", "table_bytes": 100, **RECORD}
    near, beyond, enough = ({**row, "bytes_above": nbytes} for nbytes in (3, 150, 152))
    place = ("held live", "v41-flash", "one", 512)
    assert verdict_map.point_ratio({"records": [near, enough]}, *place) > 1
    with pytest.raises(ValueError, match=r"held live: the map ends at 1\.5 times the table, before 1\.51"):
        verdict_map.point_ratio({"records": [near, beyond]}, *place)


def test_points_bound_the_rows_of_the_whole_model(results):
    """Place for place, the map's next larger burial costs no less than the rows priced beside the very model."""
    found = [r for r in Evidence().production["records"] if r["part"] == "whole_model" and r["stream"] == TEXT]
    for model, experts, tokens in POINTS:
        for r in found:
            named = (r["table"], r["experts"], r["mode"], r["tokens_per_step"], r["context"])
            if named == (model, experts, "decode", tokens, 0) and tokens == 512:
                weights = r["steps"] * r["weights_step_price"]
                exact = (weights + r["offload_naive"]) / (weights + r["pinned"]) - 1
                at = verdict_map.point_ratio(results, r["layout"], model, experts, tokens) - 1
                assert exact < at < 4 * exact, (named, r["layout"], exact, at)


def test_the_committed_map(results):
    schema = validator(ranges.VerdictMap)
    schema.validate(results)
    with pytest.raises(jsonschema.ValidationError):
        schema.validate({**results, "verdict": "WIN"})
    records = results["records"]
    for key in {(r["table"], r["layout"]) for r in records}:
        line = [ratio(r, 0.0) for r in records if (r["table"], r["layout"]) == key]
        assert line == sorted(line) and line[0] > 1
    # What the finding says: no published model stands anywhere near a boundary.
    highest = max(boundary(r, WIN_UP_TO) for r in records)
    assert max(boundary(r, LOSS_ABOVE) for r in records) < highest < 0.3
    assert min(point(*p)[1] for p in POINTS) > 50 * highest


def test_tables_and_figure(results, tmp_path):
    assert map_table(results).count("\n") == 1 + len(results["records"])
    assert points_table(results).count(" WIN") == len(POINTS)
    (path,) = map_figure.draw_all(results, tmp_path)
    text = path.read_text(encoding="utf-8")
    assert "INCONCLUSIVE" in text and "Dense-4B" in text
