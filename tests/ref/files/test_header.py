"""Headers of safetensors files: where the library has the tensors, and nothing that does not add up is believed."""

import errno
import json
import os

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engram_ref.files.conventions import DTYPES
from engram_ref.files.header import (
    DTYPE_BITS,
    LARGEST_HEADER,
    parse_json,
    read_header,
    read_json,
    read_metadata,
    require_written,
)

DATA = bytes(range(24))
GOOD = {
    "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
    "b": {"dtype": "F32", "shape": [2, 2], "data_offsets": [4, 20]},
    "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [20, 20]},
    "c": {"dtype": "BF16", "shape": [2], "data_offsets": [20, 24]},
}


def pack(header, data=DATA, length=None):
    """A file of this header, which may be text."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


def write(path, content):
    path.write_bytes(content)
    return path


def changed(name, **changes):
    return {**GOOD, name: {**GOOD[name], **changes}}


def without(name, key):
    return {**GOOD, name: {k: v for k, v in GOOD[name].items() if k != key}}


# --- what is accepted -----------------------------------------------------------------------------


def test_tensors_are_where_the_library_puts_them(path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 100, (3, number + 1), generator=generator, dtype=torch.uint8).to(dtype)
        for number, (name, dtype) in enumerate(DTYPES.items())
    }
    save_file(tensors, path, {"note": "is no tensor"})
    entries, content = read_header(path), path.read_bytes()
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        entry = entries[name]
        assert (entry.path, entry.name, entry.dtype, entry.shape) == (path, name, name, tuple(tensor.shape))
        assert content[entry.offset : entry.offset + entry.nbytes] == tensor.view(torch.uint8).numpy().tobytes()


def test_the_good_file_is_good(path):
    entries = read_header(write(path, pack({"__metadata__": {"k": "v"}, **GOOD})))
    data = len(pack({"__metadata__": {"k": "v"}, **GOOD}, b""))
    assert {name: (entry.offset - data, entry.nbytes) for name, entry in entries.items()} == {
        "a": (0, 4),
        "b": (4, 16),
        "empty": (20, 0),
        "c": (20, 4),
    }
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == entries.keys()


def test_a_file_without_tensors_is_whole(path):
    assert read_header(write(path, pack({}, b""))) == {}


def test_metadata_are_no_tensor(path):
    write(path, pack({"__metadata__": {"made": "by a test"}, **GOOD}))
    assert read_metadata(path) == {"made": "by a test"} and read_header(path).keys() == GOOD.keys()
    assert read_metadata(write(path, pack(GOOD))) == {}


def test_values_smaller_than_a_byte(path):
    four = {"x": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]}}
    assert read_header(write(path, pack(four, b"abc")))["x"].nbytes == 3
    odd = {"x": {"dtype": "F4", "shape": [7], "data_offsets": [0, 3]}}
    with pytest.raises(ValueError, match=r"F4 of shape \[7\] has 3 bytes"):
        read_header(write(path, pack(odd, b"abc")))


def test_every_dtype_that_we_write_is_known():
    assert {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}.items() <= DTYPE_BITS.items()


# --- what is refused ------------------------------------------------------------------------------

REPEATED = '{"a": {"dtype": "U8", "shape": [24], "data_offsets": [0, 24]}, "a": {}}'
BAD = {
    "empty file": (b"", "claims a header of 0 bytes; the file has 0"),
    "no header": (b"\x05\0\0", "claims a header of 5 bytes; the file has 3"),
    "header cut off": (pack(GOOD)[:20], "it is cut off or no safetensors file, download it again"),
    "header to the end of the file and further": (pack(GOOD, b"", 10_000), "claims a header of 10000 bytes"),
    "absurd length": (
        pack(GOOD, length=2**64 - 1),
        f"claims a header of {2**64 - 1} bytes; .*at most {LARGEST_HEADER}",
    ),
    "something else": (b"PK\x03\x04" + bytes(100), "claims a header of"),
    "not JSON": (pack("{nonsense"), "the header of .* is damaged: .*; download it again"),
    "not UTF-8": ((2).to_bytes(8, "little") + b"\xff\xfe", "is damaged"),
    "a list": (pack("[1]"), "it holds a list, not a JSON object"),
    "too deep": (pack("[" * 200_000), "is damaged"),
    "twice": (pack(REPEATED), "the name 'a' stands there twice"),
    "a million dimensions": (pack(changed("a", shape=[1] * 10**6)), r"shape=\[1, .*1,000,000 items.* at most 64"),
    "65 dimensions": (pack(changed("a", shape=[4] + [1] * 64)), "at most 64 of them and each below"),
    "4,000 digits": (pack(changed("a", shape=[10**3999])), "is damaged: a number has 4,000 digits"),
    "large dimensions": (pack(changed("a", shape=[2**63 - 1] * 64)), "has <an integer of some 1,2.. digits> bytes"),
    "dimensions of 2^63": (pack(changed("a", shape=[2**63])), "not counts in order, .* each below 2"),
    "offsets of 999 digits": (
        pack(changed("a", data_offsets=[0, 10**998])),
        r"data_offsets=\[0, <an intege…gits>\] are not counts",
    ),
    "a long dtype": (pack(changed("a", dtype="F" * 10**6)), r"dtype='FFFF.*' \(1,000,000 characters\) is none"),
    "a dtype for the terminal": (pack(changed("a", dtype="\x1b[2J\n")), r"dtype='\\x1b\[2J\\n' is none"),
    "a long name": (pack({"n" * 10**6: 4}), r"tensor 'nnn.*' \(1,000,000 characters\): described by"),
    "a name for the terminal": (pack({"\r\u202e\x07": 4}), r"tensor '\\r\\u202e\\x07': described by"),
    "a long name twice": (pack(f'{{"{"n" * 10**6}": 1, "{"n" * 10**6}": 2}}'), "stands there twice"),
    "no dtype": (pack(without("a", "dtype")), "tensor 'a': described by something else than dtype"),
    "no shape": (pack(without("a", "shape")), "tensor 'a': described by something else"),
    "no offsets": (pack(without("b", "data_offsets")), "tensor 'b': described by something else"),
    "no object": (pack({**GOOD, "a": 4}), "tensor 'a': described by something else"),
    "unknown dtype": (pack(changed("a", dtype="F7")), "dtype='F7' is none that safetensors has"),
    "dtype no text": (pack(changed("a", dtype=[])), r"dtype=\[\] is none"),
    "negative shape": (pack(changed("a", shape=[-4])), r"shape=\[-4\], data_offsets=\[0, 4\] are not counts in order"),
    "real shape": (pack(changed("a", shape=[4.0])), r"shape=\[4\.0\]"),
    "negative offset": (pack(changed("a", data_offsets=[-4, 0])), r"data_offsets=\[-4, 0\] are not counts"),
    "backwards": (pack(changed("a", data_offsets=[4, 0])), r"data_offsets=\[4, 0\] are not counts in order"),
    "one offset": (pack(changed("a", data_offsets=[4])), r"data_offsets=\[4\]"),
    "boolean offset": (pack(changed("a", data_offsets=[False, 4])), r"data_offsets=\[False, 4\]"),
    "too few bytes": (pack(changed("a", shape=[3])), r"U8 of shape \[3\] has 3 bytes, data_offsets=\[0, 4\] span 4"),
    "too many bytes": (pack(changed("b", dtype="F64")), r"F64 of shape \[2, 2\] has 32 bytes"),
    "overlap": (pack(changed("b", data_offsets=[2, 18])), "the one before it ends at .*, so they overlap"),
    "the same place": (pack(changed("c", data_offsets=[0, 4])), "so they overlap"),
    "gap": (pack({**GOOD, "c": {**GOOD["c"], "data_offsets": [22, 26]}}, bytes(26)), "so they leave a gap"),
    "not from the start": (pack({"c": GOOD["c"]}), "so they leave a gap"),
    "beyond the file": (pack(changed("c", shape=[200], data_offsets=[20, 420])), "the file is cut off, download it"),
    "a number as metadata": (pack({"__metadata__": {"a": 1}, **GOOD}), "its __metadata__ are not texts; download it"),
    "a list as metadata": (pack({"__metadata__": ["a"], **GOOD}), "its __metadata__ are not texts"),
    "cut off": (pack(GOOD, DATA[:-1]), "the file is cut off, download it again"),
    "too long": (pack(GOOD, DATA + b"\0"), "the file has bytes that belong to no tensor, download it again"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_a_sentence(path, case):
    content, message = BAD[case]
    with pytest.raises(ValueError, match=message) as refused:
        read_header(write(path, content))
    assert str(path) in str(refused.value) and str(refused.value).isprintable() and len(str(refused.value)) < 600


# Of two tensors of one name, it takes the last; any number of dimensions that makes up the bytes is fine with it.
STRICTER = ("twice", "a long name twice", "a million dimensions", "65 dimensions")


@pytest.mark.parametrize("case", [case for case in BAD if case not in STRICTER])
def test_the_library_refuses_them_too(path, case):
    with pytest.raises(SafetensorError), safe_open(write(path, BAD[case][0]), framework="pt"):
        pass


@pytest.mark.parametrize("header", [{"__metadata__": None, **GOOD}, changed("a", note="x")], ids=["null", "note"])
def test_what_the_library_reads_is_read(path, header):
    write(path, pack(header))
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(GOOD)
    assert read_header(path).keys() == GOOD.keys() and read_metadata(path) == {}


# --- files that were reserved and not filled ------------------------------------------------------


@pytest.fixture
def large(path):
    """Two tensors of 64 KiB, written whole though their bytes are zeros: path and entries."""
    a, b = ({"dtype": "U8", "shape": [1 << 16], "data_offsets": [i << 16, (i + 1) << 16]} for i in (0, 1))
    write(path, pack({"a": a, "b": b}, bytes(1 << 17)))
    return path, read_header(path)


def dig(path, first, last):
    """Make a hole of bytes first .. last - 1: write all others anew, to a file of the same size."""
    content = path.read_bytes()
    path.unlink()
    with open(path, "wb") as file:
        file.write(content[:first])
        file.seek(last)
        file.write(content[last:])
        file.truncate(len(content))
    with open(path, "rb") as file:
        if os.lseek(file.fileno(), 0, os.SEEK_HOLE) == len(content):
            pytest.skip("this file system knows of no holes")


def test_zeros_that_were_written_are_no_holes(large):
    require_written(large[1].values())


@pytest.mark.parametrize(("first", "last", "hollow"), [(0, 64, "ab"), (8, 16, "a"), (20, 24, "b"), (28, 40, "b")])
def test_a_tensor_with_a_hole_is_refused_and_the_others_are_not(large, first, last, hollow):
    path, entries = large
    start, kib = entries["a"].offset, 4096
    dig(path, start if first == 0 else first * kib, min(path.stat().st_size, last * kib))
    for name, entry in entries.items():
        if name in hollow:
            with pytest.raises(ValueError, match=f"tensor '{name}': byte [0-9]+ of the file was never written") as told:
                require_written([entry])
            assert "download it again" in str(told.value) and "sparse=True" in str(told.value)
        else:
            require_written([entry])


@pytest.mark.parametrize("error", [OSError(errno.EINVAL, "no"), OSError(errno.ENXIO, "no"), OSError(errno.EPERM, "no")])
def test_where_nobody_knows_of_holes_nothing_is_refused(large, error, monkeypatch):
    path, entries = large
    dig(path, 4096, 1 << 17)

    def refuse(fd, position, how):
        raise error

    monkeypatch.setattr(os, "lseek", refuse)
    require_written(entries.values())
    monkeypatch.delattr(os, "SEEK_HOLE")
    require_written(entries.values())


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    for path in (tmp_path / "pipe", tmp_path):
        for read in (read_header, read_json):
            with pytest.raises(ValueError, match="is not a regular file"):
                read(path)
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "none")


def test_a_huge_json_file_is_not_read(tmp_path):
    path = tmp_path / "x.json"
    path.touch()
    os.truncate(path, LARGEST_HEADER + 1)
    with pytest.raises(ValueError, match=f"not a regular file of at most {LARGEST_HEADER} bytes"):
        read_json(path)


def test_a_name_twice_is_refused_at_any_depth():
    assert parse_json(b'{"a": {"b": 1}, "b": [{"a": 1}, {"a": 2}]}', "it") == {"a": {"b": 1}, "b": [{"a": 1}, {"a": 2}]}
    with pytest.raises(ValueError, match=r"^it is damaged: the name 'b' stands there twice; download it again$"):
        parse_json(b'{"a": {"b": 1, "b": 1}}', "it")
