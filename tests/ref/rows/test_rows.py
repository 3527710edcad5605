"""Rows in one part or two: the same bytes, made of one another, and refused where they are not rows."""

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from engram_ref.config import EngramConfig
from engram_ref.rows import fp8
from engram_ref.rows.rows import Rows
from engram_ref.tables import RowFormat, make_table
from engram_ref.tables.device import DeviceTable
from engram_ref.tables.host import HostTable


def fp8_rows(count: int = 20, width: int = 64) -> Rows:
    values = torch.randn(count, width, generator=torch.Generator().manual_seed(count))
    return Rows.from_split(*fp8.quantise(values))


def test_the_format_of_the_shipped_model():
    assert RowFormat.of(EngramConfig.preset("demo")) == RowFormat(torch.bfloat16, 64)
    row_format = RowFormat.of(EngramConfig.preset("v41-flash"))
    assert row_format == RowFormat(torch.bfloat16, 256, scaled=True)
    assert (row_format.row_bytes, row_format.split_bytes) == (264, (256, 8))


def test_packed_and_split_are_made_of_one_another():
    split = fp8_rows()
    packed = split.packed()
    assert [part.shape[1] for part in packed.parts] == [66] and [part.shape[1] for part in split.parts] == [64, 2]
    assert torch.equal(packed.parts[0], torch.cat(split.parts, dim=1))
    assert all(torch.equal(a, b) for a, b in zip(packed.split().parts, split.parts))
    assert split.split() is split and packed.packed() is packed
    assert split.nbytes == packed.nbytes == 20 * 66
    assert torch.equal(packed.values(), split.values())
    assert torch.equal(
        packed.values(), fp8.dequantise(split.parts[0].view(fp8.CODE_DTYPE), split.parts[1].view(fp8.SCALE_DTYPE))
    )


@pytest.mark.parametrize("scaled", [False, True])
def test_a_row_has_values(scaled):
    with pytest.raises(ValueError, match=r"^rows of 0 values: a row has one at least$"):
        RowFormat(torch.bfloat16, 0, scaled)


def test_rows_are_not_copied():
    raw = fp8_rows().packed().parts[0]
    assert Rows.from_packed(raw).parts[0].data_ptr() == raw.data_ptr()
    values = torch.randn(5, 3)
    assert Rows.of(values).values().data_ptr() == values.data_ptr()


@pytest.mark.parametrize("layout", ["packed", "split"])
def test_taken_rows(layout):
    rows = getattr(fp8_rows(), layout)()
    numbers = torch.tensor([19, 0, 19, 7])
    assert torch.equal(rows.take(numbers), fp8_rows().packed().parts[0][numbers])


def test_plain_rows_are_one_part():
    values = torch.randn(5, 6).bfloat16()
    rows = Rows.of(values)
    assert rows.format == RowFormat(torch.bfloat16, 6) and rows.nbytes == 60
    assert rows.split() is rows and rows.packed() is rows
    assert torch.equal(rows.values(), values)


@pytest.mark.parametrize(("part", "column", "byte"), [(0, 5, 0x7F), (0, 63, 0xFF), (1, 1, 0xFF)])
def test_nan_is_refused_and_the_row_named(part, column, byte):
    split = fp8_rows()
    split.parts[part][13, column] = byte
    codes, scales = split.parts[0].view(fp8.CODE_DTYPE), split.parts[1].view(fp8.SCALE_DTYPE)
    with pytest.raises(ValueError, match="row 13 has a code or a scale that is NaN"):
        Rows.from_split(codes, scales)
    with pytest.raises(ValueError, match="row 13 "):
        Rows.from_packed(torch.cat(split.parts, dim=1))


def test_the_row_with_nan_is_counted_from_the_first(monkeypatch):
    monkeypatch.setattr("engram_ref.rows.rows._CHECKED", 8)
    raw = fp8_rows().packed().parts[0].clone()
    raw[17, 0] = 0x7F
    with pytest.raises(ValueError, match="row 17 "):
        Rows.from_packed(raw)


@pytest.mark.parametrize("shape", [(4, 0), (4, 32), (4, 65), (66,)], ids=str)
def test_bytes_that_are_no_packed_rows_are_refused(shape):
    with pytest.raises(ValueError, match="packed rows of shape"):
        Rows.from_packed(torch.zeros(shape, dtype=torch.uint8))


def test_scales_of_another_block_size_are_refused():
    codes = torch.zeros(4, 256).to(fp8.CODE_DTYPE)
    with pytest.raises(ValueError, match=r"scales of shape \(4, 2\).*one scale for every 1 x 32"):
        Rows.from_split(codes, torch.ones(4, 2).to(fp8.SCALE_DTYPE))


@pytest.mark.parametrize(
    "shapes", [((4, 64), (3, 2)), ((4, 64), (4, 3)), ((4, 64),), ((4, 66), (4, 2)), ((4, 66, 1),)], ids=str
)
def test_parts_that_do_not_make_up_rows_are_refused(shapes):
    parts = tuple(torch.zeros(shape, dtype=torch.uint8) for shape in shapes)
    with pytest.raises(ValueError, match="one part, or"):
        Rows(RowFormat(torch.bfloat16, 64, scaled=True), parts)


def test_parts_with_gaps_are_refused():
    wide = torch.zeros(4, 132, dtype=torch.uint8)
    with pytest.raises(ValueError, match="contiguous"):
        Rows(RowFormat(torch.bfloat16, 64, scaled=True), (wide[:, :66],))


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 64), (torch.bfloat16, 65)], ids=str)
def test_scaled_rows_are_bfloat16_and_whole_blocks(dtype, width):
    with pytest.raises(ValueError, match="scaled rows of"):
        RowFormat(dtype, width, scaled=True)


@pytest.mark.parametrize("trained", [False, True])
def test_tensors_made_of_others_are_refused(trained):
    """As those of a sharded model are: they have no address, by which compiled code reads."""
    values = TwoTensor(torch.zeros(4, 8), torch.zeros(4, 8)).requires_grad_(trained)
    for use in (DeviceTable, *(() if trained else (Rows.of, lambda rows: HostTable(rows, "cpu")))):
        with pytest.raises(ValueError, match=r"rows that are a TwoTensor, made of other tensors: give a plain one"):
            use(values)
    for placement in ("device", "host", "hot"):
        with pytest.raises(ValueError, match=r"rows that are a TwoTensor, made of other tensors: give a plain one"):
            make_table(placement, values, "cpu", hot=torch.arange(2) if placement == "hot" else None)
    raw = torch.zeros(4, 66, dtype=torch.uint8)
    with pytest.raises(ValueError, match="rows that are a TwoTensor"):
        Rows.from_packed(TwoTensor(raw, raw))
