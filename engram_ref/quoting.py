"""Foreign text in our messages: one printable line, no longer than is good for the reader.

    quoted("a\\nb")                          # 'a\\nb', quotation marks and all
    quoted("x" * 1_000_000)                 # 'xxxxxxxxxx…xxxxx' (1,000,000 characters)
    quoted([2] * 1_000_000, 40)             # [2, 2, 2, 2…2, 2] (1,000,000 items)
    listed(names)                           # a, b and 70 others
    one_line(error)                         # without quotation marks: a sentence that somebody else wrote

What comes from a file (a tensor's name, a shape, a pattern) may hold control characters that steer a terminal, letters
that turn the line round, or megabytes. The work is bounded like the result: of a long value no more is looked at than
can be shown.

    python -m pytest tests/ref/test_quoting.py
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

_LEAST = 40  # characters: room for the beginning, the end and how long the whole is
_FEWEST = 6  # characters: room in which a part says anything
_BITS_PER_DIGIT = 3.3219  # the logarithm of 10 to the base 2


def quoted(value: Any, limit: int = 80) -> str:
    """A value as Python writes it, in one printable line.

    Args:
        value: what JSON can hold, or anything with a repr.
        limit: characters of the result, at least 40; a longer one loses its middle, and says how long the whole is.
    """
    assert limit >= _LEAST, limit  # every caller names a constant
    return _cut(_written(value, limit), limit, _count(value, limit))


def one_line(text: object, limit: int = 400) -> str:
    """A sentence in one printable line of at most `limit` characters, at least 40; control characters are escaped."""
    assert limit >= _LEAST, limit
    given = str(text)
    return _cut(_printable(_ends(given, limit, limit)), limit, _count(given, limit))


def listed(names: Sequence[str], most: int = 8) -> str:
    """Some names, each printable and short, and how many others there are; nothing for none."""
    others = f" and {len(names) - most} others" if len(names) > most else ""
    return ", ".join(one_line(name, 80) for name in names[:most]) + others


def _written(value: Any, room: int) -> str:
    """The repr of a value, or of one with the same beginning and end; `room` of each are right."""
    if isinstance(value, (str, bytes)):
        return repr(_ends(value, room, room))
    if isinstance(value, int) and value.bit_length() > _BITS_PER_DIGIT * room:
        return f"<an integer of some {int(value.bit_length() / _BITS_PER_DIGIT):,} digits>"  # its repr may be refused
    if isinstance(value, (list, tuple)):
        parts = [_part(item, room) for item in _ends(value, room // 3, room // 9)]  # with its comma, 3 characters
        return f"[{', '.join(parts)}]" if isinstance(value, list) else f"({', '.join(parts)}{',' * (len(parts) == 1)})"
    if isinstance(value, dict):
        pairs = islice(value.items(), room // 3)
        return f"{{{', '.join(f'{_part(name, room)}: {_part(item, room)}' for name, item in pairs)}}}"
    return _printable(repr(value))


def _part(value: Any, room: int) -> str:
    """A value inside another one that has `room`: a fifth of it, so that nesting ends soon."""
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 10**12):
        return repr(value)
    return _cut(_written(value, room // 5), room // 5) if room // 5 >= _FEWEST else "…"


def _ends(value: Any, first: int, last: int) -> Any:
    """A sequence, or what is left of a long one: as many items of its beginning and of its end."""
    return value if len(value) <= first + last else value[:first] + value[len(value) - last :]


def _count(value: Any, limit: int) -> str:
    """How long a value is that cannot be shown whole."""
    if not isinstance(value, (str, bytes, list, tuple, dict)) or len(value) <= limit:
        return ""
    return f" ({len(value):,} {'characters' if isinstance(value, (str, bytes)) else 'items'})"


def _cut(text: str, limit: int, count: str = "") -> str:
    """A text of at most `limit` characters with `count` at its end: the middle gives way."""
    limit -= len(count)
    if len(text) > limit:
        tail = (limit - 1) // 3
        text = f"{text[: limit - 1 - tail]}…{text[len(text) - tail :]}"
    return text + count


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
