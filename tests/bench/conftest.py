"""What the tests of benchmarks share."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """Triton's interpreter runs one program after the other: each has more rows than a GPU would give it."""
    kernels = sys.modules.get("engram_ref.rows.kernels")
    with pytest.MonkeyPatch.context() as patch:
        if kernels is not None:
            patch.setattr(kernels, "ROWS_PER_PROGRAM", 512)
            patch.setattr(kernels, "SCALED_ROWS_PER_PROGRAM", 512)
        yield
