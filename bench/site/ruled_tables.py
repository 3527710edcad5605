"""Printed tables as real ones on the site: an extension of Python-Markdown, named in `mkdocs.yml`.

The benchmarks print tables whose head stands over a rule of dashes (`bench.instruments.words.aligned`), and documents
show them as printed, in blocks of text. Before Markdown is read, every ruled table in a block of text becomes a table
of Markdown; lines around it stay a block of text.
"""

from __future__ import annotations

import re

from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

from bench.instruments.words import markdown

_BLOCK = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_RULE = re.compile(r"-+(?:  -+)*")
_RANGE = re.compile(r"(?<![\w.-])\d[\d.,]*-\d[\d.,]*(?![\w-])")
_BEFORE_FENCES = 30  # Python-Markdown takes code blocks out at 25


class RuledTables(Extension):
    """Makes tables of the ruled tables in blocks of text."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Put the step before the one that takes code blocks out."""
        md.preprocessors.register(_Step(md), "ruled_tables", _BEFORE_FENCES)


class _Step(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        return with_tables("\n".join(lines)).split("\n")


def makeExtension(**options: object) -> RuledTables:
    """How Python-Markdown asks a module for its extension."""
    return RuledTables(**options)


def with_tables(text: str) -> str:
    """Markdown with every ruled table of its blocks of text as a table of Markdown."""
    # A browser gives a block of text no columns: on a phone it is a strip without heads, to a screen reader one long
    # line.
    return _BLOCK.sub(lambda block: _block(block.group(1).splitlines()) or block.group(0), text)


def _block(lines: list[str]) -> str | None:
    """One block in parts, text and tables in turn; None where it has no ruled table."""
    rules = [number for number, line in enumerate(lines) if number and _RULE.fullmatch(line)]  # a head stands above
    parts, done = [], 0
    for rule in rules:
        spans = [match.span() for match in re.finditer("-+", lines[rule])]
        end = rule + 1
        while end < len(lines) and lines[end].strip() and _fits(lines[end], spans):
            end += 1
        if not _fits(lines[rule - 1], spans):
            continue
        first = rule - 1
        while first > done and not _of_first_column(lines[first], spans) and _heads(lines[first - 1], spans):
            first -= 1  # units, which the first column has none of: what they are of stands above
        parts += [_text(lines[done:first]), _table(lines[first:rule], lines[rule + 1 : end], spans)]
        done = end
    body = "\n\n".join(part for part in [*parts, _text(lines[done:])] if part)
    return f'<div class="ruled" markdown>\n\n{body}\n\n</div>' if parts else None


def _fits(line: str, spans: list[tuple[int, int]]) -> bool:
    """Whether nothing stands between the columns, nor after the last."""
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), max(len(line), ends[-1])]
    return not any(line[end:start].strip() for end, start in zip(ends, starts))


def _heads(line: str, spans: list[tuple[int, int]]) -> bool:
    return bool(line.strip()) and _fits(line, spans)


def _of_first_column(line: str, spans: list[tuple[int, int]]) -> str:
    return line[slice(*spans[0])].strip()


def _text(lines: list[str]) -> str:
    kept = "\n".join(lines).strip("\n")
    return f"```text\n{kept}\n```" if kept.strip() else ""


def _table(head: list[str], body: list[str], spans: list[tuple[int, int]]) -> str:
    columns = [[line[start:end] for line in (*head, *body)] for start, end in spans]
    right = {at for at, (start, end) in enumerate(spans) if _flush_right(columns[at], end - start)}
    heads = ["<br>".join(_cell(part) for part in column[: len(head)] if part.strip()) for column in columns]
    rows = [[_cell(column[number]) for column in columns] for number in range(len(head), len(head) + len(body))]
    return markdown(heads, rows, right)


def _flush_right(column: list[str], width: int) -> bool:
    # Cells of one length are flush on both sides, and say nothing.
    filled = [cell.ljust(width) for cell in column if cell.strip()]
    return not any(cell[0] != " " and cell[-1] == " " for cell in filled) and len({len(c.strip()) for c in filled}) > 1


def _cell(text: str) -> str:
    """As it was printed: nothing in it is Markdown, and an interval stays on one line, as a number and its unit do."""
    together = re.sub(
        r"\[[^\]]*\]| (?=%)|(?<=\d) (?=\S{1,3}$|[KMGT]iB\b)",
        lambda part: part.group().replace(" ", "\u00a0"),
        text.strip(),
    )
    plain = re.sub(r"[\\`*_{}\[\]<>#|~^&]", lambda mark: f"&#{ord(mark.group())};", together)
    return _RANGE.sub(r'<span class="whole">\g<0></span>', plain)  # no browser breaks a line at its hyphen
