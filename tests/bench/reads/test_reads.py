"""Ways to read rows: all find the same bits, what they ask for is counted from addresses, and orders are what they say.

In Triton's interpreter; on a GPU see tests/cuda/test_reads_cuda.py. What a warp asks for at once is read off the code
that Triton makes for an H100, in tests/ref/test_kernel_code.py.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton (pip install 'engram-offload[test]' on Linux)")

from bench.reads import kernels, ways
from bench.reads.methods import METHODS, PADDED
from bench.reads.requests import LINE, SECTOR, Span, asked
from bench.reads.ways import Reads
from bench.setup import table_content
from engram_ref.rows.format import RowFormat
from engram_ref.rows.memory import HostMemory
from engram_ref.rows.rows import Rows
from tests.ref.rows.fp8_pairs import assert_bits, pair_rows, random_rows, rows_of

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in multiply")
FP8, CPU, COUNT = RowFormat(torch.bfloat16, 256, scaled=True), torch.device("cpu"), 1000
ROWS_ASKED = {  # lines and sectors a row: of 264 bytes apart, the mean over the sixteen places in a line
    "as_is": (3.9375, 9.75),
    "pieces": (9.75, 15.0),
    "lines": (3, 12),
    "padded": (3, 9),
    "padded_lines": (3, 12),
    "split": (3, 9),
    "scales_there": (2, 8),
    "stream": (3, 12),
}


@pytest.fixture(scope="module")
def rows():
    with HostMemory(COUNT * FP8.row_bytes) as memory:
        made = table_content.rows_in(memory.bytes, FP8, COUNT)
        table_content.fill(made, seed=3)
        yield made


@pytest.fixture(scope="module")
def reads(rows):
    with Reads(rows, CPU, list(METHODS), seed=3) as made:
        yield made


def test_every_way_finds_what_was_written(reads):
    reads.check()


def test_another_default_device_changes_nothing(rows):
    with torch.device("meta"), Reads(rows, CPU, ["as_is", "stream"], seed=3) as reads:
        reads.check()


@pytest.mark.parametrize("name", METHODS)
def test_wrong_rows_are_refused_by_name(name, rows):
    with Reads(rows, CPU, [name], seed=3) as reads:
        right = reads._numbers
        reads._numbers = lambda name, count, samples: right(name, count, samples) // 2
        way = reads.way(name, ways._CHECKED, 1)
        reads._numbers, reads.way = right, lambda *arguments: way
        with pytest.raises(ValueError, match=f"{name} returned other (rows|bytes) than were written"):
            reads.check()


@pytest.mark.parametrize("stride", [264, 272, PADDED])
@pytest.mark.parametrize("read", ["lines", "pieces", "whole", "many"])
def test_every_pair_of_code_and_scale_wherever_a_row_begins(read, stride):
    raw, numbers = pair_rows(), torch.arange(255, -1, -1)
    table = torch.full((256 * stride + 128,), 0x7F, dtype=torch.uint8)
    table = table[-table.data_ptr() % LINE :][: 256 * stride].view(256, stride)
    table[:, :264] = raw
    codes, scales = table[:, :256], table[:, 256:264]
    out = torch.zeros((258, 256), dtype=torch.bfloat16)
    run = {
        "lines": lambda out: kernels.read_lines(codes, numbers, out),
        "pieces": lambda out: kernels.read_pieces(codes, scales, numbers, out),
        "whole": lambda out: kernels.read(codes, scales, numbers, out),
        "many": lambda out: kernels.read(codes, scales, numbers, out, tile=16),
    }[read]
    run(out[1:-1])
    assert_bits(out[1:-1], raw.flip(0))
    assert not out[[0, -1]].any()


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5])
def test_counts_about_the_tile_and_places(count):
    raw = random_rows(9, 256)
    codes, scales = rows_of(raw, split=True).parts
    numbers, places = torch.arange(count), torch.arange(count - 1, -1, -1)
    for given, wanted in ((None, raw[:count]), (places, raw[:count].flip(0))):
        out = torch.zeros((count, 256), dtype=torch.bfloat16)
        if count:
            kernels.read(codes, scales, numbers, out, places=given)
            assert_bits(out, wanted)


def test_the_last_row_is_read_to_its_end_and_nothing_behind_it():
    """Whole lines reach over the end of a table; what lies there must not decide anything."""
    raw = random_rows(5, 256)
    memory = torch.full((5 * 264 + 512,), 0xFF, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % LINE :]
    memory[: 5 * 264] = raw.flatten()
    out = torch.zeros((2, 256), dtype=torch.bfloat16)
    kernels.read_lines(memory[: 5 * 264].view(5, 264)[:, :256], torch.tensor([4, 4]), out)
    assert_bits(out, raw[[4, 4]])


@pytest.mark.parametrize("span", [Span(0, 264, 256), Span(256, 264, 8), Span(64, 264, 64), Span(0, 1, 1)], ids=str)
def test_requests_are_counted_byte_by_byte(span):
    numbers = np.random.default_rng(0).integers(0, 2**40, 50)
    expected = {
        name: sum(len({b // unit for b in range(first, first + span.nbytes)}) for first in starts)
        for starts in [[span.start + int(n) * span.stride for n in numbers]]
        for name, unit in (("lines", LINE), ("sectors", SECTOR))
    }
    assert asked([span], numbers) == expected
    assert asked([span, span], numbers) == {name: 2 * value for name, value in expected.items()}


def test_what_each_way_asks_for_a_row(reads):
    """Sixteen rows that follow each other begin at each of the sixteen places that a row can have in a line."""
    for name, (lines, sectors) in ROWS_ASKED.items():
        numbers = np.arange(16)
        found = asked(reads._spans(METHODS[name]), numbers if name != "stream" else numbers[:12])
        assert (found["lines"] / 16, found["sectors"] / 16) == (lines, sectors), name
    way = reads.way("padded", 48, 5)
    assert way.asked == {"lines": 3 * 48, "sectors": 9 * 48}


def test_orders_are_what_they_say(rows):
    with Reads(rows, CPU, ["as_is"], seed=0) as reads:
        random, ordered, shuffled, following = (
            reads._numbers(name, 48, 7) for name in ("as_is", "presorted", "shuffled", "in_order")
        )
    for numbers in (random, ordered, shuffled, following):
        assert numbers.shape == (7, 48) and numbers.min() >= 0 and numbers.max() < COUNT
        assert len(np.unique(numbers, axis=0)) == 7
    assert (np.diff(random, axis=1) < 0).any() and (np.diff(ordered, axis=1) >= 0).all()
    assert np.ptp(random) > 900
    for sample in shuffled:  # each row of a stretch once, wherever it begins, around the end of the table, too
        (start,) = {int(row) for row in sample} - {(int(row) + 1) % COUNT for row in sample}
        assert sorted((sample - start) % COUNT) == list(range(48)) and (np.diff((sample - start) % COUNT) != 1).any()
    assert (np.diff(following, axis=1) % COUNT == 1).all()


def test_other_rows_are_refused():
    for other in (Rows.of(torch.zeros(4, 132)), rows_of(random_rows(4, 256), split=True), rows_of(random_rows(4, 128))):
        with pytest.raises(ValueError, match="other ways to read are for packed fp8 rows of 256 values"):
            Reads(other, CPU, ["as_is"], seed=0)
