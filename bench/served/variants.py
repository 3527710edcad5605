"""The variants of the end-to-end benchmark: one table content in every placement, and the controls around it.

    with Contenders(config, plan, vocab, choice, device, folder, seed, sample) as contenders:
        for contender in contenders.all: ...

What `gpu_wall` measures around a step is here, too (`bench.setup.variants`); added are the model without an Engram
layer, the layer with its rows already on hand, hot rows at several shares, and a slowed bus. On CUDA the resident
table is looked up by two kernels from token ids to rows, which a graph can hold: the best control that we can build.
A file is read past the page cache where the file system allows it; on a CPU, hot rows lie in front of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.setup.slow_bus import Bus, ThrottledTable
from bench.setup.variants import CONTROL, TableSet
from engram_ref.config import EngramConfig
from engram_ref.device_lookup import DeviceLookup
from engram_ref.hashing import HashPlan
from engram_ref.hashing.device import DeviceHasher
from engram_ref.prefetch import Prefetcher
from engram_ref.tables.base import Table
from engram_ref.tables.file import FileTable, StoredRows, save_rows
from engram_ref.tables.host import HostTable
from engram_ref.tables.hot import HotTable, most_frequent
from engram_ref.vocab import CompressedVocab

OWN_COMPUTE = "own_compute"
THROTTLED = "throttled"
ON_CUDA = (
    CONTROL,
    OWN_COMPUTE,
    "resident",
    "offload_naive",
    "offload_prefetch",
    "offload_uva",
    "offload_hot",
    "offload_disk",
    THROTTLED,
)
ON_CPU = (CONTROL, OWN_COMPUTE, "resident", "offload_disk", "offload_hot", THROTTLED)
_OF_SET = ("resident", "offload_naive", "offload_prefetch", "offload_uva")  # that `TableSet` makes


@dataclass(frozen=True)
class Contender:
    """One row of the results.

    Attributes:
        name: of ON_CUDA or ON_CPU.
        schedule: synchronous, prefetched, in place, in graph, or none where nothing is looked up.
        repeat: 1 for the second measurement of `resident`, the noise floor.
        hot_share: of the rows that are on the device, for hot rows.
        bus: for the slowed bus.
        page_cache: of a file: passed by, or used.
        kernels: the lookup from token ids to rows, where kernels do all of it.
    """

    name: str
    schedule: str
    repeat: int = 0
    hot_share: float | None = None
    bus: Bus | None = None
    page_cache: str | None = None
    table: Table | None = None
    prefetcher: Prefetcher | None = None
    kernels: DeviceLookup | None = None

    @property
    def label(self) -> str:
        """All that tells it from the others."""
        words = [self.name]
        if self.repeat:
            words.append("again")
        if self.hot_share is not None:
            words.append(f"{100 * self.hot_share:g} %")
        if self.bus is not None:
            words.append(str(self.bus))
        if self.name == "offload_disk":
            words.append(self.schedule)
        return " ".join(words)

    @property
    def has_engram(self) -> bool:
        """Whether the model has the layer."""
        return self.name != CONTROL

    @property
    def hashing_device(self) -> torch.device | None:
        """Where ids are hashed, if that is a device's business."""
        hasher = self.prefetcher.hasher if self.prefetcher is not None else None
        return hasher.device if isinstance(hasher, DeviceHasher) else None


@dataclass(frozen=True)
class Choice:
    """What is to be measured.

    Attributes:
        names: variants.
        hot_shares: for `offload_hot`.
        buses: for `throttled`.
        graphs: decode steps are CUDA graphs.
    """

    names: tuple[str, ...]
    hot_shares: tuple[float, ...] = ()
    buses: tuple[Bus, ...] = ()
    graphs: bool = False


class Contenders:
    """All variants over one content; a context manager that gives everything back.

    Args:
        config, plan: one Engram layer.
        vocab: of the token ids.
        choice: what is wanted.
        device: where rows are used.
        folder: for the table's file.
        seed: of the content.
        sample: row numbers to choose hot rows from.

    Raises:
        ValueError: memory or disk does not hold it.
    """

    def __init__(
        self,
        config: EngramConfig,
        plan: HashPlan,
        vocab: CompressedVocab,
        choice: Choice,
        device: torch.device,
        folder: Path,
        seed: int,
        sample: Tensor,
    ) -> None:
        self._choice, self._device, self._sample = choice, device, sample
        self._plan, self._vocab = plan, vocab
        self._stack = ExitStack()
        try:
            names = [name for name in _OF_SET if name in choice.names]
            if OWN_COMPUTE in choice.names and "resident" not in names and "offload_naive" not in names:
                names.append("offload_naive")  # its rows come from somewhere
            self.tables = self._stack.enter_context(
                TableSet(config, plan, names, device, folder, seed, None, (), packed=True)
            )
            self._found = {name: self._build(name, folder, seed) for name in self._wanted()}
        except BaseException:
            self._stack.close()
            raise

    def _wanted(self) -> tuple[str, ...]:
        order = ON_CUDA if self._device.type == "cuda" else ON_CPU
        return tuple(name for name in order if name in self._choice.names)

    @property
    def all(self) -> list[Contender]:
        """In the order of the results."""
        return [contender for name in self._wanted() for contender in self._found[name]]

    @property
    def source(self) -> Contender:
        """One that the rows on hand can be fetched from."""
        return _of_set(self.tables.variants[0])

    def _build(self, name: str, folder: Path, seed: int) -> list[Contender]:
        if name in (CONTROL, OWN_COMPUTE):
            return [Contender(name, "none")]
        if name == "offload_disk":
            return self._disk(folder, seed)
        if name == "offload_hot":
            return [self._hot(share, folder, seed) for share in self._choice.hot_shares]
        if name == THROTTLED:
            return self._throttled()
        found = [_of_set(variant) for variant in self.tables.variants if variant.name == name]
        return self._by_kernels(found) if name == "resident" and self._device.type == "cuda" else found

    def _by_kernels(self, residents: list[Contender]) -> list[Contender]:
        table = residents[0].table
        assert table is not None
        lookup = DeviceLookup(self._plan, {self.tables.layer_id: table}, self._vocab)
        schedule = "in graph" if self._choice.graphs else "in place"
        return [replace(one, schedule=schedule, kernels=lookup) for one in residents]

    @property
    def kernels(self) -> DeviceLookup | None:
        """The lookup of the resident table, where kernels do all of it."""
        return next((one.kernels for one in self.all if one.kernels is not None), None)

    def check(self, token_ids: np.ndarray) -> None:
        """Look one batch of token ids [B, T] up in every way that there is.

        Raises:
            ValueError: one of them gave other rows than were written: then nothing may be timed.
        """
        compressed = self._vocab(token_ids)
        self.tables.check(compressed, [one for one in self.all if one.prefetcher is not None])
        lookup, source = self.kernels, self.source
        if lookup is None:
            return
        found = lookup(torch.from_numpy(token_ids).to(self._device)).values[self.tables.layer_id]
        assert source.prefetcher is not None
        given = compressed if source.hashing_device is None else torch.from_numpy(compressed).to(self._device)
        with source.prefetcher.start(given) as fetch:
            if not torch.equal(found.view(torch.uint8), fetch[self.tables.layer_id].wait().view(torch.uint8)):
                raise ValueError("the kernels' lookup returned other rows than were written: nothing was measured")
        lookup.check()

    def _served(self, table: Table, background: bool = True) -> dict[str, Any]:
        return {"table": table, "prefetcher": self.tables.prefetcher(table, background)}

    def _file(self, folder: Path, seed: int) -> tuple[FileTable, str]:
        """The table as a file, written once, and whether its reads pass the page cache.

        One that a killed run left behind is whole, since files get their name when they are; its rows are checked, too.
        """
        path = folder / f"table-{self.tables.rows}x{self.tables.format.row_bytes}-{seed}.safetensors"
        if not path.exists():
            save_rows(path, self.tables.in_host)
        self._stack.callback(path.unlink, missing_ok=True)
        stored = StoredRows.find(path)
        try:
            return FileTable(stored, self._device, direct=True), "passed by"
        except ValueError:
            return FileTable(stored, self._device), "used"

    def _disk(self, folder: Path, seed: int) -> list[Contender]:
        table, cache = self._file(folder, seed)
        self.tables.keep(table)
        return [
            Contender("offload_disk", schedule, page_cache=cache, **self._served(table, schedule == "prefetched"))
            for schedule in ("synchronous", "prefetched")
        ]

    def _hot(self, share: float, folder: Path, seed: int) -> Contender:
        cache = None
        if self._device.type == "cuda":
            behind: Table = HostTable(self.tables.in_host, self._device)
        else:
            behind, cache = self._file(folder, seed)
        rows = most_frequent(self._sample, max(1, int(share * self.tables.rows)), self.tables.rows)
        table = self.tables.keep(HotTable(behind, rows))
        return Contender("offload_hot", "prefetched", hot_share=share, page_cache=cache, **self._served(table))

    def _throttled(self) -> list[Contender]:
        behind = self.tables.keep(
            HostTable(self.tables.in_host, self._device)
        )  # and its staging, for one pass at a time
        tables = [ThrottledTable(behind, bus) for bus in self._choice.buses]
        return [Contender(THROTTLED, "prefetched", bus=table.bus, **self._served(table)) for table in tables]

    def __enter__(self) -> Contenders:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def _of_set(variant: Any) -> Contender:
    return Contender(variant.name, variant.schedule, variant.repeat, table=variant.table, prefetcher=variant.prefetcher)


def chosen_names(wanted: Sequence[str] | None, device: torch.device) -> tuple[str, ...]:
    """The variants to measure; by default all that make sense on the device.

    Raises:
        ValueError: one that this machine cannot serve.
    """
    possible = ON_CUDA if device.type == "cuda" else ON_CPU
    for name in wanted or ():
        if name not in possible:
            raise ValueError(f"--variants {name}: this machine can serve {', '.join(possible)} end to end")
    return tuple(name for name in possible if wanted is None or name in wanted)
