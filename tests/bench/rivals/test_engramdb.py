"""What a table in a file is held against, with a fake clock, a fake fio and a fake store."""

import gc
import json
import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="tables need torch (pip install 'engram-offload[ref]')")

from bench.instruments.bandwidth import fio_random_read
from bench.instruments.timing import Prepared, prepared_samples
from bench.rivals import engramdb
from bench.rivals.engramdb import DISK, OURS, STORE, ColdRace

ROWS, ROW_BYTES = 2000, 64
linux = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="only Linux can empty the page cache of a file")


def test_only_the_run_is_timed_and_all_ways_get_the_rows_of_their_round():
    now, calls = [0.0], []

    def way(name: str, seconds: float) -> Prepared:
        def prepare(rows):
            now[0] += 1000
            return name, int(rows[0])

        def run(given):
            now[0] += seconds
            calls.append(given)

        return Prepared(prepare, run)

    rows = iter(np.arange(3)[:, None])
    samples = prepared_samples({"a": way("a", 1), "b": way("b", 2)}, lambda: next(rows), 2, clock=lambda: now[0])
    assert samples == {"a": [1, 1], "b": [2, 2]}
    assert calls == [("b", 0), ("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2)]


def test_the_collector_is_off_inside_and_back_on_after():
    states = []
    prepared_samples(
        {"a": Prepared(lambda rows: rows, lambda rows: states.append(gc.isenabled()))}, lambda: np.zeros(1), 1
    )
    assert states == [False, False]
    assert gc.isenabled()


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="repeats=0: measure at least once"):
        prepared_samples({}, lambda: np.zeros(1), 0)


# --- the disk ---------------------------------------------------------------------------------------------


@pytest.fixture
def fake_fio(tmp_path, monkeypatch):
    """fake_fio(body): a shell script that stands in for fio."""

    def install(body: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "fio").write_text(f"#!/bin/sh\n{body}\n")
        (folder / "fio").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    return install


def test_what_fio_measures_is_read_and_named(fake_fio):
    output = json.dumps({"jobs": [{"read": {"iops": 65046.5, "bw_bytes": 266430416}}]})
    asked = "*--filename=/a/b*--direct=1*--runtime=2000ms*"
    fake_fio(f"case \"$*\" in {asked}) echo 'note: a line before'; echo '{output}';; esac")
    assert fio_random_read(Path("/a/b"), 2.0) == {
        "reads_per_s": 65046.5,
        "bytes_per_s": 266430416.0,
        "what": "fio, 4 KiB random direct reads, 64 in flight, 2 s",
    }


def test_a_machine_without_fio_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert fio_random_read(Path("/a/b"), 2.0) == {"reads_per_s": None, "why": "fio is not installed"}


def test_what_fio_complains_of_is_the_reason(fake_fio):
    fake_fio("echo 'fio: no such file' >&2; echo more >&2; exit 1")
    assert fio_random_read(Path("/a/b"), 2.0) == {"reads_per_s": None, "why": "fio failed: fio: no such file"}


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_fio_as_it_is_installed_here(tmp_path):
    (tmp_path / "fi:le").write_bytes(bytes(1 << 20))
    found = fio_random_read(tmp_path / "fi:le", 0.3)
    if found["reads_per_s"] is None:
        assert found["why"].startswith("fio failed: ")  # a file system without direct reads
    else:
        assert found["bytes_per_s"] == pytest.approx(4096 * found["reads_per_s"], rel=0.02)  # both are rounded


# --- the store --------------------------------------------------------------------------------------------


class FakeStore:
    """What EngramDB's store does, from memory."""

    shift = 0

    def __init__(self, folder, shards, rows, width):
        assert (shards, rows, width) == (1, ROWS, ROW_BYTES)
        self.rows = np.fromfile(Path(folder) / "shard_000.bin", np.uint8).reshape(rows, width)

    def fetch(self, rows):
        return self.rows[np.array(rows) + self.shift].tobytes()

    def close(self):
        pass


@pytest.fixture
def fake_engramdb(monkeypatch):
    monkeypatch.setitem(sys.modules, "engramdb", types.SimpleNamespace(Store=FakeStore))
    monkeypatch.setattr(engramdb.importlib.metadata, "version", lambda name: "0.0 of a test")


@linux
def test_both_ways_are_measured_and_nothing_is_left(fake_engramdb, fake_fio, tmp_path):
    fake_fio('echo \'{"jobs": [{"read": {"iops": 1000, "bw_bytes": 1}}]}\'')
    with ColdRace(tmp_path / "race", ROWS, ROW_BYTES) as race:
        samples = race.against_limit(50, rounds=4)
        assert {name: len(values) for name, values in samples.items()} == {OURS: 4, STORE: 4, DISK: 2}
        assert samples[DISK] == [0.05, 0.05]
    assert list((tmp_path / "race").iterdir()) == []


@linux
def test_a_race_without_fio_says_why(fake_engramdb, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    with (
        ColdRace(tmp_path, ROWS, ROW_BYTES) as race,
        pytest.raises(ValueError, match="limit is not known: fio is not installed"),
    ):
        race.against_limit(50, rounds=1)


def test_nothing_is_measured_when_rows_differ(fake_engramdb, monkeypatch, tmp_path):
    monkeypatch.setattr(FakeStore, "shift", -1)
    with pytest.raises(ValueError, match=f"{STORE} returned other rows than were written"):
        ColdRace(tmp_path, ROWS, ROW_BYTES)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_measured_that_is_not_cold(fake_engramdb, monkeypatch, tmp_path):
    monkeypatch.setattr(engramdb.FileTable, "drop_cache", lambda table: table.source.read())
    monkeypatch.setattr(engramdb.FileTable, "cached_share", lambda table: 0.25)
    with ColdRace(tmp_path, ROWS, ROW_BYTES) as race, pytest.raises(ValueError, match=r"25.00% of the file stay"):
        race.samples(50, 1)


def test_a_store_that_is_not_installed_is_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "engramdb", None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ValueError, match=r"^EngramDB cannot be compared with: .*pip install --target DIR") as caught:
        ColdRace(tmp_path / "race", ROWS, ROW_BYTES, tmp_path / "nowhere")
    assert "\n" not in str(caught.value)
    assert sys.path[-1] == str(tmp_path / "nowhere")
    assert list(tmp_path.rglob("*.safetensors")) == []
