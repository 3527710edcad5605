"""Numbers on a command line, in the spellings that people use: 1e6, 10^6, 80GB, 188.8GiB, 56us.

Each function but the first is a `type` for argparse: it refuses what it cannot take in one line.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal

from engram_ref.quoting import quoted

MOST = 100_000  # of samples, rounds, processes: whatever an option counts and says no other limit of
MOST_SEED = 2**63 - 1
_MOST_DIGITS = 25  # of a number: more than any limit of ours has, and computed with exactly
_NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,9})?\s*", re.ASCII)
_POWER = re.compile(r"\s*(\d{1,2})\^(\d{1,3})\s*", re.ASCII)
# The e of an exponent begins no unit.
_UNIT = re.compile(r"([^a-zA-Zµμ]*(?:[eE][+-]?\d+)?)\s*([a-zA-Zµμ]*)")
_BYTES = {"": 1, "b": 1, **{f"{prefix}b": 1000**n for n, prefix in enumerate("kmgt", 1)}}
_BYTES |= {f"{prefix}ib": 1024**n for n, prefix in enumerate("kmgt", 1)}
_LEAST_PLAIN = 1e6  # bytes: 80 was meant to be 80GB
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0}  # micro sign, Greek letter


def number(text: str) -> int | float | None:
    """What a number means, in every spelling that an option takes: 12, 2.5, 1e6, 10^6; None where it is none.

    Whole numbers come out as integers, exactly; those of more digits than anything has here, as infinite.
    """
    if power := _POWER.fullmatch(text):
        value = Decimal(int(power[1]) ** int(power[2]))
    elif _NUMBER.fullmatch(text):
        value = Decimal(text.strip())
    else:
        return None
    if value and value.adjusted() > _MOST_DIGITS:
        return math.copysign(math.inf, value)
    if value and value.adjusted() < -_MOST_DIGITS:
        return 0.0
    return int(value) if value == value.to_integral_value() else float(value)


def at_least(least: int, most: int = MOST) -> Callable[[str], int]:
    """An argument type: an integer from `least` to `most`, what memory and patience hold."""

    def parse(text: str) -> int:
        value = number(text)
        # What is infinite is too much, and is told so below.
        if value is None or value < least or (isinstance(value, float) and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{quoted(text)} must be an integer of at least {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{quoted(text)} must be at most {most}")
        return int(value)

    return parse


def positive(text: str) -> float:
    """An argument type: a number above 0, and not infinite."""
    value = number(text)
    if value is None or not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{quoted(text)} must be a number above 0, such as 2.5, 1e6 or 10^6")
    return float(value)


def nbytes(text: str) -> int:
    """An argument type: bytes with a unit, or from a million on as a number alone: 80GB, 188.8GiB, 2e9."""
    return round(_with_unit(text, _BYTES, "bytes, such as 80GB, 188.8GiB or 2e9"))


def bytes_per_second(text: str) -> float:
    """An argument type: a bandwidth above 0, such as 50GB/s."""
    what = "a bandwidth, such as 50GB/s"
    value = _with_unit(text.strip().removesuffix("/s"), _BYTES, what)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{quoted(text)} must be {what}")
    return value


def seconds(text: str) -> float:
    """An argument type: a time with its unit: 56us, 3.6ms, 1s."""
    return _with_unit(text, _SECONDS, "a time with its unit, such as 56us, 3.6ms or 1s")


def _with_unit(text: str, units: Mapping[str, float], what: str) -> float:
    found = _UNIT.fullmatch(text.strip())
    value = number(found[1]) if found else None
    factor = units.get(found[2].lower()) if found else None
    if found and not found[2] and value is not None and 0 < value < _LEAST_PLAIN:
        raise argparse.ArgumentTypeError(f"{quoted(text)} has no unit: give {what}")
    if value is None or factor is None or not 0 <= value * factor < 2**63:
        raise argparse.ArgumentTypeError(f"{quoted(text)} must be {what}")
    return value * factor


def share(text: str) -> float:
    """An argument type: a number in 0 .. 1."""
    value = number(text)
    if value is None or not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{quoted(text)} must be a number in 0 .. 1")
    return float(value)
