"""What all tests of placements share."""

import pytest

from engram_ref.place.model import Model


@pytest.fixture(scope="module")
def flash():
    return Model.of("v41-flash")
