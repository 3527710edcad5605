"""Rows in a safetensors file, read when they are asked for: the placement for tables that fit nowhere else.

    table = FileTable(StoredRows.find("table.safetensors"), torch.device("cuda"))
    values = table.start(rows).wait()                   # [N, D]

The row numbers of a fetch are sorted and freed of repeats, the rows are read in the order of the file (`row_reader`
says how), and put where they were asked for. What was read is counted; what will be read can be computed before,
from the row numbers alone, so that a benchmark can compare the two. `drop_cache` and `cached_share` make cold reads
honest, and so does `direct=True`, which never touches the page cache. fp8 rows that hold NaN are refused when they are
fetched.
"""

from __future__ import annotations

import functools
import itertools
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engram_ref.files import pagecache
from engram_ref.files.conventions import round_up
from engram_ref.files.read_plan import plan_reads, rows_in
from engram_ref.files.row_reader import RowReader
from engram_ref.files.stored_rows import StoredRows
from engram_ref.files.validated import StoredPart
from engram_ref.files.writing import save_pieces, save_rows
from engram_ref.rows.nan_check import refuse_nan
from engram_ref.tables.base import Pending, Table, check_out, check_rows, check_shape, counted
from engram_ref.tables.staging import Delivery
from engram_ref.threads.errands import Later

# Rows that a disk is asked for by whoever wants them: some 5 us each, and 10 us past no page cache.
ASKED_ROWS = 64
Take = Callable[[np.ndarray, np.ndarray], int]  # of `RowReader.ask`

__all__ = ["FileTable", "Prediction", "StoredRows", "predict", "save_pieces", "save_rows"]


@dataclass(frozen=True)
class Prediction:
    """What one fetch will read, known from its row numbers.

    Attributes:
        bytes_read: what reads will return: each row once, and more only where whole blocks are read (`direct`).
        bytes_paged: what the disk must deliver if nothing is in the page cache: whole pages, each once; for direct
            reads whole blocks.
        stretches: runs of touching pages among them: the fewest reads that the disk can do it with.
    """

    bytes_read: int
    bytes_paged: int
    stretches: int


def predict(rows: Tensor, stored: StoredRows, direct: bool = False) -> Prediction:
    """What a fetch of `rows` (as for `FileTable.start`) will read from a table's files.

    Raises:
        ValueError: row numbers that the table would refuse.
    """
    unique = np.unique(check_rows(rows, stored.rows).numpy())
    lengths = np.concatenate([plan_reads(unique[rows_in(unique, p)], p, direct).lengths for p in stored.parts])
    bytes_read = int(lengths.sum())
    if direct:
        return Prediction(bytes_read, int(round_up(lengths).sum()), len(lengths))
    in_order = sorted(stored.parts, key=lambda part: (part.stamp, part.offset))
    files = [_pages(unique, list(parts)) for _, parts in itertools.groupby(in_order, key=lambda part: part.stamp)]
    return Prediction(bytes_read, mmap.PAGESIZE * sum(pages for pages, _ in files), sum(runs for _, runs in files))


def _pages(unique: np.ndarray, parts: Sequence[StoredPart]) -> tuple[int, int]:
    """Pages of a file on which sorted rows lie, in its parts in order, and how many runs of touching ones they form."""
    if not len(unique):
        return 0, 0
    starts = [(unique[rows_in(unique, p)].astype(np.int64) - p.first) * p.row_bytes + p.offset for p in parts]
    if not any(map(len, starts)):
        return 0, 0
    first = np.concatenate([start // mmap.PAGESIZE for start in starts])
    last = np.concatenate([(start + part.row_bytes - 1) // mmap.PAGESIZE for start, part in zip(starts, parts)])
    shared = first[1:] == last[:-1]  # a page on which one row ends and the next begins
    apart = first[1:] > last[:-1] + 1
    return int((last - first + 1).sum() - shared.sum()), 1 + int(apart.sum())


class FileTable(Table):
    """A table in a file.

    Args:
        stored: the rows.
        device: where fetched rows arrive.
        threads: that read at most; None takes what is fastest here (`row_reader`).
        direct: read whole blocks past the page cache: always cold, and nothing else is driven out of it.

    Raises:
        ValueError: the file was changed after it was validated, or its file system cannot read directly.
    """

    placement = "file"
    waits = True

    def __init__(
        self, stored: StoredRows, device: torch.device, threads: int | None = None, direct: bool = False
    ) -> None:
        super().__init__(stored.rows, stored.format, device, torch.device("cpu"))
        self.source = stored
        self.direct = direct
        self._delivery = Delivery(device, stored.format)
        self._reader = RowReader(stored.parts, threads, direct)
        self._bytes_read = 0

    def start(self, rows: Tensor, out: Tensor | None = None) -> Pending:
        """Read the rows now, in this thread, and start them on their way to the device.

        Raises:
            ValueError: row numbers that do not exist, a changed file, or a closed table.
            OSError: the disk failed.
        """
        with self._users.here():
            ordered, places = self._sorted(rows)
            fetch = self._delivery.send(len(ordered), functools.partial(self._fill, ordered, places), out)
        self.count(len(ordered))
        return fetch

    def ask(self, rows: Tensor, out: Tensor | None = None) -> Pending:
        """Ask the disk for the rows now; they are read by whoever waits for them.

        For an accelerator, which is to wait for nothing but a copy, this is `start`.

        Raises:
            As `start`; what the disk says later, and of a table that was closed or changed meanwhile, `wait` does.
        """
        if not 0 < len(rows) <= self.inline_rows:
            return self.start(rows, out)
        if out is not None:
            check_out(out, len(rows), self.format, self.device)
        with self._users.here():
            ordered, places = self._sorted(rows)
            take = self._reader.ask(ordered)
        # No thread could hide more: it is the disk that works meanwhile, and what is left are a few calls.
        return Later(functools.partial(self._take, ordered, places, take, out))

    def _take(self, ordered: np.ndarray, places: np.ndarray, take: Take, out: Tensor | None) -> Tensor:
        with self._users.here():
            self._require_open()
            fill = functools.partial(self._fill, ordered, places, take=take)
            values = self._delivery.send(len(ordered), fill, out).wait()
        self.count(len(ordered))
        return values

    @property
    def inline_rows(self) -> int:
        """Rows that are asked for without a thread."""
        return ASKED_ROWS if self.device.type == "cpu" and self._reader.can_ask else 0

    def _sorted(self, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers in order, int64, checked, and where each of them is wanted."""
        check_shape(rows, self.index_device)
        self._require_open()
        numbers = rows.numpy()
        places = np.argsort(numbers)
        ordered = numbers[places].astype(np.int64, copy=False)
        if len(ordered) and (ordered[0] < 0 or ordered[-1] >= self.rows):
            check_rows(rows, self.rows)  # says which row
        return ordered, places

    def stored(self, rows: Tensor) -> Tensor:
        """The bytes of some rows as they are stored, uint8 [N, row_bytes], in host memory; only bytes are counted."""
        numbers = check_rows(rows, self.rows).numpy()
        places = np.argsort(numbers)
        raw = torch.empty((len(numbers), self.format.row_bytes), dtype=torch.uint8, device="cpu")
        with self._users.here():
            self._require_open()
            self._fill(numbers[places].astype(np.int64, copy=False), places, raw)
        return raw

    def _fill(self, ordered: np.ndarray, places: np.ndarray, staged: Tensor, take: Take | None = None) -> None:
        """Read rows, or `take` those that were asked for."""
        raw = staged.numpy()
        bytes_read = take(places, raw) if take else self._reader.read(ordered, places, raw)
        if self.format.scaled:
            first = self.source.first
            refuse_nan(self.source.path, raw, self.format.width, lambda at: first + int(ordered[places == at][0]))
        with self._users.alone:
            self._bytes_read += bytes_read

    def predict(self, rows: Tensor) -> Prediction:
        """What a fetch of these rows will read."""
        return predict(rows, self.source, self.direct)

    def counters(self) -> dict[str, int]:
        """As for every table; `bytes_disk` is what reads have returned, whether the page cache had it or not."""
        return counted(self._asked, 0, disk=self._bytes_read)

    def drop_cache(self) -> None:
        """Make the system forget the files, so that the next fetch is cold."""
        with self._users.here():
            self._require_open()
            for fd in self._reader.require_open():
                pagecache.drop_pages(fd)

    def cached_share(self) -> float:
        """Share of the files' pages that are in memory."""
        with self._users.here():
            self._require_open()
            return pagecache.cached_share(*self._reader.require_open())

    def _require_open(self) -> None:
        if self._users.closed:
            raise ValueError(f"the table in {self.source.path} was closed: make a new one")

    def _held(self) -> dict[str, int]:
        return {"disk": self.source.nbytes}

    def _give_back(self) -> None:
        self.trim()
        self._reader.close()
