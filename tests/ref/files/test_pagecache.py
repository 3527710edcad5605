"""What the system keeps of a file in memory is counted, of one file, of several and in pieces; and dropped."""

import os

import pytest
import torch

from engram_ref.files import pagecache
from tests.ref.files.stored_cases import R, random_rows
from tests.ref.files.ways import cold, fetch, linux


@linux
def test_the_share_in_memory_is_counted(make):
    table = make("4096 B")
    pages = R + 1  # and the header's
    cold(table)
    assert table.cached_share() == 0.0
    fetch(table, torch.tensor([5, 77, 5]))
    assert table.cached_share() == 2 / pages
    table.source.read()
    assert table.cached_share() == R / pages


@linux
def test_the_share_in_memory_is_that_of_all_files(make):
    table = make("two files")
    table.source.read()
    assert table.cached_share() == 1.0
    cold(table)
    assert table.cached_share() == 0.0
    fetch(table, torch.tensor([5, 10, 5]))
    pages = [-(-part.file_bytes // 4096) for part in table.source.parts]
    assert table.cached_share() == 2 / sum(pages)


@linux
def test_the_share_of_a_large_file_is_counted_in_pieces(make, monkeypatch):
    monkeypatch.setattr(pagecache, "_WINDOW", 1 << 16)
    table = cold(make("4096 B"))
    fetch(table, torch.arange(100, 300))
    assert table.cached_share() == 200 / (R + 1)


@linux
def test_direct_reads_leave_nothing_in_memory(make):
    table = cold(make("256 B", direct=True))
    fetch(table, random_rows(200))
    assert table.cached_share() == 0.0


def test_a_system_without_the_call_says_that_it_cannot_empty_the_page_cache(make, monkeypatch):
    table = make("256 B")
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    with pytest.raises(ValueError, match="cannot drop a file's pages"):
        table.drop_cache()
