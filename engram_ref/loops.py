"""What the compiled loops share: a pointer from an address, and numba's cache where there can be one.

    hash_rows = compiled(_hash_rows, ["boolean(int64[:,:], int64)"], nogil=True)

Needs numba: imported only where `engram_ref.compiled.numba_works`.
"""

# mypy: disable-error-code="call-overload"
# (numba's own signatures do not know all that it takes)

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba import njit, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic


@intrinsic
def pointer(typing_context, address, value):
    """`address` as a pointer to values of the type of `value`."""
    kind = types.CPointer(value)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(kind))

    return kind(address, value), generate


def compiled(function: Callable[..., Any], signatures: list[Any], **options: bool) -> Any:
    """`function` compiled for these signatures only, from numba's cache where it can have one."""
    dispatcher: Any = njit(**options)(function)
    with suppress(RuntimeError, OSError):  # numba may write neither beside this file nor in the user's cache
        dispatcher._cache = _Cache(function)  # what `cache=True` does
    for signature in signatures:
        dispatcher.compile(signature)
    dispatcher.disable_compile()
    return dispatcher


class _Cache(FunctionCache):
    """A cache that knows no machine code of other sources, and stores nothing where it cannot.

    numba's own looks at the time and the size of the one file that a function is in; a loop holds the code of others
    that it calls, too, and files of two releases may have the same time. So all files of the package count, by content.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
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


@functools.cache
def _sources() -> str:
    """Digest of the package's files."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()
