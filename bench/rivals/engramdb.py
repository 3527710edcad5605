"""What a table in a file is held against: EngramDB's row store on the same rows, and the disk itself (fio).

    with ColdRace(Path("out/cold"), rows=1 << 23, row_bytes=256, site=Path("SITE-PACKAGES")) as race:
        samples = race.against_limit(count=12_288, rounds=9)    # seconds, of OURS, STORE and DISK

The store is the PyPI package `engramdb-python` (Apache-2.0), made for such tables: rows in a file of their own, read
by compiled code. It is no dependency: install it in a folder apart and give that folder. Every sample begins with the
file out of the page cache and with fresh random rows, the same ones for all ways of a round.

    pip install --target SITE-PACKAGES engramdb-python==0.3.0
    python bench/layer_speed.py --cases cold --store SITE-PACKAGES
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.instruments.bandwidth import fio_random_read
from bench.instruments.timing import Prepared, prepared_samples
from bench.setup import table_content
from engram_ref.files import pagecache
from engram_ref.rows.format import RowFormat
from engram_ref.rows.rows import Rows
from engram_ref.tables.file import FileTable, StoredRows, save_pieces

OURS, STORE, DISK = "ours", "EngramDB Store.fetch", "fio, 4 KiB random reads"
_DTYPE = torch.bfloat16
_SEED = 0
_PIECE = 64 << 20  # bytes of a table made at a time
_CHECKED_ROWS = 1000  # that both have read as they were written, before anything is timed
_TURN = 3  # rounds between two measurements of the disk


class StoreRival:
    """EngramDB's store with the content of `synthetic`, in one shard.

    Args:
        folder: for its file, removed on close.
        rows, row_bytes: size of the table.
        site: folder in which engramdb-python is installed, if not beside the other packages.

    Raises:
        ValueError: it is not installed.
    """

    def __init__(self, folder: Path, rows: int, row_bytes: int, site: Path | None = None) -> None:
        engramdb = _import_engramdb(site)
        self.version = importlib.metadata.version("engramdb-python")
        folder.mkdir(parents=True)
        with ExitStack() as undo:
            undo.callback(shutil.rmtree, folder)
            shard = folder / "shard_000.bin"
            with open(shard, "wb") as file:
                for piece in _content(rows, row_bytes):
                    file.write(piece.numpy().data)
            self._fd = os.open(shard, os.O_RDONLY)
            undo.callback(os.close, self._fd)
            # It chooses its number of threads: none that we gave it was faster.
            self._store = engramdb.Store(str(folder), 1, rows, row_bytes)
            undo.callback(self._store.close)
            self._close = undo.pop_all()

    def fetch(self, rows: list[int]) -> bytes:
        """The bytes of these rows, one after the other."""
        return self._store.fetch(rows)

    def drop_cache(self) -> None:
        """Make the system forget its file."""
        pagecache.drop_pages(self._fd)

    def cached_share(self) -> float:
        """Share of its file that is in memory."""
        return pagecache.cached_share(self._fd)

    def close(self) -> None:
        """Remove its file."""
        self._close.close()


def _import_engramdb(site: Path | None) -> Any:
    if site is not None and str(site) not in sys.path:
        sys.path.append(str(site))  # at the end: the packages beside it must not stand in for ours
    try:
        import engramdb  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ValueError(
            f"EngramDB cannot be compared with: {error}; pip install --target DIR engramdb-python==0.3.0, and give DIR"
        ) from error
    return engramdb


def _row_format(row_bytes: int) -> RowFormat:
    return RowFormat(_DTYPE, row_bytes // _DTYPE.itemsize)


def _content(rows: int, row_bytes: int) -> Iterator[torch.Tensor]:
    """Stored rows of the table, uint8 [n, row_bytes], piece by piece; every piece is overwritten by the next."""
    row_format = _row_format(row_bytes)
    memory = torch.empty((max(1, _PIECE // row_bytes), row_bytes), dtype=torch.uint8)
    for first in range(0, rows, len(memory)):
        piece = memory[: min(len(memory), rows - first)]
        table_content.fill(Rows(row_format, (piece,)), _SEED, first)
        yield piece


class ColdRace(AbstractContextManager["ColdRace"]):
    """Our table and the store with the same rows in two files, measured in turn.

    Args:
        folder: for the files, removed on close; on the disk to be measured.
        rows, row_bytes: size of the table.
        site: see StoreRival.

    Raises:
        ValueError: the store is not installed, or the two do not return the same bytes.
    """

    def __init__(self, folder: Path, rows: int, row_bytes: int, site: Path | None = None) -> None:
        self.rows, self.row_bytes = rows, row_bytes
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as undo:
            self.store = StoreRival(folder / f"store-{os.getpid()}", rows, row_bytes, site)
            undo.callback(self.store.close)
            self.path = folder / f"table-{os.getpid()}.safetensors"
            row_format = _row_format(row_bytes)
            save_pieces(self.path, rows, row_format, map(row_format.decode, _content(rows, row_bytes)))
            undo.callback(self.path.unlink)
            self.table = FileTable(StoredRows.find(self.path), torch.device("cpu"))
            undo.callback(self.table.close)
            self._draw = np.random.default_rng(_SEED)
            self._require_equal()  # both files hold the same bytes, or nothing is timed
            self._close = undo.pop_all()

    def _require_equal(self) -> None:
        rows, row_format = self.fresh(_CHECKED_ROWS), _row_format(self.row_bytes)
        numbers = torch.from_numpy(rows)
        # A copy: torch wants memory that could be written.
        stored = torch.frombuffer(bytearray(self.store.fetch(rows.tolist())), dtype=torch.uint8)
        for name, found in ((OURS, self.table.start(numbers).wait()), (STORE, stored.view(-1, self.row_bytes))):
            table_content.require_written(name, found, numbers, row_format, _SEED)

    def fresh(self, count: int) -> np.ndarray:
        """Random row numbers [count]."""
        return self._draw.integers(0, self.rows, count)

    def samples(self, count: int, rounds: int) -> dict[str, list[float]]:
        """Seconds of a cold fetch of `count` rows, both ways."""
        ours, store = self.table, self.store
        ways = {
            OURS: Prepared(
                lambda rows: _once_cold(OURS, ours, torch.from_numpy(rows)), lambda rows: ours.start(rows).wait()
            ),
            STORE: Prepared(lambda rows: _once_cold(STORE, store, rows.tolist()), store.fetch),
        }
        return prepared_samples(ways, lambda: self.fresh(count), rounds)

    def against_limit(self, count: int, rounds: int) -> dict[str, list[float]]:
        """Seconds of cold fetches, and what the disk needs for as many random reads, by turns of three rounds.

        Raises:
            ValueError: fio is missing or failed.
        """
        samples: dict[str, list[float]] = {OURS: [], STORE: [], DISK: []}
        for first in range(0, rounds, _TURN):
            for name, values in self.samples(count, min(_TURN, rounds - first)).items():
                samples[name] += values
            disk = fio_random_read(self.path, seconds=1.0)
            if disk["reads_per_s"] is None:
                raise ValueError(f"the disk's limit is not known: {disk['why']}")
            samples[DISK].append(count / disk["reads_per_s"])
        return samples

    def __exit__(self, *error: object) -> None:
        """Remove both files."""
        self._close.close()


def _once_cold(name: str, file: FileTable | StoreRival, rows: Any) -> Any:
    """The same rows, when nothing of the file is in the page cache any more."""
    file.drop_cache()
    if share := file.cached_share():
        raise ValueError(f"{name}: {share:.2%} of the file stay in the page cache: nothing measured here would be cold")
    return rows
