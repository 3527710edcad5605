"""The variants of the hardware benchmark: one table content, every placement and schedule, rows checked first.

A variant is a table (where rows live), a prefetcher (when they are fetched) and, for a file, a state of the page
cache. They share the memory that they can share: a table is there once in host memory, once on the device and once on
disk. Names as in the twin: `engram_toy/models/layouts.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from bench.schemas.common import Held
from bench.schemas.common import Table as TableRecord
from bench.setup import table_content
from bench.setup.slow_bus import Bus
from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.hashing.device import DeviceHasher
from engram_ref.prefetch import Prefetcher
from engram_ref.prefetch.fetch import Observer
from engram_ref.rows.format import RowFormat
from engram_ref.rows.memory import HostMemory, require_bytes
from engram_ref.rows.rows import Rows
from engram_ref.tables.base import Table
from engram_ref.tables.device import DeviceTable
from engram_ref.tables.file import FileTable, StoredRows, save_rows
from engram_ref.tables.host import HostTable
from engram_ref.tables.hot import HotTable, most_frequent

ON_CPU = ("resident", "offload_disk")  # without an accelerator the others would all be the same RAM
IN_GRAPH = "in graph"  # the schedule whose lookup a CUDA graph holds
BESIDE = "in graph, beside"  # the same, on a branch of its own, which joins where rows are needed
ASKING = "in graph, asking the CPU"  # the branch sends the ids to the CPU, which gathers, and waits for the rows
UNSEEN = (IN_GRAPH, BESIDE, ASKING)  # whose decode steps wait for rows inside of a graph, where no clock is
PREPARED = ("cold", "warm")  # states of the page cache that a step finds
HOT_TOKENS = 1 << 19  # of text before the measured one, to choose the most frequent rows from
_CHECKED_ROWS = 4096  # of a step: what each variant must find as it was written
_PIECE = 1 << 28  # bytes of a table copied to the device at a time; divides what is pinned in one piece


@dataclass(frozen=True)
class Variant:
    """One way to have the rows: a line of the results.

    Attributes:
        name: of PLACEMENTS, or a control's.
        schedule: synchronous, prefetched, in place, IN_GRAPH, BESIDE, ASKING, or none where nothing is looked up.
        page_cache: of a file: cold, warm, used or passed by.
        repeat: 1 for the second measurement of `resident`, the noise floor.
        hot_share: of the rows that are on the device, where several shares are measured.
        bus: of a slowed one.
    """

    name: str
    schedule: str
    page_cache: str | None = None
    repeat: int = 0
    table: Table | None = None
    prefetcher: Prefetcher | None = None
    hot_share: float | None = None
    bus: Bus | None = None

    @property
    def label(self) -> str:
        """All that tells it from the others of a run."""
        parts = [
            self.name,
            "again" if self.repeat else "",
            "" if self.hot_share is None else f"{100 * self.hot_share:g} %",
            str(self.bus or ""),
            self.schedule if self.name == "offload_disk" else "",  # the one that is measured in both
            "in graph" if self.schedule in (BESIDE, ASKING) else "",
            self.page_cache if self.page_cache in PREPARED else "",
        ]
        return " ".join(part for part in parts if part)

    def bytes_held(self) -> Held:
        """Bytes of its table by place."""
        return cast(Held, self.table.bytes_held() if self.table else {"device": 0, "host": 0, "disk": 0})

    @property
    def hashing_device(self) -> torch.device | None:
        """Where ids are hashed, if that is a device's business."""
        hasher = self.prefetcher.hasher if self.prefetcher is not None else None
        return hasher.device if isinstance(hasher, DeviceHasher) else None


def chosen(wanted: Sequence[str] | None, possible: Sequence[str], besides: str) -> list[str]:
    """Of the variants that a machine can serve, those that are wanted; None for all. `besides` ends the refusal.

    Raises:
        ValueError: one that it cannot serve.
    """
    for name in wanted or ():
        if name not in possible:
            raise ValueError(f"--variants {name}: this machine can serve {', '.join(possible)}{besides}")
    return [name for name in possible if wanted is None or name in wanted]


def row_sample(plan: HashPlan, calibration: np.ndarray) -> Tensor:
    """Row numbers [1, T, C] to choose the most frequent from: what the beginning of a text, [T], asks for."""
    return torch.from_numpy(NgramHasher(plan)(calibration[None, :HOT_TOKENS], plan.layers[0].layer_id))


class TableSet(AbstractContextManager[Any]):
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
        self.config = config
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

    def record(self, preset: str) -> TableRecord:
        """What a results file says of the table, which has the geometry of a preset."""
        return {
            "preset": preset,
            "parameters": self.rows * self.format.width,
            "rows": self.rows,
            "row_bytes": self.format.row_bytes,
            "columns": self.config.columns,
            "bytes": self.nbytes,
            "row_dtype": self.config.row_dtype,
            "huge_pages": self.memory.huge_page_share(),
        }

    def _build(self, names: Sequence[str], folder: Path, hot: tuple[Tensor, int] | None, caches: Sequence[str]) -> None:
        if self.device.type == "cuda" and "resident" in names:
            require_bytes(self.nbytes, self.device)
        # Once, for all placements: the largest table leaves no room for a second one in host memory.
        self.memory = self.keep(HostMemory(self.nbytes))
        self.in_host = self._laid_out(self.memory.bytes)
        # It writes numbers only, and `check` compares rows with what it wrote: none of the tables searches its rows
        # for NaN, which at 100 B parameters would be some 12 s for each.
        table_content.fill(self.in_host, self._seed)
        if self.device.type == "cuda":
            self.memory.pin()  # after the first touch, which many threads share
        self._folder, self._caches, self._given_hot = folder, caches, hot
        self.variants = [variant for name in names for variant in self._builders()[name]()]

    def _builders(self) -> dict[str, Callable[[], list[Variant]]]:
        """What makes the variants of each name."""
        return {
            "resident": self._resident,
            "offload_naive": lambda: [self.variant("offload_naive", "synchronous", self.on_host())],
            "offload_prefetch": lambda: [self.variant("offload_prefetch", "prefetched", self.on_host())],
            "offload_uva": self._uva,
            "offload_hot": self._hot,
            "offload_disk": self._disk,
        }

    def _laid_out(self, memory: Tensor) -> Rows:
        return table_content.rows_in(memory, self.format, self.rows, self._packed)

    def keep(self, resource: Any) -> Any:
        """Let go of a resource together with this set."""
        return self._stack.enter_context(resource)

    def variant(self, name: str, schedule: str, table: Table, **more: Any) -> Variant:
        """One over a table, which ends with the set."""
        return Variant(name, schedule, table=table, prefetcher=self.prefetcher(table, schedule == "prefetched"), **more)

    def prefetcher(self, table: Table, background: bool) -> Prefetcher:
        """One for a table of these rows; it ends with the set."""
        hasher: NgramHasher | DeviceHasher = NgramHasher(self.plan)
        if table.index_device.type == "cuda":
            hasher = DeviceHasher(self.plan, table.index_device)
        tables = {self.layer_id: table}
        return self.keep(Prefetcher(hasher, tables, background=background, observer=self._observer))

    def on_host(self) -> HostTable:
        """A table in host memory."""
        return self.keep(HostTable(self.in_host, self.device, checked=True))

    def on_disk(self, direct: bool = False) -> FileTable:
        """The table as a file, written once; `direct`: its reads pass the page cache.

        Raises:
            ValueError: the file system knows no direct reads.
        """
        stored = f"{self.rows}x{self.format.row_bytes}-{self.format.dtype}-{self.layout}-{self._seed}"
        path = self._folder / f"table-{stored}.safetensors"
        # One that a killed run left behind is whole: files get their name when they are. Its rows are checked, too.
        if not path.exists():
            save_rows(path, self.in_host)
        self._stack.callback(path.unlink, missing_ok=True)
        return self.keep(FileTable(StoredRows.find(path), self.device, direct=direct))

    def hot(self, behind: Table, stream: Tensor, count: int) -> HotTable:
        """The most frequent rows of a stream on the device, and the others behind it."""
        return self.keep(HotTable(behind, most_frequent(stream, count, self.rows)))

    def _resident(self) -> list[Variant]:
        on_cpu = self.device.type == "cpu"
        rows = self.in_host if on_cpu else self._laid_out(_to_device(self.memory.bytes, self.device))
        found = self.variant("resident", "in place", self.keep(DeviceTable(rows, checked=True)))
        return [found, replace(found, repeat=1)]  # against itself: the noise floor

    def _uva(self) -> list[Variant]:
        from engram_ref.tables.uva import UvaTable  # needs Triton

        return [self.variant("offload_uva", "prefetched", self.keep(UvaTable(self.in_host, self.device, checked=True)))]

    def _hot(self) -> list[Variant]:
        if self._given_hot is None:
            raise ValueError("offload_hot needs a stream to choose the most frequent rows from")
        table = self.hot(HostTable(self.in_host, self.device, checked=True), *self._given_hot)
        return [self.variant("offload_hot", "prefetched", table)]

    def _disk(self) -> list[Variant]:
        table = self.on_disk()
        table.drop_cache()  # of what writing it has left there
        both = [self.variant("offload_disk", schedule, table) for schedule in ("synchronous", "prefetched")]
        return [replace(variant, page_cache=cache) for cache in self._caches for variant in both]

    def check(self, ids: np.ndarray) -> str:
        """Fetch one batch [B, T] from every variant; the digest of its values, equal to the content's formula.

        Args:
            ids: compressed.

        Raises:
            ValueError: a variant returned other bits: then nothing may be timed.
        """
        for variant in self.variants:
            if variant.prefetcher is not None:  # a control looks nothing up
                device = variant.hashing_device
                given = ids if device is None else torch.from_numpy(ids).to(device)
                with variant.prefetcher.start(given) as fetch:
                    self.require(variant.label, fetch[self.layer_id].wait(), ids)
        written = table_content.expected_values(self._numbers(ids), self.format, self._seed)
        return hashlib.sha256(written.view(torch.uint8).numpy().tobytes()).hexdigest()

    def require(self, who: str, values: Tensor, ids: np.ndarray) -> None:
        """Refuse values [N, D] of compressed ids that are not those which were written.

        Raises:
            ValueError: names who found them.
        """
        numbers = self._numbers(ids)
        table_content.require_written(who, values[: len(numbers)], numbers, self.format, self._seed)

    def _numbers(self, ids: np.ndarray) -> Tensor:
        """The first rows that compressed ids ask for."""
        return torch.from_numpy(NgramHasher(self.plan, "numpy")(ids, self.layer_id).reshape(-1)[:_CHECKED_ROWS])

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def _to_device(memory: Tensor, device: torch.device) -> Tensor:
    """A copy on the device."""
    target = torch.empty(memory.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(memory), _PIECE):  # one copy may not span two page-locked regions
        target[start : start + _PIECE].copy_(memory[start : start + _PIECE])
    return target
