"""A small share of every kind of stress, and faults that are planted for every kind to find.

`make fuzz` runs the whole of it.

    python -m pytest tests/fuzz
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
import warnings

import pytest

from tests.fuzz import folders, forks, headers, leaks, prefetch, programs

SHARES = {"programs": 60, "headers": 600, "folders": 15, "prefetch": 200, "forks": 8, "leaks": 60, "kills": 1}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, cache_home):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))


@pytest.mark.parametrize("kind", SHARES)
def test_a_share_of_it_finds_no_fault(kind):
    found = importlib.import_module(f"tests.fuzz.{kind}").run(SHARES[kind], seed=1)
    assert found["faults"] == [] and found["cases"] >= SHARES[kind] * 0.9


def changed(module, name, monkeypatch, after):
    """Have what `module` calls `name` give what `after` makes of its result."""
    original = getattr(module, name)
    monkeypatch.setattr(module, name, functools.wraps(original)(lambda *a, **k: after(original(*a, **k))))


def finds(kind, count, *parts):
    """Whether its faults say all of this, each of them something of it."""
    faults = kind.run(count, seed=1)["faults"]
    return all(any(part in fault for fault in faults) for part in parts) and all(
        any(part in fault for part in parts) for fault in faults
    )


def test_programs_find_a_wrong_depth(monkeypatch):
    changed(programs, "traced_eval", monkeypatch, lambda found: ([*found[0][:-1], 10**6], found[1]))
    assert finds(programs, 5, "priced otherwise")


def test_programs_find_another_result(monkeypatch):
    changed(programs, "traced_eval", monkeypatch, lambda found: (found[0], "another"))
    assert finds(programs, 5, "computed otherwise")


def test_headers_find_tensors_outside_of_the_file(monkeypatch):
    monkeypatch.setattr("engram_ref.safetensors_header._require_side_by_side", lambda *given: None)
    assert finds(headers, 200, "outside of the file")


def test_headers_find_errors_of_another_type(monkeypatch):
    monkeypatch.setattr("engram_ref.safetensors_header._are_counts", lambda values: True)
    assert finds(headers, 300, "TypeError", "AttributeError", "OverflowError", "IndexError", "outside")


def test_headers_find_names_that_are_printed_as_they_came(monkeypatch):
    monkeypatch.setattr("engram_ref.safetensors_header.quoted", str)
    assert finds(headers, 600, "\\n")


@pytest.mark.parametrize(("limit", "said"), [("SOON", " s"), ("MOST_BYTES", "bytes of memory")])
def test_headers_find_what_is_slow_or_large(limit, said, monkeypatch):
    kept = []
    changed(headers, "read_header", monkeypatch, lambda found: kept.append(bytearray(9 << 20)) or found)
    if limit == "SOON":
        monkeypatch.setattr(headers, "SOON", 0)
        monkeypatch.setattr(headers, "MOST_BYTES", 1 << 30)
    assert finds(headers, 20, said)


@pytest.fixture
def other_pad(monkeypatch):
    """Folders whose configuration names another pad token than they were written with."""

    def damage(good, bad, chance):
        monkeypatch.setattr(folders, "ODD", (5,))
        return original(good, bad, chance)

    original = folders.damage
    monkeypatch.setattr(folders, "KINDS", (folders._field,))
    monkeypatch.setattr(folders, "FIELDS", ("engram_pad_token_id",))
    monkeypatch.setattr(folders, "damage", damage)


def test_folders_find_other_rows(monkeypatch, other_pad):
    monkeypatch.setattr("engram_ref.model_folder._check_recorded", lambda *given: None)
    assert finds(folders, 1, "other rows")


def test_folders_find_rows_that_come_with_an_idle_warning(monkeypatch, other_pad):
    monkeypatch.setattr("engram_ref.model_folder._check_recorded", lambda *given: warnings.warn("by the way"))
    assert finds(folders, 1, "other rows", "warns: 'by the way'")


def test_folders_find_errors_of_several_lines_or_another_type(monkeypatch, other_pad):
    for error, said in ((ValueError("two\nlines"), "two"), (KeyError("x"), "KeyError")):

        def refuse(*given, error=error):
            raise error

        monkeypatch.setattr("engram_ref.model_folder._check_recorded", refuse)
        # the undamaged folder has to be read first
        monkeypatch.setattr(folders, "rows_of", lambda path: [] if path.name == "good" else refuse())
        assert finds(folders, 1, said)


def test_prefetch_finds_a_wrong_row(monkeypatch):
    changed(prefetch, "make_table", monkeypatch, wrong_rows)
    assert finds(prefetch, 20, "other rows")


def test_prefetch_finds_buffers_that_are_lent_twice(monkeypatch):
    from engram_ref.prefetch import Prefetcher

    monkeypatch.setattr(Prefetcher, "start", lambda self, ids: 1 / 0)
    assert finds(prefetch, 20, "ZeroDivisionError")


def wrong_rows(table):
    """A table that exchanges the first two rows that it is asked for."""
    start = table.start
    table.start = lambda rows, *more: start(rows.roll(1), *more)
    return table
