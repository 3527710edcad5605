"""What the samples of an end-to-end run mean: the overhead taken apart, tokens per second, and what a slower bus does.

    case = results["cases"][0]
    parts = decomposition(case, "decode")           # own compute, lookup, what was not hidden
    against(case, row, "resident", "decode")        # overhead against a baseline: "no_engram" or "resident"
    breaking_bus(case)                              # between which delays 3 % are lost

Pure functions of a results file. A part is a difference of two variants as a share of the model without an Engram
layer, the median over rounds with a 95 % bootstrap interval. It is not resolved where its interval holds 0 or reaches
into the noise floor, `resident` against itself.
"""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from bench.instruments.claim import WALL_TIME_CLAIM
from bench.instruments.timing import (
    LEAST_SAMPLES,
    NotMeasured,
    Overhead,
    overhead,
    paired_ratio,
    quantile,
)
from bench.schemas.served import Freed, Reading, Weights
from bench.setup.variants import ASKING

Json = dict[str, Any]
PHASES = ("prefill", "decode", "together", "token")  # token: the median decode step of a pass
# Overhead -> the row that has it, and the row without: alternatives in the order in which they are looked for.
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "own compute": (("own_compute",), ("no_engram",)),
    "lookup": (("resident",), ("own_compute",)),
    "not hidden": (("offload_prefetch", "offload_disk prefetched"), ("resident",)),
}
WHOLE = "overhead"
# What an offloaded table is compared with, and whose baseline that is.
BASELINES = {"no_engram": "no Engram at all, the paper's baseline", "resident": "the resident table, our baseline"}
NO_LOOKUP = ("no_engram", "own_compute")
LAUNCH_BOUND = 2.0  # times as long as reading the weights takes: the memory idles for the better part of a step
_STAGED = ("offload_naive", "offload_prefetch", "throttled")  # whose rows are copied as they are asked for


def case_name(case: Json) -> str:
    """Model, batch and stream, for a reader."""
    return f"{case['backbone']}, batch {case['batch']}, {case['stream']['name']}"


def row_of(case: Json, label: str) -> Json:
    """The row of a label.

    Raises:
        NotMeasured: there is none, or it has no samples.
    """
    return first_of(case, (label,))


def first_of(case: Json, labels: tuple[str, ...]) -> Json:
    """The first of these rows that was measured.

    Raises:
        NotMeasured: none was.
    """
    for row in case["rows"]:
        if row["label"] in labels and row["rounds"]:
            return row
    raise NotMeasured(f"{' or '.join(labels)} was not measured")


def seconds(sample: Json, phase: str) -> float:
    """Time of one pass in a phase, or of one decode step: the median for `token`, the mean for `step`."""
    if phase == "token":  # no stall moves it
        return statistics.median(sample["decode_s"])
    if phase == "step":
        return statistics.fmean(sample["decode_s"])
    parts = {"prefill": ("prefill_s",), "decode": ("decode_s",), "together": ("prefill_s", "decode_s")}[phase]
    return sum(sum(sample[part]) for part in parts)


def paired(rows: list[Json], phase: str) -> list[list[float]]:
    """Seconds of each row in the rounds that all of them have, measured by one process.

    Raises:
        NotMeasured: there is no such round.
    """
    # What the machine does meanwhile happens to a whole round, and to no other process's.
    found = [{(sample["round"], sample["process"]): seconds(sample, phase) for sample in row["rounds"]} for row in rows]
    common = sorted(set.intersection(*(set(times) for times in found)))
    if not common:
        raise NotMeasured(f"{', '.join(row['label'] for row in rows)} have no round in common")
    return [[times[key] for key in common] for times in found]


def share(later: list[float], earlier: list[float], base: list[float]) -> dict[str, float]:
    """1 + (later - earlier) / base, round by round: median and interval, to be compared with 1."""
    return paired_ratio([a - b + c for a, b, c in zip(later, earlier, base)], base)


def difference(case: Json, later: Json, earlier: Json, phase: str, baseline: str = "no_engram") -> Overhead:
    """By how much a row takes longer than another one, as a share of a baseline's time.

    Raises:
        NotMeasured: a row is missing.
    """
    base = row_of(case, baseline)
    times = paired([later, earlier, base], phase)
    return overhead(share(*times), lambda: noise_floor(case, phase, baseline), len(times[0]))


def against(case: Json, row: Json, baseline: str, phase: str) -> Overhead:
    """The overhead of a row against one of BASELINES, as a share of that baseline's time.

    Raises:
        NotMeasured: the baseline is missing.
    """
    return difference(case, row, row_of(case, baseline), phase, baseline)


def prefetched_row(case: Json) -> Json:
    """The row of the prefetched table, which the overhead is of.

    Raises:
        NotMeasured: there is none.
    """
    return first_of(case, PARTS["not hidden"][0])


def noise_floor(case: Json, phase: str, baseline: str = "no_engram") -> dict[str, float]:
    """`resident` against itself as `share` gives it, in terms of a baseline.

    Raises:
        NotMeasured: it was not measured twice, or not often enough.
    """
    times = paired([row_of(case, name) for name in ("resident again", "resident", baseline)], phase)
    if len(times[0]) < LEAST_SAMPLES:
        raise NotMeasured(f"{len(times[0])} rounds: a noise floor needs {LEAST_SAMPLES}")
    return share(*times)


def decomposition(case: Json, phase: str) -> dict[str, Overhead]:
    """The parts of the overhead, in their order, and the whole of it.

    Raises:
        NotMeasured: a row of a part is missing.
    """
    parts = {
        name: difference(case, first_of(case, more), first_of(case, less), phase)
        for name, (more, less) in PARTS.items()
    }
    # Measured by itself: the medians of parts need not add up to the median of the whole.
    return {**parts, WHOLE: against(case, prefetched_row(case), "no_engram", phase)}


# --- what a user sees ---------------------------------------------------------------------------------


def tokens_per_second(case: Json, row: Json) -> list[float]:
    """Output tokens per second of each round, prefill included."""
    made = {entry["round"]: entry["output_tokens"] for entry in case["rounds"]}
    return [made[sample["round"]] / seconds(sample, "together") for sample in row["rounds"]]


def per_step(row: Json, name: str) -> list[float]:
    """All samples of a kind, of all rounds: `decode_s`, `first_token_s`, `window_s`, `decode_exposed_s`, ..."""
    return [value for sample in row["rounds"] for value in sample[name]]


def token_times(row: Json) -> dict[str, float]:
    """Time per output token: median and 99th percentile of all decode steps."""
    times = per_step(row, "decode_s")
    return {"median": statistics.median(times), "p99": quantile(times, 0.99)}


def freed(case: Json, variant: str, on_device: int) -> Freed:
    """Device memory that a table leaves free against a resident one, which holds all of its bytes there; and why not.

    Args:
        on_device: bytes of the variant's table.
    """
    if variant in NO_LOOKUP:
        return {"value": None, "why": "no table is looked up"}
    return {"value": case["table"]["bytes"] - on_device, "why": None}


def freed_bytes(case: Json, row: Json) -> int | None:
    """Device memory that a row's table leaves free against a resident one; None where nothing is looked up."""
    return freed(case, row["variant"], row["held"]["device"])["value"]


def weight_reading(limits: Json, case: Json, row: Json) -> Weights:
    """How fast a median decode step reads the weights, each once, and whether something else holds it up; or why not.

    It is called launch-bound where it takes over twice as long as its weights do at the bandwidth that was measured on
    the device.
    """
    if limits["gather"] is None:
        return {"value": None, "why": "a CPU: no kernels are launched, and nothing is read from a device's memory"}
    times = per_step(row, "decode_s")
    if not times:
        return {"value": None, "why": "no decode step was measured"}
    step, limit = statistics.median(times), limits["gather"]["bytes_per_s"]
    # Without keys and values: a large batch with a long context is marked by what it reads of them.
    nbytes = case["weight_bytes"]["model"] + (case["weight_bytes"]["engram"] if row["variant"] != "no_engram" else 0)
    value: Reading = {
        "bytes": nbytes,
        "bytes_per_s": nbytes / step,
        "limit_bytes_per_s": limit,
        "launch_bound": step > LAUNCH_BOUND * nbytes / limit,
    }
    return {"value": value, "why": None}


def over_control(case: Json, row: Json) -> int | None:
    """Bytes that a row's pass received over PCIe, less those of the model without Engram; None where one is unknown."""
    try:
        both = [found["pcie"] and found["pcie"]["value"] for found in (row, row_of(case, "no_engram"))]
    except NotMeasured:
        return None
    return None if None in both else both[0] - both[1]


def joules(row: Json) -> dict[int, float]:
    """Energy of the whole board in each pass, by round, idle power included; those without a counter are missing."""
    boards = {sample["round"]: sample["board"]["value"] for sample in row["rounds"] if sample.get("board")}
    ends = {number: (value["joules_before"], value["joules_after"]) for number, value in boards.items() if value}
    return {number: after - before for number, (before, after) in ends.items() if None not in (before, after)}


def pass_joules(row: Json) -> float | None:
    """The same in a median pass; None where the counter is not there."""
    spent = joules(row)
    return statistics.median(spent.values()) if spent else None


def hit_rate(row: Json) -> float | None:
    """Rows found on the device, of those asked for."""
    lookups = sum(sample["lookups"] for sample in row["rounds"])
    return sum(sample["hits"] for sample in row["rounds"]) / lookups if lookups else None


def joules_per_token(row: Json) -> float | None:
    """Energy of the board above idle, per output token; None where it was not resolved."""
    energy = row["energy"] and row["energy"]["value"]
    return energy and energy["joules_per_step"] / energy["output_tokens_per_step"]


def same_tokens(case: Json) -> bool:
    """Whether in each round all variants with an Engram layer chose the same tokens."""
    chosen: dict[int, set[str]] = {}
    for row in case["rows"]:
        if row["variant"] != "no_engram":  # another model, which chooses others
            for sample in row["rounds"]:
                chosen.setdefault(sample["round"], set()).add(sample["tokens_sha256"])
    return all(len(digests) == 1 for digests in chosen.values())


def step_bytes(case: Json) -> int:
    """Bytes of rows that one decode step asks for."""
    return case["batch"] * case["table"]["columns"] * case["table"]["row_bytes"]


def fetch_floor(results: Json, case: Json) -> float:
    """Seconds that the unique rows of a median round take at the measured copy bandwidth."""
    return round_bytes(case)[1] / results["limits"]["copy"]["bytes_per_s"]


def round_bytes(case: Json) -> tuple[float, float]:
    """Bytes of rows that a median round asks for, and those left when each step asks for a row once; from the ids."""
    counts = [(entry["rows_requested"], entry["rows_unique"]) for entry in case["rounds"]]
    requested, unique = (statistics.median(column) * case["table"]["row_bytes"] for column in zip(*counts))
    return requested, unique


def copies_agree(case: Json, row: Json) -> bool:
    """Whether a row that is staged copied in every round exactly what the ids ask for; true of all that are not."""
    # What a graph asks for by itself, no CPU copies.
    if case["device"] == "cpu" or row["variant"] not in _STAGED or row["schedule"] == ASKING:
        return True
    row_bytes = case["table"]["row_bytes"]
    # Files of before these were counted have no `bytes_staged`.
    asked = {entry["round"]: entry.get("bytes_staged", entry["rows_requested"] * row_bytes) for entry in case["rounds"]}
    return all(sample["copied"] == asked[sample["round"]] for sample in row["rounds"])


def exposed_in_round(row: Json) -> float:
    """Median over rounds of the time that the model waited for rows."""
    return statistics.median(
        sum(sample["prefill_exposed_s"]) + sum(sample["decode_exposed_s"]) for sample in row["rounds"]
    )


# --- a slower bus -------------------------------------------------------------------------------------


class Slowed(NamedTuple):
    """One slowed bus.

    Attributes:
        label: of the row.
        delay_s: from the request until a decode step's rows have arrived.
        window_s: median time between the request and the join.
        exposed_s: median time waited there.
        extra: than `resident`, as a share of the model without Engram.
        whole: overhead against the model without Engram.
        noise: upper end of `resident` against itself, likewise.
        rounds: that it was measured in.
    """

    label: str
    delay_s: float
    window_s: float
    exposed_s: float
    extra: Overhead
    whole: Overhead
    noise: float
    rounds: int

    @property
    def breaks(self) -> bool | None:
        """Whether the bus alone costs more than 3 %; None where interval, noise or few rounds leave that open."""
        if self.extra.low > WALL_TIME_CLAIM and self.extra.resolved:
            return True
        # Few rounds have a narrow interval by chance.
        holds = self.rounds >= LEAST_SAMPLES and max(self.extra.high, self.noise) <= WALL_TIME_CLAIM
        return False if holds else None


def delay_s(case: Json, row: Json) -> float:
    """Seconds that a slowed bus takes from the request until a decode step's rows have arrived."""
    rate = row["bus"]["bytes_per_s"]
    return row["bus"]["latency_s"] + (step_bytes(case) / rate if rate else 0.0)


def slowed(case: Json) -> list[Slowed]:
    """All slowed buses, fastest first, by their median decode steps: a delay is the same in every step.

    Raises:
        NotMeasured: no `resident`, no noise floor or no model without Engram to compare with.
    """
    found, noise = [], noise_floor(case, "token")["high"] - 1
    for row in case["rows"]:
        if row["bus"] and row["rounds"]:
            found.append(
                Slowed(
                    row["label"],
                    delay_s(case, row),
                    statistics.median(per_step(row, "window_s")),
                    statistics.median(per_step(row, "decode_exposed_s")),
                    difference(case, row, row_of(case, "resident"), "token"),
                    difference(case, row, row_of(case, "no_engram"), "token"),
                    noise,
                    len(row["rounds"]),
                )
            )
    return sorted(found, key=lambda one: one.delay_s)


def window_s(buses: list[Slowed]) -> float:
    """Seconds between a request and its join, which no bus changes: the median over all of them."""
    return statistics.median(one.window_s for one in buses)


class Break(NamedTuple):
    """Between which delays of a step's rows 3 % are lost: the longest that holds, the shortest that breaks."""

    holds_s: float | None
    breaks_s: float | None
    predicted_s: float

    def bandwidths(self, nbytes: int) -> tuple[float | None, float | None]:
        """Bytes per second at which `nbytes` take these delays: that breaks, that holds."""
        at_break, at_hold = (nbytes / delay if delay else None for delay in (self.breaks_s, self.holds_s))
        return at_break, at_hold


def breaking_bus(case: Json) -> Break:
    """Where a slower bus costs 3 %.

    Raises:
        NotMeasured: no bus was slowed.
    """
    buses = slowed(case)
    if not buses:
        raise NotMeasured("no bus was slowed")
    step = token_times(row_of(case, "no_engram"))["median"]
    breaking = [one.delay_s for one in buses if one.breaks]
    first = min(breaking, default=None)
    holding = [one.delay_s for one in buses if one.breaks is False and (first is None or one.delay_s < first)]
    window = window_s(buses)
    # Predicted: the window before the join, and 3 % of a step more; `resident` needs the rows as early.
    return Break(max(holding, default=None), first, window + WALL_TIME_CLAIM * step)
