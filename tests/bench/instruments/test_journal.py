"""The journal: whatever kills a run, what was finished is found again, and nothing else is."""

import os

import pytest

from bench.instruments import journal as module
from bench.instruments.journal import Journal


def test_a_journal_that_was_killed_goes_on_in_its_place(tmp_path, capsys):
    path = tmp_path / "journal"
    whole = b'["a",{"cost":1}]\n["c",{"cost":3}]\n'
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with Journal(path) as journal:
            found = dict(journal.found)
            journal.add({"d": {"cost": 4}})
        assert found == {key: {"cost": cost} for key, cost, end in (("a", 1, 16), ("c", 3, 33)) if cut >= end}
        torn = b"" if cut in (0, 17) else b"\n"  # a torn line is ended, a whole one is not followed by an empty one
        assert path.read_bytes() == whole[:cut] + torn + b'["d",{"cost":4}]\n'
        with Journal(path) as journal:
            assert journal.found == {**found, "d": {"cost": 4}}
    assert [p.name for p in tmp_path.iterdir()] == ["journal"] and capsys.readouterr().err == ""


def test_a_journal_with_torn_and_foreign_lines(tmp_path, capsys):
    path = tmp_path / "journal"
    path.write_bytes(b'["a",{"cost":1}]\nnoise\n[1,2,3]\n{"b":1}\n["c",{"cost":3')
    with Journal(path) as journal:
        assert journal.found == {"a": {"cost": 1}}
        journal.add({"c": {"cost": 4}})
    with Journal(path) as journal:
        assert journal.found == {"a": {"cost": 1}, "c": {"cost": 4}}
    assert path.read_bytes() == b'["a",{"cost":1}]\n["c",{"cost":4}]\n'
    assert (tmp_path / "journal.broken").read_bytes().startswith(b'["a",{"cost":1}]\nnoise\n')
    assert capsys.readouterr().err.count("journal has 3 lines that no run has written; it is kept as") == 1


def test_what_was_read_of_a_broken_journal_is_on_disk_at_once(tmp_path, capsys):
    """Killed right after it opened a broken journal, a run has lost nothing."""
    path = tmp_path / "journal"
    path.write_bytes(b'["a",{"cost":1}]\nnoise\n')
    with Journal(path):
        assert path.read_bytes() == b'["a",{"cost":1}]\n'
    assert "journal has 1 lines" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", [b'["a",2]', b'["a"]', b'["a",{},3]', b'["a",[["b",1]]]', b'["a",null]', b'["a",' + b"[" * 10**5]
)
def test_a_line_that_holds_no_record_is_no_record(line, tmp_path):
    path = tmp_path / "journal"
    path.write_bytes(line + b'\n["b",{"cost":2}]\n')
    with Journal(path) as journal:
        assert journal.found == {"b": {"cost": 2}}


def test_records_are_on_disk_when_they_are_added(tmp_path, monkeypatch):
    """The file holds all of them when it is synchronised, and it is synchronised each time; the later record counts."""
    path, synced = tmp_path / "some" / "folder" / "journal", []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append((os.fstat(handle).st_ino, path.read_bytes())))
    with Journal(path) as journal:
        assert journal.found == {} and not path.parent.exists()  # a run that finishes nothing leaves nothing
        journal.add({"a": {"cost": 1}, "b": {"cost": 2}})
        first = b'["a",{"cost":1}]\n["b",{"cost":2}]\n'
        assert synced == [(path.stat().st_ino, first)]
        journal.add({"a": {"cost": 3}})
        assert synced[1:] == [(path.stat().st_ino, first + b'["a",{"cost":3}]\n')]
        assert journal.found == {"a": {"cost": 3}, "b": {"cost": 2}}
    with Journal(path) as journal:
        assert journal.found == {"a": {"cost": 3}, "b": {"cost": 2}}


def test_one_file_is_opened_and_it_is_closed(tmp_path):
    with Journal(tmp_path / "journal") as journal:
        journal.add({"a": {}})
        file = journal._file
        journal.add({"b": {}})
        assert journal._file is file and not file.closed
    assert file.closed


def test_a_journal_has_at_most_a_gibibyte(tmp_path):
    """Of a larger file nothing is read: it is no journal. Here it has a hole."""
    path = tmp_path / "journal"
    with path.open("wb") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(ValueError, match=r"journal is not a regular file of at most 1073741824 bytes: name another"):
        Journal(path)
    assert module.MOST_BYTES == 1 << 30
