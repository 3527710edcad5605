"""The variants of the end-to-end benchmark: one table content in every placement, and the controls around it.

    with Contenders(config, plan, vocab, choice, device, folder, seed, sample) as contenders:
        for variant in contenders.variants: ...

What `gpu_wall` measures around a step is here, too (`bench.setup.variants`); added are the model without an Engram
layer, the layer with its rows already on hand, hot rows at several shares, and a slowed bus. `offload_prefetch` is
there twice if it is wanted: cut where its rows are joined, and `in graph`, on a branch of the one that asks the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.schemas.common import CONTROL, PLACEMENTS
from bench.setup.slow_bus import Bus, ThrottledTable
from bench.setup.variants import ASKING, BESIDE, IN_GRAPH, TableSet, Variant, chosen
from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan
from engram_ref.lookup.device import DeviceLookup
from engram_ref.tables.file import FileTable
from engram_ref.tables.host import HostTable
from engram_ref.vocab import CompressedVocab

OWN_COMPUTE = "own_compute"
THROTTLED = "throttled"
ON_CUDA = (CONTROL, OWN_COMPUTE, *PLACEMENTS, THROTTLED)
ON_CPU = (CONTROL, OWN_COMPUTE, "resident", "offload_disk", "offload_hot", THROTTLED)


@dataclass(frozen=True)
class Choice:
    """What is to be measured.

    Attributes:
        names: variants.
        hot_shares: for `offload_hot`.
        buses: for `throttled`.
        graphs: decode steps are CUDA graphs.
        asking: measure `offload_prefetch` with graphs that ask the CPU for their rows, too.
    """

    names: tuple[str, ...]
    hot_shares: tuple[float, ...] = ()
    buses: tuple[Bus, ...] = ()
    graphs: bool = False
    asking: bool = False


class Contenders(TableSet):
    """All variants over one content, in the order of the results.

    Args:
        vocab: of the token ids.
        choice: what is wanted.
        sample: row numbers to choose hot rows from.
        config, plan, device, folder, seed: as for a TableSet.

    Attributes:
        source: that the rows on hand can be fetched from; None where nobody wants them.

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
        self._choice, self._sample, self._vocab = choice, sample, vocab
        wanted = [name for name in (ON_CUDA if device.type == "cuda" else ON_CPU) if name in choice.names]
        super().__init__(config, plan, wanted, device, folder, seed, None, ())
        in_memory = (one.table for one in self.variants if one.name in ("resident", "offload_naive"))
        self.source = next(in_memory, None) or self.on_host() if OWN_COMPUTE in wanted else None

    def _builders(self) -> dict[str, Callable[[], list[Variant]]]:
        return {
            **super()._builders(),
            CONTROL: lambda: [Variant(CONTROL, "none")],
            OWN_COMPUTE: lambda: [Variant(OWN_COMPUTE, "none")],
            "offload_prefetch": self._prefetch,
            THROTTLED: self._throttled,
        }

    @property
    def in_graph(self) -> list[Variant]:
        """Those that are looked up inside of graphs, one of each schedule."""
        each = {one.schedule: one for one in reversed(self.variants)}  # reversed: of several, the first stays
        return [each[schedule] for schedule in (IN_GRAPH, BESIDE, ASKING) if schedule in each]

    def check_tokens(self, token_ids: np.ndarray) -> str:
        """As `check`, of token ids [B, T], the kernels' lookup included."""
        digest = self.check(self._vocab(token_ids))
        for variant in self.in_graph:
            if variant.schedule == ASKING:
                continue  # the CPU looks up
            assert variant.table is not None
            lookup = DeviceLookup(self.plan, {self.layer_id: variant.table}, self._vocab)
            found = lookup(torch.from_numpy(token_ids).to(self.device)).values[self.layer_id]
            self.require("the kernels' lookup", found, self._vocab(token_ids))
            lookup.check()
        return digest

    def _resident(self) -> list[Variant]:
        # One kernel from token ids to rows, which a graph can hold: the best control that we can build.
        found = super()._resident()
        return [replace(one, schedule=IN_GRAPH) for one in found] if self._choice.graphs else found

    def _uva(self) -> list[Variant]:
        # Twice: looked up before a step's graphs are replayed, and in the graph, on a branch of its own.
        found = super()._uva()
        return [*found, *(replace(one, schedule=BESIDE) for one in found if self._choice.graphs)]

    def _prefetch(self) -> list[Variant]:
        found = super()._builders()["offload_prefetch"]()
        asking = self._choice.graphs and self._choice.asking
        return [*found, *(replace(one, schedule=ASKING) for one in found if asking)]

    def _file(self) -> tuple[FileTable, str]:
        """The table as a file, and whether its reads pass the page cache."""
        try:
            return self.on_disk(direct=True), "passed by"
        except ValueError:  # the file system knows no direct reads
            return self.on_disk(), "used"

    def _disk(self) -> list[Variant]:
        table, cache = self._file()
        return [
            self.variant("offload_disk", schedule, table, page_cache=cache)
            for schedule in ("synchronous", "prefetched")
        ]

    def _hot(self) -> list[Variant]:
        found = []
        for share in self._choice.hot_shares:
            # On a CPU, host memory would be as fast as the hot rows: there they lie in front of the file.
            on_cpu = self.device.type == "cpu"
            behind, cache = self._file() if on_cpu else (HostTable(self.in_host, self.device, checked=True), None)
            table = self.hot(behind, self._sample, max(1, int(share * self.rows)))
            found.append(self.variant("offload_hot", "prefetched", table, hot_share=share, page_cache=cache))
        return found

    def _throttled(self) -> list[Variant]:
        behind = self.on_host()  # and its staging, for one pass at a time
        return [
            self.variant(THROTTLED, "prefetched", ThrottledTable(behind, bus), bus=bus) for bus in self._choice.buses
        ]


def chosen_names(wanted: Sequence[str] | None, device: torch.device) -> tuple[str, ...]:
    """The variants to measure; by default all that make sense on the device.

    Raises:
        ValueError: one that this machine cannot serve.
    """
    return tuple(chosen(wanted, ON_CUDA if device.type == "cuda" else ON_CPU, " end to end"))
