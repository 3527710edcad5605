"""What the compiled loops share: a pointer from an address, and numba's cache where there can be one.

    hash_rows = compiled(_hash_rows, ["boolean(int64[:,:], int64)"], nogil=True)

Needs numba: imported only where `engram_ref.compiled.numba_works`.
"""

# mypy: disable-error-code="call-overload"
# (numba's own signatures do not know all that it takes)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit, types
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
    try:
        return njit(signatures, cache=True, **options)(function)
    except (RuntimeError, OSError):  # numba may write neither beside this file nor in the user's cache; or a full disk
        return njit(signatures, **options)(function)
