"""The plan's commands at a size that a CPU has done in a second: what no option says is set here.

Triton's interpreter runs one program after the other, so that programs are given more to do each.
"""

import functools

TEXT_BYTES = 1 << 16
COPY = 1 << 20


def shrink() -> None:
    """Make bandwidth copies, cache flushes, text and calibration small, and kernel programs large."""
    from bench import lookup_speed
    from bench.gpu import preflight
    from bench.instruments import bandwidth, driver, timing
    from bench.setup import streams, variants
    from engram_ref.config import PRESETS
    from engram_ref.hashing import kernels as kernels_hashing
    from engram_ref.rows import kernels
    from engram_ref.tables import uva

    driver._BUSY_COPIES, driver._BUSY_BYTES = 2, COPY
    bandwidth.COPY_BYTES, bandwidth.COPIES = COPY, 3
    variants.HOT_TOKENS = 1 << 12
    timing.FLUSHED = COPY
    preflight._PINNED = COPY
    lookup_speed.WARM_UP = 1
    streams.standard_library = functools.partial(streams.standard_library, nbytes=TEXT_BYTES)
    kernels.ROWS_PER_PROGRAM = kernels.SCALED_ROWS_PER_PROGRAM = 512
    kernels_hashing.TOKENS_PER_PROGRAM = 64
    PRESETS["tiny"]["kernel_size"] = 2  # a convolution back over 3 tokens instead of 9
    uva._host_addresses_serve = lambda: True  # asked of a driver, and there is none
