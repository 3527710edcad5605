"""JSON schemas from typed records, and what they refuse: any field that goes, comes, or changes its type."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import jsonschema
import pytest

from bench.schemas.generator import Must, NotRequired, json_schema, one_of, rules, when
from bench.schemas.results_files import RESULTS
from bench.schemas.values import Count, Text
from tests.bench.served import example as served
from tests.bench.wall import example as wall

COMMITTED = Path(__file__).parents[3] / "bench" / "results"
NAMES = {"toy": "bytedmd_toy_v41", "sweeps": "bytedmd_sweeps", "grid": "bytedmd_grid", "production": "production"}
# Objects whose names a run chooses: of records, and of plain values.
OF_RECORDS = {"models", "sweeps", "streams"}
OF_VALUES = {"configuration", "config", "plan", "packages", "unknown", "clocks_mhz", "device", "host", "first", "later"}
OF_VALUES |= {"cost_by_kind", "reads_by_kind", "depth_histogram", "escapes", "first_reads_by_order"}
ANYTHING = {"values"}


@rules(**when("kind", {"const": "b"}, {"note": {"type": "string"}}, {"note": {"type": "null"}}))
class Inner(TypedDict):
    """An inner
    record."""

    kind: Annotated[str, one_of("a", "b"), "which"]
    note: str | None


class Example(TypedDict):
    """An outer record."""

    version: Literal[1]
    inner: NotRequired[Inner | None]
    text: Annotated[Text | None, "t"]
    counts: Annotated[dict[str, Count], Must(minProperties=1)]
    choice: Annotated[int, one_of(0, 1)] | None
    anything: Any
    mixed: list[float | str]


RIGHT = {"version": 1, "text": None, "counts": {"a": 0}, "choice": None, "anything": [], "mixed": [0.5, "x"]}


def test_a_record_is_a_closed_object_of_described_fields():
    schema = json_schema(Example)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert (schema["description"], schema["additionalProperties"]) == ("An outer record.", False)
    assert schema["required"] == ["version", "text", "counts", "choice", "anything", "mixed"]
    fields = schema["properties"]
    assert fields["text"] == {"type": ["string", "null"], "minLength": 1, "description": "t"}
    count = {"type": "integer", "minimum": 0}
    assert fields["counts"] == {"type": "object", "additionalProperties": count, "minProperties": 1}
    assert (fields["version"], fields["choice"], fields["anything"]) == ({"const": 1}, {"enum": [0, 1, None]}, {})
    assert fields["mixed"] == {"type": "array", "items": {"type": ["number", "string"]}}
    inner, null = fields["inner"]["anyOf"]
    assert (inner["description"], null) == ("An inner record.", {"type": "null"})
    assert inner["properties"]["kind"] == {"type": "string", "enum": ["a", "b"], "description": "which"}


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"inner": {"kind": "b", "note": "x"}}, True),
        ({"inner": {"kind": "a", "note": None}}, True),
        ({"inner": None}, True),
        ({"inner": {"kind": "b", "note": None}}, False),
        ({"inner": {"kind": "a", "note": "x"}}, False),
        ({"inner": {"kind": "c", "note": None}}, False),
        ({"version": 2}, False),
        ({"text": ""}, False),
        ({"counts": {}}, False),
        ({"counts": {"a": -1}}, False),
        ({"choice": 2}, False),
        ({"mixed": [None]}, False),
        ({"more": 1}, False),
    ],
)
def test_what_fits(change, fits):
    assert jsonschema.Draft202012Validator(json_schema(Example)).is_valid({**RIGHT, **change}) == fits


@pytest.mark.parametrize("kind", [set, tuple[int, int], list[bytes], Literal[1, 2]])
def test_what_json_does_not_have_is_refused(kind):
    with pytest.raises(TypeError, match="has no place in JSON"):
        json_schema(kind)


def short(content: Any) -> Any:
    """A results file with the first two entries of every list of objects or lists, so that it is checked at once."""
    if isinstance(content, dict):
        return {name: short(value) for name, value in content.items()}
    if isinstance(content, list) and content and isinstance(content[0], (dict, list)):
        return [short(value) for value in content[:2]]
    return content


def committed(name: str) -> Any:
    return short(json.loads((COMMITTED / f"{NAMES[name]}.json").read_text(encoding="utf-8")))


def examples() -> dict[str, tuple[str, Any]]:
    """By what it is: which record it is, and a results file."""
    found = {name: ("sweeps" if name == "grid" else name, committed(name)) for name in NAMES}
    for device in ("cpu", "cuda"):
        found[f"wall on {device}"] = ("wall", short(wall.example(device, steps=1)))
        found[f"served on {device}"] = ("served", short(served.example(device)))
    return found


EXAMPLES = examples()


def records(content: Any, name: str = "results"):
    """Every record in a results file, with its name."""
    if isinstance(content, list):
        for value in content[:1]:
            yield from records(value, name)
    elif isinstance(content, dict) and name not in OF_VALUES:
        if name not in OF_RECORDS:
            yield name, content
        for below, value in content.items():
            yield from records(value, below)


@pytest.mark.parametrize("which", EXAMPLES)
def test_no_field_comes_or_changes_its_type(which):
    schema, content = EXAMPLES[which]
    validator = jsonschema.Draft202012Validator(json_schema(RESULTS[f"bench/schemas/{schema}.py"]))
    content = json.loads(json.dumps(content))
    validator.validate(content)
    accepted = []
    for name, record in records(content):
        record["of nobody"] = 1
        accepted += [f"{name} + of nobody"] if validator.is_valid(content) else []
        del record["of nobody"]
        for field in set(record) - ANYTHING:
            kept = copy.deepcopy(record[field])
            record[field] = [{"no": "type"}]
            accepted += [f"{name}.{field}"] if validator.is_valid(content) else []
            record[field] = kept
    assert accepted == []
