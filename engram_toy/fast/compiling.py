"""numba's `njit`, which keeps machine code on disk where it may and goes without where it may not.

    @compiled(nogil=True)
    def loop(...): ...

Why: numba raises where neither the folder of the code nor the user's cache can be written, as in a read-only
installation without a home, and when the disk is full. A cache spares seconds; it is no reason to end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache


def compiled(**options: bool) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: compile at the first call."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher: Any = njit(function, **options)  # type: ignore[call-overload]
        with suppress(RuntimeError, OSError):  # there is no place for a cache
            dispatcher._cache = _Cache(function)  # what `cache=True` does, with one that may fail
        return dispatcher

    return decorate


class _Cache(FunctionCache):
    """A cache that stores nothing where it cannot."""

    def save_overload(self, *overload: Any) -> None:
        try:
            super().save_overload(*overload)
        except OSError:  # the disk is full, or has become read-only
            self.disable()

    def load_overload(self, *overload: Any) -> Any:
        try:
            return super().load_overload(*overload)
        except OSError:  # its files may not be read
            return None
