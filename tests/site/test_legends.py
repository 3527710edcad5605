"""Whoever reads a table of results finds what its columns mean on the same page, not in a command's --help."""

import re

import pytest

from bench.fill_docs import DOCUMENTS, ROOT

OF_THEIR_OWN = ("docs/log.md", "docs/developing.md", "docs/reference/results.md", "README.md", "docs/how-it-works.md")
PAGES = [name for name in DOCUMENTS if name not in OF_THEIR_OWN]
# What a line is of needs no words beside it, nor does a number that was varied, a unit, or a tier of memory.
PLAIN = re.compile(
    r"(model|table|texts?|tokens|stream|layout|variant|boundary|sweep|definition|kind|case|device|machine|steps|on|dtype)"
    r"|[\d.,e+]+( B)?|\d.*|[\d, ]*at [\d,]+|lru|two-stack|classic|live|stationary|opt|uniform|zipf"
    r"|HBM|(host|NVMe) .*|.*/s|(us|MB|J)/\w+|% (of|over) \w+|[μum]s|%"
)
UNITS = re.compile(r",? (ms|us|[kMG]B|GiB)$|, % of \w+$| =$| [\d.e+]+ B$|\b\d[\d,]*( KiB| %)? ?")


def split(text: str) -> tuple[list[list[str]], str]:
    """Heads of the printed tables of a page, and everything on it that is no printed table."""
    lines, heads, others = text.splitlines(), [], []
    while lines:
        if len(lines) > 1 and re.fullmatch(r"-+(  -+)+", lines[1]):
            heads.append([lines[0][m.start() : m.end()].strip() for m in re.finditer("-+", lines[1])])
            lines = lines[2:]
            while lines and lines[0].strip() and not lines[0].startswith(("   ", "```")):
                lines = lines[1:]
        else:
            others.append(lines[0])
            lines = lines[1:]
    return heads, " ".join(" ".join(others).split()).lower()


def unexplained(text: str) -> set[str]:
    """Columns that nothing on the page speaks of."""
    heads, prose = split(text)
    columns = {head for table in heads for head in table if head and not PLAIN.fullmatch(head)}
    words = {head: [UNITS.sub("", part).strip().lower() for part in head.split(":")] for head in columns}
    return {head for head, parts in words.items() if not all(part in prose for part in parts)}


@pytest.mark.parametrize("page", PAGES)
def test_every_column_of_a_printed_table_is_spoken_of_on_its_page(page):
    assert unexplained((ROOT / page).read_text(encoding="utf-8")) == set()


def test_a_column_without_a_word_would_be_noticed():
    page = "model  exposed us  odd\n-----  ----------  ---\ntiny            1    2\n\n*exposed*: waited for rows."
    assert unexplained(page) == {"odd"}
