"""A word of memory by which two processors tell each other that other memory is theirs to read now.

    post(address, 7)                    # whoever sees the 7 sees all that was written before it
    wait_for(address, 7, seconds=1.0)   # what it says when it is 7 at least; None after a second

Words are int64 at a multiple of 8. A GPU is told in the same way, through page-locked memory. With numba both are what
the processor has for it, and waiting holds no lock of the interpreter's; without, plain accesses, which x86 keeps in
order and other processors may not: there numba is required.

    python -m pytest tests/ref/calling/test_words.py
"""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable

from engram_ref.compiled import numba_works

_ORDERED = ("x86_64", "AMD64")  # machines whose plain loads and stores are in order
# Looking costs a processor that others may want; the longest decode step is over by then, so that none is woken late.
SPIN_S = 0.05
_NAP_S = 1e-4
_LOOKS = 20_000  # in a row, before the clock is looked at: some 50 us

post: Callable[[int, int], None]
_look: Callable[[int, int, int], int]  # address, least, looks at most -> what it said last


def _plain_post(address: int, value: int) -> None:
    _require_order()
    ctypes.c_int64.from_address(address).value = value


def _plain_look(address: int, least: int, looks: int) -> int:
    _require_order()
    time.sleep(0)  # others may run
    return ctypes.c_int64.from_address(address).value


def _require_order() -> None:
    if platform.machine() not in _ORDERED:
        raise ValueError(f"on {platform.machine()} words between processors need numba: pip install numba")


if numba_works():
    from engram_ref.calling.words_fused import look as _look
    from engram_ref.calling.words_fused import post
else:
    post, _look = _plain_post, _plain_look


def peek(address: int) -> int:
    """What the word says now."""
    return _look(address, 0, 1)


def wait_for(address: int, least: int, seconds: float, called_off: Callable[[], bool] = lambda: False) -> int | None:
    """What the word says as soon as it is `least` or more; None if it is not after so many seconds, or when called off.

    The first SPIN_S the calling thread does not rest: whoever waits for a GPU is waited for by it.
    """
    begin = time.perf_counter()
    while True:
        value = _look(address, least, _LOOKS)
        if value >= least:
            return value
        waited = time.perf_counter() - begin
        if waited > seconds or called_off():
            return None
        if waited > SPIN_S:
            time.sleep(_NAP_S)
