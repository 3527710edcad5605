"""The questions that a sceptic asks of an end-to-end run, answered from its samples, a line for each.

Is every fetch above its floor? Is `resident` the same as itself? Do times come in the order in which work is added?
Is what a slow bus exposes its delay less the window? Do more hot rows hit more often? Did all variants choose the
same? Was any row slow for its weights, or the board slowed? Which class follows, against which baseline?
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

from bench.instruments.timing import NotMeasured
from bench.instruments.words import short, signed_percent
from bench.served import numbers
from bench.served.classes import JUDGED, NO_CLASS, classify, offloaded_labels
from bench.served.numbers import Json

# Each adds work to the one before; prefetched fetches are missing, for what they add may be hidden.
ORDER = ("no_engram", "own_compute", "resident", "offload_naive", "offload_disk synchronous")
_PHASE = "token"
_NOT_SLOWING = {"idle", "application clocks"}  # what the board says of a pass that has just ended, or was told


def reading(results: Json) -> str:
    """The answers, by case."""
    lines = []
    for case in results["cases"]:
        lines.append(numbers.case_name(case))
        for question, answer in QUESTIONS.items():
            try:
                lines.append(f"  {question}: {answer(results, case)}")
            except NotMeasured as why:
                lines.append(f"  {question}: unknown, {why}")
    return "\n".join(lines)


def _floor(results: Json, case: Json) -> str:
    floor = numbers.fetch_floor(results, case)
    waited = {
        row["label"]: numbers.exposed_in_round(row)
        for row in case["rows"]
        # On a GPU, rows of a resident table cross no bus: their floor is another.
        if row["schedule"] in ("synchronous", "in place") and (case["device"] == "cpu" or row["variant"] != "resident")
        if row["rounds"]
    }
    below = [label for label, seconds in waited.items() if seconds < floor]
    if below:
        return f"no, {', '.join(below)}: floor or time is wrong"
    return f"yes, at least {short(min(waited.values()) / floor)} times" if waited else "nothing was fetched alone"


def _itself(results: Json, case: Json) -> str:
    found = numbers.noise_floor(case, _PHASE)
    interval = f"[{signed_percent(found['low'] - 1)}, {signed_percent(found['high'] - 1)}] %"
    return f"{'yes' if found['low'] <= 1 <= found['high'] else 'NO'}, {interval}"


def _order(results: Json, case: Json) -> str:
    labels = [label for label in ORDER if any(row["label"] == label and row["rounds"] for row in case["rows"])]
    wrong = []
    for number, less in enumerate(labels):
        for more in labels[number + 1 :]:
            part = numbers.difference(case, numbers.row_of(case, more), numbers.row_of(case, less), _PHASE)
            if part.resolved and part.high < 0:
                wrong.append(f"{more} is faster than {less}")
    return f"NO, {'; '.join(wrong)}" if wrong else f"nothing resolved is against it ({' < '.join(labels)})"


def _bus(results: Json, case: Json) -> str:
    # From twice the window on, noise is small beside the difference.
    slow = [one for one in numbers.slowed(case) if one.delay_s > 2 * one.window_s]
    if not slow:
        return "no bus was slow enough to tell" if numbers.slowed(case) else "no bus was slowed"
    ratios = [one.exposed_s / (one.delay_s - one.window_s) for one in slow]
    return f"measured over expected {', '.join(short(ratio, digits=3) for ratio in ratios)}"


def _hits(results: Json, case: Json) -> str:
    rows = [row for row in case["rows"] if row["hot_share"] is not None]
    rates = [(row["hot_share"], numbers.hit_rate(row)) for row in rows]
    found = [(share, rate) for share, rate in rates if rate is not None]
    if not found:
        return "no hot rows were measured"
    text = ", ".join(f"{100 * share:g} % of the rows hold {100 * rate:.1f} % of the lookups" for share, rate in found)
    return f"{'yes' if found == sorted(found, key=lambda one: one[1]) else 'NO'}, {text}"


def _tokens(results: Json, case: Json) -> str:
    passes = statistics.median(len(row["rounds"]) for row in case["rows"])
    return f"{'yes' if numbers.same_tokens(case) else 'NO'}, in {passes:g} rounds"


def _launches(results: Json, case: Json) -> str:
    known = [row for row in case["rows"] if row.get("weights") and row["weights"]["value"]]
    if not known:
        return next(
            (row["weights"]["why"] for row in case["rows"] if row.get("weights")), "unknown, these results do not say"
        )
    bound = [row["label"] for row in known if row["weights"]["value"]["launch_bound"]]
    return f"YES, {', '.join(bound)}" if bound else f"none of {len(known)}"


def _board(results: Json, case: Json) -> str:
    boards = [sample["board"] for row in case["rows"] for sample in row["rounds"] if sample.get("board")]
    known = [board["value"]["throttled"] for board in boards if board["value"]]
    known = [found for found in known if found is not None]
    if not known:
        return "unknown, no pass asked the board, or it did not answer"
    slowing = sorted({reason for found in known for reason in found} - _NOT_SLOWING)
    return f"YES, {', '.join(slowing)}" if slowing else f"no, in {len(known)} passes"


def _classes(baseline: str) -> Callable[[Json, Json], str]:
    """Of every place of the table, in decode steps and in the whole pass."""

    def told(results: Json, case: Json) -> str:
        if case["device"] == "cpu":
            return NO_CLASS
        texts = []
        for label in offloaded_labels(case):
            both = [classify([case], label, baseline, phase)[0] for phase in JUDGED]
            texts.append(f"{label} {' / '.join(both)}")
        return f"{', '.join(texts)} ({' / '.join(JUDGED.values())})" if texts else "nothing was offloaded"

    return told


QUESTIONS: dict[str, Callable[[Json, Json], str]] = {
    "above the floor": _floor,
    "resident is itself": _itself,
    "order": _order,
    "slow bus, delay less window": _bus,
    "more hot rows, more hits": _hits,
    "same tokens": _tokens,
    "slow for its weights": _launches,
    "board slowed": _board,
    "class against no_engram": _classes("no_engram"),
    "class against resident": _classes("resident"),
}
