"""Rows per second of fetches in host memory, fp8 rows against bfloat16 rows of the same table, 256 values each.

  bf16 rows                       512 B each, gathered
  packed, as stored               264 B each, gathered: what is staged for a device
  packed, decoded                 gathered and decoded to bfloat16 in one pass: what a CPU computes with
  split, as stored; decoded       the same where codes and scales lie apart: two scattered reads for a row

Every fetch has fresh random row numbers, one for each of 24 columns and each token; small fetches are measured many
at a time. The tables lie on huge pages. The limit of a fetch is memcpy of the bytes that it delivers, in the same run;
what a fetch takes beyond it is the price of reading at random.

    python bench/layer_speed.py --cases fp8_gather
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.instruments.timing import Prepared, paired_ratio, prepared_samples
from bench.setup import table_content
from engram_ref.rows.decoding import gather_values
from engram_ref.rows.format import RowFormat
from engram_ref.rows.gather import gather_parts, in_threads
from engram_ref.rows.memory import HostMemory
from engram_ref.rows.rows import Rows

CASE = "fp8_gather"
RIVAL, OURS = "bf16 rows", "packed, as stored"
COLUMNS = 24  # of a layer of V4.1
TOKENS = (1, 64, 512, 4096, 8192)  # of one fetch
TABLE_ROWS = 1 << 21  # 1 GiB as bfloat16
BF16, FP8 = RowFormat(torch.bfloat16, 256), RowFormat(torch.bfloat16, 256, scaled=True)
_SEED = 0
_CHECKED_ROWS = 4096  # that all ways must return alike, before anything is timed
_LEAST_ROWS = 1 << 15  # of one sample: two milliseconds and more, at 80 ns a row
_WARM_ROWS = 1 << 16  # fetched at a time before anything is measured
_WARM_TIMES = 8  # how often a row is fetched then, on average: one of 3,000 never is

_Fetch = Callable[[Tensor], Tensor]  # row numbers [N] -> values [N, 256], or stored rows uint8 [N, 264]


class Race(AbstractContextManager["Race"]):
    """One table as bfloat16, as packed and as split fp8 rows; a context manager that gives the memory back.

    Args:
        rows: of the table.
        most: rows of the largest sample.

    Raises:
        ValueError: it does not fit into memory, two ways do not deliver the same rows, or there is no numba, without
            which nothing here is the fast path.
    """

    def __init__(self, rows: int, most: int) -> None:
        if importlib.util.find_spec("numba") is None:
            raise ValueError(f"{CASE} measures compiled loops and numba is not installed: pip install numba")
        self._draw = np.random.default_rng(_SEED)
        with ExitStack() as undo:
            self._memories = [undo.enter_context(HostMemory(rows * f.row_bytes)) for f in (BF16, FP8, FP8)]
            self._written = undo.enter_context(HostMemory(most * BF16.row_bytes)).bytes
            bf16, packed, split = (memory.bytes for memory in self._memories)
            self.bf16 = table_content.rows_in(bf16, BF16, rows)
            self.packed = table_content.rows_in(packed, FP8, rows)
            self.split = table_content.rows_in(split, FP8, rows, packed=False)
            for table in (self.packed, self.split):
                table_content.fill(table, _SEED)
            FP8.decode(self.packed.parts[0], self.bf16.values())  # so that all ways deliver the same values
            self._require_equal(min(most, _CHECKED_ROWS))
            self._close = undo.pop_all()

    def _require_equal(self, count: int) -> None:
        numbers = self.fresh(count)
        for name, fetch in self.ways().items():
            table_content.require_written(name, fetch(numbers), numbers, FP8, _SEED)

    def fresh(self, count: int) -> Tensor:
        """Random row numbers [count]."""
        return torch.from_numpy(self._draw.integers(0, len(self.packed), count))

    def huge_page_share(self) -> float:
        """Of the table whose share is smallest."""
        return min(memory.huge_page_share() for memory in self._memories)

    def warm(self) -> None:
        """Read every table at random until all of it has been read several times."""
        for _ in range(0, _WARM_TIMES * len(self.packed), _WARM_ROWS):
            for table in (self.bf16, self.packed, self.split):  # in turn: mappings are few, the oldest is given up
                self._stored(table, self.fresh(_WARM_ROWS))

    # --- what is measured -------------------------------------------------------------------------

    def ways(self) -> dict[str, _Fetch]:
        """Every way to fetch rows, by the name in the results."""
        return {
            RIVAL: lambda numbers: self._stored(self.bf16, numbers).view(torch.bfloat16),
            OURS: lambda numbers: self._stored(self.packed, numbers),
            "packed, decoded": lambda numbers: self._decoded(self.packed, numbers),
            "split, as stored": lambda numbers: self._stored(self.split, numbers),
            "split, decoded": lambda numbers: self._decoded(self.split, numbers),
        }

    def _out(self, count: int, row_format: RowFormat) -> Tensor:
        """The output that all ways reuse, as stored rows."""
        # New memory would unmap pages, and whoever is measured beside would pay for it.
        return self._written[: count * row_format.row_bytes].view(count, row_format.row_bytes)

    def _stored(self, table: Rows, numbers: Tensor) -> Tensor:
        out = self._out(len(numbers), table.format)
        gather_parts(table.parts, numbers, out)
        return out

    def _decoded(self, table: Rows, numbers: Tensor) -> Tensor:
        out = self._out(len(numbers), BF16).view(torch.bfloat16)
        gather_values(table.parts, numbers, out)
        return out

    # --- what bounds it ---------------------------------------------------------------------------

    def bounds(self, count: int) -> dict[str, Callable[[Tensor], object]]:
        """Copying as many bytes as `count` rows have, as bfloat16 and as fp8."""
        return {_copying(f): self._copy_of(count * f.row_bytes) for f in (BF16, FP8)}

    def _copy_of(self, nbytes: int) -> Callable[[Tensor], object]:
        source = np.ones(nbytes, np.uint8)  # written: untouched memory is one page of zeros, and always cached
        target = self._written[:nbytes].numpy()

        def share(first: int, last: int) -> None:
            np.copyto(target[first:last], source[first:last])

        return lambda numbers: in_threads(share, nbytes, nbytes)

    def samples(self, count: int, fetches: int, rounds: int) -> dict[str, list[float]]:
        """Seconds of so many fetches of `count` fresh rows each, and of what bounds all of them; `rounds` samples."""
        rows = fetches * count
        # Each way draws rows of its own: those that another one has just read may lie in a cache.
        ways = {
            name: Prepared(lambda _: self.fresh(rows).split(count), lambda batch, way=way: [*map(way, batch)])  # type: ignore[misc]
            for name, way in self.ways().items()
        }
        bounds = {name: Prepared(lambda _: self.fresh(rows), run) for name, run in self.bounds(rows).items()}
        return prepared_samples({**ways, **bounds}, lambda: None, rounds)

    def __exit__(self, *error: object) -> None:
        self._close.close()


def _copying(row_format: RowFormat) -> str:
    return f"memcpy of {row_format.row_bytes} B a row"


# Whose bytes each way delivers.
LIMITS = {
    RIVAL: _copying(BF16),
    OURS: _copying(FP8),
    "packed, decoded": _copying(BF16),
    "split, as stored": _copying(FP8),
    "split, decoded": _copying(BF16),
}


def measure(rounds: int) -> list[dict[str, Any]]:
    """An entry of the results for each number of tokens."""
    found = []
    with Race(TABLE_ROWS, max(COLUMNS * max(TOKENS), _LEAST_ROWS, _WARM_ROWS)) as race:
        race.warm()
        facts = {"table_rows": TABLE_ROWS, "row_bytes": {"bf16": BF16.row_bytes, "fp8": FP8.row_bytes}}
        for tokens in TOKENS:
            count = COLUMNS * tokens
            fetches = max(1, _LEAST_ROWS // count)
            entry = {"case": CASE, "tokens": tokens, "columns": COLUMNS, "fetches": fetches, "rows": fetches * count}
            samples = race.samples(count, fetches, rounds)
            found.append(
                {**entry, **facts, "huge": race.huge_page_share(), "ours": OURS, "rival": RIVAL, "samples_s": samples}
            )
    return found


def lines(case: dict[str, Any]) -> list[str]:
    """An entry as text: a line per way with its rows per second, its ratio to bfloat16 rows, and its limit."""
    samples, rows = case["samples_s"], case["rows"]
    per_row = {name: statistics.median(values) / rows for name, values in samples.items()}
    gib = {name: case["table_rows"] * nbytes / 2**30 for name, nbytes in case["row_bytes"].items()}
    text = [
        f"{CASE}: {case['columns']} columns x {case['tokens']:,} tokens a fetch, of {case['table_rows']:,} rows: "
        f"{gib['bf16']:.1f} GiB as bf16, {gib['fp8']:.1f} GiB as fp8"
    ]
    for name in samples:
        if name in LIMITS.values():
            continue
        ratio = paired_ratio(samples[case["rival"]], samples[name])
        against = f"x{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if name != case["rival"] else ""
        limit = per_row[LIMITS[name]]
        text.append(
            f"  {name:18s} {1e9 * per_row[name]:7.1f} ns/row {1e-6 / per_row[name]:7.2f} M rows/s  {against:20s} "
            f"limit {1e9 * limit:5.1f} ns/row ({LIMITS[name]}), {100 * limit / per_row[name]:.0f} %"
        )
    return text
