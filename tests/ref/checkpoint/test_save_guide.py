"""The page "Save and load" runs from top to bottom: what is kept is kept, what is refused is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[3] / "docs/save-and-load.md"


@pytest.mark.usefixtures("one_thread")
def test_the_guide_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.M | re.S)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 8
    assert len(names["reasons"]) == 4 and names["with_engram"].isfinite().all()
