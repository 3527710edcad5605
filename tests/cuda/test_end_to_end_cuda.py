"""A whole small model served on a GPU: every placement chooses the same tokens, in graphs and without them."""

import json
import sys
import time
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


@pytest.fixture
def serve(tmp_path, monkeypatch, capsys):
    """Runs the command over a small model and table, without figures; its results. The log says what took how long."""

    def run_once(name, *options):
        out, begun = tmp_path / name, time.monotonic()

        def tell(text):
            with capsys.disabled():  # at once, so that it stands there when the test is cut
                print(f"\n{name} {time.monotonic() - begun:6.1f} s: {text.strip()}", end="", flush=True)

        out.mkdir()
        (out / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
        (out / "tale.txt").write_text("the seventh bridge sleeps until rain " * 500, encoding="utf-8")
        # Prompts reach over two spans of the cache.
        command = f"""gpu_wall --end-to-end --device cuda --out {out} --backbones {out}/config.json --rounds 2
            --batches 3 --sequences 5 --streams uniform --prompt_tokens 240 260 --output_tokens 2 9
            --table_params 3e6 --text {out}/tale.txt"""
        monkeypatch.setattr(run, "QWEN3_VOCABULARY", 1000)
        monkeypatch.setattr(run, "draw_all", lambda results, out: [])  # drawing needs no GPU
        monkeypatch.setattr(gpu_wall, "tell", tell)
        monkeypatch.setattr(sys, "argv", [*command.split(), *options])
        gpu_wall.main()
        tell("done")
        return json.loads((out / "results.json").read_text(encoding="utf-8"))

    return run_once


def assert_fits_schema(results):
    """Where jsonschema is missing, as on a bare GPU machine, the rest of the test must run all the same."""
    try:
        import jsonschema
    except ImportError as error:
        warnings.warn(f"results are not compared with their schema: {error}", stacklevel=2)
        return
    jsonschema.validate(results, json_schema(Results))


def test_a_staged_copy_is_as_many_bytes_as_rows_were_asked_for(serve):
    (case,) = serve("run", "--variants", "no_engram", "resident", "offload_naive")["cases"]
    naive = next(row for row in case["rows"] if row["label"] == "offload_naive")
    asked = {entry["round"]: entry["bytes_staged"] for entry in case["rounds"]}
    fewest = {entry["round"]: entry["rows_requested"] * case["table"]["row_bytes"] for entry in case["rounds"]}
    assert all(fewest[number] <= asked[number] for number in asked)
    assert {sample["round"]: sample["copied"] for sample in naive["rounds"]} == asked


@pytest.mark.parametrize("geometry", [("v41-flash", "bfloat16"), ("tiny", "float32")], ids=["v41-flash", "tiny"])
def test_every_placement_chooses_the_same_in_graphs_and_without(geometry, serve):
    preset, dtype = geometry
    both = [
        serve(name, "--preset", preset, "--dtype", dtype, "--hot_shares", "0.01", "--buses", "0.01", *options)
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
