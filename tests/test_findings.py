"""Findings rest on evidence: no number in them is typed, and what others published is in one file with its source."""

import json
import re

import pytest

from bench import fill_docs
from bench.evidence import published
from bench.evidence.typed_numbers import marks_at_line_start, marks_inside_lines, typed_numbers

ROOT = fill_docs.ROOT
FINDINGS = sorted((ROOT / "docs/findings").glob("*.md"))


def test_no_number_in_the_findings_is_typed():
    assert fill_docs.unsourced() == []
    checked = {ROOT / name for name in fill_docs.SOURCED}
    assert checked >= {*FINDINGS, ROOT / "docs/index.md"} and FINDINGS


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.name)
def test_a_number_typed_into_a_finding_is_noticed(path):
    text = path.read_text(encoding="utf-8")
    paragraphs = [match.end() for match in re.finditer(r"[a-z]\.(?=\n\n)", text)]
    assert len(paragraphs) > 5
    wrong = text[: paragraphs[0]] + " It was 12.6 times as much." + text[paragraphs[0] :]
    assert typed_numbers(text) == [] and typed_numbers(wrong) == ["12.6"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("costs 12.6 times as much", ["12.6"]),
        ("×31, x12.6, 3 %, 1:25, 2–5, −1.9", ["31", "12.6", "3", "1", "25", "2", "5", "1.9"]),
        ("1,024 tokens, 10^6 values, 1e6 more", ["1,024", "10", "6", "1", "6"]),
        ("10⁶ values", ["10"]),
        ("| a | 12.6 |", ["12.6"]),
        ("# 3 times dearer", ["3"]),
        ("layer 2 of 30", ["2", "30"]),
        ("a 100B table", ["100"]),
        ("**5**", ["5"]),
        ("95 % of rows", ["95"]),
        ("[6 times](x.md)", ["6"]),
        ("<!-- v: a -->5<!-- /v --> and 6", ["6"]),
        ("<!-- begin: a -->\n5\n<!-- end: a -->\n6", ["6"]),
        ("<!-- begin: a -->\n5\n<!-- end: b -->", ["5"]),
        ("<!-- v: a -->5", ["5"]),
    ],
)
def test_typed_numbers_are_found(text, found):
    assert typed_numbers(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "DeepSeek-V4.1-Flash on H800 with HBM2E, fp8, bf16 and Dense-4B, Qwen3-32B, v1",
        "2026-11-24, 12 January 2026, April 2026, arXiv 2601.07372, doi 10.1109/X.2022.98",
        "Table 4, Figure 2b, §6.4, section 6.4, PR 2185, Phase 2",
        "## 2. Results\n\n1. one\n2. two",
        "`10^6` and\n```sh\nrun --padding 1000\n```\n",
        "[text](a_12.md) https://x.org/12 ![](figures/3.svg)",
        '<img width="12">',
        "median and 95 % interval",
    ],
)
def test_names_dates_places_and_code_are_no_figures(text):
    assert typed_numbers(text) == []


def test_marks_that_would_not_render_are_found():
    assert marks_at_line_start("a\n<!-- v: x.y -->5<!-- /v --> b\n- <!-- v: z -->5<!-- /v -->") == ["<!-- v: x.y -->"]


def test_the_price_finding_shows_seven_tables():
    """Answer, configuration, toy, rows at scale, place, whole model, energy; the rest is a reference."""
    text = (ROOT / "docs/findings/engram-offload-bytedmd.md").read_text(encoding="utf-8")
    assert text.count("```text\n") + len(re.findall(r"(?m)^\| --- ", text)) == 7


@pytest.mark.parametrize("path", sorted((ROOT / "docs/findings").glob("*.md")), ids=lambda path: path.name)
def test_a_finding_can_be_read_at_one_go(path):
    """Raw tables stand in docs/reference."""
    assert path.read_text(encoding="utf-8").count("\n") <= 300


def test_a_mark_that_begins_a_line_moves_to_the_one_before():
    text = "it costs\n<!-- v: loss.4b -->?<!-- /v -->, or more,\nthan\n  <!-- v: loss.8b -->?<!-- /v -->\nsaid"
    moved = "it costs <!-- v: loss.4b -->1.92<!-- /v -->,\nor more,\nthan <!-- v: loss.8b -->2.78<!-- /v -->\nsaid"
    assert fill_docs.filled(text) == moved
    assert marks_at_line_start(marks_inside_lines("a\n<!-- v: x -->5<!-- /v --> <!-- v: y -->6<!-- /v --> b")) == []


def test_marks_are_filled_and_unknown_ones_refused():
    text = "loss <!-- v: loss.4b -->?<!-- /v --> %, <!-- v: loss.8b -->?\n?<!-- /v --> %"
    assert fill_docs.filled(text) == "loss <!-- v: loss.4b -->1.92<!-- /v --> %, <!-- v: loss.8b -->2.78<!-- /v --> %"
    with pytest.raises(ValueError, match=r"no value is called 'loss\.9b'"):
        fill_docs.filled("<!-- v: loss.9b -->?<!-- /v -->")
    with pytest.raises(ValueError, match="no block is called 'nothing'"):
        fill_docs.filled("<!-- begin: nothing -->\n<!-- end: nothing -->")


def test_published_figures_say_where_they_stand():
    content = json.loads(published.PATH.read_text(encoding="utf-8"))
    names = [entry["id"] for entry in content["figures"]]
    assert len(set(names)) == len(names)
    for entry in content["figures"]:
        assert entry.keys() == {"id", "value", "unit", "text", "source", "locator", "kind"}
        assert entry["source"] in content["sources"] and entry["locator"] and entry["kind"] in published.KINDS
        assert (entry["value"] is None) == entry["id"].startswith("quote.") == (entry["unit"] is None)


def test_published_figures_are_written_as_they_are():
    for entry in published.figures().values():
        if entry["value"] is not None:
            values = entry["value"] if isinstance(entry["value"], list) else [entry["value"]]
            assert [float(part.replace(",", "")) for part in entry["text"].split("–")] == values, entry["id"]


def test_what_follows_from_them():
    """Against the arithmetic done by hand."""
    assert published.throughput_loss("4b") == pytest.approx(0.0192, abs=5e-5)
    assert published.extra_time("8b") == pytest.approx(4.53e-6, abs=5e-9)
    assert published.rows_per_token() == 16 and published.bytes_per_token("bf16") == 2560
    assert published.pcie_bandwidth() == pytest.approx(63e9, rel=1e-3)
    assert published.energy_against_hbm("host memory over PCIe, LPDDR5") == pytest.approx((12 / 3.92, 22 / 3.92))
    assert published.energy_against_hbm("NVMe SSD, sequential")[0] == pytest.approx(1645 / 8 / 3.92, rel=1e-3)
    assert published.energy_against_hbm("NVMe SSD, random rows, per useful bit")[0] == pytest.approx(1246, abs=1)


def test_a_quotation_or_a_range_is_no_single_figure():
    for name in ("quote.strategy", "energy.ddr", "nothing"):
        with pytest.raises(ValueError, match="no single figure"):
            published.figure(name)


@pytest.mark.parametrize("name", ["quote.penalty", "quote.lengths", "quote.negligible"])
def test_the_finding_quotes_the_paper(name):
    text = (ROOT / "docs/findings/engram-offload-paper-read.md").read_text(encoding="utf-8")
    assert f'"<!-- v: {name} -->{published.figures()[name]["text"]}<!-- /v -->"' in text


def test_the_stop_rule_is_quoted_and_the_authors_have_questions():
    text = (ROOT / "docs/findings/engram-offload-paper-read.md").read_text(encoding="utf-8")
    rule, questions, paths = (
        text.split(f"## {heading}\n", 1)[1].split("\n##", 1)[0]
        for heading in ("Whether Phase 2 may begin", "Questions to the authors", "Where the task's files are here")
    )
    assert "Do NOT proceed to Phase 2 if" in rule and rule.count("\n- *") == 3
    assert len(re.findall(r"^\d\. .*", questions, re.MULTILINE)) >= 5
    rows = [line.split("|")[1:3] for line in paths.strip().splitlines()[2:]]
    for theirs, ours in rows:
        named = re.findall(r"`([^`]*[/.][^`]*)`", theirs if "the same" in ours else ours)
        assert named and all((ROOT / path).exists() for path in named), ours
