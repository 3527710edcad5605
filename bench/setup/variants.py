"""The variants of the hardware benchmark: one table content, every placement and schedule, rows checked first.

A variant is a table (where rows live), a prefetcher (when they are fetched) and, for a file, a state of the page
cache. They share the memory that they can share, so that the largest table is there once in host memory, once
on the device and once on disk. Names as in the twin: `engram_toy/models/layouts.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bench.setup import table_content as synthetic
from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.hashing.device import DeviceHasher
from engram_ref.prefetch import Observer, Prefetcher
from engram_ref.rows.format import RowFormat
from engram_ref.rows.memory import HostMemory, require_bytes
from engram_ref.rows.rows import Rows
from engram_ref.tables.base import Table
from engram_ref.tables.device import DeviceTable
from engram_ref.tables.file import FileTable, StoredRows, save_rows
from engram_ref.tables.host import HostTable
from engram_ref.tables.hot import HotTable, most_frequent

VARIANTS = ("resident", "offload_naive", "offload_prefetch", "offload_uva", "offload_hot", "offload_disk")
ON_CPU = ("resident", "offload_disk")  # without an accelerator the others would all be the same RAM
CONTROL = "no_engram"  # the backbone by itself
_CHECKED_ROWS = 4096
_PIECE = 1 << 28  # bytes of a table copied to the device at a time; divides what is pinned in one piece


class Fetched(Protocol):
    """What rows can be fetched from."""

    @property
    def label(self) -> str:
        """For messages."""
        ...

    @property
    def prefetcher(self) -> Prefetcher | None:
        """That fetches them."""
        ...


@dataclass(frozen=True)
class Variant:
    """One way to have the rows.

    Attributes:
        name: of VARIANTS, or CONTROL.
        schedule: synchronous, prefetched or in place.
        page_cache: cold or warm for a file, else None.
        repeat: 1 for the second measurement of `resident`, the noise floor.
    """

    name: str
    schedule: str
    page_cache: str | None = None
    repeat: int = 0
    table: Table | None = None
    prefetcher: Prefetcher | None = None

    @property
    def label(self) -> str:
        """All that tells it from the others."""
        parts = [self.name, self.schedule, self.page_cache, "again" if self.repeat else None]
        return " ".join(part for part in parts if part)


class TableSet:
    """One table content in every placement that the chosen variants need; a context manager that gives all back.

    Args:
        config, plan: one Engram layer; its table is built.
        names: variants wanted.
        device: where rows are used.
        folder: where the table's file goes.
        seed: of the content.
        hot: for `offload_hot`, a stream of row numbers to choose the most frequent from, and how many to keep.
        caches: states of the page cache to measure a file in.
        observer: given to every prefetcher.
        packed: lay codes and scales of an fp8 row side by side, everywhere; False lays them apart.

    Attributes:
        layout: how a row lies: plain, packed or split.
        in_host: the rows in host memory, from which other placements are made.
    """

    def __init__(
        self,
        config: EngramConfig,
        plan: HashPlan,
        names: Sequence[str],
        device: torch.device,
        folder: Path,
        seed: int,
        hot: tuple[Tensor, int] | None,
        caches: Sequence[str],
        observer: Observer | None = None,
        packed: bool = True,
    ) -> None:
        self.layer_id = plan.layers[0].layer_id
        self.rows = plan.layers[0].rows
        self.format = RowFormat.of(config)
        self._packed = packed
        self.layout = "plain" if not self.format.scaled else "packed" if packed else "split"
        self.device = device
        self.plan = plan
        self._seed = seed
        self._observer = observer
        self._stack = ExitStack()
        try:
            self._build(names, folder, hot, caches)
        except BaseException:
            self._stack.close()
            raise

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self.rows * self.format.row_bytes

    def _build(self, names: Sequence[str], folder: Path, hot: tuple[Tensor, int] | None, caches: Sequence[str]) -> None:
        if self.device.type == "cuda" and "resident" in names:
            require_bytes(self.nbytes, self.device)
        self.memory = self.keep(HostMemory(self.nbytes))
        self.in_host = self._laid_out(self.memory.bytes)
        synthetic.fill(self.in_host, self._seed)
        if self.device.type == "cuda":
            self.memory.pin()  # after the first touch, which many threads share
        builders: dict[str, Callable[[], list[Variant]]] = {
            "resident": self._resident,
            "offload_naive": lambda: [self._host("offload_naive", "synchronous")],
            "offload_prefetch": lambda: [self._host("offload_prefetch", "prefetched")],
            "offload_uva": self._uva,
            "offload_hot": lambda: [self._hot(*_given(hot))],
            "offload_disk": lambda: self._disk(folder, caches),
        }
        self.variants = [variant for name in names for variant in builders[name]()]

    def _laid_out(self, memory: Tensor) -> Rows:
        return synthetic.rows_in(memory, self.format, self.rows, self._packed)

    def keep(self, resource: Any) -> Any:
        """Let go of a resource together with this set."""
        return self._stack.enter_context(resource)

    def prefetcher(self, table: Table, background: bool) -> Prefetcher:
        """One for a table of these rows; it ends with the set."""
        hasher: NgramHasher | DeviceHasher = NgramHasher(self.plan)
        if table.index_device.type == "cuda":
            hasher = DeviceHasher(self.plan, table.index_device)
        tables = {self.layer_id: table}
        return self.keep(Prefetcher(hasher, tables, background=background, observer=self._observer))

    def _resident(self) -> list[Variant]:
        on_cpu = self.device.type == "cpu"
        rows = self.in_host if on_cpu else self._laid_out(_to_device(self.memory.bytes, self.device))
        table = self.keep(DeviceTable(rows, checked=True))  # content of our own making, without NaN
        prefetcher = self.prefetcher(table, background=False)
        return [Variant("resident", "in place", None, repeat, table, prefetcher) for repeat in (0, 1)]

    def _host(self, name: str, schedule: str) -> Variant:
        table = self.keep(HostTable(self.in_host, self.device, checked=True))
        return Variant(name, schedule, None, 0, table, self.prefetcher(table, schedule == "prefetched"))

    def _uva(self) -> list[Variant]:
        from engram_ref.tables.uva import UvaTable  # needs Triton

        table = self.keep(UvaTable(self.in_host, self.device, checked=True))
        return [Variant("offload_uva", "prefetched", None, 0, table, self.prefetcher(table, True))]

    def _hot(self, stream: Tensor, count: int) -> Variant:
        rows = most_frequent(stream, count, self.rows)
        table = self.keep(HotTable(HostTable(self.in_host, self.device, checked=True), rows))
        return Variant("offload_hot", "prefetched", None, 0, table, self.prefetcher(table, True))

    def _disk(self, folder: Path, caches: Sequence[str]) -> list[Variant]:
        path = folder / f"table-{self.rows}x{self.format.row_bytes}-{self._seed}.safetensors"
        save_rows(path, self.in_host)
        self._stack.callback(path.unlink)
        table = self.keep(FileTable(StoredRows.find(path), self.device))
        table.drop_cache()
        prefetchers = {"synchronous": self.prefetcher(table, False), "prefetched": self.prefetcher(table, True)}
        return [
            Variant("offload_disk", schedule, cache, 0, table, prefetcher)
            for cache in caches
            for schedule, prefetcher in prefetchers.items()
        ]

    def check(self, ids: np.ndarray, others: Sequence[Fetched] = ()) -> str:
        """Fetch one batch [B, T] from every variant; the digest of its values, equal to the content's formula.

        Args:
            ids: compressed.
            others: what is made from this content besides.

        Raises:
            ValueError: a variant returned other bits: then nothing may be timed.
        """
        numbers = NgramHasher(self.plan, "numpy")(ids, self.layer_id).reshape(-1)[:_CHECKED_ROWS]
        want = synthetic.expected_values(torch.from_numpy(numbers), self.format, self._seed)
        digest = hashlib.sha256(_bytes(want)).hexdigest()
        for variant in (*self.variants, *others):
            got = hashlib.sha256(_fetch_bytes(variant, ids, self.layer_id, len(numbers))).hexdigest()
            if got != digest:
                raise ValueError(f"{variant.label} returned other rows than were written: nothing was measured")
        return digest

    def __enter__(self) -> TableSet:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def _given(hot: tuple[Tensor, int] | None) -> tuple[Tensor, int]:
    if hot is None:
        raise ValueError("offload_hot needs a stream to choose the most frequent rows from")
    return hot


def _fetch_bytes(variant: Fetched, ids: np.ndarray, layer_id: int, count: int) -> bytes:
    assert variant.prefetcher is not None
    hasher = variant.prefetcher.hasher
    given = torch.from_numpy(ids).to(hasher.device) if isinstance(hasher, DeviceHasher) else ids
    with variant.prefetcher.start(given) as fetch:
        return _bytes(fetch[layer_id].wait()[:count].contiguous().cpu())


def _bytes(values: Tensor) -> bytes:
    return values.view(torch.uint8).numpy().tobytes()


def _to_device(memory: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, made in pieces from the beginning: one copy may not span two page-locked regions."""
    target = torch.empty(memory.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(memory), _PIECE):
        target[start : start + _PIECE].copy_(memory[start : start + _PIECE])
    return target
