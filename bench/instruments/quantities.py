"""What a results file measured, as named quantities: samples of times and bytes, and exact numbers such as prices.

    found = quantities(read_results(path))
    found["steps / decode 4 x 1 / resident / step_s"].samples

Numbers under a name that ends in `_s` are samples, and so are bytes that crossed the bus; a number under the name of a
price is exact, and an entry of a list is named by the fields that say which one it is. What a board counted of energy
and clocks is not among them.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# Fields that say which entry of a list it is, in the order in which they are named.
_WHICH = (
    *("case", "kind", "part", "what", "sweep", "value", "table", "preset", "stream", "shape", "phase", "mode"),
    *("backbone", "model", "boundary", "label", "variant", "schedule", "page_cache", "way", "layout", "definition"),
    *("experts", "context", "batch", "tokens", "tokens_per_step", "asked_tokens", "ranks", "hot_share", "share"),
    *("padding_bytes", "prefetch", "row_bytes", "rows", "repeat", "bus"),
)
_EXACT = (
    *("cost", "price", "offload_naive", "offload_prefetch", "resident", "pinned"),
    *("reads", "distinct_rows", "faults"),
)
_CROSSED = ("copied", "counter", "pcie")  # bytes: by explicit copies, and as the driver or the kernel counted
_ONE_TIME = ("seconds", "total_s", "step_s")
_UNSEEN = "in graph"  # how schedules begin whose decode steps wait where no clock is; older results have 0 there
# Not what was measured, but on what and by whom; or what a model on paper says beside it.
_ABOUT = (
    *("environment", "git", "configuration", "limits", "processes", "needs", "held"),
    *("spans", "depth_histogram", "config", "model", "schedule"),
    *("launched_late", "disturbed"),  # samples that something else has met, by way or variant
)


class Quantity(NamedTuple):
    """One measured or computed thing.

    Attributes:
        samples: seconds or bytes; of an exact number, it alone.
        exact: the same on every machine, so that any difference is one.
    """

    samples: tuple[float, ...]
    exact: bool

    @property
    def median(self) -> float:
        """Of the samples."""
        return statistics.median(self.samples)


def quantities(results: Mapping[str, Any]) -> dict[str, Quantity]:
    """All of a file, in its order, by names that are the same for the same thing in another file."""
    # A file is walked, not known: a new kind of file needs nothing here.
    found: dict[str, Quantity] = {}
    for name, quantity in _walk(results, ()):
        number, unique = 1, name
        while unique in found:
            number += 1
            unique = f"{name} #{number}"
        found[unique] = quantity
    return found


def _walk(node: Any, path: tuple[str, ...], times: bool = False) -> Iterator[tuple[str, Quantity]]:
    """Quantities below a node; `times`: every list of numbers here is samples."""
    if isinstance(node, Mapping):
        unseen = str(node.get("schedule")).startswith(_UNSEEN)
        for key, value in node.items():
            if key not in _ABOUT:
                found = _field(key, value, path, times)
                yield from (each for each in found if not (unseen and each[0].endswith("decode_exposed_s")))
    elif isinstance(node, list):
        names = [_which(entry) for entry in node]
        shared = {name for name, count in Counter(names).items() if count > 1}
        for number, (name, entry) in enumerate(zip(names, node)):
            alone = name and name not in shared
            yield from _walk(entry, (*path, name if alone else f"{name} {number}".strip()), times)


def _field(key: str, value: Any, path: tuple[str, ...], times: bool) -> Iterator[tuple[str, Quantity]]:
    name = " / ".join((*path, key))
    if _numbers(value) and (times or key.endswith("_s") or key in _CROSSED):
        yield name, Quantity(tuple(map(float, value)), exact=False)
    elif isinstance(value, list) and value and all(isinstance(v, Mapping) and _rounds(v) for v in value):
        for part in _rounds(value[0]):
            yield f"{name} / {part}", Quantity(tuple(_total(entry[part]) for entry in value), exact=False)
    elif key in _CROSSED and isinstance(value, Mapping) and _number(value.get("value")):
        yield name, Quantity((float(value["value"]),), exact=False)
    elif key in _ONE_TIME and _number(value) and not times:
        yield name, Quantity((float(value),), exact=False)
    elif key in _EXACT and (_number(value) or _nested_numbers(value)):
        leaves = list(_leaves(value))
        for number, leaf in enumerate(leaves):
            yield (name if len(leaves) == 1 else f"{name} / {number}"), Quantity((leaf,), exact=True)
    elif isinstance(value, (Mapping, list)):
        yield from _walk(value, (*path, key), times or key.endswith("_s"))


def _rounds(entry: Mapping[str, Any]) -> list[str]:
    """What an entry that is one round of many spent on each part, or in all, and what it copied."""
    if "round" in entry:
        copied = [key for key in _CROSSED if _number(entry.get(key))]
        return [key for key, value in entry.items() if key.endswith("_s") and _numbers(value)] + copied
    return ["total_s"] if "total_s" in entry else []


def _total(value: Any) -> float:
    return float(sum(value)) if isinstance(value, list) else float(value)


def _which(entry: Any) -> str:
    if not isinstance(entry, Mapping):
        return ""
    found = ((key, _in_words(entry.get(key))) for key in _WHICH)
    # A number by itself says nothing: it is named.
    return " ".join(words if not words.isdigit() else f"{key} {words}" for key, words in found if words)


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):  # a table and a stream by their names, a shape or a bus by all that it says
        named = value.get("name") or value.get("preset") or ("" if "parameters" in value or "params" in value else None)
        return " ".join(str(v) for v in value.values() if v is not None) if named is None else str(named)
    if isinstance(value, list):
        return "x".join(map(str, value)) if len(value) <= 4 and _numbers(value) else ""
    return "" if value is None or value is False else str(value)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_number, value))


def _nested_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_number(v) or _nested_numbers(v) for v in value)


def _leaves(value: Any) -> Iterator[float]:
    if isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def last_line(results: Mapping[str, Any], path: Path | None) -> str:
    """A run's result as one JSON object: whose, where the whole lies, and the median of each of its quantities."""
    return json.dumps(
        {
            "benchmark": results.get("benchmark"),
            "results": None if path is None else str(path),
            "commit": (results.get("git") or {}).get("commit"),
            "medians": {name: quantity.median for name, quantity in quantities(results).items()},
        }
    )
