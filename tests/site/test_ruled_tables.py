"""Printed tables become tables of Markdown with every cell as it was printed; what is no table stays as it was."""

from __future__ import annotations

import re

from bench.fill_docs import DOCUMENTS, ROOT
from bench.instruments.words import aligned
from bench.site.ruled_tables import with_tables

ROWS = [["what", "price", "class, with room"], ["a | b", "1,024", "WIN"], ["*c* <d>", "2", "not [-1, +2] %"]]


def cells(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
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


def test_several_tables_of_one_block():
    block = f"one\n{aligned(ROWS, {0})}\n\ntwo\n{aligned(ROWS[:2], {0})}"
    assert cells(with_tables(f"```text\n{block}\n```")) == [*ROWS, *ROWS[:2]]


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
        made = re.sub(r"&#(\d+);", lambda m: chr(int(m[1])), with_tables(text))
        assert re.findall(r"[\w.,+%]*\d[\w.,+%]*", made) == re.findall(r"[\w.,+%]*\d[\w.,+%]*", text), name
