"""The schemas of results files as tables in Markdown: a line per field, nested fields by their path."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from bench.instruments.words import markdown
from bench.schemas.generator import json_schema
from bench.schemas.results_files import RESULTS


def schema_tables() -> str:
    """Every kind of results file, by its title."""
    return "\n\n".join(schema_table(json_schema(record), where) for where, record in RESULTS.items())


def schema_table(schema: dict[str, Any], where: str) -> str:
    """One schema: its title and description, and its fields; alternatives one after the other, by their titles.

    Args:
        where: the file that says so.
    """
    lines = [f"## {schema['title']}", "", f"`{where}`. {schema.get('description', '')}".strip(), ""]
    for part in schema.get("anyOf", ()):
        lines += [f"### {part['title']}", "", _table(part), ""]
    return "\n".join(lines if "anyOf" in schema else [*lines, _table(schema)]).rstrip()


def _table(schema: dict[str, Any]) -> str:
    rows = [
        [f"`{name}`", _cell(_type(rules)), "yes" if required else "", _cell(rules.get("description", ""))]
        for name, rules, required in _fields(schema, "")
    ]
    return markdown(["field", "type", "required", "meaning"], rows)


def _fields(schema: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Name, rules and whether it is required, for every field below a node, parents before children."""
    required = set(schema.get("required", ()))
    named = schema.get("properties", {})
    for name in [*named, *sorted(required - named.keys())]:
        rules = named.get(name, {})
        yield f"{prefix}{name}", rules, name in required
        yield from _fields(rules, f"{prefix}{name}.")
    for key, step in (("items", "[]"), ("additionalProperties", ".*")):
        below = schema.get(key)
        if isinstance(below, dict):
            yield from _fields(below, f"{prefix.removesuffix('.')}{step}.".lstrip("."))
    for part in _alternatives(schema):
        yield from _fields(part, prefix)


def _alternatives(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The types of a union; what else stands in `anyOf` are conditions."""
    return [part for part in schema.get("anyOf", ()) if "type" in part]


def _type(rules: dict[str, Any]) -> str:
    if "const" in rules:
        return f"`{json.dumps(rules['const'])}`"
    if "enum" in rules:
        return ", ".join(f"`{json.dumps(value)}`" for value in rules["enum"])
    kind = rules.get("type") or list(dict.fromkeys(part["type"] for part in _alternatives(rules)))
    return " or ".join(kind) if isinstance(kind, list) else kind


def _cell(text: str) -> str:
    """Text that Markdown leaves as it is: no column ends in it, and brackets are no links."""
    for mark in "|[]":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("\n", " ")
