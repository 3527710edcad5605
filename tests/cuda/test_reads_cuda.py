"""Other ways to read rows in place, on a GPU: each finds what was written, from pinned memory, on all kinds of rows.

What needs no GPU is in tests/bench/reads. Here loads are as wide as they are compiled to be, and a lane that asks for
the wrong word faults, or finds another lane's.
"""

import pytest
import torch

from bench.reads.methods import METHODS
from bench.reads.ways import Reads
from bench.setup import table_content
from engram_ref.rows.format import RowFormat
from engram_ref.rows.memory import HostMemory
from engram_ref.rows.rows import Rows
from tests.ref.rows.fp8_pairs import assert_bits, pair_rows

pytestmark = pytest.mark.cuda

FP8, COUNT, ROWS = RowFormat(torch.bfloat16, 256, scaled=True), 50_000, 6_144


@pytest.fixture(scope="module")
def rows():
    with HostMemory(COUNT * FP8.row_bytes) as memory:
        made = table_content.rows_in(memory.bytes, FP8, COUNT)
        table_content.fill(made, seed=5)
        memory.pin()
        yield made


@pytest.mark.parametrize("name", METHODS)
def test_a_way_finds_what_was_written(name, rows, device):
    with Reads(rows, device, [name], seed=5) as reads:
        reads.check()
        way = reads.way(name, ROWS, 3)
        first = way.run(0).clone()
        if METHODS[name].by != "stream":
            numbers = torch.from_numpy(reads._numbers(name, ROWS, 3)[0])
            table_content.require_written(name, first, numbers, FP8, seed=5)
        assert not torch.equal(way.run(1), first)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "stream"])
def test_a_way_finds_every_pair_of_code_and_scale(name, device):
    """In tables that end with a line and in ones that do not."""
    for count in (256, 255):
        raw = pair_rows()[:count].contiguous()
        with HostMemory(raw.numel(), pinned=True) as memory:
            memory.bytes.copy_(raw.flatten())
            with Reads(Rows(FP8, (memory.bytes.view(count, 264),)), device, [name], seed=0) as reads:
                found = reads.way(name, 1_000, 1).run(0)
                assert_bits(found, raw[reads._numbers(name, 1_000, 1)[0]])
