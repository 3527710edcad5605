"""`engram-price` against the job that `make toy` prices, value by value.

python -m pytest tests/price
"""

from __future__ import annotations

import io
import json
import sys

import pytest

from bench.price.job import Job, price_job
from bench.price.models import make_workload, toy_config
from engram_price.command import main, prices
from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan
from engram_toy.hashing import NgramHasher
from engram_toy.models.layouts import VARIANTS, Layout, most_frequent

IDS = [n * n % 97 for n in range(24)]
BEFORE = [n % 31 for n in range(200)]


@pytest.fixture(autouse=True)
def _cache(monkeypatch, cache_home):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))


@pytest.fixture(scope="module")
def plan():
    return HashPlan.build(EngramConfig.preset("tiny"), 97, 2)


def test_the_price_is_that_of_the_benchmarks_program(plan):
    """With its weights and its values: a lookup's price depends on neither."""
    workload = make_workload("engram", toy_config("engram", 8), plan, IDS, seed=3)
    found = prices(plan, 4, IDS, BEFORE, 1000, 0.1)
    layer = plan.layers[0]
    hot = most_frequent(NgramHasher(json.loads(plan.to_json()))(BEFORE, layer.layer_id), int(0.1 * layer.rows))
    for variant in VARIANTS:
        job = Job(workload, "lookup", Layout.variant(variant, layer.rows, hot), 1000)
        assert found[variant] == price_job(job)["cost"], variant
    assert found["resident"] < found["offload_hot"] < found["offload_naive"] < found["offload_prefetch"]


def run(capsys, *argv):
    main([*argv])
    return capsys.readouterr().out


def test_a_text_from_standard_input(capsys, monkeypatch, tmp_path):
    text = "a river of words that flows on and on " * 20
    file = tmp_path / "text.txt"
    file.write_text(text)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    options = ("--tokens", "8", "--padding", "10^3", "--json")
    piped, read = (json.loads(run(capsys, "--text", name, *options)) for name in ("-", str(file)))
    assert piped.pop("text") == "standard input" and read.pop("text") == "text.txt" and piped == read
    assert piped["rows_read"] == 128 and piped["prices"][0]["padding"] == 1000


def test_wrong_input_ends_in_one_line(capsys, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("hello world")
    for argv, said in (
        (["--text", str(short)], "to price need a text of at least 256"),
        (["--tokens", "1"], "at least 2"),
        (["--padding", "1e9"], "at most"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        printed = capsys.readouterr()
        assert ended.value.code == 2 and said in printed.err and printed.err.count("\n") == 1
