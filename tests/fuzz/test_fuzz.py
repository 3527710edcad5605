"""A small share of every kind of stress, and faults planted for every kind to find; `make fuzz` runs the whole.

python -m pytest tests/fuzz
"""

import functools
import importlib
import json
import os
import shutil
import sys
import threading
import time
import types
import warnings

import pytest

from engram_ref.prefetch import Prefetcher, slots
from tests.fuzz import folders, forks, headers, kills, leaks, prefetch, programs
from tests.fuzz.resumable import resumable

SHARES = {"programs": 60, "headers": 600, "folders": 15, "prefetch": 200, "forks": 8, "leaks": 60, "kills": 1}
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("kept_maps")]


@pytest.mark.parametrize("kind", SHARES)
def test_a_share_of_it_finds_no_fault(kind):
    found = importlib.import_module(f"tests.fuzz.{kind}").run(SHARES[kind], seed=1)
    assert found["faults"] == [] and found["cases"] >= SHARES[kind] * 0.9


def change(monkeypatch, module, name, after):
    """Have what `module` calls `name` give what `after` makes of its result."""
    original = getattr(module, name)
    monkeypatch.setattr(
        module, name, functools.wraps(original)(lambda *given, **named: after(original(*given, **named)))
    )


def assert_finds(kind, count, *parts):
    """Each of these parts is in a fault that it reports."""
    faults = kind.run(count, seed=1)["faults"]
    assert all(any(part in fault for fault in faults) for part in parts), faults


def test_programs_find_a_wrong_depth(monkeypatch):
    change(monkeypatch, programs, "traced_eval", lambda found: ([*found[0], 1], found[1]))
    assert_finds(programs, 5, "priced otherwise")


def test_programs_find_another_result(monkeypatch):
    change(monkeypatch, programs, "traced_eval", lambda found: (found[0], "another"))
    assert_finds(programs, 5, "computed otherwise")


READER = sys.modules[headers.read_header.__module__]


def test_headers_find_tensors_outside_of_the_file(monkeypatch):
    monkeypatch.setattr(READER, "_require_side_by_side", lambda *given: None)
    assert_finds(headers, 200, "outside of the file")


def test_headers_find_errors_of_another_type(monkeypatch):
    monkeypatch.setattr(READER, "parse_json", lambda text, what: json.loads(text))
    assert_finds(headers, 200, "RecursionError")


def test_headers_find_a_message_that_carries_what_the_file_says(monkeypatch):
    monkeypatch.setattr(READER, "quoted", str)
    assert_finds(headers, 600, "\\x1b")


def test_headers_find_slow_ones(monkeypatch):
    monkeypatch.setattr(headers, "SOON", 0)
    assert_finds(headers, 5, " s")


def test_headers_find_memory_that_was_given_back(monkeypatch):
    change(monkeypatch, headers, "read_header", lambda entries: bytes(headers.MOST_BYTES + 1) and entries)
    assert_finds(headers, 60, "bytes of memory")


@pytest.fixture
def other_pad(monkeypatch):
    """Every damaged folder names another pad token than its rows were hashed with; what is to check that does this."""

    def damage(good, bad, chance):
        shutil.copytree(good, bad)
        config = json.loads((bad / "config.json").read_text())
        config["text_config"]["engram_pad_token_id"] = 5
        (bad / "config.json").write_text(json.dumps(config))
        return "another pad"

    def planted(check):
        opener = sys.modules[folders.ModelFolder.__module__]
        original = opener._check_recorded
        monkeypatch.setattr(
            opener, "_check_recorded", lambda path, *more: (check if path.name == "bad" else original)(path, *more)
        )

    monkeypatch.setattr(folders, "damage", damage)
    return planted


def test_folders_find_other_rows(other_pad):
    other_pad(lambda *given: None)
    assert_finds(folders, 1, "other rows")


def test_folders_find_other_rows_that_come_with_an_idle_warning(other_pad):
    other_pad(lambda *given: warnings.warn("by the way", stacklevel=2))
    assert_finds(folders, 1, "other rows", "by the way")


@pytest.mark.parametrize(("error", "said"), [(ValueError("two\nlines"), "two"), (KeyError("x"), "KeyError")], ids=str)
def test_folders_find_wrong_errors(error, said, other_pad):
    def refuse(*given):
        raise error

    other_pad(refuse)
    assert_finds(folders, 1, said)


def rows_exchanged(table):
    """A table that gives rows in another order."""
    start = table.start
    table.start = lambda rows, *more: start(rows.roll(1), *more)
    return table


def test_prefetch_finds_other_rows(monkeypatch):
    change(monkeypatch, prefetch, "make_table", rows_exchanged)
    assert_finds(prefetch, 20, "other rows")


def test_prefetch_finds_a_buffer_that_is_lent_twice(monkeypatch):
    slot = slots._Slot
    monkeypatch.setattr(slot, "is_free", lambda self: True)
    assert_finds(prefetch, 200, "called off")


def test_prefetch_finds_an_error(monkeypatch):
    monkeypatch.setattr(prefetch, "Prefetcher", lambda *given, **named: 1 / 0)
    assert_finds(prefetch, 2, "ZeroDivisionError")


def in_the_child(monkeypatch, do):
    """Have `do` run at each start of a fetch in a forked process, before it is given what was asked for."""
    parent, start = os.getpid(), Prefetcher.start
    monkeypatch.setattr(Prefetcher, "start", lambda self, ids: start(self, ids if os.getpid() == parent else do(ids)))


def test_forks_find_other_rows_in_the_child(monkeypatch):
    in_the_child(monkeypatch, lambda ids: ids[:, ::-1])
    assert_finds(forks, 2, f"child {forks.WRONG}")


def test_forks_find_a_child_that_hangs(monkeypatch):
    monkeypatch.setattr(forks, "IN_TIME", 0.3)
    in_the_child(monkeypatch, lambda ids: threading.Event().wait())
    assert_finds(forks, 1, "not ended")


def test_forks_find_a_child_that_fails(monkeypatch):
    in_the_child(monkeypatch, lambda ids: ids / 0)
    assert_finds(forks, 1, f"child {forks.WRONG + 1}")


def test_forks_find_other_rows_in_the_parent(monkeypatch):
    change(monkeypatch, forks, "make_table", rows_exchanged)
    assert_finds(forks, 1, "the parent has other rows", f"child {forks.WRONG}")


def test_leaks_find_what_stays(monkeypatch, request):
    """Tables that are never closed, prefetchers that are not, and memory that somebody keeps."""
    kept = []
    request.addfinalizer(lambda: [one.close() for one in kept])

    class Kept:
        def __init__(self, table):
            kept.append(table)
            self.table = table

        def __enter__(self):
            return self.table

        def __exit__(self, *error):
            pass

    change(monkeypatch, leaks, "make_table", Kept)
    assert_finds(leaks, 60, "descriptors", "bytes")


def test_leaks_find_threads(monkeypatch, request):
    closes = []
    close = Prefetcher.close
    monkeypatch.setattr(Prefetcher, "close", lambda self: closes.append(self))
    request.addfinalizer(lambda: [close(one) for one in closes])
    assert_finds(leaks, 3, "threads")


@pytest.mark.parametrize("fault", [None, "other results", ".part stayed", "exit 2"])
def test_kills_find(fault, monkeypatch):
    monkeypatch.setattr(kills, "COMMAND", functools.partial(resumable, fault=fault))
    faults = kills.run(2, seed=1)["faults"]
    assert (faults != []) if fault else (faults == [])
    assert all(fault in one for one in faults)


def test_kills_find_where_a_command_stands_still(monkeypatch, tmp_path):
    monkeypatch.setattr(kills, "COMMAND", functools.partial(resumable, fault="not ended"))
    (tmp_path / "out").mkdir()
    told = kills._finish(kills._start(tmp_path / "out"), tmp_path / "out", limit=0.5)
    assert "not ended within 0.5 s" in told and "in resumable" in told
    assert not kills._kill(kills._start(tmp_path / "new"), after=100)


def test_kills_come_sooner_where_the_first_run_was_slow(monkeypatch):
    """Else nearly every command would end before it is killed, once the machine has less to do than at first."""
    times = iter([1.0, 61.0])
    monkeypatch.setattr(kills, "COMMAND", resumable)
    clock = types.SimpleNamespace(monotonic=lambda: next(times, None) or time.monotonic(), sleep=time.sleep)
    monkeypatch.setattr(kills, "time", clock)
    rounds = []
    change(monkeypatch, kills, "_finish", lambda code: rounds.append(code) or code)
    assert kills.run(2, seed=1)["cases"] == 2 and len(rounds) < 8
