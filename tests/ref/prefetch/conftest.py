"""Rows of every layer, for all tests of prefetching."""

import pytest

from tests.ref.prefetch.tables import CONFIG, make_values


@pytest.fixture(scope="module")
def values():
    """By layer id, [R, D]."""
    return {layer_id: make_values(layer_id) for layer_id in CONFIG.layer_ids}
