"""The page about Qwen3.8-Flash-Next runs from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip(
    "transformers.models.qwen4_exp.modeling_qwen4_exp",
    reason="this transformers has no qwen4_exp: pip install 'transformers>=5.17'",
)

GUIDE = Path(__file__).parents[3] / "docs/run-qwen-with-its-table-elsewhere.md"


@pytest.mark.usefixtures("one_thread")
def test_the_guide_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path / "checkpoint"))
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.M | re.S)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 4
    printed = capsys.readouterr().out.splitlines()
    said = [line.split("# ")[1] for block in blocks for line in block.splitlines() if "print(" in line]
    freed, refused = (line.removeprefix("of the model's own parameter, by device: ") for line in said)
    assert printed[0] == freed and printed[1] == refused
    assert names["tokens"].shape == (1, 11) and names["offloaded"].prefetched == 1
    with torch.no_grad():
        assert torch.equal(names["model"](names["prompt"]).logits, names["expected"])
    assert sum(name.count("shard_") for name in names["checkpoint"].weight_map) == 8
