"""Fill the figures of the documents from committed results; nothing between the marks is typed by hand.

    python bench/fill_docs.py             rewrite the marked blocks and the figures
    python bench/fill_docs.py --check     say what would change, and fail if anything would

A block stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`; NAME is one of BLOCKS.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a script: the repository root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import hashing_speed, layer_speed, pricing_speed
from bench.harness import end_to_end_explained, end_to_end_figures, figures, wall_figures
from bench.harness.explained import published_forms, what_fits, worked_example
from bench.harness.figures import source
from bench.harness.table import verdict_table
from bench.harness.wall_table import wall_table
from examples.same_rows import report_on_sample

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    "README.md", "docs/index.md", "docs/how-it-works.md", "docs/forms.md", "docs/hardware.md", "docs/log.md",
    "docs/findings/engram-offload-wall-time.md",
]  # fmt: skip
RESULTS = ROOT / "bench" / "results"
FIGURES = ROOT / "docs" / "figures"


def load(name: str) -> dict[str, Any]:
    """A committed results file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def machine(results: dict[str, Any]) -> str:
    """Where a result was measured."""
    e = results["environment"]
    return f"{e['cpu']}, {e['cpu_count']} cores, Python {e['python']}"


def as_text(results: dict[str, Any], body: str) -> str:
    """A block of printed text, and the machine it was measured on."""
    return f"```text\n{body}\n```\n\nMeasured on: {machine(results)}."


BLOCKS = {
    "verdict": lambda: as_text(load("bytedmd_toy"), verdict_table(load("bytedmd_toy"))),
    "verdict_v41": lambda: as_text(load("bytedmd_toy_v41"), verdict_table(load("bytedmd_toy_v41"))),
    "pricing": lambda: as_text(load("pricing_speed"), pricing_speed.report(load("pricing_speed"))),
    "hashing": lambda: as_text(load("hashing_speed"), hashing_speed.report(load("hashing_speed"))),
    "layer": lambda: as_text(load("layer_speed"), layer_speed.report(load("layer_speed"))),
    "wall_cpu": lambda: f"```text\n{wall_table(load('gpu_wall_cpu'))}\n```",
    "wall_cpu_v41": lambda: f"```text\n{wall_table(load('gpu_wall_cpu_v41'))}\n```",
    **end_to_end_explained.blocks(RESULTS),
    "example": worked_example,
    "fits": what_fits,
    "forms": published_forms,
    "same_rows": lambda: "```text\n{}\n```".format("\n".join(report_on_sample())),
}
# Which results each committed figure shows, and what draws them.
DRAWN = {
    "bytedmd_toy": figures.draw_all,
    "gpu_wall_cpu": wall_figures.draw_all,
    "end_to_end_cpu": end_to_end_figures.draw_all,
}


def filled(text: str) -> str:
    """`text` with every marked block replaced by what the results say."""

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- begin: {name} -->\n{BLOCKS[name]()}\n<!-- end: {name} -->"

    return re.sub(r"<!-- begin: (\w+) -->\n.*?<!-- end: \1 -->", replace, text, flags=re.DOTALL)


def stale() -> list[str]:
    """Documents that are not what the results give, and figures that were drawn from others."""
    documents = [name for name in DOCUMENTS if (text := (ROOT / name).read_text(encoding="utf-8")) != filled(text)]
    origins = [source(load(name)) for name in DRAWN]
    drawn = [path for path in sorted(FIGURES.glob("*.svg")) if not _shows_any(path, origins)]
    return documents + [str(path.relative_to(ROOT)) for path in drawn]


def _shows_any(figure: Path, origins: list[str]) -> bool:
    text = figure.read_text(encoding="utf-8")
    return any(origin in text for origin in origins)


def main() -> None:
    """Fill, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if something is stale")
    if parser.parse_args().check:
        if wrong := stale():
            sys.exit(f"stale: {', '.join(wrong)}; run python bench/fill_docs.py")
        return
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    for name, draw_all in DRAWN.items():
        draw_all(load(name), FIGURES)


if __name__ == "__main__":
    main()
