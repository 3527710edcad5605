"""The tutorial is a notebook: its blocks run one after the other, and what the page shows below each is what it prints.

python -m tests.test_tutorial      write what they print into the page
"""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[1] / "docs/from-a-sentence.md"
# A block, and the output below it, if there is one.
CELL = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<shown>.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def cells(text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Each block with what it prints."""
    names: dict[str, object] = {}
    for cell in CELL.finditer(text):
        printed = io.StringIO()
        line = text[: cell.start("code")].count("\n")
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + cell["code"], PAGE.name, "exec"), names)
        yield cell, printed.getvalue()


def test_every_block_prints_what_the_page_shows(kept_maps):
    found = [(cell["shown"] or "", printed) for cell, printed in cells(PAGE.read_text(encoding="utf-8"))]
    assert len(found) >= 8
    assert [shown for shown, _ in found] == [printed for _, printed in found]


def main() -> None:
    """Write the outputs into the page."""
    text, done, parts = PAGE.read_text(encoding="utf-8"), 0, []
    for cell, printed in cells(text):
        shown = f"\n```text\n{printed}```\n" if printed else ""
        parts += [text[done : cell.start()], f"```python\n{cell['code']}```\n{shown}"]
        done = cell.end()
    PAGE.write_text("".join([*parts, text[done:]]), encoding="utf-8")


if __name__ == "__main__":
    main()
