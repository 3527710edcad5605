"""The tables of a wall-time results file, as text for a terminal: what was predicted first, then what was measured.

    print(wall_table(json.loads(Path("bench/results/gpu_wall_cpu.json").read_text())))

GiB is 2^30 bytes; kB, MB and GB are powers of ten. A number that a run does not carry is "-", with the reason below
its table; what went against the prediction is a line that begins with "warning". The numbers come from
`bench.wall.numbers`.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

from bench.instruments.timing import NotMeasured, noise_interval, quantile, unless_missing
from bench.instruments.words import aligned, commit_of, fraction, gib, measured_on, short, signed
from bench.schemas.common import CONTROL
from bench.wall import numbers
from bench.wall.numbers import ALONE, Run, Step

_WIDTH = 150  # characters of a line
_SECONDS = [(1.0, "s"), (1e-3, "ms"), (1e-6, "us")]
_BYTES = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")]


def wall_table(results: dict[str, Any]) -> str:
    """Everything that a results file says about time and bytes; the first line names the device it was measured on."""
    blocks = ["\n".join([measured_on(results), *_machine(results)])]
    blocks += [step_table(results, step) for step in results["steps"]]
    if results["components"] or results["components_skipped"]:
        blocks.append(component_table(results))
    return "\n\n".join(blocks)


def step_label(step: Step) -> str:
    """Shape, table size and backbone of a step, in a few words."""
    shape, table = step["shape"], step["table"]
    scale = f" ({scale_label(table)})" if "preset" in table else ""
    return (
        f"{shape['phase']} {shape['batch']} x {shape['tokens']}, "
        f"{table['params'] / 1e9:g}e9 parameters{scale}, backbone {step['backbone']}"
    )


def scale_label(table: dict[str, Any]) -> str:
    """How much of the published table of its preset a step's table is: "1/640 of v41-flash's table"."""
    share = table["rows"] / table["published_rows"]
    return f"{fraction(share)}{'' if share > 1 else ' of'} {table['preset']}'s table"


def run_label(run: Run) -> str:
    """Variant, schedule and page cache of a run; its second measurement is called "again"."""
    words = [run["variant"], "again" if run["repeat"] else "", _schedule(run)]
    return " ".join(word for word in words if word)


def _schedule(run: Run) -> str:
    return run["schedule"] + (f" {run['page_cache']}" if run["page_cache"] else "")


def _machine(results: dict[str, Any]) -> list[str]:
    e, stream = results["environment"], results["stream"]
    limits = results["limits"]
    rates = [
        f"{name} {short(limit['bytes_per_s'] / 1e9)} GB/s ({limit['what']}, {gib(limit['bytes'])} a time)"
        for name in ("copy", "gather")
        if (limit := limits[name])
    ]
    huge = "unknown" if e["huge_pages"] is None else f"{100 * e['huge_pages']:.1f} %"
    tokens = "endless" if stream["tokens"] is None else f"{stream['tokens']:,} tokens"
    facts = (
        f"Host {e['cpu']}, {e['cpu_count']} cores, {gib(e['memory_bytes'])}; host memory "
        f"{'pinned' if e['pinned'] else 'not pinned'}, huge pages {huge}, page {e['page_size']} B; "
        f"stream {stream['name']}, {tokens}; commit {commit_of(results)}"
    )
    return [*_wrapped(facts), *_wrapped(f"Limits measured in this run: {'; '.join([*rates, _disk(limits['disk'])])}")]


def _disk(limit: dict[str, Any]) -> str:
    if limit["reads_per_s"] is None:
        return f"disk unknown ({limit['why']})"
    return f"disk {limit['reads_per_s']:,.0f} reads/s, {short(limit['bytes_per_s'] / 1e9)} GB/s ({limit['what']})"


def step_table(results: dict[str, Any], step: Step) -> str:
    """The table of one shape: what it is, the prediction, a line per run, the noise floor, reasons and warnings."""
    columns = _columns(step)
    gaps = _Gaps()
    rows = [[name for name, _, _ in columns], [unit for _, unit, _ in columns]]
    for run in step["runs"]:
        rows.append([gaps.cell(name, run, cell) for name, _, cell in columns])
    lines = [*step_header(results, step), prediction(results, step), aligned(rows, left={0, 1, 2}, headers=2)]
    lines += [_floor_line(step), *_notes(step), *gaps.lines(), *_warnings(step)]
    if not step.get("finished", True):
        done, asked = len(step["runs"][0]["step_s"]), results["configuration"]["rounds"]
        lines.append(f"warning: cut after round {done} of {asked}; the same command with the same --out goes on")
    return "\n".join(lines)


def step_header(results: dict[str, Any], step: Step) -> list[str]:
    """Two lines that say what a step is."""
    shape, table = step["shape"], step["table"]
    return [
        f"== {shape['phase']}, {shape['batch']} x {shape['tokens']} tokens, context {shape['context']}, "
        f"stream {results['stream']['name']}, {step['dtype']}, on {step['device']}",
        f"   table {table['params'] / 1e9:g}e9 parameters, {gib(table['bytes'])}, {table['rows']:,} rows of "
        f"{table['row_bytes']} B, {table['columns']} columns, layers {', '.join(map(str, table['layer_ids']))}; "
        f"backbone {step['backbone']}, {step['blocks']} blocks",
        *(_stored(table) if "preset" in table else []),
    ]


def _stored(table: dict[str, Any]) -> list[str]:
    """How a table relates to the published one, and how its rows are stored."""
    stored = {"plain": "", "packed": ", scales beside their codes", "split": ", scales apart from their codes"}
    return _wrapped(
        f"   {scale_label(table)}, of which one layer has {table['published_rows']:,} rows; "
        f"rows stored as {table['row_dtype']}{stored[table['layout']]}"
    )


def prediction(results: dict[str, Any], step: Step) -> str:
    """What can be printed before anything of the step is measured: rows, bytes, and the floor in us."""
    p, copy = step["prediction"], results["limits"]["copy"]
    paged = f", {_size(p['bytes_paged'])} in pages of a file" if p.get("bytes_paged") else ""
    text = (
        f"   predicted per step: {p['rows']:,.0f} rows, {p['unique_rows']:,.0f} unique; {_size(p['bytes_requested'])} "
        f"requested, {_size(p['bytes_unique'])} after deduplication{paged}; at {short(copy['bytes_per_s'] / 1e9)} GB/s "
        f"({copy['what']}) no less than {short(1e6 * numbers.predicted_floor(step, copy['bytes_per_s']))} us"
    )
    return "\n".join(_wrapped(text))


def _columns(step: Step) -> list[tuple[str, str, Callable[[Run], str]]]:
    """Name, unit and text of each column; one unit of time and one of bytes for the whole step."""
    seconds, time_unit = _unit(max(statistics.median(run["step_s"]) for run in step["runs"]), _SECONDS)
    nbytes, byte_unit = _unit(step["prediction"]["bytes_unique"], _BYTES)
    sizes: list[tuple[str, str, Callable[[Run], str]]] = [
        ("from ids", byte_unit, lambda run: short(numbers.median_bytes(run, "from_ids") / nbytes)),
        ("copied", byte_unit, lambda run: short(numbers.median_bytes(run, "copied") / nbytes)),
        ("counter", byte_unit, lambda run: short(numbers.median_bytes(run, "counter") / nbytes)),
    ]
    if any(run["variant"] == CONTROL and run["bytes"]["counter"] for run in step["runs"]):
        others = [run for run in step["runs"] if run["variant"] != CONTROL]
        sizes.append(
            (
                "less no_engram",
                byte_unit,
                lambda run: signed(numbers.over_control(step, run) / nbytes) if run in others else "",
            )
        )
    if any("freed" in run for run in step["runs"]):  # older results say nothing of it
        sizes.append(("freed", "GiB", lambda run: "" if run["freed"] is None else signed(run["freed"] / 2**30)))
    preset = step["table"].get("preset")  # older results say nothing of it
    scale = [("table", f"of {preset}", lambda run: fraction(run["table"]["share"]))] if preset else []
    return [
        ("variant", "", lambda run: run["variant"] + (" again" if run["repeat"] else "")),
        ("schedule", "", _schedule),
        ("on", "", lambda run: step["device"]),
        *scale,
        ("median", time_unit, lambda run: short(statistics.median(run["step_s"]) / seconds)),
        ("p20-p80", time_unit, lambda run: _spread(run["step_s"], seconds)),
        ("overhead", "% of resident", lambda run: _overhead(step, run)),
        ("exposed", "us", lambda run: short(1e6 * numbers.exposed(run))),
        (
            "hidden",
            "%",
            lambda run: f"{100 * numbers.hidden_share(step, run):.1f}" if run["schedule"] == "prefetched" else "",
        ),
        ("floor", "us", lambda run: short(1e6 * numbers.floor(run))),
        ("ratio", "x", lambda run: short(numbers.floor_ratio(step, run))),
        *sizes,
        ("hits", "%", lambda run: f"{100 * run['hot']['hit_rate']:.1f}" if run["hot"] else ""),
    ]


class _Gaps:
    """Why numbers are missing, gathered while a table is laid out."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, str], list[str]] = {}

    def cell(self, column: str, run: Run, text: Callable[[Run], str]) -> str:
        try:
            return text(run)
        except NotMeasured as why:
            self._runs.setdefault((str(why), run_label(run)), []).append(column)
            return "-"

    def lines(self) -> list[str]:
        """One line per reason and set of columns, with all the runs that share it."""
        shared: dict[tuple[str, str], list[str]] = {}
        for (why, label), columns in self._runs.items():
            shared.setdefault((", ".join(columns), why), []).append(label)
        lines = [f"   - in {columns}: {why} ({', '.join(labels)})" for (columns, why), labels in shared.items()]
        return [part for line in lines for part in _wrapped(line)]


def _overhead(step: Step, run: Run) -> str:
    if run["variant"] == "resident" and run["repeat"] == 0:
        return "baseline"
    found = numbers.overhead(step, run)
    return f"noise floor {found.interval}" if run["variant"] == "resident" else str(found)


def _floor_line(step: Step) -> str:
    try:
        found = noise_interval(numbers.noise_floor(step))
    except NotMeasured as why:
        return f"   noise floor: unknown, so that no overhead is resolved: {why}"
    return f"   {found}; an overhead whose interval reaches into it, or holds 0, is not resolved"


def _notes(step: Step) -> list[str]:
    """What the columns leave out: how floors come about, counters, memory held, hot rows, energy."""
    runs = step["runs"]
    hot = [
        f"{run_label(run)} keeps {run['hot']['hot_rows']:,} rows on the device; "
        f"{100 * run['hot']['used_share']:.3g} % of the table's rows were read at all"
        for run in runs
        if run["hot"]
    ]
    notes = {
        "floor": _grouped(runs, lambda run: run["limit_why"] if run["limit_s"] else None),
        "counter": _grouped(runs, lambda run: run["bytes"]["counter_what"]),
        "table held in": _grouped(
            runs, lambda run: " + ".join(f"{gib(n)} {place}" for place, n in run["held"].items() if n) or "nothing"
        ),
        "energy per step": _grouped(runs, _energy),
        "PCIe sampled": _grouped(runs, _sampled),
    }
    lines = [f"{name}: {text}" for name, text in notes.items() if text] + hot
    return [part for line in lines for part in _wrapped(f"   {line}")]


def _grouped(runs: list[Run], describe: Callable[[Run], str | None]) -> str:
    """The descriptions, each followed by the variants that it holds for."""
    names: dict[str, dict[str, None]] = {}
    for run in runs:
        text = describe(run)
        if text is not None:
            names.setdefault(text, {})[run["variant"]] = None
    return "; ".join(f"{text} ({', '.join(variants)})" for text, variants in names.items())


def _energy(run: Run) -> str:
    if run["energy"] is None:
        return f"unknown, {run['energy_why']}"
    return f"{short(run['energy']['joules_per_step'])} J"


def _sampled(run: Run) -> str | None:
    """What stands in for a byte counter that the driver does not have; never a number of the table."""
    fallback = run["pcie"]["fallback"] if run.get("pcie") else None
    if fallback is None:
        return None
    if fallback["value"] is None:
        return f"unknown, {fallback['why']}"
    return f"{short(fallback['value']['bytes_per_s'] / 1e6)} MB/s by {fallback['what']}"


def _warnings(step: Step) -> list[str]:
    lines = [] if numbers.rows_agree(step) else ["the rows of the fixed batch differ between runs: no time here counts"]
    for run in step["runs"]:
        if numbers.bytes_agree(run) is False:
            lines.append(f"{run_label(run)} did not copy the bytes that were predicted")
        if run["schedule"] in ALONE and unless_missing(partial(numbers.floor_ratio, step, run), 1.0) < 1:
            lines.append(f"{run_label(run)} fetched faster than its floor allows ({run['limit_why']}): one is wrong")
    return [part for line in lines for part in _wrapped(f"warning: {line}")]


def component_table(results: dict[str, Any]) -> str:
    """A line per case of the component benchmark, then the cases that were skipped and why."""
    head = ["case", "on", "batch x tokens", "dtype", "median us", "p20-p80 us", "rate", "floor us", "x floor"]
    rows = [head, *(_component(case) for case in results["components"])]
    lines = ["== components", *([aligned(rows, left={0, 1, 2, 3})] if results["components"] else [])]
    for case in results["components"]:
        why = f"; no floor: {case['limit_why']}" if case["limit_s"] is None else f"; floor: {case['limit_why']}"
        lines += _wrapped(f"   {case['case']}: {case['what']}{why}")
    lines += [f"   {skipped['case']}: skipped, {skipped['why']}" for skipped in results["components_skipped"]]
    for case in results["components"]:
        if case["limit_s"] and statistics.median(case["samples_s"]) < case["limit_s"]:
            lines += _wrapped(f"warning: {case['case']} was faster than its floor ({case['limit_why']}): one is wrong")
    return "\n".join(lines)


def _component(case: dict[str, Any]) -> list[str]:
    median, limit = statistics.median(case["samples_s"]), case["limit_s"]
    work = [(case["bytes"], "GB/s"), (case["flops"], "GFLOP/s")]
    return [
        case["case"],
        case["device"],
        f"{case['batch']} x {case['tokens']}",
        case["dtype"],
        short(1e6 * median),
        _spread(case["samples_s"], 1e-6),
        ", ".join(f"{short(amount / median / 1e9)} {unit}" for amount, unit in work if amount) or "-",
        *(["-", "-"] if limit is None else [short(1e6 * limit), short(median / limit)]),
    ]


def _spread(samples: list[float], scale: float) -> str:
    low, high = (short(quantile(samples, share) / scale, digits=3) for share in (0.2, 0.8))
    return f"{low}-{high}"


def _unit(value: float, units: list[tuple[float, str]]) -> tuple[float, str]:
    """The largest unit that the value is at least one of."""
    return next((unit for unit in units if value >= unit[0]), units[-1])


def _size(nbytes: float) -> str:
    scale, unit = _unit(nbytes, _BYTES)
    return f"{short(nbytes / scale)} {unit}"


def _wrapped(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(line, _WIDTH, subsequent_indent=f"{indent}  ", break_long_words=False, drop_whitespace=True)
