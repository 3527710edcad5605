"""A whole small model served on a GPU: every placement chooses the same tokens, in graphs and without them."""

from __future__ import annotations

import json
import sys
import warnings

import pytest

from bench import gpu_wall
from bench.schemas.generator import json_schema
from bench.schemas.served import Results
from bench.served import run
from bench.served.numbers import same_tokens
from tests.bench.setup.test_backbones import TINY

pytestmark = pytest.mark.cuda

LABELS = ["no_engram", "own_compute", "resident", "resident again", "offload_naive", "offload_prefetch", "offload_uva"]
IN_GRAPH = "offload_uva in graph"  # beside the latter, where there are graphs
LABELS += ["offload_hot 1 %", "offload_disk synchronous", "offload_disk prefetched", "throttled 0.01 GB/s"]


def serve(out, patch, *options):
    """The results of a run over a small model and table."""
    out.mkdir()
    (out / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    (out / "tale.txt").write_text("the seventh bridge sleeps until rain " * 500, encoding="utf-8")
    arguments = ["--end-to-end", "--device", "cuda", "--out", out, "--backbones", out / "config.json", "--rounds", 3]
    arguments += [
        "--batches",
        3,
        "--sequences",
        5,
        "--streams",
        "uniform",
        "--prompt_tokens",
        240,
        260,
    ]  # two spans of the cache
    arguments += [
        "--output_tokens",
        2,
        9,
        "--table_params",
        "3e6",
        "--hot_shares",
        0.01,
        "--buses",
        "0.01",
        "--text",
        out / "tale.txt",
    ]
    patch.setattr(run, "_QWEN3_TOKENS", 1000)
    patch.setattr(sys, "argv", ["gpu_wall", *map(str, arguments), *options])
    gpu_wall.main()
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def assert_fits_schema(results):
    """Where jsonschema is missing, as on a bare GPU machine, the rest of the test must run all the same."""
    try:
        import jsonschema
    except ImportError as error:
        warnings.warn(f"results are not compared with their schema: {error}", stacklevel=2)
        return
    jsonschema.validate(results, json_schema(Results))


@pytest.mark.parametrize("geometry", [("v41-flash", "bfloat16"), ("tiny", "float32")])
def test_every_placement_chooses_the_same_in_graphs_and_without(geometry, tmp_path, monkeypatch):
    preset, dtype = geometry
    both = [
        serve(tmp_path / name, monkeypatch, "--preset", preset, "--dtype", dtype, *options)
        for name, options in (("graphs", []), ("eager", ["--eager"]))
    ]
    chosen = []
    for results, graphs in zip(both, (True, False)):
        assert_fits_schema(results)
        (case,) = results["cases"]
        labels = [row["label"] for row in case["rows"]]
        assert [label for label in labels if label != IN_GRAPH] == LABELS and same_tokens(case)
        assert (IN_GRAPH in labels) == graphs
        assert {row["graphs"]["used"] for row in case["rows"]} == {graphs}, case["rows"][0]["graphs"]
        assert {row["device"] for row in case["rows"]} == {"cuda"}
        schedules = {row["schedule"] for row in case["rows"] if row["variant"] == "resident"}
        assert schedules == {"in graph" if graphs else "in place"}
        assert all(row["weights"]["value"]["bytes_per_s"] > 0 for row in case["rows"])
        assert {row["freed"]["value"] for row in case["rows"] if row["variant"] == "resident"} == {0}
        chosen.append([[sample["tokens_sha256"] for sample in row["rounds"]] for row in case["rows"]])
    assert (
        chosen[0][0] == chosen[1][0] and chosen[0][1] == chosen[1][1]
    )  # without Engram; and with it, all are the same


def test_a_staged_copy_is_as_many_bytes_as_rows_were_asked_for(tmp_path, monkeypatch):
    (case,) = serve(tmp_path / "run", monkeypatch, "--variants", "no_engram", "resident", "offload_naive")["cases"]
    naive = next(row for row in case["rows"] if row["label"] == "offload_naive")
    asked = {entry["round"]: entry["rows_requested"] * case["table"]["row_bytes"] for entry in case["rounds"]}
    assert {sample["round"]: sample["copied"] for sample in naive["rounds"]} == asked
