"""What a results file says, held against itself: what nothing could have measured is refused where it is read.

    check(json.loads(path.read_text()))      # ValueError: steps 0 / runs 1 / step_s holds -0.01, ...

A schema says what a file may hold, and to apply it takes a package that is not on every machine. This takes none, and
finds what would become a ratio: times below 0, waits longer than what they are part of, counts that are not whole, sums
that are not those of their parts, rounds that not all variants have or one has twice, a checksum of another plan,
a variant whose table lies where another's does.

What it cannot find: a plausible number in place of another, such as times exchanged between two variants while their
tables and bytes stay, or the prices of two layouts. Prices can be computed again (`make findings`), times only measured
again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from engram_ref.hashing.plan import checksum

Json = dict[str, Any]
_NUMBERS = {int, float}  # of the types that JSON is read as
# Times and rates that something is divided by; others, such as waits, may be 0.
_DIVIDED = ("step_s", "samples_s", "prefill_s", "decode_s", "wall_time_s", "bytes_per_s", "reads_per_s")
_COUNTS = (
    *("cost", "reads", "lookups", "hits", "distinct_rows", "rows_requested", "rows_unique", "output_tokens"),
    *("copied", "counter", "from_ids", "cost_by_kind", "reads_by_kind"),
)
_SUMS = {"cost": "cost_by_kind", "reads": "reads_by_kind"}
_WAITS = {"exposed_s": "step_s", "decode_exposed_s": "decode_s"}  # part of the time beside them, sample by sample
_PARTS = {"hits": "lookups", "rows_unique": "rows_requested"}  # at most as many
# Where the table of a variant lies; a hot tier's lies in several places.
_HELD: dict[str, set[str]] = {
    **{"no_engram": set(), "own_compute": set(), "resident": {"device"}, "offload_disk": {"disk"}},
    **{name: {"host"} for name in ("offload_naive", "offload_prefetch", "offload_uva", "throttled")},
}
_SCHEDULES = {"offload_naive": "synchronous", "offload_prefetch": "prefetched"}  # what tells these two apart


def check(content: Json) -> None:
    """Hold a results file against itself.

    Raises:
        ValueError: it contradicts itself, or holds what nothing can have measured; the message says where.
    """
    _check(content, ())


def _check(node: Any, path: tuple[str, ...]) -> None:
    if isinstance(node, dict):
        for name, test in _TESTS:
            if name in node:
                test(node, path)
        for key, value in node.items():
            if key.endswith("_s") or key in _COUNTS:
                _check_numbers(key, value, path)
            if isinstance(value, (dict, list)):
                _check(value, (*path, key))
    elif isinstance(node, list):
        for number, inner in enumerate(node):
            if isinstance(inner, (dict, list)):
                _check(inner, (*path[:-1], f"{path[-1]} {number}") if path else ())


def _check_numbers(key: str, value: Any, path: tuple[str, ...]) -> None:
    is_count, is_divided = key in _COUNTS, key in _DIVIDED
    for number in _numbers(value):
        if not 0 <= number < math.inf or (is_divided and number == 0):
            what = "a time or rate is above 0" if is_divided else "it is finite, and not below 0"
            raise ValueError(f"{_where(path, key)} holds {number}: {what}, measure again")
        if is_count and number != int(number):
            raise ValueError(f"{_where(path, key)} holds {number}: counts are whole, measure again")


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return [value] if type(value) in _NUMBERS else []
    if _NUMBERS.issuperset(map(type, value)):  # samples: most of a file
        return value
    return [number for inner in value for number in _numbers(inner)]


def _check_sum(node: Json, path: tuple[str, ...], whole: str, parts: str) -> None:
    if whole in node and isinstance(node[parts], dict) and node[whole] != sum(_numbers(node[parts])):
        raise ValueError(f"{_where(path, whole)} is {node[whole]}, which is not the sum of {parts}: measure again")


def _check_part(node: Json, path: tuple[str, ...], whole: str, part: str) -> None:
    few, many = node[part], node.get(whole)
    if isinstance(few, int) and isinstance(many, int) and few > many:
        raise ValueError(f"{_where(path, part)} is {few}, of {many} {whole}: measure again")


def _check_wait(node: Json, path: tuple[str, ...], whole: str, wait: str) -> None:
    # Altogether: the accelerator's clock has the waits and the host's the steps, and one may be read later.
    waited, took = (sum(_numbers(_listed_in(node, key))) for key in (wait, whole))
    if len(_listed_in(node, wait)) == len(_listed_in(node, whole)) and waited > took:
        raise ValueError(f"{_where(path, wait)} is {waited:.3g} s of {took:.3g} s {whole}: measure again")


def _check_rounds(step: Json, path: tuple[str, ...]) -> None:
    """Index i of all runs of a step is of the same round."""
    runs = _listed_in(step, "runs")
    lengths = _lengths((run, key) for run in runs for key in ("step_s", "exposed_s") if isinstance(run, dict))
    if len(lengths := lengths - {0}) > 1:  # no rows are waited for without a table
        raise ValueError(f"{_where(path, 'runs')} have {_listed(lengths)} rounds: all of a step have as many")


def _check_passes(case: Json, path: tuple[str, ...]) -> None:
    """A round is the same steps under every variant."""
    rounds: dict[str, set[int]] = {}
    rows = case["rows"] if isinstance(case["rows"], list) else []
    for row in (row for row in rows if isinstance(row, dict)):
        samples = [sample for sample in _listed_in(row, "rounds") if isinstance(sample, dict)]
        seen = [str(sample.get("round")) for sample in samples]
        if twice := {number for number in seen if seen.count(number) > 1}:
            raise ValueError(f"{_where(path, row.get('label'))} has round {min(twice)} twice: measure again")
        for sample in samples:
            each = _lengths((sample, key) for key in ("decode_s", "window_s", "decode_exposed_s"))
            rounds.setdefault(str(sample.get("round")), set()).update(each)
    for number, lengths in rounds.items():
        if len(lengths) > 1:
            raise ValueError(
                f"{_where(path, 'rows')} have {_listed(lengths)} decode steps in round {number}: one count"
            )


def _lengths(lists: Iterable[tuple[Json, str]]) -> set[int]:
    return {len(node[key]) for node, key in lists if isinstance(node.get(key), list)}


def _listed_in(node: Json, key: str) -> list[Any]:
    return node[key] if isinstance(node.get(key), list) else []


def _check_held(row: Json, path: tuple[str, ...]) -> None:
    variant, held = row.get("variant"), row["held"]
    if not isinstance(held, dict) or not isinstance(variant, str) or variant not in _HELD:
        return
    where = {place for place, nbytes in held.items() if nbytes}
    if where != _HELD[variant]:
        places = [", ".join(sorted(found)) or "nowhere" for found in (where, _HELD[variant])]
        raise ValueError(f"{_where(path, variant)} holds its table in: {places[0]}; that variant's is in: {places[1]}")
    if not where - {"device"}:
        _check_moved(row, path)
    if "schedule" in row and row["schedule"] != _SCHEDULES.get(variant, row["schedule"]):
        raise ValueError(f"{_where(path, variant)} is {row['schedule']!r}; that variant is {_SCHEDULES[variant]!r}")


def _check_moved(row: Json, path: tuple[str, ...]) -> None:
    """A table where the compute is, or none: no byte of rows is copied or read from a file."""
    samples = [row["bytes"], *_listed_in(row, "rounds")] if "bytes" in row else _listed_in(row, "rounds")
    moved = sum(sum(_numbers(sample.get("copied"))) for sample in samples if isinstance(sample, dict))
    if moved:
        raise ValueError(f"{_where(path, row['variant'])} copied {moved} bytes: they are another variant's samples")


def _check_plan(node: Json, path: tuple[str, ...]) -> None:
    if checksum({key: value for key, value in node.items() if key != "checksum"}) != node["checksum"]:
        raise ValueError(f"{_where(path, 'checksum')} is of other numbers than those beside it: measure again")


def _where(path: tuple[str, ...], key: Any) -> str:
    return " / ".join((*path, str(key)))


def _listed(lengths: set[int]) -> str:
    return " and ".join(map(str, sorted(lengths)))


# In this order, where a node has the name: of several contradictions the first is told.
_TESTS: list[tuple[str, Callable[[Json, tuple[str, ...]], None]]] = [
    ("held", _check_held),
    ("checksum", _check_plan),
    ("rows", _check_passes),
    *((parts, partial(_check_sum, whole=whole, parts=parts)) for whole, parts in _SUMS.items()),
    *((part, partial(_check_part, whole=whole, part=part)) for part, whole in _PARTS.items()),
    *((wait, partial(_check_wait, whole=whole, wait=wait)) for wait, whole in _WAITS.items()),
    ("runs", _check_rounds),
]
