"""What the finding about wall time shows of committed end-to-end results, and what it says where there are none.

    python bench/fill_docs.py      fills docs/findings/engram-offload-wall-time.md and docs/reference/offload-times.md

Runs on CUDA machines are looked for by name, `bench/results/end_to_end_*.json`; a CPU's is never shown in their place:
it is folded away, since it says nothing about a GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.evidence.on_gpu import LOOKUP
from bench.instruments.claim import PUBLISHED_STEP_S, PUBLISHED_WINDOW_S, WALL_TIME_CLAIM
from bench.instruments.reading import read_results
from bench.instruments.timing import NotMeasured
from bench.instruments.words import commit_of, device_label, markdown, short, signed_percent
from bench.served import numbers
from bench.served.classes import JUDGED, added_s, classify, offloaded_labels
from bench.served.doubts import reading
from bench.served.numbers import BASELINES, PARTS, WHOLE, Json
from bench.served.table import report
from engram_ref.config import EngramConfig

NO_RUN = "No run on a CUDA machine is committed yet."
_PHASE = "together"
_EXPECTED = ("measured on", "model, batch, table", "rows of a step", "window", "3 % expected at", "as bandwidth")
_LATEST = (*_EXPECTED, "holds to", "broken at")
_LOOKUPS = {"uva": "lookup in place, H200", "staged": "lookup gathered, H200"}  # what a bus alone leaves out
_PUBLISHED_BATCHES = (1, 16, 64, 256)


def committed(folder: Path, device: str) -> list[tuple[str, Json]]:
    """File names and contents of the committed runs on a kind of device."""
    found = [(path.name, read_results(path)) for path in folder.glob("end_to_end_*.json")]
    return sorted((name, results) for name, results in found if results["device"] == device)


def folded(summary: str, text: str) -> str:
    """A part of a page that opens when it is asked for."""
    return f"<details markdown>\n<summary>{summary}</summary>\n\n{text}\n\n</details>"


def of_both(folder: Path, what: str, shown: Callable[[list[tuple[str, Json]]], str]) -> str:
    """Something of the runs on CUDA machines, or that there is none; that of a CPU's runs folded away below."""
    runs, others = committed(folder, "cuda"), committed(folder, "cpu")
    parts = [shown(runs) if runs else NO_RUN]
    return "\n\n".join(
        [*parts, folded(f"{what}, on a CPU: nothing about a GPU follows", shown(others))] if others else parts
    )


def wall_time_runs(folder: Path, device: str) -> str:
    """Everything that the runs on a kind of device say, or that there is none; a CPU's folded away."""
    runs = committed(folder, device)
    if not runs:
        return NO_RUN
    text = "\n\n".join(f"`bench/results/{name}`:\n\n```text\n{report(results)}\n```" for name, results in runs)
    return text if device == "cuda" else folded("All tables of the runs on a CPU", text)


def wall_time_story(folder: Path) -> str:
    """The one comparison: the overhead in its parts, a line per case."""
    return of_both(folder, "The same comparison", _story)


def _story(runs: list[tuple[str, Json]]) -> str:
    head = ["measured on", "model, batch, table, stream", *PARTS, "all of it", "of `resident`"]
    return markdown(head, _of_cases(runs, _line), right=range(2, len(head)))


def _of_cases(runs: list[tuple[str, Json]], line: Callable[[Json, Json], list[str]]) -> list[list[str]]:
    return [line(results, case) for _, results in runs for case in results["cases"]]


def _line(results: Json, case: Json) -> list[str]:
    what = f"{_sized(case)}, {case['stream']['name']}"
    try:
        parts = numbers.decomposition(case, _PHASE)
        ours = numbers.against(case, numbers.prefetched_row(case), "resident", _PHASE)
        cells = [str(part) for part in (*(parts[name] for name in (*PARTS, WHOLE)), ours)]
    except NotMeasured as why:
        cells = [str(why), *[""] * (len(PARTS) + 1)]
    return [device_label(results), what, *cells]


def wall_time_class(folder: Path) -> str:
    """A line for every place of the table: its class in decode steps and whole passes, against each baseline."""
    cases = [case for _, results in committed(folder, "cuda") for case in results["cases"]]
    if not cases:
        return f"**INCONCLUSIVE**, {NO_RUN[0].lower()}{NO_RUN[1:]}"
    columns = [(phase, baseline) for baseline in BASELINES for phase in JUDGED]
    rows = []
    for label in dict.fromkeys(label for case in cases for label in offloaded_labels(case)):
        added = [1e6 * added_s(case, label) for case in cases if label in offloaded_labels(case)]
        cells = [_class_cell(cases, label, baseline, phase) for phase, baseline in columns]
        rows.append([f"`{label}`", f"{min(added):+.0f} to {max(added):+.0f}", *cells])
    head = [*("where the rows are", "us added to a decode step"), *(f"{JUDGED[p]}, % of `{b}`" for p, b in columns)]
    return markdown(head, rows, right={1})


def _class_cell(cases: list[Json], label: str, baseline: str, phase: str) -> str:
    """A class over all cases, and between which medians they lie."""
    medians = [
        numbers.against(case, numbers.row_of(case, label), baseline, phase).median
        for case in cases
        if label in offloaded_labels(case)
    ]
    low, high = signed_percent(min(medians)), signed_percent(max(medians))
    return f"**{classify(cases, label, baseline, phase)[0]}** {low if low == high else f'{low} to {high}'}"


def wall_time_sensitivity(folder: Path) -> str:
    """How late a step's rows may come: by published numbers, then, per case, expected and measured on slowed buses."""

    def table(rows: list[list[str]]) -> str:
        return markdown(_LATEST, rows, right=range(2, len(_LATEST)))

    head = (*_EXPECTED, *_LOOKUPS.values())
    lookups = {case["tokens"]: case["samples_s"] for case in read_results(folder / f"{LOOKUP}.json")["cases"]}
    rows = [_published(batch, lookups[batch]) for batch in _PUBLISHED_BATCHES]
    published = markdown(head, rows, right=range(2, len(head)))
    return f"{published}\n\n{of_both(folder, 'Slowed buses', lambda runs: table(_of_cases(runs, _sensitivity)))}"


def _sensitivity(results: Json, case: Json) -> list[str]:
    name = f"{_sized(case)}, {case['stream']['name']}"
    try:
        found, buses = numbers.breaking_bus(case), numbers.slowed(case)
    except NotMeasured as why:
        return [device_label(results), name, _kilobytes(numbers.step_bytes(case)), str(why), "", "", "", ""]
    window = numbers.window_s(buses)
    measured = ["not resolved" if at is None else _us(at) for at in (found.holds_s, found.breaks_s)]
    return [device_label(results), name, *_expected(numbers.step_bytes(case), window, found.predicted_s), *measured]


def _sized(case: Json) -> str:
    """Model, batch and table: runs of one name differ in the last."""
    return f"{case['backbone']}, {case['batch']}, {case['table']['parameters'] / 1e9:.3g} B"


def _published(batch: int, lookups: dict[str, list[float]]) -> list[str]:
    """By arithmetic: one layer of v41-flash in a model whose window and step others have computed.

    Args:
        lookups: seconds from token ids to as many rows, by the way they come.
    """
    config = EngramConfig.preset("v41-flash")
    nbytes = batch * config.columns * config.row_bytes()
    # What the window hides, and the share of a step by which it may be longer.
    latest = PUBLISHED_WINDOW_S + WALL_TIME_CLAIM * PUBLISHED_STEP_S
    expected = _expected(nbytes, PUBLISHED_WINDOW_S, latest)
    took = [_us(statistics.median(lookups[way])) for way in _LOOKUPS]
    return ["arithmetic, arXiv 2603.10087", f"Qwen3-32B, {batch}, v41-flash rows", *expected, *took]


def _expected(nbytes: int, window: float, latest: float) -> list[str]:
    return [_kilobytes(nbytes), _us(window), _us(latest), f"{short(nbytes / latest / 1e9, digits=3)} GB/s"]


def _kilobytes(nbytes: int) -> str:
    return f"{short(nbytes / 1e3, digits=3)} kB"


def _us(seconds: float) -> str:
    return f"{short(1e6 * seconds, digits=3)} us"


def wall_time_reading(folder: Path) -> str:
    """A sceptic's questions to every committed run."""
    return of_both(folder, "The same questions", _questions)


def _questions(runs: list[tuple[str, Json]]) -> str:
    read = [f"{name}, {device_label(results)}\n{reading(results)}" for name, results in runs]
    return "```text\n{}\n```".format("\n\n".join(read))


def wall_time_setup(folder: Path) -> str:
    """Configuration of every case, and the machines."""
    return of_both(folder, "Configuration", _setups)


def _setups(runs: list[tuple[str, Json]]) -> str:
    rows = dict.fromkeys(map(tuple, _of_cases(runs, _setup)))  # streams share one
    return markdown(["machine", "model", "served", "table", "code"], rows)


def _setup(results: Json, case: Json) -> list[str]:
    table = case["table"]
    (low, high), (least, most) = case["prompt_tokens"], case["output_tokens"]
    decoding = "CUDA graphs" if case["rows"][0]["graphs"]["used"] else "no CUDA graphs"
    return [
        f"{device_label(results)}, {results['environment']['cpu_count']} cores",
        f"{case['backbone']}, {case['blocks']} blocks, random {case['dtype']} weights, {decoding}",
        f"{len(case['rounds'])} rounds of {case['sequences']}, {case['batch']} at a time; prompts {low} to {high}, "
        f"outputs {least} to {most} tokens; {case['stream']['name']}",
        f"{table['preset']}, {table['parameters'] / 1e9:.3g}e9 values, {table['columns']} rows of "
        f"{table['row_bytes']} B a token",
        "`{}`{}{}".format(*commit_of(results).partition(" ")),
    ]


def blocks(folder: Path) -> dict[str, Any]:
    """Name of each block -> what fills it."""
    return {
        "wall_time_setup": lambda: wall_time_setup(folder),
        "wall_time_story": lambda: wall_time_story(folder),
        "wall_time_class": lambda: wall_time_class(folder),
        "wall_time_gpu": lambda: wall_time_runs(folder, "cuda"),
        "wall_time_cpu": lambda: wall_time_runs(folder, "cpu"),
        "wall_time_sensitivity": lambda: wall_time_sensitivity(folder),
        "wall_time_reading": lambda: wall_time_reading(folder),
    }
