"""Rows in files: found or refused with a reason, read whole in any layout, and written so that others can read them."""

import dataclasses
import errno
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from engram_ref.files import stored_rows, validated, writing
from engram_ref.files.conventions import BLOCK, packed_mark
from engram_ref.files.stored_rows import StoredRows
from engram_ref.files.writing import save_pieces, save_rows
from engram_ref.rows import fp8
from engram_ref.rows.format import RowFormat
from engram_ref.rows.fp8 import CODE_DTYPE, SCALE_DTYPE
from engram_ref.rows.nan_check import find_nan
from engram_ref.rows.rows import Rows
from tests.ref.files.stored_cases import (
    CASES,
    FORMATS,
    FP8,
    R,
    assert_same_bits,
    random_codes,
    random_content,
    random_values,
    store,
    write_tensors,
)

FP8_FORMAT = RowFormat(torch.bfloat16, 256, scaled=True)


def assert_same_rows(got: Rows, expected: Rows) -> None:
    """The same bytes in the same parts."""
    assert got.format == expected.format and len(got.parts) == len(expected.parts)
    assert all(torch.equal(*pair) for pair in zip(got.parts, expected.parts))


# --- files that are not tables ----------------------------------------------------------------------------


def test_a_truncated_file_is_refused(tmp_path):
    """Whatever else can be wrong with a file, its header's reader refuses (test_header.py)."""
    write_tensors(tmp_path / "t", {"weight": CODES, "scale": scales_of(4, 2)})
    (tmp_path / "s").write_bytes((tmp_path / "t").read_bytes()[:-1])
    for options in ({"path": tmp_path / "s"}, {"path": tmp_path / "t", "scale_path": tmp_path / "s"}):
        with pytest.raises(ValueError, match=r"/s has .*: the file is cut off, download it again"):
            StoredRows.find(**options)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        StoredRows.find(tmp_path / "nowhere.safetensors")


TENSORS = {
    "table": torch.zeros(3, 4),
    "bytes": torch.zeros(3, 4, dtype=torch.uint8),
    "numbers": torch.zeros(3, 4, dtype=torch.int64),
    "flat": torch.zeros(12),
    "cube": torch.zeros(3, 2, 2),
    "empty": torch.zeros(0, 4),
    "scale": torch.zeros(3, 4).to(SCALE_DTYPE),
}


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "weight": "has no tensor 'weight': it has table, bytes, numbers, flat, cube, empty, scale$",
        "bytes": "tensor 'bytes' is U8, and the file's metadata do not say that it has packed fp8 rows",
        "numbers": "tensor 'numbers' is I64: rows are one of F64, F32, F16, BF16, F8_E4M3$",
        "flat": r"tensor 'flat' has shape \(12,\): a table is \[rows, width\]",
        "cube": r"tensor 'cube' has shape \(3, 2, 2\)",
        "empty": r"tensor 'empty' has shape \(0, 4\): a table is .* one row at least",
        "scale": "tensor 'scale' is F8_E8M0: rows are one of",
        None: "has 4 tensors with two dimensions: give the name of one",
    }.items(),
)
def test_a_tensor_that_is_no_table_is_refused(name, message, tmp_path):
    write_tensors(tmp_path / "many", TENSORS)
    with pytest.raises(ValueError, match=message):
        StoredRows.find(tmp_path / "many", name)


def test_the_only_matrix_of_a_file_needs_no_name(tmp_path):
    values = random_values(FORMATS["10 B"])
    tensors = {"scale": torch.ones(3), "rows": values, "cube": TENSORS["cube"]}
    safetensors.torch.save_file(tensors, tmp_path / "some", metadata={"made": "by a test"})
    found = StoredRows.find(tmp_path / "some")
    assert (found.name, found.rows, found.format, found.nbytes) == ("rows", R, FORMATS["10 B"], R * 10)
    assert_same_rows(found.read(), Rows.of(values))


# --- codes and their scales -------------------------------------------------------------------------------

NAME, SCALE = "layers.1.engram.embed.weight", "layers.1.engram.embed.scale"


def write_codes(path: Path, codes: torch.Tensor, scales: torch.Tensor, scale: str = SCALE) -> Path:
    """A file as a checkpoint has it: other tensors with two dimensions, codes, scales."""
    write_tensors(path, {"wkv.weight": torch.zeros(4, 4), NAME: codes, scale: scales})
    return path


def test_codes_and_scales_are_found_by_the_names_of_a_checkpoint(tmp_path):
    codes, scales = random_codes()
    path = write_codes(tmp_path / "shard", codes, scales)
    found = StoredRows.find(path, NAME)
    assert (found.path, found.name, found.rows, found.nbytes) == (path, NAME, R, R * 264)
    assert found.format == FP8_FORMAT
    assert [(part.path, part.name, part.row_bytes) for part in found.parts] == [(path, NAME, 256), (path, SCALE, 8)]
    assert_same_rows(found.read(), Rows.from_split(codes, scales))


def test_scales_are_found_elsewhere_under_another_name(tmp_path):
    codes, scales = random_codes()
    one = write_codes(tmp_path / "1", codes, fp8.quantise(torch.ones(R, 256))[1])
    two = write_codes(tmp_path / "2", random_codes(R, 64)[0], scales, "s")
    found = StoredRows.find(one, NAME, scale="s", scale_path=two)
    assert found.parts[1].path == two
    assert_same_rows(found.read(), Rows.from_split(codes, scales))
    with pytest.raises(AssertionError):
        assert_same_rows(StoredRows.find(one, NAME).read(), Rows.from_split(codes, scales))


def test_the_only_pair_of_a_file_needs_no_name(tmp_path):
    content = random_content("split")
    save_rows(tmp_path / "t", content)
    found = StoredRows.find(tmp_path / "t")
    assert [part.name for part in found.parts] == ["weight", "scale"]
    assert_same_rows(found.read(), content)


CODES = torch.zeros(4, 64).to(CODE_DTYPE)


def scales_of(*shape: int) -> torch.Tensor:
    return torch.ones(shape).to(SCALE_DTYPE)


WRONG_SCALES = {
    "none": (torch.ones(4), {}, "has no tensor 'w.scale': it has w.weight, w.other; .* give scale= or scale_path="),
    "float32": (torch.ones(4, 2), {"scale": "w.other"}, "is F32: the scales of rows are F8_E8M0"),
    "codes": (CODES, {"scale": "w.other"}, "is F8_E4M3: the scales of rows are F8_E8M0"),
    "one for 64": (
        scales_of(4, 1),
        {"scale": "w.other"},
        r"shape \(4, 1\) for codes of shape \(4, 64\): there is one scale for every 32 codes of a row",
    ),
    "one for 16": (scales_of(4, 4), {"scale": "w.other"}, r"shape \(4, 4\) .* for every 32 codes"),
    "fewer rows": (scales_of(3, 2), {"scale": "w.other"}, r"shape \(3, 2\) for codes of shape \(4, 64\)"),
    "more rows": (scales_of(5, 2), {"scale": "w.other"}, r"shape \(5, 2\) for codes of shape \(4, 64\)"),
    "flat": (scales_of(8), {"scale": "w.other"}, r"has shape \(8,\): a table is \[rows, width\]"),
}


@pytest.mark.parametrize("case", WRONG_SCALES)
def test_scales_that_do_not_fit_are_refused(case, tmp_path):
    other, arguments, message = WRONG_SCALES[case]
    write_tensors(tmp_path / "t", {"w.weight": CODES, "w.other": other})
    with pytest.raises(ValueError, match=message) as caught:
        StoredRows.find(tmp_path / "t", "w.weight", **arguments)
    assert "\n" not in str(caught.value)


def test_scales_that_fit_are_not_refused(tmp_path):
    write_tensors(tmp_path / "t", {"w.weight": CODES, "w.other": scales_of(4, 2)})
    assert StoredRows.find(tmp_path / "t", "w.weight", scale="w.other").rows == 4


def test_codes_that_do_not_make_whole_blocks_are_refused(tmp_path):
    write_tensors(tmp_path / "t", {"weight": torch.zeros(4, 80).to(CODE_DTYPE), "scale": scales_of(4, 2)})
    with pytest.raises(ValueError, match="tensor 'weight' has 80 codes a row: 32 of them share a scale"):
        StoredRows.find(tmp_path / "t")


def test_codes_of_another_name_need_the_name_of_their_scales(tmp_path):
    write_tensors(tmp_path / "t", {"codes": CODES, "scale": scales_of(4, 2)})
    with pytest.raises(ValueError, match="is F8_E4M3 and is not called 'weight': name its scales, with scale="):
        StoredRows.find(tmp_path / "t")
    assert StoredRows.find(tmp_path / "t", scale="scale").name == "codes"


@pytest.mark.parametrize("arguments", [{"scale": "scale"}, {"scale_path": "elsewhere"}])
def test_scales_for_plain_rows_are_refused(arguments, tmp_path):
    write_tensors(tmp_path / "t", {"weight": torch.zeros(4, 64), "scale": scales_of(4, 2)})
    with pytest.raises(ValueError, match="tensor 'weight' is F32: only codes, F8_E4M3, have scales"):
        StoredRows.find(tmp_path / "t", "weight", **arguments)


# --- packed rows ------------------------------------------------------------------------------------------


def test_packed_rows_are_found_by_their_mark(tmp_path):
    packed = random_content("packed")
    mark = {**packed_mark("rows"), "made": "by a test"}
    write_tensors(tmp_path / "t", {"rows": packed.parts[0]}, mark)
    found = StoredRows.find(tmp_path / "t")
    assert (found.name, found.rows, found.format, found.nbytes) == ("rows", R, FP8_FORMAT, R * 264)
    assert_same_rows(found.read(), packed)


@pytest.mark.parametrize(
    "metadata", [None, packed_mark("other"), {"rows.rows": "F8_E4M3 codes, then one F8_E8M0 scale for every 128"}]
)
def test_bytes_without_the_mark_are_refused(metadata, tmp_path):
    write_tensors(tmp_path / "t", {"rows": random_content("packed").parts[0]}, metadata)
    with pytest.raises(ValueError, match="tensor 'rows' is U8, and the file's metadata do not say"):
        StoredRows.find(tmp_path / "t")


@pytest.mark.parametrize("row_bytes", [256, 265, 32])
def test_packed_rows_of_another_size_are_refused(row_bytes, tmp_path):
    write_tensors(tmp_path / "t", {"w": torch.zeros(4, row_bytes, dtype=torch.uint8)}, packed_mark("w"))
    with pytest.raises(ValueError, match=f"tensor 'w' has rows of {row_bytes} B: packed ones have 33 B for every 32"):
        StoredRows.find(tmp_path / "t")


# --- reading all ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_read(case, tmp_path, monkeypatch):
    monkeypatch.setattr(stored_rows, "_PIECE", 4099)  # many pieces
    monkeypatch.setattr(writing, "_PIECE", 4099)
    content = random_content(case)
    found = store(tmp_path, case, content)
    assert (found.format, found.rows, found.nbytes) == (content.format, R, content.nbytes)
    assert_same_rows(found.read(), content)


@pytest.mark.parametrize("case", FP8)
@pytest.mark.parametrize("layout", [Rows.packed, Rows.split])
def test_fp8_rows_are_read_into_either_layout(case, layout, tmp_path, monkeypatch):
    monkeypatch.setattr(stored_rows, "_PIECE", 4099)
    expected = layout(random_content(case))
    parts = [torch.full_like(part, 0xAA) for part in expected.parts]
    store(tmp_path, case, random_content(case)).read_into(parts)
    assert_same_rows(Rows(expected.format, tuple(parts)), expected)


@pytest.mark.parametrize("case", FP8)
@pytest.mark.parametrize(("column", "byte"), [(0, 0x7F), (255, 0xFF), (263, 0xFF)])
def test_fp8_rows_with_nan_are_not_loaded(case, column, byte, tmp_path, monkeypatch):
    monkeypatch.setattr(stored_rows, "_PIECE", 4099)
    raw = random_content("packed").parts[0].clone()
    raw[500, column] = byte
    content = Rows(FP8_FORMAT, (raw,))
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "refuse_nan", lambda rows, before: None)  # a file that others wrote
        found = store(tmp_path, case, content if case == "packed" else content.split())
    for layout in (content.packed(), content.split()):
        with pytest.raises(ValueError, match=r": row 500 has a code or a scale that is NaN: not fp8 rows$"):
            found.read_into([torch.empty_like(part) for part in layout.parts])


@pytest.mark.parametrize("checked", [1, 264, 1000, 1 << 20])
def test_the_first_nan_is_found_wherever_it_is(checked, monkeypatch):
    monkeypatch.setattr("engram_ref.rows.nan_check._CHECKED", checked)
    raw = random_content("packed").parts[0].numpy().copy()
    assert find_nan(raw, 256) is None and find_nan(raw[:0], 256) is None
    for row, column, byte in [(700, 263, 0xFF), (699, 255, 0x7F), (4, 256, 0xFF), (3, 0, 0xFF), (0, 128, 0x7F)]:
        raw[row, column] = byte
        assert find_nan(raw, 256) == row
    assert find_nan(raw[:, :256], 256) == 0 and find_nan(raw[1:, :256], 256) == 2
    assert find_nan(raw[:, 256:], 0) == 4


def test_every_byte_but_nan_is_a_code_or_a_scale():
    every = np.arange(256, dtype=np.uint8)[:, None]
    nan = torch.arange(256, dtype=torch.uint8).view(CODE_DTYPE).float().isnan().tolist()
    assert [find_nan(code, 1) is not None for code in every[:, None]] == nan
    nan = torch.arange(256, dtype=torch.uint8).view(SCALE_DTYPE).float().isnan().tolist()
    assert [find_nan(scale, 0) is not None for scale in every[:, None]] == nan


@pytest.mark.parametrize("part", [0, 1])
def test_a_file_that_is_truncated_while_all_of_it_is_read_is_refused(part, tmp_path, monkeypatch):
    found = store(tmp_path, "two files", random_content("two files"))
    descriptor = validated.open_same

    def open_and_truncate(path, *more):
        fd = descriptor(path, *more)
        if path == found.parts[part].path:
            os.truncate(path, path.stat().st_size // 2)
        return fd

    monkeypatch.setattr(validated, "open_same", open_and_truncate)
    with pytest.raises(ValueError, match="the file ends at byte"):
        found.read()


def test_memory_of_another_shape_is_refused(tmp_path):
    save_rows(tmp_path / "t", random_values(FORMATS["256 B"]))
    found = StoredRows.find(tmp_path / "t")
    right = torch.empty(R, 256, dtype=torch.uint8)
    found.read_into([right])
    for wrong in ([right[1:]], [right.view(2 * R, 128)], [right.view(torch.int8)], [right, right], []):
        with pytest.raises(ValueError, match=r"need \[701, 256\], uint8, on the CPU"):
            found.read_into(wrong)
    with pytest.raises(ValueError, match="must be contiguous"):
        found.read_into([torch.empty(256, R, dtype=torch.uint8).t()])


def test_memory_for_half_a_row_is_refused(tmp_path):
    found = store(tmp_path, "split", random_content("split"))
    for wrong in ([torch.empty(R, 256, dtype=torch.uint8)], [torch.empty(R, 132, dtype=torch.uint8)] * 2):
        with pytest.raises(ValueError, match=r"need \[701, 264\] or \[701, 256\] and \[701, 8\], uint8"):
            found.read_into(wrong)


def test_a_table_larger_than_memory_is_not_read(tmp_path):
    save_rows(tmp_path / "t", torch.zeros(2, 2))
    found = StoredRows.find(tmp_path / "t")
    large = dataclasses.replace(found.parts[0], rows=2**60)
    with pytest.raises(ValueError, match="do not fit into host memory"):
        dataclasses.replace(found, parts=(large,)).read()


# --- writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", FORMATS)
def test_safetensors_reads_plain_rows(size, tmp_path):
    values = random_values(FORMATS[size])
    name = 'a "name" with ünusual characters'
    save_rows(tmp_path / "t", values, name)
    assert StoredRows.find(tmp_path / "t").parts[0].offset % BLOCK == 0
    assert_same_bits(safetensors.torch.load_file(tmp_path / "t")[name], values, torch.arange(R))


def test_safetensors_reads_codes_and_scales(tmp_path):
    codes, scales = random_codes()
    save_rows(tmp_path / "t", Rows.from_split(codes, scales), NAME)
    with safe_open(tmp_path / "t", framework="pt") as file:
        for name, expected in ((NAME, codes), (SCALE, scales)):
            got = file.get_tensor(name)
            assert got.dtype == expected.dtype and torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
        assert set(file.keys()) == {NAME, SCALE} and file.metadata() is None
    first, second = (part.offset for part in StoredRows.find(tmp_path / "t", NAME).parts)
    assert first % BLOCK == 0 and second == first + R * 256


def test_safetensors_reads_packed_rows_and_their_mark(tmp_path):
    packed = random_content("packed")
    save_rows(tmp_path / "t", packed, NAME)
    with safe_open(tmp_path / "t", framework="pt") as file:
        assert file.metadata() == {f"{NAME}.rows": "F8_E4M3 codes, then one F8_E8M0 scale for every 32"}
        assert torch.equal(file.get_tensor(NAME), packed.parts[0])
    assert StoredRows.find(tmp_path / "t").parts[0].offset % BLOCK == 0


def test_values_that_do_not_lie_in_order_are_saved_in_order(tmp_path):
    values = random_values(FORMATS["256 B"]).t()[::3].requires_grad_()
    save_rows(tmp_path / "t", values)
    assert_same_rows(StoredRows.find(tmp_path / "t").read(), Rows.of(values.detach().contiguous()))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(3), r"shape \(3,\): a table is \[rows, width\]"),
        (torch.zeros(0, 3), "a table of 0 rows of 3 values"),
        (torch.zeros(3, 0), "rows of 0 values: a row has one at least"),
        (torch.zeros(3, 3, dtype=torch.int32), "rows of torch.int32: a table's are one of"),
    ],
)
def test_values_that_are_no_table_are_not_saved(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_rows(tmp_path / "t", values)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "__metadata__"])
def test_a_name_that_safetensors_has_taken_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="a tensor needs another name"):
        save_rows(tmp_path / "t", torch.zeros(2, 2), name)


def test_codes_must_be_called_weight(tmp_path):
    with pytest.raises(ValueError, match="codes called 'rows': end the name in 'weight'"):
        save_rows(tmp_path / "t", random_content("split"), "rows")


def test_pieces_make_one_table(tmp_path):
    values = random_values(FORMATS["10 B"])
    save_pieces(tmp_path / "t", R, FORMATS["10 B"], (values[i : i + 100] for i in range(0, R, 100)))
    assert_same_rows(StoredRows.find(tmp_path / "t").read(), Rows.of(values))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("given", ["packed", "split"])
def test_pieces_of_fp8_rows_are_laid_as_wanted(given, split, tmp_path):
    content = random_content(given)
    pieces = (Rows(FP8_FORMAT, tuple(part[i : i + 100] for part in content.parts)) for i in range(0, R, 100))
    save_pieces(tmp_path / "t", R, FP8_FORMAT, pieces, split=split)
    assert_same_rows(StoredRows.find(tmp_path / "t").read(), content.split() if split else content.packed())


@pytest.mark.parametrize("split", [False, True])
def test_pieces_of_values_are_quantised(split, tmp_path):
    values = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    row_format = RowFormat(torch.bfloat16, 64, scaled=True)
    save_pieces(tmp_path / "t", 50, row_format, values.split(20), split=split)
    expected = Rows.from_split(*fp8.quantise(values))
    assert_same_rows(StoredRows.find(tmp_path / "t").read(), expected if split else expected.packed())


@pytest.fixture
def folder(tmp_path):
    """A folder with an older table in it; a failed save must leave it is."""
    folder = tmp_path / "folder"
    folder.mkdir()
    save_rows(folder / "t", torch.ones(2, 2))
    before = (folder / "t").read_bytes()
    yield folder
    assert [path.name for path in folder.iterdir()] == ["t"]
    assert (folder / "t").read_bytes() == before


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([torch.zeros(3, 5)], "the pieces have 3 rows together: 4 were announced"),
        ([torch.zeros(3, 5), torch.zeros(2, 5)], "the pieces have 5 rows together: 4 were announced"),
        ([torch.zeros(3, 5), torch.zeros(1, 6)], r"rows of shape \(1, 6\)"),
        ([torch.zeros(4, 5, dtype=torch.float64)], "float64"),
        ([Rows.of(torch.zeros(4, 6))], "a piece of RowFormat.*width=6.*: this table has RowFormat.*width=5"),
    ],
)
def test_pieces_that_are_not_the_table_leave_nothing_behind(pieces, message, folder):
    with pytest.raises(ValueError, match=message):
        save_pieces(folder / "t", 4, RowFormat(torch.float32, 5), pieces)


def test_a_save_that_is_interrupted_leaves_nothing_behind(folder):
    def pieces():
        yield torch.zeros(2, 5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_pieces(folder / "t", 4, RowFormat(torch.float32, 5), pieces())


def test_a_disk_that_is_full_while_writing_leaves_nothing_behind(folder):
    resource = pytest.importorskip("resource", reason="limits of file size are Unix's")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match=r"^\[Errno 27\] File too large: '.*/t'$"):
            save_rows(folder / "t", torch.zeros(1 << 10, 1 << 10))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("rows", "split"), [(R - 1, True), (R + 1, True), (R - 1, False)])
def test_another_number_of_fp8_rows_leaves_nothing_behind(rows, split, folder):
    with pytest.raises(ValueError, match=f"the pieces have 701 rows together: {rows} were announced"):
        save_pieces(folder / "t", rows, FP8_FORMAT, [random_content("split")], split=split)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_at_the_end_leaves_nothing_behind(call, folder, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), refuse)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '.*/t'$"):
        save_rows(folder / "t", torch.zeros(3, 3))


@pytest.mark.parametrize(("first", "last"), [(0, 9), (1, 3), (2, 8), (3, 4), (5, 9), (4, 4), (9, 9)])
def test_some_rows_of_several_tensors(tmp_path, first, last):
    """Each tensor gives the rows that it has of those that are asked for."""
    values = torch.arange(9 * 4, dtype=torch.float32).view(9, 4)
    places = []
    for number, piece in enumerate(values.split([3, 1, 5])):
        save_rows(tmp_path / f"{number}.safetensors", piece.contiguous())
        places.append((tmp_path / f"{number}.safetensors", "weight"))
    some = StoredRows.find_shards(places).between(first, last)
    assert some.rows == last - first
    if some.rows:
        assert torch.equal(some.read().values(), values[first:last])
    inner = StoredRows.find_shards(places).between(1, 9).between(1, 7)  # some of some
    assert torch.equal(inner.read().values(), values[2:8])
