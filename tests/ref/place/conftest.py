"""What all tests of placements share."""

from __future__ import annotations

import pytest

from engram_ref.place.model import Model


@pytest.fixture(autouse=True)
def _cache(monkeypatch, cache_home):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))


@pytest.fixture(scope="module")
def flash():
    return Model.of("v41-flash")
