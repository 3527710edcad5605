"""Bytes of rows and their values.

format      how the bytes of one row become its values
rows        rows in memory, in one part or two
fp8         codes with block scales, to values and back: the definition
decoding    the same, the fastest way that there is; decoding_fused: compiled
gather      some rows of many; gather_fused: compiled
filling     drawn rows
nan_check   fp8 rows that are not numbers, refused
memory      host memory: huge pages, page-locked
kernels     gather and decode in Triton, from wherever a GPU can read
"""

import engram_ref.needs_torch  # noqa: F401
