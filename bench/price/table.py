"""The verdict table of a results file, as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.instruments.claim import WALL_TIME_CLAIM, Verdict, classify
from bench.instruments.timing import LEAST_SAMPLES, Overhead, overhead, paired_ratio
from bench.instruments.words import aligned

Run = dict[str, Any]
_OF_ROWS = ("row", "staged row")  # kinds of values


def find_run(results: dict[str, Any], model: str, boundary: str, variant: str) -> Run:
    """The one run of these names.

    Raises:
        ValueError: none or several.
    """
    names = (model, boundary, variant)
    found = [run for run in results["runs"] if (run["model"], run["boundary"], run["variant"]) == names]
    if len(found) != 1:
        raise ValueError(f"{len(found) or 'no'} runs of {'/'.join(names)} in these results: one is wanted")
    return found[0]


def groups(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The (model, boundary) pairs, in the order of the runs."""
    return list(dict.fromkeys((run["model"], run["boundary"]) for run in results["runs"]))


def variants(results: dict[str, Any]) -> list[str]:
    """The variants, in the order of the runs."""
    return list(dict.fromkeys(run["variant"] for run in results["runs"]))


def is_valid(results: dict[str, Any], model: str, boundary: str) -> bool:
    """Whether all variants gave the same output bits, traced and untraced, and nothing escaped the tracer."""
    runs = [run for run in results["runs"] if (run["model"], run["boundary"]) == (model, boundary)]
    return comparable(runs, ("output_sha256", "untraced_output_sha256"))


def comparable(runs: Sequence[Run], outputs: Sequence[str] = ("output_sha256",)) -> bool:
    """Whether runs gave the same bits, by the digests of `outputs`, and let the same values out of the tracer."""
    digests = {run[key] for run in runs for key in outputs}
    # An index into the table and the branch on a comparison read their value and need it plain; numbers do not.
    escaped = any(run["untracked_outputs"] or run["escapes"].keys() - {"index", "bool"} for run in runs)
    return len(digests) == 1 and not escaped and all(run["escapes"] == runs[0]["escapes"] for run in runs)


def wall_overhead(run: Run, baseline: Run, floor: dict[str, float]) -> Overhead:
    """Extra wall time against a baseline, of which `floor` is the paired ratio to itself."""
    ratio = paired_ratio(run["wall_time_s"], baseline["wall_time_s"])
    return overhead(ratio, lambda: floor, len(run["wall_time_s"]))


def claimed_overhead(run: Run, baseline: Run, floor: dict[str, float]) -> float | None:
    """What to hold against the claim: the upper end if that is below it, the median if all is above, else None."""
    found = wall_overhead(run, baseline, floor)
    high = max(found.high, floor["high"] - 1)  # nothing is known better than the noise allows
    # Few samples have a narrow interval by chance.
    if len(run["wall_time_s"]) >= LEAST_SAMPLES and high < WALL_TIME_CLAIM:
        return high
    return found.median if found.resolved and found.low >= WALL_TIME_CLAIM else None


def noise_floor(results: dict[str, Any], model: str, boundary: str) -> dict[str, float]:
    """Paired ratio of `resident` against itself."""
    for floor in results["noise_floor"]:
        if (floor["model"], floor["boundary"]) == (model, boundary):
            return floor["ratio"]
    raise ValueError(f"no noise floor of {model}/{boundary} in these results")


def verdict(results: dict[str, Any], model: str, boundary: str, variant: str = "offload_prefetch") -> Verdict:
    """The classification of a variant against `resident`."""
    run, resident = (find_run(results, model, boundary, name) for name in (variant, "resident"))
    claimed = claimed_overhead(run, resident, noise_floor(results, model, boundary))
    return classify(run["cost"] / resident["cost"], claimed, is_valid(results, model, boundary))


def most_ratio(results: dict[str, Any], model: str, boundary: str) -> float:
    """What offload_prefetch's price ratio is at most: if all reads of `resident`, its rows', too, cost one unit each.

    A class that holds here does not rest on how the denominator was counted; one that does not hold says nothing, since
    rows cost more than that wherever they lie.
    """
    # The toy reads every weight once a token, where a server reads it once a step of many tokens. However the other
    # reads are scheduled, the variant costs as much more as it does, and the baseline no less than one unit a read.
    run, resident = (find_run(results, model, boundary, name) for name in ("offload_prefetch", "resident"))
    return 1 + (run["cost"] - resident["cost"]) / resident["reads"]


def rows_ratio(results: dict[str, Any], model: str, boundary: str) -> float:
    """The price ratio of offload_prefetch if rows and their copies cost what they do, and all else one unit a read."""
    prices = []
    for name in ("offload_prefetch", "resident"):
        run = find_run(results, model, boundary, name)
        of_rows, reads = (sum(run[key].get(kind, 0) for kind in _OF_ROWS) for key in ("cost_by_kind", "reads_by_kind"))
        prices.append(of_rows + run["reads"] - reads)
    return prices[0] / prices[1]


def denominator_table(results: dict[str, Any]) -> str:
    """What each boundary divides by: reads of rows and of all else, the published ratio, and two with cheaper reads."""
    head = ["model", "boundary", "reads of rows", "other reads", "ratio"]
    rows = [[*head, "all else at a unit", "class", "rows too", "class"]]
    for model, boundary in groups(results):
        if boundary == "lookup":
            continue  # nothing else is read there
        resident, run = (find_run(results, model, boundary, name) for name in ("resident", "offload_prefetch"))
        own = resident["reads_by_kind"]["row"]
        reads = f"{own:,}", f"{resident['reads'] - own:,}"
        cheaper = (of(results, model, boundary) for of in (rows_ratio, most_ratio))
        classes = [cell for ratio in cheaper for cell in (f"{ratio:,.2f}", classify(ratio, None).label)]
        rows.append([model, boundary, *reads, f"{run['cost'] / resident['cost']:.3f}", *classes])
    return aligned(rows, left={0, 1, 6, 8})


def scale_text(run: Run) -> str:
    """By how much a run is smaller than the model that it stands for; empty where nothing was cut."""
    if "scale" not in run:
        return ""
    scale = run["scale"]
    rows, full_rows = scale["table_rows"]
    of = {name: f"{here:,} of {full:,}" for name, (here, full) in scale.items()}
    return (
        f"table 1/{round(full_rows / rows):,}, row {of['row_width']} values, hidden {of['hidden']}, "
        f"copies {of['hc_mult']}, layers {of['layers']}"
    )


def verdict_table(results: dict[str, Any]) -> str:
    """Price ratios of every variant to `resident`, and the class of the prefetch, per boundary.

    Lines of a model that was cut say by how much. Wall times are not shown: they are a Python interpreter's.
    """
    offloads = [name for name in variants(results) if name != "resident"]
    names = [name.removeprefix("offload_") for name in offloads]
    rows = [["model", "boundary", "resident price", *names, "verdict", "scale"]]
    reasons = {}
    for model, boundary in groups(results):
        resident = find_run(results, model, boundary, "resident")
        runs = [find_run(results, model, boundary, name) for name in offloads]
        ratios = [f"{run['cost'] / resident['cost']:.3f}" for run in runs]
        label, reason = verdict(results, model, boundary)
        reasons[reason] = label
        rows.append([model, boundary, f"{resident['cost']:,}", *ratios, label, scale_text(resident)])
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    notes = [f"{label}: {reason}" for reason, label in reasons.items()]
    return "\n".join(
        [
            aligned(rows, left={0, 1, *range(len(names) + 3, len(rows[0]))}),
            "",
            f"{', '.join(names)}: ByteDMD price / price of resident",
            *notes,
        ]
    )
