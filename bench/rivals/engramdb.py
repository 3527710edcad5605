"""What a table in a file is held against: EngramDB's row store on the same rows, and the disk itself (fio).

    with ColdRace(Path("out/cold"), rows=1 << 23, row_bytes=256, site=Path("SITE-PACKAGES")) as race:
        samples = race.against_limit(count=12_288, rounds=9)    # seconds, of OURS, STORE and DISK
    fio_random_read(path, seconds=2.0)                          # random reads of 4 KiB per second

The store is the PyPI package `engramdb-python` (Apache-2.0), made for such tables: rows in a file of their own, read
by compiled code. It is no dependency: install it in a folder apart and give that folder. Both files hold the same
bytes, and a fetch of each is compared before anything is timed. Every sample begins with the file out of the page
cache and with fresh random rows, the same ones for all ways of a round.

    pip install --target SITE-PACKAGES engramdb-python==0.3.0
    python -m bench.rivals.engramdb --folder out/cold --store SITE-PACKAGES
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.instruments.bandwidth import fio_random_read
from bench.instruments.timing import Way, paired_ratio, prepared_samples
from bench.setup import table_content
from engram_ref import cli
from engram_ref.files import pagecache
from engram_ref.rows.format import RowFormat
from engram_ref.rows.rows import Rows
from engram_ref.tables.file import FileTable, StoredRows, save_pieces

PROG = "rivals"
OURS, STORE, DISK = "ours", "EngramDB Store.fetch", "fio, 4 KiB random reads"
_DTYPE = torch.bfloat16
_SEED = 0
_PIECE = 64 << 20  # bytes of a table made at a time
_CHECKED_ROWS = 1000
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


class ColdRace:
    """Our table and the store with the same rows in two files, measured in turn.

    Args:
        folder: for the files, removed on close; on the disk to be measured.
        rows, row_bytes: size of the table.
        site: see StoreRival.
        threads: of our table.

    Raises:
        ValueError: the store is not installed, or the two do not return the same bytes.
    """

    def __init__(
        self, folder: Path, rows: int, row_bytes: int, site: Path | None = None, threads: int | None = None
    ) -> None:
        self.rows, self.row_bytes = rows, row_bytes
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as undo:
            self.store = StoreRival(folder / f"store-{os.getpid()}", rows, row_bytes, site)
            undo.callback(self.store.close)
            self.path = folder / f"table-{os.getpid()}.safetensors"
            row_format = _row_format(row_bytes)
            save_pieces(self.path, rows, row_format, map(row_format.decode, _content(rows, row_bytes)))
            undo.callback(self.path.unlink)
            self.table = FileTable(StoredRows.find(self.path), torch.device("cpu"), threads)
            undo.callback(self.table.close)
            self._draw = np.random.default_rng(_SEED)
            self._require_equal()
            self._close = undo.pop_all()

    def _require_equal(self) -> None:
        rows = self.fresh(_CHECKED_ROWS)
        row_format = _row_format(self.row_bytes)
        expected = table_content.expected_rows(torch.from_numpy(rows), row_format, _SEED).numpy().tobytes()
        ours = self.table.start(torch.from_numpy(rows)).wait().view(torch.uint8).numpy().tobytes()
        for name, found in ((OURS, ours), (STORE, self.store.fetch(rows.tolist()))):
            if found != expected:
                raise ValueError(f"{name} returned other rows than were written: nothing was measured")

    def fresh(self, count: int) -> np.ndarray:
        """Random row numbers [count]."""
        return self._draw.integers(0, self.rows, count)

    def samples(self, count: int, rounds: int, cold: bool = True) -> dict[str, list[float]]:
        """Seconds of a fetch of `count` rows, both ways; warm: of rows that have just been read."""
        ways = {
            OURS: Way(self._prepare_ours if cold else self._warm_ours, lambda rows: self.table.start(rows).wait()),
            STORE: Way(self._prepare_store if cold else self._warm_store, self.store.fetch),
        }
        return prepared_samples(ways, lambda: self.fresh(count), rounds)

    def _prepare_ours(self, rows: np.ndarray) -> torch.Tensor:
        self.table.drop_cache()
        _require_cold(OURS, self.table.cached_share())
        return torch.from_numpy(rows)

    def _prepare_store(self, rows: np.ndarray) -> list[int]:
        self.store.drop_cache()
        _require_cold(STORE, self.store.cached_share())
        return rows.tolist()

    def _warm_ours(self, rows: np.ndarray) -> torch.Tensor:
        self.table.start(torch.from_numpy(rows)).wait()
        return torch.from_numpy(rows)

    def _warm_store(self, rows: np.ndarray) -> list[int]:
        self.store.fetch(rows.tolist())
        return rows.tolist()

    def against_limit(self, count: int, rounds: int, seconds: float = 1.0) -> dict[str, list[float]]:
        """Seconds of cold fetches, and what the disk needs for as many random reads, by turns of three rounds.

        Raises:
            ValueError: fio is missing or failed.
        """
        samples: dict[str, list[float]] = {OURS: [], STORE: [], DISK: []}
        for first in range(0, rounds, _TURN):
            for name, values in self.samples(count, min(_TURN, rounds - first)).items():
                samples[name] += values
            samples[DISK] += self.limit(count, 1, seconds)
        return samples

    def limit(self, count: int, rounds: int, seconds: float = 1.0) -> list[float]:
        """Seconds that the disk needs for `count` random reads, measured `rounds` times with fio.

        Raises:
            ValueError: fio is missing or failed.
        """
        found = [fio_random_read(self.path, seconds) for _ in range(rounds)]
        seconds_each = []
        for result in found:
            if result["reads_per_s"] is None:
                raise ValueError(f"the disk's limit is not known: {result['why']}")
            seconds_each.append(count / result["reads_per_s"])
        return seconds_each

    def close(self) -> None:
        """Remove both files."""
        self._close.close()

    def __enter__(self) -> ColdRace:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _require_cold(name: str, share: float) -> None:
    if share:
        raise ValueError(f"{name}: {share:.2%} of the file stay in the page cache: nothing measured here would be cold")


def _line(samples: dict[str, list[float]], count: int, what: str) -> str:
    """Medians in us a row, and the paired ratio."""
    medians = {name: 1e6 * statistics.median(values) / count for name, values in samples.items()}
    ratio = paired_ratio(samples[STORE], samples[OURS])
    text = f"{count:6,} rows {what}: " + ", ".join(f"{name} {median:.1f} us/row" for name, median in medians.items())
    text += f"; store / ours x{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    if DISK not in medians:
        return text
    share = medians[DISK] / medians[OURS]
    beyond = " (warning: beyond it; the disk or the machine changed between the two)" if share > 1 else ""
    return f"{text}; {share:.0%} of the disk's limit{beyond}"


def main() -> None:
    """The command: both ways, cold and warm, for three sizes of fetch, and the disk's limit."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    parser.add_argument(
        "--folder", type=Path, required=True, metavar="DIR", help="for the two files, removed at the end"
    )
    parser.add_argument("--store", type=Path, metavar="DIR", help="folder in which engramdb-python is installed")
    parser.add_argument(
        "--rows", type=cli.at_least(1, 1 << 31), default=1 << 23, help="rows of the table (default: 2^23)"
    )
    parser.add_argument("--row-bytes", type=cli.at_least(8, 1 << 20), default=256, help="bytes of a row (default: 256)")
    parser.add_argument(
        "--fetch", type=cli.at_least(1, 1 << 24), nargs="+", default=[12_288, 1_536, 48], help="rows at a time"
    )
    parser.add_argument("--rounds", type=cli.at_least(1), default=9, help="samples per way (default: 9)")
    options = parser.parse_args()
    with cli.one_line_errors(PROG):
        race(options)


def race(options: argparse.Namespace) -> None:
    """Measure and print, a line per size."""
    with ColdRace(options.folder, options.rows, options.row_bytes, options.store) as cold_race:
        print(f"{STORE}: version {cold_race.store.version}; {options.rows * options.row_bytes / 2**30:.2f} GiB each")
        for count in options.fetch:
            print(_line(cold_race.against_limit(count, options.rounds), count, "cold"), flush=True)
            print(_line(cold_race.samples(count, options.rounds, cold=False), count, "warm"), flush=True)


if __name__ == "__main__":
    cli.run(main, PROG)
