"""Vector arithmetic refuses what it would have computed of some of the values only."""

import pytest

from engram_toy import functional
from engram_toy.bytedmd import bytedmd


@pytest.mark.parametrize(
    "call",
    [
        lambda: functional.dot([1, 2], [1]),
        lambda: functional.dot([1], [1, 2]),
        lambda: functional.dot([], []),
        lambda: functional.linear([[1, 2]], [1, 2, 3]),
        lambda: functional.linear([[1, 2]], [1, 2], [0, 0]),
        lambda: functional.mix([1], [[1, 2], [3, 4]]),
        lambda: bytedmd(functional.dot, ([1, 2], [1])),
    ],
)
def test_sizes_that_do_not_fit(call):
    with pytest.raises(ValueError, match=r"vectors of \d and \d values|a bias of 2 values for 1 rows"):
        call()


def test_sizes_that_fit():
    assert functional.linear([[1, 2], [3, 4]], [1, 1], [1, 0]) == [4, 7] and functional.mix([1, 2], [[1], [3]]) == [7]
