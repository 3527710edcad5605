"""The examples of a page: its Python blocks, run one after the other with the same names."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[3] / "docs"


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def run_page(page: str) -> tuple[list[str], dict]:
    """Its blocks, and the names that they leave."""
    blocks, names = re.findall(r"^```python\n(.*?)^```", text_of(page), re.M | re.S), {}
    for block in blocks:
        exec(block, names)
    return blocks, names
