"""Rows that stay where they are, and copies of what is read again: what the tracer says, and above the floor."""

from collections import Counter

import pytest

pytest.importorskip("numba", reason="row prices are compiled: pip install numba")

from engram_toy.bytedmd import bytedmd
from engram_toy.fast.floor import row_floor
from engram_toy.fast.kept_copies import price_kept
from engram_toy.fast.rows import start
from tests.toy.fast.test_rows import Stream


@pytest.mark.parametrize("padding", [0, 13])
def test_it_is_what_the_tracer_says_of_the_same_copies(padding):
    for seed in range(40):
        stream = Stream(seed)
        reads, flat = stream.reads(), stream.flat()

        def function(pad, table, flat=flat):
            left, copies = Counter(flat), {}
            again = {row for row in left if left[row] > 1}
            for row in flat:
                if row in again:
                    if row not in copies:
                        copies[row] = +table[-1 - row]
                    _ = +copies[row]
                else:
                    _ = +table[-1 - row]

        wanted = bytedmd(function, ([1.0] * padding, [1.0] * stream.rows), 8, definition="stationary")
        found = price_kept(reads, start(reads, True), 8, 8 * padding)
        assert found == wanted, seed
        assert row_floor(reads, start(reads, True), 8, 8 * padding, within=0)[0] <= found


def test_a_stack_too_deep_is_refused():
    reads = Stream(1).reads()
    with pytest.raises(ValueError, match="up to 2\\^51"):
        price_kept(reads, start(reads, True), 8, 2**51)
