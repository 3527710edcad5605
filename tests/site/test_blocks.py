"""Data scripts, schema tables, commands and start page, apart from a browser."""

import json
import re
from pathlib import Path

import pytest

from bench.evidence.committed import Evidence
from bench.instruments.claim import classify
from bench.schemas.results_files import RESULTS
from bench.site import data
from bench.site.commands import command_table, duration
from bench.site.schema_tables import schema_table, schema_tables
from bench.site.start_page import added, bars, verdict_figure, verdict_lines, verdict_sentence
from tests.site import synthetic

ROOT = Path(__file__).parents[2]


def content(script: str):
    return json.loads(script[script.index("= ") + 2 : script.rindex(";")])


@pytest.fixture
def results(tmp_path):
    (tmp_path / "bytedmd_grid.json").write_text(json.dumps(synthetic.grid()), encoding="utf-8")
    (tmp_path / "production.json").write_text(json.dumps(synthetic.production()), encoding="utf-8")
    return tmp_path


def test_scripts_hold_the_results(results):
    grid = content(data.grid_script(results))
    assert (grid["axes"], grid["prices"]) == (synthetic.grid()["axes"], synthetic.grid()["prices"])
    assert grid["thresholds"] == {"strong_below": 2, "win_up_to": 5, "loss_above": 20}
    assert content(data.whole_model_script(results))["whole_model"] == data.curves(synthetic.production())


def test_explore_opens_on_the_numbers_of_the_start_page():
    """Where the sliders stand at first, the committed grid has the committed toy's prices, and so the same class."""
    start = re.search(r"const START = \{(.*?)\};", (ROOT / "docs/javascripts/explore.js").read_text(encoding="utf-8"))
    assert start
    point = {axis: float(value) for axis, value in re.findall(r"(\w+): ([\de.]+)", start[1])}
    grid, evidence = content(data.grid_script(ROOT / "bench" / "results")), Evidence()
    for name in ("offload_prefetch", "offload_naive"):
        found = [grid["prices"][variant] for variant in (name, "resident")]
        for axis in ("padding", "share", "hot", "compute"):
            found = [level[grid["axes"][axis].index(point[axis])] for level in found]
        assert found[0] / found[1] == evidence.ratio("engram", "lookup", name)
    assert (
        grid["stream"] == evidence.toy["stream"]["name"] and grid["tokens"] == evidence.toy["configuration"]["seq_len"]
    )


def test_curves_are_the_records_by_tokens_per_step():
    found = data.curves(synthetic.production())
    assert len(found) == 16
    assert found[0] == {
        "model": "Dense-4B",
        "table": "100 B parameters",
        "mode": "decode",
        "stream": "text",
        "layout": "held live",
        "tokens": [1, 1000, 100_000],
        "share": [1e-6, 1e-3, 0.1],
        "crossing_3_percent": pytest.approx(30_000),
    }
    assert found[-1]["model"] == "V4.1-Flash" and found[-1]["crossing_3_percent"] is None


def test_missing_results_are_null(tmp_path):
    assert content(data.grid_script(tmp_path)) is None
    assert content(data.whole_model_script(tmp_path)) is None
    (tmp_path / "production.json").write_text('{"records": []}', encoding="utf-8")
    assert content(data.whole_model_script(tmp_path)) is None


def test_every_schema_has_a_table():
    text = schema_tables()
    for where in RESULTS:
        assert (ROOT / where).is_file() and f"`{where}`" in text


def test_a_schema_table_names_every_field():
    n = {"enum": ["u", "v"], "description": "an n"}
    schema = {
        "title": "T",
        "required": ["a", "bare"],
        "properties": {
            "a": {"type": "array", "description": "x | y [0]", "items": {"properties": {"b": n}}},
            "free": {"type": ["object", "null"], "additionalProperties": {"properties": {"c": {"const": 1}}}},
            "or": {"anyOf": [{"type": "object", "properties": {"d": n}}, {"type": "null"}, {"not": {}}]},
        },
    }
    assert schema_table(schema, "t.py").splitlines()[6:] == [
        "| `a` | array | yes | x \\| y \\[0\\] |",
        '| `a[].b` | `"u"`, `"v"` |  | an n |',
        "| `free` | object or null |  |  |",
        "| `free.*.c` | `1` |  |  |",
        "| `or` | object or null |  |  |",
        '| `or.d` | `"u"`, `"v"` |  | an n |',
        "| `bare` |  | yes |  |",
    ]


def test_alternatives_of_a_schema_stand_one_after_the_other():
    part = {"type": "object", "properties": {"a": {"type": "string"}}}
    text = schema_table({"title": "T", "anyOf": [{**part, "title": "p"}, {**part, "title": "q"}]}, "t.py")
    assert [line for line in text.splitlines() if line.startswith("#")] == ["## T", "### p", "### q"]
    assert text.count("| `a` | string |") == 2


def test_durations_are_those_of_the_runs(tmp_path):
    path = tmp_path / "bytedmd_toy.json"
    times = {"started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:01:12+00:00"}
    path.write_text(json.dumps(times), encoding="utf-8")
    assert duration(path) == "72 s"
    path.write_text(json.dumps({**times, "finished": "2026-01-01T01:02:03+00:00"}), encoding="utf-8")
    assert duration(path) == "62 min 3 s"


def test_the_commands_name_targets_and_files_that_exist():
    described = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "pyproject.toml"))
    for line in command_table(ROOT / "bench" / "results").splitlines()[2:]:
        first, second = line.split("`")[1].split()[:2] if " " in line.split("`")[1] else (line.split("`")[1], "")
        target = f"\n{second}: " if first == "make" else f"\n{first} = " if first.startswith("engram-") else None
        assert target in described if target else (ROOT / (second if first == "python" else first)).exists()


def test_the_start_page_says_what_was_measured(tmp_path):
    """Change prices, and sentence, figure and lines follow; every boundary is there with its class."""
    evidence = Evidence()
    for path in evidence.folder.glob("*.json"):
        (tmp_path / path.name).symlink_to(path)
    ratio = evidence.ratio("engram", "lookup", "offload_prefetch")
    assert added(ratio) in verdict_figure(evidence) and classify(ratio, None).label in verdict_figure(evidence)
    assert verdict_figure(evidence).count("badge") == 4
    replace(tmp_path / "bytedmd_toy.json", "runs", lambda r: r["variant"] == "resident", "cost", 2)
    replace(tmp_path / "lookup_range.json", "records", lambda r: r["variant"] == "resident", "cost", 2)
    replace(tmp_path / "production.json", "records", lambda r: "prefetch_stands" in r, "prefetch_one_use", 3)
    other = Evidence(tmp_path)
    assert other.ratio("engram", "lookup", "offload_prefetch") == ratio / 2
    for block in (verdict_sentence, verdict_figure, verdict_lines):
        assert block(other) != block(evidence)
    # What the sentence says of the padding is asked of the results.
    dear = {"sweep": "padding", "model": "engram", "boundary": "block", "variant": "resident"}
    replace(tmp_path / "bytedmd_sweeps.json", "points", lambda r: dear.items() <= r.items(), "cost", 2)
    with pytest.raises(ValueError, match="no padding decides at the toy's block"):
        verdict_sentence(Evidence(tmp_path))


def replace(path, rows, which, key, factor):
    """The same results with one number of some of their rows multiplied, and what it is the sum of."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for row in content[rows]:
        if which(row):
            row[key] *= factor
            parts = row.get(f"{key}_by_kind", {})
            parts.update({kind: factor * part for kind, part in parts.items()})
    path.unlink()
    path.write_text(json.dumps(content), encoding="utf-8")


def test_the_lines_say_no_number_twice():
    """And they are as short as a minute asks: three lines, one unit."""
    text = verdict_lines(Evidence())
    assert text.count("\n") == 2 and "times" not in text
    shares = re.findall(r"[\d.,]+ %", text)
    claim = "3 %"
    assert len(set(shares) - {claim}) == len([share for share in shares if share != claim])
    assert len(text.split()) < 200


@pytest.mark.parametrize(
    ("ratio", "text"), [(12.614, "+1,161 %"), (2, "+100 %"), (1.0112, "+1.1 %"), (1.00042, "+0.042 %")]
)
def test_what_a_ratio_adds(ratio, text):
    assert added(ratio) == text


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("scheme", "page"), [("default", "#ffffff"), ("slate", "#1e2129")])
def test_colours_can_be_read(scheme, page):
    """Text at 4.5 : 1 on what it stands on, lines of charts at 3 : 1, as WCAG AA asks."""
    style = (ROOT / "docs/stylesheets/site.css").read_text(encoding="utf-8")
    block = re.search(rf'\[data-md-color-scheme="{scheme}"\] \{{(.*?)\}}', style, re.DOTALL)
    assert block
    colour = dict(re.findall(r"--([\w-]+): (#\w{6})", block.group(1)))
    for label in ("win", "inconclusive", "loss"):
        assert contrast(colour[label], colour[f"{label}-back"]) >= 4.5
    assert min(contrast(colour["quiet"], colour["soft"]), contrast(colour["quiet"], page)) >= 4.5
    assert all(contrast(colour[f"style-{number}"], page) >= 3 for number in (1, 2, 3, 4, 5))
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") < 4.5


def test_bars_stay_in_their_track():
    drawn = bars("c", [("small", 0.9, "WIN"), ("huge", 4e5, "LOSS")])
    assert 'win" style="width:0.0%"' in drawn and 'loss" style="width:100.0%"' in drawn
