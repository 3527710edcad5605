"""`engram-price` against the job that `make toy` prices, value by value.

python -m pytest tests/price
"""

import io
import json
import sys

import pytest

from bench.price.job import Job, price_job
from bench.price.models import make_workload, toy_config
from engram_price.command import main, prices, stored_values, toy_of
from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan
from engram_toy.bytedmd import record
from engram_toy.hashing import NgramHasher
from engram_toy.models.cuts import ROWS
from engram_toy.models.layouts import VARIANTS, Layout, most_frequent

IDS = [n * n % 97 for n in range(10)]
BEFORE = [n % 31 for n in range(200)]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("kept_maps")]


@pytest.mark.parametrize("preset", ["tiny", "v41-flash", "qwen38-flash-next"])
def test_the_price_is_that_of_the_benchmarks_program(preset, monkeypatch):
    """With its weights and its values: a lookup's price depends on neither."""
    orders = len(EngramConfig.preset(preset).orders)
    monkeypatch.setitem(ROWS[preset], "table_size_per_order", (20,) * orders)
    config = toy_of(preset).replace(compressed_size=97, rows_multiple=1)
    plan = HashPlan.build(config, 97, 2)
    workload = make_workload("engram", toy_config("engram", 8, preset), plan, IDS, seed=3)
    (found,) = prices(plan, config, IDS, BEFORE, [1000], 0.1)
    layer = plan.layers[0]
    assert len(workload.table[0]) == stored_values(config)
    hot = most_frequent(NgramHasher(json.loads(plan.to_json()))(BEFORE, layer.layer_id), int(0.1 * layer.rows))
    for variant in VARIANTS:
        job = Job(workload, "lookup", Layout.variant(variant, layer.rows, hot), 1000)
        assert found[variant] == price_job(job)["cost"], variant
    assert found["resident"] < found["offload_hot"] < found["offload_naive"] < found["offload_prefetch"]


def test_padding_is_counted_and_never_laid_out(monkeypatch):
    """Each layout is run once for all paddings, and what that traces does not grow with them."""
    recorded = []

    def noted(*arguments, **options):
        recorded.append(record(*arguments, **options))
        return recorded[-1]

    monkeypatch.setattr("engram_price.command.record", noted)
    monkeypatch.setitem(ROWS["tiny"], "table_size_per_order", (20, 20))
    config = toy_of("tiny").replace(compressed_size=97, rows_multiple=1)
    plan = HashPlan.build(config, 97, 2)
    near, far, farther = prices(plan, config, IDS, BEFORE, [0, 10**6, 10**7], 0.1)
    values = plan.layers[0].rows * stored_values(config)
    assert [recording.log.inputs for recording in recorded] == [values] * len(VARIANTS)
    assert near["resident"] == far["resident"] == farther["resident"]
    assert all(near[name] < far[name] < farther[name] for name in VARIANTS[1:])


def run(capsys, *argv):
    main([*argv])
    return capsys.readouterr().out


@pytest.mark.parametrize("preset", sorted(ROWS))
def test_every_preset_reads_as_many_rows_as_published_and_says_what_was_cut(
    preset, capsys, monkeypatch, small_tokenizer, tmp_path
):
    """Orders, heads and form stay; widths of the paper's rows, too."""
    config, published = toy_of(preset), EngramConfig.preset(preset)
    assert (config.columns, config.form, config.row_dtype) == (published.columns, published.form, published.row_dtype)
    assert (config.row_width == published.row_width) == (preset not in ("v41-flash", "qwen38-flash-next"))
    monkeypatch.setitem(ROWS, preset, {**ROWS[preset], "table_size_per_order": (20,) * len(config.orders)})
    (tmp_path / "text.txt").write_text("a river of words that flows on and on " * 20)
    short = () if preset == "tiny" else ("--tokenizer", str(small_tokenizer), "--text", str(tmp_path / "text.txt"))
    found = json.loads(run(capsys, "--preset", preset, "--tokens", "2", "--padding", "0", "--json", *short))
    assert found["rows_read"] == 2 * published.columns and found["values_per_row_published"] == (
        264 if preset == "v41-flash" else published.row_width
    )
    assert found["table_rows"] <= found["table_rows_published"] and found["preset"] == preset


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
