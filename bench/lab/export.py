"""The answer as a folder that drops into the tree of the lab that asked, and runs there on its own tracer.

    python bench/verdict.py --export out/lab
    cd out/lab && PYTHONPATH=src python experiments/engram-offload/run.py      where src/bytedmd is vendored
    python experiments/engram-offload/finding.py --date 2026-11-27 --author NAME

experiments/engram-offload/{model,run,finding}.py are `bench/lab/`, standard library and `bytedmd` alone; docs/findings
holds Phase 1. A run writes results.json, numbers only; the finding takes every number from there.
"""

from __future__ import annotations

import re
from pathlib import Path

from engram_ref.files.replacing import replacing

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("model.py", "run.py", "finding.py")
PAPER = "engram-offload-paper-read.md"
_MARK = re.compile(r"<!-- (?:begin|end): \w+ -->\n|<!-- (?:v: [\w.+-]+|/v) -->")
_LOCAL_LINK = re.compile(r"\[([^\]]*)\]\((?!http|#)[^)]*\)")


def export(folder: Path) -> list[Path]:
    """Write all files below a folder; each is complete or absent. Returns their paths.

    Raises:
        ValueError: the folder is this project, whose own document would be replaced.
    """
    target = folder / "docs" / "findings" / PAPER
    # Only this project's own document has marks.
    if target.exists() and _MARK.search(target.read_text(encoding="utf-8")):
        raise ValueError(f"{target} is the document that is exported, not an export: name a folder of its own")
    experiment = folder / "experiments" / "engram-offload"
    texts = {
        experiment / name: _standing_alone((ROOT / "bench/lab" / name).read_text(encoding="utf-8")) for name in SOURCES
    }
    paper = (ROOT / "docs/findings" / PAPER).read_text(encoding="utf-8")
    texts[target] = _LOCAL_LINK.sub(r"\1", _MARK.sub("", paper))  # the pages are not exported: of a link its text stays
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(text.encode())
    return list(texts)


def _standing_alone(source: str) -> str:
    """The modules beside each other, as a script finds them."""
    return source.replace("from bench.lab.", "from ")
