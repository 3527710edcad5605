"""The JSON schemas of results files as tables in Markdown: a line per field, nested fields by their path."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "schemas"


def schema_tables() -> str:
    """Every `bench/schemas/*.schema.json`, by file name."""
    return "\n\n".join(schema_table(path) for path in sorted(FOLDER.glob("*.schema.json")))


def schema_table(path: Path) -> str:
    """One schema: its title and description, and its fields; alternatives one after the other, by their names."""
    schema = json.loads(path.read_text(encoding="utf-8"))
    lines = [f"## {schema['title']}", "", f"`bench/schemas/{path.name}`. {schema.get('description', '')}".strip(), ""]
    alternatives = [rules["$ref"] for rules in schema.get("oneOf", ())]
    for reference in alternatives:
        heading = f"### {reference.rpartition('/')[2]}"
        lines += [heading, "", *_table(schema, _resolved(schema, {"$ref": reference})), ""]
    return "\n".join(lines if alternatives else lines + _table(schema, schema)).rstrip()


def _table(schema: dict[str, Any], node: dict[str, Any]) -> list[str]:
    lines = ["| field | type | required | meaning |", "| --- | --- | --- | --- |"]
    for name, rules, required in _fields(schema, node, ""):
        always = "yes" if required else ""
        lines.append(f"| `{name}` | {_cell(_type(rules))} | {always} | {_cell(rules.get('description', ''))} |")
    return lines


def _fields(schema: dict[str, Any], node: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Name, rules and whether it is required, for every field below a node, parents before children."""
    required = set(node.get("required", ()))
    named = node.get("properties", {})
    for name in [*named, *sorted(required - named.keys())]:
        rules = _resolved(schema, named.get(name, {}))
        yield f"{prefix}{name}", rules, name in required
        yield from _fields(schema, rules, f"{prefix}{name}.")
    for key, step in (("items", "[]"), ("additionalProperties", ".*")):
        below = node.get(key)
        if isinstance(below, dict):
            yield from _fields(schema, _resolved(schema, below), f"{prefix.removesuffix('.')}{step}.".lstrip("."))


def _resolved(schema: dict[str, Any], rules: dict[str, Any]) -> dict[str, Any]:
    """The rules that a reference points to, with what stands beside the reference on top."""
    reference = rules.get("$ref")
    if reference is None:
        return rules
    target: Any = schema
    for part in reference.removeprefix("#/").split("/"):
        target = target[part]
    return {**target, **{key: value for key, value in rules.items() if key != "$ref"}}


def _type(rules: dict[str, Any]) -> str:
    if "const" in rules:
        return f"`{json.dumps(rules['const'])}`"
    if "enum" in rules:
        return ", ".join(f"`{json.dumps(value)}`" for value in rules["enum"])
    kind = rules.get("type", "")
    return " or ".join(kind) if isinstance(kind, list) else kind


def _cell(text: str) -> str:
    """Text that Markdown leaves as it is: no column ends in it, and brackets are no links."""
    for mark in "|[]":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("\n", " ")
