"""Headers of safetensors files: where the library has the tensors, and nothing that does not add up is believed.

python -m pytest tests/ref/test_safetensors_header.py
"""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engram_ref.safetensors_header import DTYPE_BITS, LARGEST_HEADER, parse_json, read_header, read_json, read_metadata
from engram_ref.tables.writing import DTYPES

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
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("case", [case for case in BAD if case != "twice"])  # of two, it takes the last
def test_the_library_refuses_them_too(path, case):
    with pytest.raises(SafetensorError), safe_open(write(path, BAD[case][0]), framework="pt"):
        pass


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
