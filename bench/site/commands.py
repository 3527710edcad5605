"""The commands of the page "Run it yourself", with how long they took where a results file says so."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from bench.instruments.reading import read_results
from bench.instruments.words import markdown

_COMMANDS = {
    "engram-place --preset v41-flash": "[Where a table should live](where-should-my-table-live.md): what fits, what a "
    "step moves and loses, which place to take",
    "engram-price --preset v41-flash --text FILE": "What the lookups of a text cost in ByteDMD, in a table cut to fit",
    "engram-plan --preset v41-flash": "The constants of a published hash, for another engine",
    "make toy": "Real text to a verdict: table, figures and `results.json` in `out/toy/`",
    "python bench/bytedmd_toy.py --preset v41-flash": "The same with DeepSeek-V4.1-Flash's geometry, cut to a laptop",
    "python bench/bytedmd_toy.py --quick": "The same, small, to see that it works",
    "python bench/bytedmd_toy.py --sweep all": "One setting varied at a time, with figures; resumable",
    "python bench/production.py": "Tables of published size, every row read priced; resumable",
    "python bench/verdict.py": "The whole answer on one screen, from the committed results",
    "python bench/verdict.py --export DIR": "The answer as a folder that runs in the asking lab's tree",
    "make findings": "Every result, figure and document of the findings, from nothing",
    "make bench-cpu": "Time and bytes of a table in RAM and in a real file",
    "python bench/gpu_wall.py": "Time and bus traffic of every placement around a decoder",
    "python bench/lookup_speed.py": "The lookup of a decode step alone, in microseconds, per placement",
    "bench/gpu_checks.sh check OUT": "Whether all that needs a GPU works, within 170 s; at most eight files come "
    "back in `OUT`",
    "bench/gpu_checks.sh measure OUT": "What it costs, what tells most first: 100 B parameters beside an 8B model, "
    "within 580 s",
    "bench/gpu_checks.sh check OUT  # with REHEARSE=1": "The same lines at toy sizes on a stand-in for CUDA: a fault "
    "shows before a GPU is at hand",
    "make bench-layer": "Gather, convolution, layer, construction, cold reads against what others do",
    "make speed": "Speed of hashing, of pricing, and of pricing at production scale",
    "python bench/fill_docs.py": "Write the figures of these pages from the committed results",
    "make site": "This site as files: open `site/index.html`, no server needed",
    "make test": "The tests, without the slow ones",
    "make test-slow": "Tests that start whole commands, a browser, the stand-in for CUDA, ranks, compilers",
    "make check": "Formatter, linter, types, and this site, strictly",
}
_NEEDS = {  # beside Python
    "make bench-cpu": "a disk with space",
    "python bench/gpu_wall.py": "a CUDA device",
    "bench/gpu_checks.sh check OUT": "a CUDA device",
    "bench/gpu_checks.sh measure OUT": "a CUDA device of 139 GiB",
    "bench/gpu_checks.sh check OUT  # with REHEARSE=1": "Triton",
}
_TIMED = {"make toy": "bytedmd_toy", "python bench/bytedmd_toy.py --preset v41-flash": "bytedmd_toy_v41"}  # its results


def command_table(results: Path) -> str:
    """All commands, as a table; a duration is that of the committed run, on the machine that its results name."""
    rows = []
    for command, what in _COMMANDS.items():
        took = duration(results / f"{_TIMED[command]}.json") if command in _TIMED else ""
        rows.append([f"`{command}`", what, _NEEDS.get(command, "nothing else"), took])
    return markdown(["command", "what it does", "needs", "took"], rows, right={3})


def duration(path: Path) -> str:
    """How long the run of a results file took."""
    content = read_results(path)
    taken = datetime.fromisoformat(content["finished"]) - datetime.fromisoformat(content["started"])
    seconds = round(taken.total_seconds())
    return f"{seconds} s" if seconds < 120 else f"{seconds // 60} min {seconds % 60} s"
