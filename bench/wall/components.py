"""The component benchmark: parts of offloading in isolation, then both strategies end to end.

hash       hash and embed on the CPU                                   (both strategies)
compute    keys and values projected on the CPU                        (strategy 1)
up_embed   embeddings uploaded                                         (strategy 2)
up_kv      keys and values uploaded                                    (strategy 1)
full       strategy 1: hash, embed, project on the CPU, upload keys and values, gate on the GPU
           strategy 2: hash and embed on the CPU, upload embeddings, project and gate on the GPU

Every iteration has fresh token ids. Options are spelt as in a known benchmark of this name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.instruments.timing import rounds
from bench.schemas.wall import Component, Cost
from bench.setup import table_content
from bench.setup.token_batches import TokenBatches
from engram_ref.config import EngramConfig
from engram_ref.fusion import DemoFusion
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.rows.format import RowFormat
from engram_ref.rows.memory import HostMemory, require_host_bytes
from engram_ref.tables.host import HostTable

CASES = ("hash", "compute", "up_embed", "up_kv", "full")
WHAT = {
    "hash": "hash and embed on the CPU, fresh ids",
    "compute": "keys and values projected on the CPU",
    "up_embed": "embeddings uploaded from page-locked memory",
    "up_kv": "keys and values uploaded from page-locked memory",
    "full_1": "strategy 1: hash, embed and project on the CPU, upload keys and values, gate on the GPU",
    "full_2": "strategy 2: hash and embed on the CPU, upload embeddings, project and gate on the GPU",
}
ON_CPU = ("hash", "compute")
_SQUARE = 2048  # of the product that tells what the CPU can do: a larger one reached no higher rate on two cores
_Floor = tuple[int | None, int | None, float, str]  # bytes, operations, seconds, and what the seconds derive from


@dataclass(frozen=True)
class Rates:
    """What this machine can do, measured in the same run; None where it was not.

    Attributes:
        memcpy: bytes per second that one thread copies in RAM.
        upload: bytes per second from page-locked memory to the device.
        matmul: floating-point operations per second of a large product on the CPU, in the benchmark's dtype.
    """

    memcpy: float
    upload: float | None
    matmul: float


def matmul_rate(dtype: torch.dtype) -> float:
    """Operations per second of a square product on the CPU, the best of a few: what no part can exceed."""
    a, b = (torch.randn(_SQUARE, _SQUARE, dtype=dtype) for _ in range(2))
    # The best, for it is a limit: what slows one down says nothing of what the CPU can do.
    return max(2 * _SQUARE**3 / _clocked(lambda: a @ b) for _ in range(10))


def _clocked(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _synchronised(part: Callable[[], object]) -> None:
    part()
    torch.cuda.synchronize()


class Components:
    """The parts, ready to run; close it to give the table's memory back.

    Args:
        config, plan: the geometry; the first layer is used.
        batches: token ids [B, T], fresh every iteration.
        device: where uploads go; on a CPU only `hash` and `compute` can run.
        dtype: of the table, the projections and what is uploaded.
    """

    def __init__(
        self, config: EngramConfig, plan: HashPlan, batches: TokenBatches, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._layer = plan.layers[0]
        self._hasher, self._batches, self._device, self._config = NgramHasher(plan), batches, device, config
        self._row_format = RowFormat(dtype, config.row_width)
        self._cuda = device.type == "cuda"
        self._memory = HostMemory(self._layer.rows * self._row_format.row_bytes)
        rows = table_content.rows_in(self._memory.bytes, self._row_format, self._layer.rows)
        table_content.fill(rows, seed=0)
        self._table = HostTable(rows, torch.device("cpu"))
        ids = batches.next()
        self.batch, self.tokens = ids.shape
        self._buffers = self._make_buffers(dtype)
        self._fusion = DemoFusion(config, device="cpu", dtype=dtype)
        if self._cuda:
            self._on_device = DemoFusion(config, device=device, dtype=dtype)
            shape = (self.batch, self.tokens, config.hc_mult, config.hidden)
            self._hidden = torch.randn(shape, device=device, dtype=dtype)  # [B, T, G, H]

    @property
    def positions(self) -> int:
        """Tokens of one iteration, over the whole batch."""
        return self.batch * self.tokens

    def _make_buffers(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Where embeddings, and keys and values, are made; page-locked if they travel."""
        config, count = self._config, self.positions * self._config.columns
        width = (config.hc_mult + 1) * config.hidden  # a key for each copy of the stream, and the value
        require_host_bytes(count * self._row_format.row_bytes + self.positions * width * dtype.itemsize)
        # Page-locked for both strategies: the comparison is of what is uploaded.
        # [B*T*C, D]; numbers: `compute` by itself projects them.
        e = torch.randn((count, config.row_width), dtype=dtype, device="cpu", pin_memory=self._cuda)
        shape = (self.batch, self.tokens, width)  # [B, T, (G+1)*H]
        kv = torch.empty(shape, dtype=dtype, device="cpu", pin_memory=self._cuda)
        return {"e": e, "kv": kv}

    def _hash(self) -> None:
        rows = self._hasher(self._batches.next(), self._layer.layer_id).reshape(-1)  # [B*T*C]
        self._table.start(torch.from_numpy(rows), self._buffers["e"]).wait()

    def _compute(self) -> None:
        self._buffers["kv"].copy_(self._fusion.project(self._buffers["e"].view(self.batch, self.tokens, -1)))

    def _upload(self, name: str) -> Tensor:
        return self._buffers[name].to(self._device, non_blocking=True)

    def _full_1(self) -> Tensor:
        self._hash()
        self._compute()
        return self._on_device.combine(self._upload("kv"), self._hidden)

    def _full_2(self) -> Tensor:
        self._hash()
        e = self._upload("e").view(self.batch, self.tokens, -1)
        return self._on_device(e, self._hidden)

    def parts(self, case: str) -> dict[str, Callable[[], object]]:
        """What a case runs, by the name in the results."""
        if case == "full":
            return {"full_1": self._full_1, "full_2": self._full_2}
        single: dict[str, Callable[[], object]] = {
            "hash": self._hash,
            "compute": self._compute,
            "up_embed": lambda: self._upload("e"),
            "up_kv": lambda: self._upload("kv"),
        }
        return {case: single[case]}

    def cost(self, part: str, rates: Rates) -> Cost:
        """Bytes, operations and the time below which this machine cannot do a part."""
        e, kv = (self._buffers[name].nbytes for name in ("e", "kv"))
        flops = 2 * self.positions * self._config.projection_macs()
        # Without a bus nothing is uploaded; parts that do are not run there.
        gathered, computed, upload = e / rates.memcpy, flops / rates.matmul, rates.upload or float("inf")
        parts, on_both = "sum of its parts' limits", "sum of its parts' limits on the CPU and the bus"
        floors: dict[str, _Floor] = {
            "hash": (e, None, gathered, "bytes of the embeddings / memcpy rate"),
            "compute": (None, flops, computed, "operations / rate of a large matrix product"),
            "up_embed": (e, None, e / upload, "bytes / measured upload rate"),
            "up_kv": (kv, None, kv / upload, "bytes / measured upload rate"),
            "full_1": (kv, flops, gathered + computed + kv / upload, parts),
            "full_2": (e, flops, gathered + e / upload, on_both),
        }
        nbytes, operations, limit, why = floors[part]
        return {"bytes": nbytes, "flops": operations, "limit_s": limit, "limit_why": why}

    def run(self, part: Callable[[], object]) -> float:
        """Seconds of one iteration, synchronised before and after."""
        with torch.inference_mode():
            if not self._cuda:
                return _clocked(part)
            torch.cuda.synchronize()  # and again at the end: `full` ends with the gated output on the GPU
            return _clocked(lambda: _synchronised(part))

    def close(self) -> None:
        """Give the table's memory back."""
        self._table.close()
        self._memory.close()


def measure(
    components: Components, cases: Sequence[str], iterations: int, rates: Rates, tell: Callable[[str], None]
) -> list[Component]:
    """Raw samples of every part, interleaved, after one round of warm-up."""
    parts = {name: run for case in cases for name, run in components.parts(case).items()}
    samples: dict[str, list[float]] = {name: [] for name in parts}
    for number, turn in rounds(list(parts.items()), range(-1, iterations), "components", tell):
        for name, part in turn:
            elapsed = components.run(part)
            if number >= 0:
                samples[name].append(elapsed)
    return [
        {
            "case": name,
            "what": WHAT[name],
            "device": components._device.type,
            "batch": components.batch,
            "tokens": components.tokens,
            "dtype": str(components._row_format.dtype).removeprefix("torch."),
            "samples_s": samples[name],
            **components.cost(name, rates),
        }
        for name in parts
    ]
