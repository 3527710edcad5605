"""The parts of pricing one replay under every layout, at their edges; other tests hold the whole to direct runs."""

import numpy as np
import pytest

from bench.sweeps.readdressed import _addressed, _rows, addresses
from engram_toy.bytedmd import record


def test_inputs_lie_argument_after_argument_and_padding_begins_behind_a_whole_one():
    address, moved = addresses(6, [[4, 5], [2, 3], [0, 1]], 1)
    assert address.tolist() == [5, 6, 3, 4, 1, 2]
    assert moved.tolist() == [True, True, True, True, False, False]  # of the first argument not even its last value


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("definition", "wanted"), [("stationary", [0, 1, 2, 3]), ("live", [0, 1])])
def test_the_first_read_of_all_is_charged_an_address(definition, wanted, compiled):
    """And every later one of an input only where arguments stay in their places."""
    log = record(lambda a, b: (a + b) + (a * b), (2, 3)).log
    places, values = _addressed(log, definition, compiled)
    assert places.tolist() == wanted and set(values[:2].tolist()) == {0, 1}


@pytest.mark.parametrize(("rows", "wanted"), [(1, [[0, 1, 2, 3]]), (2, [[0, 1], [2, 3]]), (0, [])])
def test_numbers_of_a_table_by_row(rows, wanted):
    assert [list(row) for row in _rows(range(4), rows)] == wanted


def test_every_input_has_an_address_of_its_own():
    address, _ = addresses(1000, [range(500, 1000), range(500)], 0)
    assert np.array_equal(np.sort(address), np.arange(1, 1001))
