"""Printed tables become tables of Markdown with every cell as it was printed; what is no table stays as it was."""

import re

from bench.fill_docs import DOCUMENTS, ROOT
from bench.instruments.words import aligned
from bench.site.ruled_tables import with_tables

ROWS = [["what", "price", "class, with room"], ["a | b", "1,024", "WIN"], ["*c* <d>", "2", "not [-1, +2] %"]]


def cells(markdown: str) -> list[list[str]]:
    plain = re.sub("</?span[^>]*>", "", markdown)
    lines = [line for line in plain.splitlines() if line.startswith("|")]
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if not line.startswith("| -")]
    unescaped = [[re.sub(r"&#(\d+);", lambda m: chr(int(m[1])), cell) for cell in row] for row in found]
    return [[cell.replace("\u00a0", " ").strip() for cell in row] for row in unescaped]


def test_cells_are_those_that_were_printed():
    text = f"before\n\n```text\nsaid first\n{aligned(ROWS, {0, 2})}\n\nsaid last\n```\n\nafter\n"
    made = with_tables(text)
    assert cells(made) == ROWS
    assert "| --- | ---: | --- |" in made
    assert "```text\nsaid first\n```" in made and "```text\nsaid last\n```" in made
    assert made.startswith("before\n\n<div") and made.endswith("</div>\n\nafter\n")
    assert "[-1,\u00a0+2]\u00a0%" in re.sub(r"&#(\d+);", lambda m: chr(int(m[1])), made)


def test_a_range_stays_on_one_line():
    made = with_tables(f"```text\n{aligned([['p20-p80', 'us'], ['1,846-2,319', '0.35-0.44 uJ']], set())}\n```")
    assert '<span class="whole">1,846-2,319</span>' in made and '<span class="whole">0.35-0.44</span>\u00a0uJ' in made
    assert cells(made) == [["p20-p80", "us"], ["1,846-2,319", "0.35-0.44 uJ"]]
    assert "span" not in with_tables(f"```text\n{aligned([['day', 'of'], ['2026-11-27', 'sha-1-2b']], set())}\n```")


def test_several_tables_of_one_block():
    block = f"one\n{aligned(ROWS, {0})}\n\ntwo\n{aligned(ROWS[:2], {0})}"
    assert cells(with_tables(f"```text\n{block}\n```")) == [*ROWS, *ROWS[:2]]


def test_a_head_of_two_lines_is_one_head():
    """Units stand under names, and the first column has none; what comes before the names stays text."""
    head = [["variant", "time", "exposed"], ["", "ms", ""]]
    table = aligned([*head, ["resident", "1,024", "3"], ["offload_naive", "7", "-"]], {0}, headers=2)
    for before in ("said first\n", "== one of them\n", "title\n\n", ""):
        made = with_tables(f"```text\n{before}{table}\n```")
        assert cells(made)[0] == ["variant", "time<br>ms", "exposed"] and len(cells(made)) == 3
        assert (f"```text\n{before.rstrip()}\n```" in made) == bool(before)


def test_a_row_that_does_not_fit_ends_the_table():
    table = aligned([["a", "b"], ["1", "2"]], set())
    made = with_tables(f"```text\n{table}\n1-and-more\n```")
    assert cells(made) == [["a", "b"], ["1", "2"]] and "1-and-more" in made


def test_what_is_no_table_stays():
    for text in (
        "```text\nname   value\n```",
        "```sh\na  b\n-  -\n1  2\n```",
        "```text\nlonger than the rule\n---\n1\n```",
    ):
        assert with_tables(text) == text


def test_no_number_of_a_document_is_lost():
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        made, printed = numbers(with_tables(text)), numbers(text)
        if "<br>" in with_tables(text):  # a head of two lines is read by columns
            made, printed = sorted(made), sorted(printed)
        assert made == printed, name


def numbers(text):
    unescaped = re.sub(r"&#(\d+);", lambda m: chr(int(m[1])), re.sub("<br>|</?span[^>]*>", " ", text))
    return re.findall(r"[\w.,+%]*\d[\w.,+%]*", unescaped)
