"""Fill the figures of the documents from committed results; nothing between the marks is typed by hand.

    python bench/fill_docs.py             rewrite the marked blocks and the figures
    python bench/fill_docs.py --check     say what would change, and fail if anything would; of figures, see `stale`
    python bench/fill_docs.py --redraw    draw all figures anew, elsewhere; fail if a committed one shows something else

A block stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`; NAME is one of BLOCKS. A single value in a
sentence stands between `<!-- v: NAME -->` and `<!-- /v -->`; NAME is one of `values()`. Neither mark shows when
rendered. The data that the site's scripts draw from are written as scripts, too (SCRIPTS): a page opened as a file may
load no other kind. In `docs/findings/` and on the start page no number may be typed (`bench.evidence.typed_numbers`).
"""

from __future__ import annotations

import functools
import re
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a script: the repository root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # Ctrl-C ends the imports that follow, too, in one line
    from engram_ref.starting import interruptible

    interruptible("fill_docs")

from bench import hashing_speed, layer_speed, pricing_speed, row_speed
from bench.evidence import gpu_figures, lookup_table, predictions, price, published, ranges, stress, wall_time
from bench.evidence.committed import Evidence
from bench.evidence.from_code import placed_example, published_forms, what_fits, worked_example
from bench.evidence.on_gpu import OnGpu
from bench.evidence.typed_numbers import BLOCK, MARK, marks_at_line_start, marks_inside_lines, typed_numbers
from bench.instruments.claim import LOSS_ABOVE, STRONG_BELOW, WALL_TIME_CLAIM, WIN_UP_TO
from bench.instruments.drawing import same_picture
from bench.instruments.output import source
from bench.instruments.reading import read_results
from bench.price import figures
from bench.price.table import verdict_table
from bench.ranks import figures as ranks_figures
from bench.ranks import table as ranks_table
from bench.rows import figures as row_figures
from bench.rows import map_figure
from bench.served import figures as end_to_end_figures
from bench.site import data
from bench.site.commands import command_table
from bench.site.file_tree import file_tree
from bench.site.schema_tables import schema_tables
from bench.site.stack_story import story_tables
from bench.site.start_page import verdict_figure, verdict_lines, verdict_sentence
from bench.sweeps import figures as sweep_figures
from bench.wall import figures as wall_figures
from bench.wall.table import wall_table
from engram_ref import cli
from engram_ref.files.replacing import replacing
from examples.same_rows import report_on_sample

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]
# Where every number must come from results or from what others published.
_SOURCED = ("docs/index.md", "docs/reference/offload-", "docs/findings/")
SOURCED = [name for name in DOCUMENTS if name.startswith(_SOURCED)]
RESULTS = ROOT / "bench" / "results"
FIGURES = ROOT / "docs" / "figures"
ASSETS = ROOT / "docs" / "assets"


def load(name: str) -> dict[str, Any]:
    """A committed results file."""
    return read_results(RESULTS / f"{name}.json")


def machine(results: dict[str, Any]) -> str:
    """Where a result was measured."""
    e = results["environment"]
    return f"{e['cpu']}, {e['cpu_count']} cores, Python {e['python']}"


def as_text(results: dict[str, Any], body: str) -> str:
    """A block of printed text, and the machine it was measured on."""
    return f"```text\n{body}\n```\n\nMeasured on: {machine(results)}."


def fenced(tables: dict[str, Callable[[], str]]) -> dict[str, Callable[[], str]]:
    """Tables as blocks of printed text."""
    return {name: functools.partial(_fenced, table) for name, table in tables.items()}


def _fenced(table: Callable[[], str]) -> str:
    return f"```text\n{table()}\n```"


BLOCKS: dict[str, Callable[[], str]] = {
    "pricing": lambda: as_text(load("pricing_speed"), pricing_speed.report(load("pricing_speed"))),
    "row_speed": lambda: as_text(load("row_speed"), row_speed.report(load("row_speed"))),
    "hashing": lambda: as_text(load("hashing_speed"), hashing_speed.report(load("hashing_speed"))),
    "layer": lambda: as_text(load("layer_speed"), layer_speed.report(load("layer_speed"))),
    **fenced(
        {
            **price.blocks(Evidence(RESULTS)),
            **ranges.blocks(Evidence(RESULTS)),
            # Prices are the same on every machine: no machine is named.
            "verdict": lambda: verdict_table(load("bytedmd_toy")),
            "verdict_v41": lambda: verdict_table(load("bytedmd_toy_v41")),
            "wall_cpu": lambda: wall_table(load("gpu_wall_cpu")),
            "wall_cpu_v41": lambda: wall_table(load("gpu_wall_cpu_v41")),
            "handover": lambda: lookup_table.handover_table(load("lookup_speed_cpu")),
            "same_rows": lambda: "\n".join(report_on_sample()),
        }
    ),
    **wall_time.blocks(RESULTS),
    **OnGpu(RESULTS).blocks(),
    "place_formulas": predictions.formulas,
    "place_errors": lambda: predictions.table(RESULTS),
    "example": worked_example,
    "place_example": placed_example,
    "fits": what_fits,
    "forms": published_forms,
    "overhead": published.overhead_table,
    "energy": published.energy_table,
    "published_sources": published.sources_table,
    "verdict_sentence": lambda: verdict_sentence(Evidence(RESULTS)),
    "verdict_figure": lambda: verdict_figure(Evidence(RESULTS)),
    "verdict_lines": lambda: verdict_lines(Evidence(RESULTS)),
    "stack_stories": story_tables,
    "commands": lambda: command_table(RESULTS),
    "schemas": schema_tables,
    "file_tree": file_tree,
    "sharded_bytes": lambda: ranks_table.bytes_table(load("sharded_cpu")),
    "sharded_hidden": lambda: ranks_table.most_hidden(load("sharded_cpu")),
    "sharded_stragglers": lambda: ranks_table.stragglers_table(load("sharded_cpu")),
    "stress": lambda: as_text(load("stress"), stress.report(load("stress"))),
}


@functools.cache
def values() -> dict[str, str]:
    """Single values in sentences, by name."""
    evidence = Evidence(RESULTS)
    return {
        **published.values(),
        **price.values(evidence),
        **ranges.values(evidence),
        **OnGpu(RESULTS).values(),
        "threshold.strong": f"{STRONG_BELOW:g}",
        "threshold.win": f"{WIN_UP_TO:g}",
        "threshold.loss": f"{LOSS_ABOVE:g}",
        "threshold.wall_time": f"{100 * WALL_TIME_CLAIM:g}",
    }


# Scripts that carry data to the pages, below docs/assets.
SCRIPTS: dict[str, Callable[[], str]] = {
    "grid.js": lambda: data.grid_script(RESULTS),
    "whole_model.js": lambda: data.whole_model_script(RESULTS),
    "stack_stories.js": data.stories_script,
}
# Which results each committed figure shows, and what draws them; those that start page and findings show are drawn for
# a phone, too, and `bench.site.pictures` looks for that.
DRAWN: dict[str, Callable[..., list[Path]]] = {
    "bytedmd_toy": figures.draw_all,
    "bytedmd_sweeps": functools.partial(sweep_figures.draw_all, names=("padding", "share")),
    "production": row_figures.draw_all,
    "verdict_map": map_figure.draw_all,
    "gpu_wall_cpu": wall_figures.draw_all,
    "end_to_end_cpu": end_to_end_figures.draw_all,
    "end_to_end_h200": gpu_figures.draw_decode,
    "end_to_end_h200_100b": gpu_figures.draw_hundred,
    "lookup_speed_h200": gpu_figures.draw_lookup,
    "sharded_cpu": ranks_figures.draw_all,
}

_GPU = ("end_to_end_h200", "end_to_end_h200_100b", "lookup_speed_h200")
NARROW = ("bytedmd_toy", "production", "verdict_map", "end_to_end_cpu", *_GPU)


def filled(text: str) -> str:
    """`text` with every marked block and every marked value replaced by what the results say."""

    def block(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- begin: {name} -->\n{_named(BLOCKS, name, 'block')()}\n<!-- end: {name} -->"

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- v: {name} -->{_named(values(), name, 'value')}<!-- /v -->"

    return marks_inside_lines(MARK.sub(value, BLOCK.sub(block, text)))


def _named(known: dict[str, Any], name: str, what: str) -> Any:
    if name not in known:
        raise ValueError(f"no {what} is called {name!r}: see bench/fill_docs.py for those there are")
    return known[name]


def stale() -> list[str]:
    """Documents and scripts that are not what the results give, and figures that were drawn from others."""
    documents = [name for name in DOCUMENTS if (text := (ROOT / name).read_text(encoding="utf-8")) != filled(text)]
    scripts = [f"docs/assets/{name}" for name, script in SCRIPTS.items() if _text_of(ASSETS / name) != script()]
    origins = [source(load(name)) for name in DRAWN]
    figures = {path: path.read_text(encoding="utf-8") for path in sorted(FIGURES.glob("*.svg"))}
    # A figure names the results that it shows: none is drawn again to be compared, which `redrawn` does.
    drawn = [path for path, text in figures.items() if not any(origin in text for origin in origins)]
    return documents + scripts + [str(path.relative_to(ROOT)) for path in drawn]


def redrawn() -> list[str]:
    """Figures that show something else than what is drawn today: code, results or matplotlib has changed."""
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder))
        today, kept = _figures(Path(folder)), _figures(FIGURES)
    other = [name for name in today.keys() & kept.keys() if not same_picture(today[name], kept[name])]
    return sorted([*other, *(today.keys() ^ kept.keys())])


def _figures(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.svg")}


def draw(out: Path) -> None:
    """Draw every figure into a folder, those for a phone, too; on all processors, as it is half a minute on one."""
    with ProcessPoolExecutor() as pool:
        jobs = [pool.submit(draw_all, load(name), out) for name, draw_all in DRAWN.items()]
        jobs += [pool.submit(DRAWN[name], load(name), out, narrow=True) for name in NARROW]
        for job in jobs:
            job.result()


def _text_of(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def unsourced() -> list[str]:
    """Numbers that were typed where only evidence may speak, and marks that Markdown would not render."""
    found = []
    for name in SOURCED:
        text = (ROOT / name).read_text(encoding="utf-8")
        found += [f"{name}: {number}" for number in typed_numbers(text)]
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        found += [f"{name}: {mark} begins a line" for mark in marks_at_line_start(text)]
    return found


def main() -> None:
    """Fill, or check."""
    parser = cli.Parser(prog="fill_docs", description=__doc__)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="change nothing; fail if something is stale")
    instead.add_argument("--redraw", action="store_true", help="change nothing; fail if a figure shows something else")
    options = parser.parse_args()
    with cli.one_line_errors("fill_docs"):
        if options.check:
            check()
        elif options.redraw:
            check_figures()
        else:
            fill()


def check() -> None:
    """Raise ValueError unless every document and figure follows from the results."""
    if wrong := stale():
        raise ValueError(f"stale: {', '.join(wrong)}; run python bench/fill_docs.py")
    if typed := unsourced():
        raise ValueError(f"neither measured nor published: {'; '.join(typed)}")


def check_figures() -> None:
    """Raise ValueError unless every figure shows what its code draws from the results."""
    if wrong := redrawn():
        advice = "run python bench/fill_docs.py, with the matplotlib of constraints.txt"
        raise ValueError(f"drawn otherwise today: {', '.join(wrong)}; {advice}")


def fill() -> None:
    """Write what the results say into documents, scripts and figures; a file that says it already is left alone."""
    for name in DOCUMENTS:
        path = ROOT / name
        _write(path, filled(path.read_text(encoding="utf-8")))
    for name, script in SCRIPTS.items():
        _write(ASSETS / name, script())
    draw(FIGURES)


def _write(path: Path, text: str) -> None:
    if _text_of(path) != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(text.encode())


if __name__ == "__main__":
    cli.run(main, "fill_docs")
