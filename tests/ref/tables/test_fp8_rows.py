"""Rows in fp8: the same bits from every placement, laid as wanted, none with NaN, and no byte more than theirs."""

import pytest
import torch

from engram_ref.rows import nan_check
from engram_ref.tables import make_table
from engram_ref.tables.device import DeviceTable
from engram_ref.tables.file import StoredRows, save_pieces, save_rows
from engram_ref.tables.host import HostTable
from engram_ref.tables.uva import UvaTable
from tests.ref.rows.fp8_pairs import assert_bits, rows_of
from tests.ref.rows.fp8_pairs import random_rows as random_fp8_rows
from tests.ref.tables.placements import CASES, R, device_for, every_case, fetch, random_rows

# The interpreter multiplies with NumPy, which speaks of an overflow where fp8 rows have infinity for a value.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in multiply")
FP8 = random_fp8_rows(R, 64)  # any code with any scale but NaN, packed


@every_case
@pytest.mark.parametrize("split", [False, True], ids=["packed", "split"])
def test_fp8_rows_are_the_same_from_every_placement(case, split, placed):
    table = placed(case, rows_of(FP8, split))
    assert table.format.scaled and table.format.row_bytes == 66
    for count in (500, 1, 0):
        rows = random_rows(count)
        assert_bits(fetch(table, rows), FP8[rows])
        assert torch.equal(table.stored(rows), FP8[rows])
    out = torch.empty(4, 64, dtype=torch.bfloat16, device=table.device)
    assert fetch(table, torch.tensor([3, 0, R - 1, 3]), out).data_ptr() == out.data_ptr()
    assert_bits(out, FP8[[3, 0, R - 1, 3]])


@pytest.mark.parametrize("case", ["device", "host", "hot"])
@pytest.mark.parametrize("split", [False, True], ids=["from packed", "from split"])
@pytest.mark.parametrize("packed", [False, True], ids=["to split", "to packed"])
@pytest.mark.parametrize("stored", [False, True], ids=["in memory", "in a file"])
def test_fp8_rows_are_laid_as_wanted(case, split, packed, stored, tmp_path):
    content = rows_of(FP8, split)
    if stored:
        save_rows(tmp_path / "t.safetensors", content)
        content = StoredRows.find(tmp_path / "t.safetensors")
    with make_table(case, content, packed=packed, **CASES[case]) as table:
        held = (table._behind if case == "hot" else table)._rows
        assert [part.shape[1] for part in held.parts] == ([66] if packed else [64, 2])
        assert_bits(fetch(table, random_rows(100)), FP8[random_rows(100)])


@pytest.mark.parametrize("case", [case for case in CASES if "file" not in case])  # files: test_file.py
@pytest.mark.parametrize("split", [False, True], ids=["packed", "split"])
@pytest.mark.parametrize(("column", "byte"), [(5, 0x7F), (5, 0xFF), (65, 0xFF)], ids=["NaN", "-NaN", "scale"])
def test_fp8_rows_with_nan_are_refused_by_every_placement(case, split, column, byte, placed):
    """As those of a file are, however they came into memory."""
    poisoned = FP8.clone()
    poisoned[R - 2, column] = byte
    with pytest.raises(ValueError, match=f"row {R - 2} has a code or a scale that is NaN: not fp8 rows"):
        placed(case, rows_of(poisoned, split))


@pytest.mark.parametrize("split", [False, True], ids=["packed", "split"])
@pytest.mark.parametrize(("column", "byte"), [(0, 0xFF), (63, 0x7F), (64, 0xFF)], ids=["-NaN", "NaN", "scale"])
@pytest.mark.parametrize("kind", [DeviceTable, HostTable, UvaTable])
def test_fp8_rows_with_nan_are_refused_by_a_table_that_is_made_of_them(kind, split, column, byte, tmp_path):
    if kind is UvaTable and device_for("uva") != "cpu":
        pytest.skip("needs page-locked memory: tests/cuda")
    options = {} if kind is DeviceTable else {"device": "cpu"}
    poisoned = FP8.clone()
    kind(rows_of(poisoned, split), **options).close()
    poisoned[[R - 2, R - 1], column] = byte
    told = f"row {R - 2} has a code or a scale that is NaN: not fp8 rows$"
    with pytest.raises(ValueError, match=told):
        kind(rows_of(poisoned, split), **options)
    with pytest.raises(ValueError, match=told):
        save_rows(tmp_path / "table.safetensors", rows_of(poisoned, split))
    assert list(tmp_path.iterdir()) == []


def test_the_row_with_nan_is_counted_through_all_pieces(tmp_path):
    poisoned = FP8.clone()
    poisoned[290, 65] = 0xFF
    pieces = (rows_of(poisoned[first : first + 100]) for first in range(0, R, 100))
    with pytest.raises(ValueError, match="row 290 has a code or a scale that is NaN"):
        save_pieces(tmp_path / "table.safetensors", R, rows_of(FP8).format, pieces)


@pytest.mark.parametrize("case", CASES)
def test_the_factory_looks_for_nan_once(case, placed, monkeypatch):
    """At the rows that it is given, or at those that it reads from a file; never again at what it made of them."""
    looked = []
    real = nan_check.find_nan
    monkeypatch.setattr(nan_check, "find_nan", lambda raw, codes: looked.append(raw.nbytes) or real(raw, codes))
    placed(case, rows_of(FP8))
    # The file is looked at when it is written; what is hot of it, when it is read.
    again = 66 * len(CASES[case]["hot"]) if case == "hot, file behind" else 0
    assert sum(looked) == FP8.nbytes + again


@every_case
def test_a_table_of_fp8_rows_holds_their_bytes_and_no_more(case, placed):
    held = placed(case, rows_of(FP8)).bytes_held()
    hot = len(CASES[case]["hot"]) * 66 + 4 * R if "hot" in CASES[case] else 0
    assert sum(held.values()) == R * 66 + hot


def test_a_file_is_not_laid_anew(tmp_path):
    save_rows(tmp_path / "t.safetensors", rows_of(FP8))
    with pytest.raises(ValueError, match="'file' leaves rows as they lie"):
        make_table("file", StoredRows.find(tmp_path / "t.safetensors"), packed=False)
