"""Every placement for tests: its options, tables of random rows, and what a fetch must bring, byte by byte.

Random bytes, so that NaN with any payload, -0.0 and denormals are among the values.
"""

import contextlib

import pytest
import torch
import torch.distributed as dist

from engram_ref.tables import Table

R, D = 301, 12
CASES = {
    "device": {},
    "host": {},
    "uva": {},
    "file": {},
    "hot": {"hot": torch.arange(0, R, 3)},
    "hot, file behind": {"hot": torch.arange(R - 1, 0, -7), "behind": "file"},
    "hot, uva behind": {"hot": torch.tensor([5]), "behind": "uva"},
    "hot, device behind": {"hot": torch.arange(R), "behind": "device"},
    "sharded": {},  # by one rank; by several: test_sharded.py
}
every_case = pytest.mark.parametrize("case", CASES)


def random_values(dtype: torch.dtype = torch.float32, rows: int = R, width: int = D) -> torch.Tensor:
    """Random bytes, as values [rows, width]."""
    generator = torch.Generator().manual_seed(width)
    return torch.randint(0, 256, (rows, width * dtype.itemsize), dtype=torch.uint8, generator=generator).view(dtype)


def random_rows(count: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(0, R, (count,), generator=torch.Generator().manual_seed(count)).to(dtype)


def device_for(case: str) -> str:
    """The CPU, but for in-place reads the GPU of a machine that has one."""
    if "uva" not in case:
        return "cpu"
    pytest.importorskip("triton", reason="placement uva needs Triton (pip install 'engram-offload[test]' on Linux)")
    from engram_ref import gpu  # here: all tests of this folder import this file, and few need Triton

    return "cpu" if gpu.INTERPRETED else "cuda"


@contextlib.contextmanager
def ranks_for(case: str):
    """For a table of several processes, this one as the only member of a group."""
    if case != "sharded" or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def fetch(table: Table, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return table.start(rows.to(table.index_device), out).wait()


def assert_same_bits(got: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> None:
    """`got` is values[rows], byte by byte."""
    assert got.dtype == values.dtype and got.shape == (len(rows), values.shape[1])
    expected = values.view(torch.uint8).numpy()[rows.numpy()]
    assert (got.contiguous().cpu().view(torch.uint8).numpy() == expected).all()


ROWS = {
    "none": torch.empty(0, dtype=torch.int64),
    "one": torch.tensor([7]),
    "the largest": torch.tensor([R - 1]),
    "the largest, many times": torch.full((64,), R - 1),
    "one row, often": torch.tensor([5] * 30),
    "all": torch.arange(R),
    "all, backwards": torch.arange(R).flip(0),
    "int32": random_rows(200, torch.int32),
    "none, int32": torch.empty(0, dtype=torch.int32),
    "every second of": random_rows(400)[::2],
    "a column of": random_rows(400).view(100, 4)[:, 1],
    "every second of int32": random_rows(400, torch.int32)[::2],
}
