"""The page about Qwen3.8-Flash-Next runs from top to bottom."""

import pytest
import torch

from tests.ref.guides.pages import run_page

pytest.importorskip(
    "transformers.models.qwen4_exp.modeling_qwen4_exp",
    reason="this transformers has no qwen4_exp: pip install 'transformers>=5.17'",
)


def test_the_guide_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path / "checkpoint"))
    blocks, names = run_page("run-qwen-with-its-table-elsewhere.md")
    assert len(blocks) == 4
    printed = capsys.readouterr().out.splitlines()
    said = [line.split("# ")[1] for block in blocks for line in block.splitlines() if "print(" in line]
    freed, refused = (line.removeprefix("of the model's own parameter, by device: ") for line in said)
    assert printed[0] == freed and printed[1] == refused
    assert names["tokens"].shape == (1, 11) and names["offloaded"].prefetched == 1
    with torch.no_grad():
        assert torch.equal(names["model"](names["prompt"]).logits, names["expected"])
    assert sum(name.count("shard_") for name in names["checkpoint"].weight_map) == 8
