"""Data of the interactive pages, as scripts: a page that is opened from a folder may load nothing else.

`grid.js` holds the prices of `bench/results/bytedmd_grid.json` and the thresholds of the verdict, `whole_model.js` the
curves of `bench/results/production.json`, `stack_stories.js` the steps of `bench.site.stack_story`. Where a results
file is missing, the script says null and the page says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.instruments.claim import LOSS_ABOVE, STRONG_BELOW, WALL_TIME_CLAIM, WIN_UP_TO
from bench.instruments.output import source
from bench.instruments.reading import read_results
from bench.rows.table import crossing_of, lines, row_share
from bench.rows.whole_model import MODELS, shown
from bench.site.stack_story import as_data

GRID_VARIANTS = ("resident", "offload_naive", "offload_prefetch")


def grid_script(results: Path) -> str:
    """Axes, prices and thresholds for the page "Explore"."""
    grid = _load(results / "bytedmd_grid.json")
    if grid is not None:
        thresholds = {"strong_below": STRONG_BELOW, "win_up_to": WIN_UP_TO, "loss_above": LOSS_ABOVE}
        kept = {"axes": grid["axes"], "prices": {name: grid["prices"][name] for name in GRID_VARIANTS}}
        kept |= {
            "share_below": grid["share_below"],
            "stream": grid["stream"]["name"],
            "tokens": grid["configuration"]["seq_len"],
        }
        grid = {**kept, "thresholds": thresholds, "source": source(grid)}
    return _script("engramGrid", grid, "bench/results/bytedmd_grid.json")


def whole_model_script(results: Path) -> str:
    """Price of the rows against that of a model's weights, for the second panel of the page "Explore"."""
    production = _load(results / "production.json")
    content = None
    if production is not None and (found := curves(production)):
        content = {"whole_model": found, "claim": WALL_TIME_CLAIM, "source": source(production)}
    return _script("engramWholeModel", content, "bench/results/production.json")


def curves(production: dict[str, Any]) -> list[dict[str, Any]]:
    """A line per model, kind of step, stream and layout: the share by tokens per step, and where it crosses 3 %."""
    # Lines of all of the text have the largest steps alone.
    return [_curve(line) for line in lines(production) if line[0]["asked_tokens"] is not None]


def _curve(line: list[dict[str, Any]]) -> dict[str, Any]:
    first = line[0]
    model = MODELS[first["table"]]
    tokens, shares = [record["tokens_per_step"] for record in line], [row_share(record) for record in line]
    parameters = first["table_rows"] * model.table.row_width
    return {
        "model": shown(first["table"], first["experts"]),
        "table": f"{parameters / 1e9:.0f} B parameters",
        **{key: first[key] for key in ("mode", "stream", "layout")},
        "tokens": tokens,
        "share": shares,
        "crossing_3_percent": crossing_of(tokens, shares),
    }


def stories_script() -> str:
    """The steps of the page "How ByteDMD works"."""
    return _script("engramStackStories", as_data(), "bench/site/stack_story.py")


def _load(path: Path) -> dict[str, Any] | None:
    return read_results(path) if path.exists() else None


def _script(name: str, content: Any, origin: str) -> str:
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return f"// Written by bench/fill_docs.py from {origin}.\nwindow.{name} = {body};\n"
