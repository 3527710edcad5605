"""A table whose rows lie in several tensors, of one file and more: read as if it lay in one."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engram_ref.files import row_reader
from engram_ref.files.row_reader import RowReader
from engram_ref.tables import make_table
from engram_ref.tables.file import StoredRows, predict, save_rows

WIDTH = 5
SIZES = (7, 1, 130, 40, 22)  # rows of each tensor: alone, and more than one read takes
ROWS = sum(SIZES)


@pytest.fixture(scope="module")
def values():
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stored(values, tmp_path_factory):
    """In two files, the names such that no file has its rows in order."""
    folder = tmp_path_factory.mktemp("shards")
    shards = {f"shard_{10 - k}": part.clone() for k, part in enumerate(values.split(SIZES))}
    names = list(shards)
    files = {folder / "a.safetensors": names[::2], folder / "b.safetensors": names[1::2]}
    for path, there in files.items():
        save_file({name: shards[name] for name in there}, path)
    homes = {name: path for path, there in files.items() for name in there}
    return StoredRows.find_shards([(homes[name], name) for name in names])


def test_what_it_says(stored, values):
    assert (stored.rows, stored.nbytes, stored.format.width) == (ROWS, values.nbytes, WIDTH)
    assert torch.equal(stored.read().values(), values)


numbers = st.lists(st.one_of(st.integers(0, ROWS - 1), st.sampled_from([0, 6, 7, 8, 137, 138, ROWS - 1])), max_size=60)


@pytest.mark.parametrize("way", ["compiled", "planned", "direct"])
@settings(max_examples=40, deadline=None)
@given(rows=numbers)
def test_any_rows(way, stored, values, rows):
    with pytest.MonkeyPatch.context() as patch:
        if way == "planned":
            patch.setattr(row_reader, "_fused", None)
        elif way == "compiled" and row_reader._fused is not None:
            patch.setattr(RowReader, "_read_planned", None)  # the compiled loop reads them all
        with make_table("file", stored, threads=2, direct=way == "direct") as table:
            wanted = torch.tensor(rows, dtype=torch.int64)
            found = table.start(wanted).wait()
            assert torch.equal(found, values[wanted])
            before = predict(wanted, stored, direct=way == "direct")
            counters = table.counters()
            assert (counters["rows"], counters["bytes_disk"]) == (len(rows), before.bytes_read)
            assert before.bytes_paged >= 4096 * bool(rows)


def test_all_rows_in_shares(stored, values):
    """So many rows that several threads read them."""
    wanted = torch.randint(0, ROWS, (9_000,), generator=torch.Generator().manual_seed(1))
    with make_table("file", stored, threads=4) as table:
        assert torch.equal(table.start(wanted).wait(), values[wanted])
    for placement in ("host", "device"):
        with make_table(placement, stored) as table:
            assert torch.equal(table.start(wanted).wait(), values[wanted])


def test_pages_by_hand(tmp_path):
    """Two tensors of one file, a page apart: rows on one page are one page, wherever their tensors begin."""
    parts = torch.arange(2 * 3000, dtype=torch.float32).view(2, 1500, 2)
    save_file({"x": parts[0].clone(), "y": parts[1].clone()}, tmp_path / "t.safetensors")
    stored = StoredRows.find_shards([(tmp_path / "t.safetensors", name) for name in ("y", "x")])
    first, last = stored.parts[1].offset, stored.parts[0].offset + 1500 * 8 - 8  # x lies before y
    rows = torch.tensor([1500, 1499])
    pages = {first // 4096, (first + 7) // 4096, last // 4096, (last + 7) // 4096}
    assert predict(rows, stored).bytes_paged == 4096 * len(pages)


def test_scaled_rows_and_their_scales_lie_together(tmp_path):
    """Codes and scales of each piece: any two-part rows can be put together."""
    from engram_ref.rows.format import RowFormat
    from engram_ref.rows.rows import Rows

    values = torch.randn(20, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    row_format = RowFormat(torch.bfloat16, 64, scaled=True)
    rows = Rows(row_format, (row_format.encode(values),)).split()
    pieces = []
    for at, name in enumerate(("a", "b")):
        piece = Rows(row_format, tuple(part[10 * at : 10 * at + 10] for part in rows.parts))
        save_rows(tmp_path / f"{name}.safetensors", piece)
        pieces.append(StoredRows.find(tmp_path / f"{name}.safetensors"))
    together = StoredRows.together(pieces)
    wanted = torch.tensor([19, 0, 9, 10, 10])
    with make_table("file", together) as table:
        found = table.start(wanted).wait()
    with make_table("host", rows) as table:
        assert torch.equal(found, table.start(wanted).wait())
    assert [bytes(p.numpy()) for p in together.read().parts] == [bytes(p.contiguous().numpy()) for p in rows.parts]


def test_shards_without_rows_are_passed_over(stored, tmp_path):
    save_rows(tmp_path / "plain.safetensors", torch.ones(3, WIDTH))
    plain = StoredRows.find(tmp_path / "plain.safetensors")
    none = plain.between(0, 0)
    for shards, rows in (([none, plain, none], 3), ([none, none], 0)):
        together = StoredRows.together(shards)
        assert (together.widths, together.rows) == ([WIDTH * 4], rows)
        assert torch.equal(together.read().values(), torch.ones(rows, WIDTH))


def test_what_is_not_stored_alike_is_refused(stored, tmp_path):
    save_rows(tmp_path / "wide.safetensors", torch.zeros(3, WIDTH + 1))
    wide = StoredRows.find(tmp_path / "wide.safetensors")
    save_rows(tmp_path / "plain.safetensors", torch.zeros(3, WIDTH))
    plain = StoredRows.find(tmp_path / "plain.safetensors")
    assert StoredRows.together([plain, plain]).rows == 6
    with pytest.raises(
        ValueError, match=re.escape(f"{wide.path}, tensor 'weight': RowFormat(dtype=torch.float32, wid")
    ):
        StoredRows.together([plain, wide])
    with pytest.raises(ValueError, match="put together what is stored alike"):
        StoredRows.together([plain, stored])  # which is put together already
    with pytest.raises(ValueError, match="no rows: give those of one tensor at least"):
        StoredRows.together([])
    with pytest.raises(ValueError, match="has no tensor 'scale'"):
        StoredRows.find_shards([(wide.path, "weight"), (wide.path, "scale")])


def test_a_shard_that_is_changed_is_noticed(values, tmp_path):
    for at, part in enumerate(values.split(81)):
        save_rows(tmp_path / f"{at}.safetensors", part)
    stored = StoredRows.find_shards([(tmp_path / f"{at}.safetensors", "weight") for at in range(3)])
    with make_table("file", stored) as table:
        with (tmp_path / "2.safetensors").open("r+b") as file:
            file.seek(-4, 2)
            file.write(np.float32(3).tobytes())
        with pytest.raises(ValueError, match=r"2\.safetensors was changed after it was validated"):
            table.start(torch.tensor([0])).wait()  # whichever rows are asked for: the table is not what it was
