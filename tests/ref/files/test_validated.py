"""Files that are not what they were when they were validated: not opened, or refused by the next fetch."""

import os
import time
from pathlib import Path

import pytest
import torch

from engram_ref.tables.file import FileTable
from tests.ref.files.stored_cases import R, random_content, store
from tests.ref.files.ways import CPU, fetch


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    path.write_bytes(b"other")


CHANGES = [grow, truncate, overwrite]


def become_a_pipe(path):
    path.unlink()
    os.mkfifo(path)  # whose opening waits for a writer


@pytest.mark.parametrize("change", [*CHANGES, become_a_pipe, lambda path: os.utime(path, ns=(1, 1))])
@pytest.mark.parametrize("part", [0, 1])
def test_a_file_that_was_changed_after_it_was_validated_is_not_opened(part, change, tmp_path):
    found = store(tmp_path, "two files", random_content("two files"))
    change(found.parts[part].path)
    for use in (found.read, lambda: FileTable(found, CPU), lambda: FileTable(found, CPU, direct=True)):
        with pytest.raises(ValueError, match=f"{part + 1}.safetensors was changed after it was validated"):
            use()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", [0, 1])
def test_a_file_that_changes_its_size_while_it_is_open_is_refused(part, change, way, make):
    table = make(random_content("two files"), "two files", **way)
    fetch(table, torch.tensor([0]))
    changed = table.source.parts[part]
    change(changed.path)
    with pytest.raises(ValueError, match=f"bytes now and had {changed.file_bytes} when it was opened"):
        fetch(table, torch.tensor([0]))


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("late", [False, True], ids=["before a fetch", "during a fetch"])
def test_a_file_that_is_overwritten_in_place_is_noticed(part, late, way, make, monkeypatch):
    """By its time: the size is the same."""
    table = make(random_content("two files"), "two files", **way)
    fetch(table, torch.tensor([0]))

    def overwrite_in_place():
        path = table.source.parts[part].path
        time.sleep(0.02)  # until the clock that dates files has ticked
        path.write_bytes(bytes(path.stat().st_size))

    if late:
        monkeypatch.setattr(table._reader, "_require_same_size", overwrite_in_place)
    else:
        overwrite_in_place()
    with pytest.raises(ValueError, match=f"{part + 1}.safetensors was changed after it was validated"):
        fetch(table, torch.arange(0, R, 7))


@pytest.mark.parametrize("part", [0, 1])
def test_a_file_that_is_truncated_during_a_fetch_is_refused(part, way, make, monkeypatch):
    table = make(random_content("two files"), "two files", **way)
    monkeypatch.setattr(table._reader, "_require_same_size", lambda: truncate(table.source.parts[part].path))
    with pytest.raises(ValueError, match=r"^the file ends at byte \d+, where it had rows when it was opened"):
        fetch(table, torch.arange(0, R, 7))
