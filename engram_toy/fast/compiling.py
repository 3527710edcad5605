"""numba's `njit`, which keeps machine code on disk where it may and goes without where it may not.

@compiled(nogil=True)
def loop(...): ...
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache


def compiled(**options: bool) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: compile at the first call."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher: Any = njit(function, **options)  # type: ignore[call-overload]
        # Neither the folder of the code nor the user's cache can be written, as in a read-only installation without a
        # home: a cache spares seconds, and is no reason to end.
        with suppress(RuntimeError, OSError):
            dispatcher._cache = _Cache(function)  # what `cache=True` does, with one that may fail
        return dispatcher

    return decorate


class _Cache(FunctionCache):
    """A cache that knows no machine code of other sources, and stores nothing where it cannot."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        # numba's own stamp is the time and the size of the one file that a function is in. A loop holds the code of
        # others, too, and files of two releases may have the same time: so the whole folder counts, by content.
        self._cache_file._source_stamp = (self._cache_file._source_stamp, _sources())

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


@lru_cache(maxsize=1)
def _sources() -> str:
    """Digest of the folder's files."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()
