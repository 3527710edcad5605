"""A JSON schema (2020-12) from typed records: what a results file may hold is said once, as Python's own types.

    class Stream(TypedDict):
        \"\"\"What was read.\"\"\"

        name: Text
        start: NotRequired[Annotated[Count, "first token that was read"]]

    json_schema(Stream)

A text in `Annotated` is a description, `Must` holds further keywords of JSON Schema; what stands further out wins. A
record's docstring describes it, `@rules` adds what types cannot say. Records are closed: a field that they do not name
is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import GenericAlias, NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

if TYPE_CHECKING:
    from typing_extensions import NotRequired
else:

    class NotRequired:
        """A field that may be missing; `typing` has it from Python 3.11 on."""

        __class_getitem__ = classmethod(GenericAlias)


Json = dict[str, Any]
Record = TypeVar("Record")

_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}
_RESTRICTS_NULL = {"const", "anyOf", "allOf", "not", "if"}  # where a second type would not let null in


class Must:
    """What a value must keep to, as keywords of JSON Schema."""

    def __init__(self, **keywords: Any) -> None:
        self.keywords = keywords


def one_of(*values: str | int) -> Must:
    """Nothing but these; the code that writes them holds them as plain texts or numbers."""
    return Must(enum=list(values))


def rules(**keywords: Any) -> Callable[[Record], Record]:
    """Keywords of JSON Schema that a record has beside its fields."""

    def add(record: Record) -> Record:
        setattr(record, "__rules__", keywords)
        return record

    return add


def when(name: str, rule: Json, then: Json, otherwise: Json | None = None) -> Json:
    """Rules of other fields, by name, that hold where a field keeps a rule, and those that hold where it does not."""
    otherwise_ = {} if otherwise is None else {"else": {"properties": otherwise}}
    return {"if": {"properties": {name: rule}}, "then": {"properties": then}, **otherwise_}


def json_schema(kind: Any) -> Json:
    """The schema of a record, or of any type that records may hold.

    Raises:
        TypeError: JSON has no such type.
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_schema(kind)}


def _schema(kind: Any) -> Json:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        schema = _schema(arguments[0])
        for note in arguments[1:]:
            schema |= {"description": note} if isinstance(note, str) else note.keywords
        return schema
    if is_typeddict(kind):
        return _record(kind)
    if origin is Literal and len(arguments) == 1:
        return {"const": arguments[0]}
    if origin in (Union, UnionType):
        return _union([_schema(one) for one in arguments])
    if origin is list:
        return {"type": "array", "items": _schema(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1]) or True}
    if kind is Any:
        return {}
    if kind not in _NAMES:
        raise TypeError(
            f"{kind} has no place in JSON: use TypedDict, a Literal of one, list, dict, a union or a scalar"
        )
    return {"type": _NAMES[kind]}


def _record(kind: Any) -> Json:
    hints = get_type_hints(kind, include_extras=True)
    optional = {name for name, hint in hints.items() if get_origin(hint) is NotRequired}
    bare = {name: get_args(hint)[0] if name in optional else hint for name, hint in hints.items()}
    described = {"description": " ".join(inspect.cleandoc(kind.__doc__).split())} if kind.__doc__ else {}
    return {
        "type": "object",
        **described,
        "additionalProperties": False,
        "required": [name for name in hints if name not in optional],
        "properties": {name: _schema(hint) for name, hint in bare.items()},
        **getattr(kind, "__rules__", {}),
    }


def _union(parts: list[Json]) -> Json:
    """`anyOf`, or shorter where the only alternative is null, or where all are plain types."""
    if all(part.keys() == {"type"} for part in parts):
        return {"type": [part["type"] for part in parts]}
    first, *others = parts
    if others == [{"type": "null"}] and "enum" in first:
        return {key: value for key, value in first.items() if key != "type"} | {"enum": [*first["enum"], None]}
    if others == [{"type": "null"}] and "type" in first and not first.keys() & _RESTRICTS_NULL:
        return {**first, "type": [first["type"], "null"]}
    return {"anyOf": parts}
