"""Numbers that a document holds as typed text: neither filled from results, nor part of a name, a date or a reference.

    typed_numbers("a loss of 2.8 %")                             # ['2.8']
    typed_numbers("a loss of <!-- v: loss_peak -->2.8<!-- /v -->")  # []

A finding may rest on saved evidence only, so it should have none.
"""

from __future__ import annotations

import re

BLOCK = re.compile(r"<!-- begin: (\w+) -->\n.*?<!-- end: \1 -->", re.DOTALL)
MARK = re.compile(r"<!-- v: ([\w.-]+) -->(.*?)<!-- /v -->", re.DOTALL)

_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
# In this order: a mark takes its number along, while as a comment it would leave it behind.
_NO_FIGURES = [
    BLOCK,
    MARK,
    re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL),  # commands and code
    re.compile(r"`[^`\n]+`"),
    re.compile(r"<!--.*?-->|</?\w[^>\n]*>", re.DOTALL),  # comments, and tags with their attributes
    re.compile(r"\]\([^)\s]*\)|https?://\S+"),  # where links lead
    re.compile(r"\b\d{4}-\d\d-\d\d\b"),
    re.compile(rf"\b(\d\d? )?({_MONTH}) \d{{4}}\b"),
    re.compile(r"\barXiv[: ]\d{4}\.\d{5}(v\d+)?|\bdoi \S+"),
    re.compile(r"\b95 % interval"),  # a convention, not a result
    # Places in a text: of the paper, of a project's tracker, of this site. Not "layer 2", which is a fact.
    re.compile(r"(\b(Phase|[Tt]able|Tables|[Ff]igure|[Ss]ections?|PR|RFC|issue) |§)\d+(\.\d+)*[a-z]?\b"),
    re.compile(r"^(#+ |\s*)\d+\. ", re.MULTILINE),  # numbers of headings and of list items
    # Names with digits in them: Dense-4B, V4.1, H800, fp8. A speed-up such as x12 is no name.
    re.compile(r"\b[A-Z]\w*(\.\d+)?-\d[\w.]*\b"),
    re.compile(r"(?<![\w.])(?!x\d)[A-Za-z][A-Za-z_]*\d\w*(\.\d+)?\b"),
]


def typed_numbers(markdown: str) -> list[str]:
    """Every number of a Markdown text that a person typed, in order."""
    for pattern in _NO_FIGURES:
        markdown = pattern.sub(" ", markdown)
    # No-break spaces hold a number together; a full stop ends its sentence.
    return re.findall(r"\d[\d,.\u00a0\u202f]*(?<![,.])", markdown)


def marks_inside_lines(markdown: str) -> str:
    """The same text with marks that begin a line of a paragraph moved to the end of the line before."""
    # Two marks in a row move one by one.
    mark = r"(?<=\S)\n( {0,3})(<!-- v: \S+ -->.*?<!-- /v -->\S*)"
    moved = re.sub(rf"{mark}(?= *\n)", r" \2", markdown)  # the line holds nothing else
    moved = re.sub(rf"{mark} +", r" \2\n\1", moved)
    return moved if moved == markdown else marks_inside_lines(moved)


def marks_at_line_start(markdown: str) -> list[str]:
    """Inline marks that begin a line: Markdown takes such a line for HTML and leaves it as it is."""
    return re.findall(r"^ {0,3}(<!-- v: [\w.-]+ -->)", BLOCK.sub("", markdown), re.MULTILINE)
