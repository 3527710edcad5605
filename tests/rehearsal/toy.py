"""The plan's commands at a size that a CPU has done in a second: what no option says is set here.

Triton's interpreter runs one program after the other, so that programs are given more to do each.
"""

from __future__ import annotations

import functools

TEXT_BYTES = 1 << 16
COPY = 1 << 20


def shrink() -> None:
    """Make bandwidth copies, cache flushes, text and calibration small, and kernel programs large."""
    from bench import gpu_wall, lookup_speed
    from bench.gpu import preflight
    from bench.instruments import driver, timing
    from bench.setup import streams
    from bench.wall import run as wall
    from engram_ref.hashing import kernels as kernels_hashing
    from engram_ref.rows import kernels
    from engram_ref.tables import uva

    driver._BUSY_COPIES, driver._BUSY_BYTES = 2, COPY
    gpu_wall.COPY_BYTES = wall.COPY_BYTES = COPY
    gpu_wall.COPIES = wall.COPIES = 3
    wall.HOT_TOKENS = 1 << 12
    timing.FLUSHED = COPY
    preflight._COPY_BYTES, preflight._COPIES, preflight._PINNED = COPY, 3, COPY
    lookup_speed.COPY_BYTES, lookup_speed.COPIES, lookup_speed.WARM_UP = COPY, 3, 1
    streams.standard_library = functools.partial(streams.standard_library, nbytes=TEXT_BYTES)
    kernels.ROWS_PER_PROGRAM = kernels.SCALED_ROWS_PER_PROGRAM = 512
    kernels_hashing.TOKENS_PER_PROGRAM = 64
    uva._host_addresses_serve = lambda: True  # asked of a driver, and there is none
