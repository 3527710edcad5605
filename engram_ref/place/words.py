"""Numbers in words, as a person reads them: bytes, shares, times, energies, rates.

size(3 << 30), time(5.7e-6)       # 3 GiB, 5.7 us
"""

from __future__ import annotations


def in_tokens(number: int) -> str:
    """A number of tokens in words."""
    return f"{number:,} token{'s' * (number != 1)}"


def size(nbytes: float) -> str:
    """Bytes in words."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(nbytes) >= 0.9995 * unit:
            return f"{_digits(nbytes / unit, 4)} {name}"
    return f"{_digits(nbytes, 4)} B"


def percent(share: float | None) -> str:
    """A share in words, with one digit behind the point below ten."""
    if share is None:
        return "-"
    if 0 < share < 0.001:
        return "<0.1 %"
    return f"{100 * share:.{0 if share >= 0.0995 else 1}f} %"


def time(value: float | None) -> str:
    """Seconds in words."""
    if value is None:
        return "-"
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if value >= 0.9995 * unit:
            return f"{_digits(value / unit, 3)} {name}"
    return f"{_digits(1e6 * value, 3)} us"


def in_joules(least: float, most: float) -> str:
    """A range of energies in words, both in one unit."""
    unit, name = next(((u, n) for u, n in ((1.0, "J"), (1e-3, "mJ")) if most >= 0.995 * u), (1e-6, "uJ"))
    low, high = (f"{float(f'{joules / unit:.2g}'):g}" for joules in (least, most))  # two digits
    return f"{low} {name}" if low == high else f"{low}-{high} {name}"


def in_units(value: float, unit: str) -> str:
    """A rate in words, by powers of a thousand; or a delay, or a share, which has no unit."""
    if unit == "s":
        return time(value)
    if not unit:
        return percent(value)
    for power, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * power:
            return f"{value / power:.3g} {prefix}{'' if unit == 'B/s' else ' '}{unit}"
    return f"{value:.3g} {unit}"


def _digits(value: float, digits: int) -> str:
    """So many digits, or all that a larger number has before the point."""
    return f"{value:,.0f}" if abs(value) >= 10**digits - 0.5 else f"{value:.{digits}g}"
