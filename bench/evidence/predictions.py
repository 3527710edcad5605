"""What `engram-place` predicts, held against what was measured: a line for every committed figure it has a formula for.

    print(table(RESULTS))

Rates come from the same results file where it has them, as `--measure` would have found them; the others are those that
the command assumes. So the error is that of a user who measured, or did not.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.instruments.reading import read_results
from bench.instruments.words import markdown, short, signed
from bench.rows.whole_model import shown
from bench.served.numbers import delay_s, hit_rate, token_times
from bench.setup.decoder_sizes import SIZES, BlockShape
from engram_ref.config import EngramConfig
from engram_ref.place.energy import PAGE, pages_per_row
from engram_ref.place.formulas import (
    FORMULAS,
    beside_seconds,
    beyond_seconds,
    block_seconds,
    held_bytes,
    moved_bytes,
    seconds,
)
from engram_ref.place.group import Group
from engram_ref.place.machine import Machine, Rate
from engram_ref.place.price import rows_price

# Results files of which nothing is predicted, and why.
NOT_PREDICTED = {
    "bytedmd_toy": "the toy prices every read itself",
    "bytedmd_toy_v41": "the toy prices every read itself",
    "bytedmd_sweeps": "the toy prices every read itself",
    "bytedmd_grid": "the toy prices every read itself",
    "row_definitions": "other definitions of the metric",
    "production_qwen": "rows under too little: its model is known in part",
    "row_speed": "how long pricing takes",
    "pricing_speed": "how long pricing takes",
    "hashing_speed": "hashing is no part of a placement",
    "layer_speed_first_run": "the same as layer_speed, an earlier run",
    "stress": "faults, not times",
    "energy_by_tier": "counts of rows, not energies",
    "lab": "the toy, as the lab asked for it",
    "lookup_range": "the toy prices every read itself",
    "other_texts": "prices of single reads, of other texts",
    "verdict_map": "prices of single reads",
}


class Line(NamedTuple):
    """One comparison."""

    file: str
    case: str
    formula: str
    predicted: float
    measured: float
    unit: str

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured


def lines(folder: Path) -> list[Line]:
    """All comparisons, file by file."""
    found: list[Line] = []
    for name, read in _READERS.items():
        found += read(name, read_results(folder / f"{name}.json"))
    return found


def table(folder: Path) -> str:
    """The comparisons as a table in Markdown."""
    rows = []
    for line in lines(folder):
        ratio = f"{line.ratio:.2f}" if line.measured > 0 else "not resolved"
        both = (_figure(value, line.unit) for value in (line.predicted, line.measured))
        rows.append([f"`{line.file}`", line.case, line.formula, *both, ratio])
    head = ["measured in", "case", "formula", "predicted", "measured", "predicted / measured"]
    return markdown(head, rows, right={3, 4, 5})


def formulas() -> str:
    """The formulas by their names, as a table in Markdown."""
    return markdown(["name", "formula"], FORMULAS.items())


def _figure(value: float, unit: str) -> str:
    if unit == "s":
        return f"{signed(1e6 * value)} us"
    return f"{value:,.0f} B" if unit == "B" else f"{short(value)} {unit}"


def _machine(**rates: float) -> Machine:
    # No prediction here asks what fits.
    return Machine(None, 0, 0).with_rates({name: Rate(value, "measured") for name, value in rates.items()})


def _of_limits(results: dict[str, Any]) -> Machine:
    """With the rates that a run measured beside its own figures."""
    limits, on_gpu = results["limits"], results["device"] == "cuda"
    # On a GPU it was copied from pinned memory, over the bus.
    rates = {"bus" if on_gpu else "memory": limits["copy"]["bytes_per_s"]}
    if on_gpu:
        rates["device"] = limits["gather"]["bytes_per_s"]
    if limits.get("disk"):
        rates["reads"] = limits["disk"]["reads_per_s"]
    return _machine(**rates)


def _kind(results: dict[str, Any], run: dict[str, Any]) -> str:
    """The placement of a variant that is waited for."""
    if results["device"] == "cuda":
        return {"resident": "device", "offload_naive": "host"}[run["variant"]]
    # A file in the page cache is read as memory is.
    return "file, no GPU" if run["variant"] == "offload_disk" and run["page_cache"] == "cold" else "memory"


def _wall(name: str, results: dict[str, Any]) -> Iterator[Line]:
    """Bytes of a step, the waits of the synchronous variants, and a prompt without Engram."""
    products = next((part for part in results["components"] if part["case"] == "compute"), None)
    machine = _of_limits(results)
    for step in results["steps"]:
        medians = {run["variant"]: statistics.median(run["step_s"]) for run in step["runs"] if not run["repeat"]}
        shape, said = step["shape"], step["prediction"]
        row_bytes, step_name = step["table"]["row_bytes"], f"{shape['phase']} {shape['batch']} x {shape['tokens']}"
        rows, distinct = shape["batch"] * shape["tokens"] * step["table"]["columns"], said["unique_rows"]
        yield Line(name, f"{step_name}, bytes asked for", "rows", rows * row_bytes, said["bytes_requested"], "B")
        pages = distinct * pages_per_row(row_bytes) * PAGE
        if said["bytes_paged"]:
            yield Line(name, f"{step_name}, bytes of pages", "time.file", pages, said["bytes_paged"], "B")
        if products and shape["phase"] == "prefill":
            values = step["blocks"] * BlockShape.of(SIZES[step["backbone"]]).parameters()
            least = block_seconds(values, shape["batch"] * shape["tokens"], products["flops"] / products["limit_s"])
            case = f"{step_name}, {step['blocks']} blocks compute, at least"
            yield Line(name, case, "window", least, medians["no_engram"], "s")
        for run in step["runs"]:
            if run["repeat"] or run["variant"] == "no_engram":
                continue
            if run["schedule"] == "prefetched":
                # On a CPU a step is too short for its noise: served ones say it.
                if results["device"] == "cuda":
                    kind = _BEHIND[run["variant"]]
                    hits = run["hot"]["hit_rate"] if kind == "hot" else 0.0
                    fetch = seconds(machine, kind, rows, distinct, row_bytes, hits)
                    block = medians["no_engram"] / step["blocks"]
                    predicted = _exposed(machine, kind, fetch, step["table"]["layer_ids"], block)
                    lost = medians[run["variant"]] - medians["resident"]
                    yield Line(name, f"{step_name}, {run['variant']}, lost", "exposed", predicted, lost, "s")
                continue
            kind = _kind(results, run)
            case = ", ".join(filter(None, (step_name, run["variant"], run["page_cache"])))
            predicted = seconds(machine, kind, rows, distinct, row_bytes, 0.0)
            waited = statistics.median(run["exposed_s"])
            yield Line(name, f"{case}, waited", f"time.{kind.partition(',')[0]}", predicted, waited, "s")


def _layer(name: str, results: dict[str, Any]) -> Iterator[Line]:
    """Fetches by themselves: from memory, and from a file, cold."""
    for case in results["cases"]:
        samples = {key: statistics.median(values) for key, values in case["samples_s"].items()}
        if case["case"] == "gather":
            yield _gather(name, "gather", case["rows"], case["row_bytes"], samples["ours"])
        elif case["case"] == "fp8_gather":
            rows = case["rows"] / case["fetches"]
            took = samples["packed, as stored"] / case["fetches"]
            yield _gather(name, f"fp8 rows, {case['tokens']:,} tokens", rows, case["row_bytes"]["fp8"], took)
        elif case["case"] == "cold":
            machine = _machine(reads=case["rows"] / samples["fio, 4 KiB random reads"])
            predicted = seconds(machine, "file, no GPU", case["rows"], case["rows"], case["row_bytes"], 0.0)
            yield Line(name, f"{case['rows']:,} rows from a cold file", "time.file", predicted, samples["ours"], "s")


def _gather(name: str, case: str, rows: float, row_bytes: int, took: float) -> Line:
    return Line(name, case, "time.memory", seconds(_machine(), "memory", rows, rows, row_bytes, 0.0), took, "s")


def _end_to_end(name: str, results: dict[str, Any]) -> Iterator[Line]:
    """What a hot tier holds, and what a decode step loses behind a slowed bus: the delay less the window."""
    yield from _hot_tiers(name, results)
    for case in results["cases"]:
        rows = {row["label"]: token_times(row)["median"] for row in case["rows"]}
        block = rows["no_engram"] / case["blocks"]
        for row in case["rows"]:
            if not row["bus"]:
                continue
            # On both sides nothing is read beside it.
            predicted = beyond_seconds([delay_s(case, row)], [case["layer_id"]], block)
            # Where the window hides all of it, what was measured is noise, and a ratio to it says nothing.
            if predicted > 0:
                lost = rows[row["label"]] - rows["resident"]
                case_name = f"batch {case['batch']}, {case['stream']['name']}, {row['label']}, lost per step"
                yield Line(name, case_name, "beyond", predicted, lost, "s")
        yield from _file_beside(name, case, rows, block)


def _file_beside(name: str, case: dict[str, Any], steps: dict[str, float], block: float) -> Iterator[Line]:
    """What a decode step of a CPU loses to a file that is read beside it, with and without a hot tier in front."""
    rows, machine = case["batch"] * case["table"]["columns"], _machine()
    for row in case["rows"]:
        kind = {"offload_disk": "file, no GPU", "offload_hot": "hot file, no GPU"}.get(row["variant"])
        if kind is None or row["schedule"] == "synchronous":
            continue
        fetch = seconds(machine, kind, rows, rows, case["table"]["row_bytes"], hit_rate(row) or 0.0)
        predicted = _exposed(machine, kind, fetch, [case["layer_id"]], block)
        case_name = f"batch {case['batch']}, {case['stream']['name']}, {row['label']}, lost per step"
        yield Line(name, case_name, "exposed", predicted, steps[row["label"]] - steps["resident"], "s")


def _exposed(machine: Machine, kind: str, fetch: float, layer_ids: Sequence[int], block: float) -> float:
    """Of a step with one Engram layer."""
    beyond = beyond_seconds([fetch], layer_ids, block)
    return beyond + beside_seconds(machine, kind, [fetch], beyond)


def _lookup(name: str, results: dict[str, Any]) -> Iterator[Line]:
    """Fetches by themselves, hash included, on a GPU."""
    machine = _of_limits(results)
    kinds = {"resident": "device", "uva": "uva", "staged": "host"}
    for case in results["cases"]:
        for way, kind in kinds.items():
            predicted = seconds(machine, kind, case["rows"], case["rows"], results["table"]["row_bytes"], 0.0)
            took = statistics.median(case["samples_s"][way])
            yield Line(name, f"{case['tokens']} tokens, {way}", f"time.{kind}", predicted, took, "s")


# Placements by what the benchmarks call them on a GPU.
_BEHIND = {"offload_prefetch": "host", "offload_uva": "uva", "offload_hot": "hot"}


def _served_on_gpu(name: str, results: dict[str, Any]) -> Iterator[Line]:
    """What a decode step loses to the resident table: the fetch less the block before it, if it may hide there."""
    machine = _of_limits(results)
    for case in results["cases"]:
        rows_of = {row["label"]: row for row in case["rows"] if row["rounds"]}
        steps = {label: token_times(row)["median"] for label, row in rows_of.items()}
        block = steps["no_engram"] / case["blocks"]
        rows, row_bytes = case["batch"] * case["table"]["columns"], case["table"]["row_bytes"]
        for label, row in rows_of.items():
            waits = row["schedule"] == "synchronous"
            kind = "host" if waits else _BEHIND.get(row["variant"])
            if kind is None:
                continue
            took = seconds(machine, kind, rows, rows, row_bytes, hit_rate(row) or 0.0)
            predicted = took if waits else _exposed(machine, kind, took, [case["layer_id"]], block)
            formula = f"time.{kind}" if waits else "exposed"
            what = f"{case['table']['parameters']:.3g} parameters, batch {case['batch']}, {label}, lost per step"
            yield Line(name, what, formula, predicted, steps[label] - steps["resident"], "s")


def _hot_tiers(name: str, results: dict[str, Any]) -> Iterator[Line]:
    """Hot rows in memory in front of a file, and an entry for each row of the table; buffers left out."""
    # Tiers of one share hold the same in every case.
    case = results["cases"][0]
    config = EngramConfig.preset(case["table"]["preset"]).replace(row_dtype=case["table"]["row_dtype"])
    for row in case["rows"]:
        if row["variant"] == "offload_hot":
            hot = round(row["hot_share"] * case["table"]["rows"])
            held = held_bytes(config, [case["table"]["rows"]], 0, hot)["hot file"]  # for no tokens: no buffers
            label = f"{row['label']} in front of a file"
            tier = held["gpu"] + held["host"]
            yield Line(name, f"{label}, bytes held", "held", tier, row["held"]["device"] + row["held"]["host"], "B")
            yield Line(name, f"{label}, bytes of the file", "held", held["disk"], row["held"]["disk"], "B")


def _sharded(name: str, results: dict[str, Any]) -> Iterator[Line]:
    """Bytes that the rank with most received in one fetch of both layers."""
    for run in results["runs"]:
        layers, columns = len(run["rows"]), EngramConfig.preset(run["preset"]).columns
        for case in run["cases"]:
            if case["way"] == "owners":
                rows, group = case["tokens"] * columns, Group(run["ranks"])
                told = layers * moved_bytes("sharded", rows, rows, run["row_bytes"], 0.0, group)["link"]
                most = max(rank["ids"] + rank["rows"] + rank["control"] for rank in case["by_rank"])
                what = f"{run['ranks']} ranks, {case['tokens']:,} tokens, bytes from other ranks"
                yield Line(name, what, "exchange.bytes", told, most, "B")


def _production(name: str, results: dict[str, Any]) -> Iterator[Line]:
    """The price of offloaded rows over that of pinned ones, from the counts of the same stream."""
    for record in results["records"]:
        wanted = record["part"] == "whole_model" and record["mode"] == "decode" and record["layout"] == "held live"
        if not wanted or record["context"]:
            continue
        first = record["distinct_rows"] / record["reads"]
        # How far back a row was read last is not in the record: as if that were spread evenly over all rows read.
        root = 2 / 3 * record["distinct_rows"] ** 0.5
        reads = record["reads"] / record["steps"]
        size = record["table_rows"] * record["row_bytes"]
        far, near = (
            rows_price(reads, record["row_bytes"], size, first, 1.0, root, *above)
            for above in ((record["live_bytes"], record["read_bytes"]), (0.0, 0.0))  # offloaded, then pinned
        )
        model, size = shown(record["table"], record["experts"]), f"{record['tokens_per_step']:,} tokens a step"
        case = f"{model}, {record['stream']}, {size}, over pinned"
        yield Line(name, case, "price", far / near, record["offload_naive"] / record["pinned"], "x")


_READERS = {
    "gpu_wall_cpu": _wall,
    "gpu_wall_cpu_v41": _wall,
    "end_to_end_cpu": _end_to_end,
    "gpu_wall_h200": _wall,
    "lookup_speed_h200": _lookup,
    "end_to_end_h200": _served_on_gpu,
    "end_to_end_h200_100b": _served_on_gpu,
    "layer_speed": _layer,
    "production": _production,
    "sharded_cpu": _sharded,
}
