"""One step of a model with an Engram layer, under every variant: interleaved rounds, raw samples, bytes counted.

A step is a forward of a model to which the variant's layer is attached as anybody attaches it. Rows are fetched at the
model's entry: waited for at once, from elsewhere (synchronous) or where they lie (in place), or in the background and
joined before the second block (prefetched). `exposed_s` is how long compute waited for rows, and at the entry for the
fetch to be begun.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.instruments.clocks import Lap, device_clock, total
from bench.instruments.timing import rounds
from bench.schemas.common import CONTROL
from bench.setup.backbones import Backbone
from bench.setup.token_batches import TokenBatches
from bench.setup.variants import TableSet, Variant
from engram_ref.attach import attach
from engram_ref.fusion.base import Fusion, ShortConvHistory
from engram_ref.hashing import NgramHasher, TokenHistory
from engram_ref.layer import Engram
from engram_ref.tables.file import FileTable
from engram_ref.tables.host import HostTable
from engram_ref.tables.staging import crossing_bytes

IO_COUNTER = "/proc/self/io read_bytes"
_PREDICTED_STEPS = 3  # of which the median is taken: the fewest of which one slow step moves it little


@dataclass(frozen=True)
class Shape:
    """What one step processes: `batch` sequences of `tokens` new tokens, after `context` old ones."""

    phase: str
    batch: int
    tokens: int
    context: int = 0

    def __str__(self) -> str:
        return f"{self.phase} {self.batch} x {self.tokens}"


@dataclass
class Samples:
    """What was measured of one variant, a value per round."""

    step_s: list[float] = field(default_factory=list)
    exposed_s: list[float] = field(default_factory=list)
    from_ids: list[int] = field(default_factory=list)
    copied: list[int] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)
    counter: list[int] = field(default_factory=list)
    predicted_counter: list[int] = field(default_factory=list)


class Stepper:
    """Runs steps of one shape on one backbone, to which the variant's layer is attached; knows nothing of rounds.

    Args:
        tables: the content and its variants.
        fusion: what is done with the rows, shared by all variants.
        backbone: the blocks around the layer.
        shape: of a step.
        batches: token ids, fresh every step; compressed ones, and the backbone has an embedding for each.
    """

    def __init__(
        self, tables: TableSet, fusion: Fusion, backbone: Backbone, shape: Shape, batches: TokenBatches
    ) -> None:
        self.tables, self.fusion, self.backbone, self.shape = tables, fusion, backbone, shape
        self._batches = batches
        context = max(1, shape.context) if shape.phase == "decode" else 0  # a decode step has a token before it
        self._cache = backbone.new_cache(shape.batch, context)
        self._clock = device_clock(tables.device)
        self._hasher = NgramHasher(tables.plan)

    def next_ids(self) -> tuple[np.ndarray, Any]:
        """Compressed ids [B, T] of a fresh step, and the history before them (None for a prefill)."""
        return self._batches.next(), self._batches.history  # in this order: drawing moves the history on

    def predict(self) -> dict[str, float]:
        """What a step will ask for, from the ids of a few: rows, bytes, and the pages of a file if there is one."""
        row_bytes = self.tables.format.row_bytes
        file = next(filter(None, map(file_behind, self.tables.variants)), None)
        found = []
        for _ in range(_PREDICTED_STEPS):
            rows = self.rows_of(*self.next_ids())
            read = file.predict(torch.from_numpy(rows)) if file else None
            paged, stretches = (read.bytes_paged, read.stretches) if read else (0, 0)
            found.append((len(rows), len(np.unique(rows)), paged, stretches))
        requested, unique, bytes_paged, disk_reads = (float(np.median(values)) for values in zip(*found))
        return {
            "rows": requested,
            "unique_rows": unique,
            "bytes_requested": requested * row_bytes,
            "bytes_unique": unique * row_bytes,
            "bytes_paged": bytes_paged,
            "disk_reads": disk_reads,
        }

    def rows_of(self, ids: np.ndarray, history: Any) -> np.ndarray:
        """Row numbers [N] of a batch, hashed apart from what is measured."""
        return self._hasher(ids, self.tables.layer_id, history=history).reshape(-1)

    def run(self, variant: Variant, samples: Samples | None) -> list[Lap]:
        """One step with fresh token ids; kept where `samples` are given. Returns its laps."""
        ids, history = self.next_ids()
        rows = self.rows_of(ids, history)  # [N], before the clock starts
        prepare_page_cache(variant, rows)
        given = torch.from_numpy(ids).to(self.tables.device)  # [B, T]
        # Behind what warms the page cache: that reads from the file, too.
        counted = Counted(variant, rows, self.tables.format.row_bytes) if samples is not None else None
        with self._attached(variant, history), torch.inference_mode():
            self._clock.begin()  # the token ids are known
            self.began = time.perf_counter()
            self.backbone.step(given, self._cache)
            self._clock.mark("end")  # the last block has run
            laps = self._clock.end()
        if samples is not None and counted is not None:
            samples.step_s.append(total(laps))
            samples.exposed_s.append(total(laps, "joined"))
            counted.add_to(samples)
        return laps

    @contextmanager
    def _attached(self, variant: Variant, history: TokenHistory | None) -> Iterator[None]:
        """The variant's layer in the model, before the clock starts; the control's model is as it was."""
        if self._cache is not None:
            self._cache.rewind()
        if variant.table is None:
            yield
            return
        engram = Engram(self.fusion, variant.table)
        layer, background = self.tables.layer_id, variant.schedule == "prefetched"
        model, plan, fetch = self.backbone.model, self.tables.plan, variant.prefetcher
        with attach(model, {layer: engram}, plan, background=background, exposed=self, prefetcher=fetch) as attached:
            if history is not None:
                # The rows depend on the tokens before; the convolution takes as long over a past of zeros.
                past = {layer: ShortConvHistory(self.fusion, len(history.ids))} if self.fusion.reach else {}
                attached.remember(self._cache, torch.from_numpy(history.ids), past)
            yield

    @contextmanager
    def around(self, place: object) -> Iterator[None]:
        """What `attach` tells of every wait for rows: where it began and ended, on the step's clock."""
        self._clock.mark("join")
        yield
        self._clock.mark("joined")


class Counted:
    """Bytes of one step from three sides: the ids, what our code read or copied, what the system counted."""

    def __init__(self, variant: Variant, rows: np.ndarray, row_bytes: int) -> None:
        self._table = variant.table
        self._rows, self._row_bytes = rows, row_bytes
        self._file = file_behind(variant)
        self._copied = self._count_copied()
        self._counter = io_read_bytes() if self._file is not None else None

    def _count_copied(self) -> int:
        if self._file is not None:
            return self._file.counters()["bytes_disk"]
        return self._table.bytes_copied if self._table is not None else 0

    def add_to(self, samples: Samples) -> None:
        """Append what has come about since."""
        unique = len(np.unique(self._rows))
        samples.from_ids.append(unique * self._row_bytes)
        samples.copied.append(self._count_copied() - self._copied)
        if self._file is None:
            if isinstance(self._table, HostTable) and self._table.device.type == "cuda":
                samples.predicted.append(crossing_bytes(self._table.format, len(self._rows)))  # repeats included
            return
        prediction = self._file.predict(torch.from_numpy(self._rows))
        samples.predicted.append(prediction.bytes_read)
        now = io_read_bytes()
        if self._counter is not None and now is not None:
            samples.counter.append(now - self._counter)
            samples.predicted_counter.append(prediction.bytes_paged)


def file_behind(variant: Variant) -> FileTable | None:
    """The variant's table if it is a file."""
    return variant.table if isinstance(variant.table, FileTable) else None


def prepare_page_cache(variant: Variant, rows: np.ndarray) -> None:
    """Cold: the file's pages are dropped. Warm: exactly the rows of this step have been read before."""
    table = file_behind(variant)
    if table is None:
        return
    if variant.page_cache == "cold":
        table.drop_cache()
    else:
        table.start(torch.from_numpy(rows)).wait()


def io_read_bytes() -> int | None:
    """Bytes that the kernel has read from block devices for this process, or None where it does not say."""
    try:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return None
    return int(fields["read_bytes"])


def measure(
    stepper: Stepper,
    variants: Sequence[Variant],
    samples: Mapping[str, Samples],
    count: int,
    warmup: int,
    tell: Callable[[str], None],
    keep: Callable[[], None],
) -> None:
    """The rounds that every variant's samples lack of `count`; warm-up rounds are run and not kept.

    Args:
        samples: by label; of whole rounds, as many of each. They grow.
        keep: called behind each round.
    """
    done = len(samples[variants[0].label].step_s)  # by an earlier run; of whole rounds, so of all variants alike
    for _ in range(done * len(variants)):
        stepper.next_ids()  # what these rounds had: ids are fresh every step
    numbers = [*range(-warmup, 0), *range(done, count)] if done < count else []
    for number, turn in rounds(variants, numbers, str(stepper.shape), tell):
        for variant in turn:
            stepper.run(variant, samples[variant.label] if number >= 0 else None)
        if number >= 0:
            keep()


def control() -> Variant:
    """The backbone without any Engram layer: what the paper compares with."""
    return Variant(CONTROL, "in place")
