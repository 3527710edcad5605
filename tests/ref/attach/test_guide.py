"""The guide's examples run from top to bottom, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[3] / "docs/put-engram-into-your-model.md"


@pytest.mark.usefixtures("one_thread")
def test_the_guide_runs(monkeypatch, cache_home):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.M | re.S)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 8
    assert names["tokens"].shape == (1, 11) and names["logits"].isfinite().all()
    assert [place for place, _ in names["waited"]] == ["start", 1]
    assert not names["model"].model._forward_pre_hooks
    assert names["engram"].fusion.projection_weight.grad.any()


def test_what_does_not_run_says_so():
    text = GUIDE.read_text(encoding="utf-8")
    before = re.findall(r"([^\n]*\n)\n```py\n", text)
    assert len(before) == 1 and "has not been run here" in before[0]
