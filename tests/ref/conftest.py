"""Fixtures of the reference's tests."""

import sys

import pytest


@pytest.fixture(scope="module", autouse=True)
def _kept_maps(kept_maps): ...


@pytest.fixture(autouse=True)
def nothing_stays_locked():
    """Fails a test that leaves memory locked in the stand-in for CUDA's runtime, as it would stay locked in CUDA."""
    yield
    if "tests.ref.tables.fake_cuda" in sys.modules:  # the tests of hashing and of the plan run without torch
        made = sys.modules["tests.ref.tables.fake_cuda"].FakeRuntime.made
        left = [runtime.registered for runtime in made if runtime.registered]
        made.clear()
        assert not left
