"""Files that are read whole: none that would wait, never end or fill memory."""

import os
import tracemalloc

import pytest

from bench.instruments.journal import Journal, earlier
from engram_ref.checkpoint.config_json import read_config
from engram_ref.files.header import read_json
from engram_ref.files.small_files import MOST_JSON, read_small
from engram_ref.files.texts import read_text
from engram_ref.vocab import CompressedVocab, configured_pad, load_tokenizer


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(60 << 30)


def loop(path):
    path.symlink_to("/dev/zero")


TRAPS = {"pipe": os.mkfifo, "folder": os.mkdir, "sparse": sparse, "a device behind a link": loop}


@pytest.fixture(params=TRAPS)
def trap(request, tmp_path):
    """Make a file that must not be read at a path."""
    return TRAPS[request.param]


def test_what_is_regular_and_small_is_read(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    (tmp_path / "link").symlink_to(file)
    assert read_small(file, 5) == read_small(str(tmp_path / "link"), 5) == b"12345"
    with pytest.raises(ValueError, match="file is not a regular file of at most 4 bytes: give a smaller one"):
        read_small(file, 4, "give a smaller one")


def test_a_file_that_hides_its_size_is_not_read_to_its_end():
    assert len(read_small("/proc/self/maps", 1 << 24)) > 100  # its size is 0
    with pytest.raises(ValueError, match="of at most 100 bytes"):
        read_small("/proc/self/maps", 100)


READERS = {
    "small": ("file", read_small),
    "json": ("file", read_json),
    "config": ("config.json", lambda path: read_config(path.parent)),
    "tokenizer": ("tokenizer.json", load_tokenizer),
    "vocabulary": ("tokenizer.json", CompressedVocab.from_tokenizer),
    "journal": ("sweeps.journal", Journal),
    "earlier results": ("results.json", lambda path: earlier(path, {}, fresh=False)),
}


@pytest.mark.parametrize("reader", READERS)
def test_traps_are_refused_at_once_and_in_a_sentence(reader, trap, tmp_path):
    name, read = READERS[reader]
    trap(tmp_path / name)
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError, match=f"{name}.*: (name|give|take|download) |no tokenizer at .*: give"
        ) as caught:
            read(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_a_trap_beside_the_tokenizer(trap, tmp_path):
    trap(tmp_path / "tokenizer_config.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    try:
        assert configured_pad(tmp_path) is None  # there is none
    except ValueError as error:
        assert f"at most {MOST_JSON} bytes" in str(error)


@pytest.mark.parametrize("path", ["/dev/zero", "/"])
def test_a_text_is_a_file(path):
    with pytest.raises(ValueError, match=r"is not a regular file.*: name a text file"):
        read_text(path)


def test_a_text_from_a_pipe_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"is not a regular file.*: name a text file"):
        read_text(tmp_path / "pipe")
