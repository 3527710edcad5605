"""A small share of every kind of stress; `make fuzz` runs the whole.

python -m pytest tests/fuzz
"""

from __future__ import annotations

import importlib

import pytest

SHARES = {"programs": 60, "headers": 600, "folders": 15, "prefetch": 200, "forks": 8, "leaks": 60, "kills": 1}


@pytest.mark.parametrize("kind", SHARES)
def test_a_share_of_it_finds_no_fault(kind, monkeypatch, cache_home):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    found = importlib.import_module(f"tests.fuzz.{kind}").run(SHARES[kind], seed=1)
    assert found["faults"] == [] and found["cases"] >= SHARES[kind] * 0.9
