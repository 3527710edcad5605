"""The ways to read rows in host memory, each over the same content: layouts, orders, sizes of requests, and controls.

    with Reads(rows, device, ["as_is", "padded"], seed=0) as reads:    # packed fp8 rows in pinned host memory
        reads.check()
        way = reads.way("padded", 6144, 310)                           # 310 samples of 6,144 rows
        values = way.run(0)                                            # [N, D] of the first

They start from row numbers on the device, other ones in every sample of every way; only `sorted` has the sort in its
time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.reads import kernels
from bench.reads.layouts import Layouts
from bench.reads.methods import METHODS, PADDED, Method
from bench.reads.requests import LINE, Span, asked
from bench.schemas.lookup_speed import Asked
from bench.setup.table_content import require_written
from engram_ref.rows.kernels import gather_rows, gather_scaled
from engram_ref.rows.rows import Rows

_STREAMED = 4 * LINE  # bytes of a row of `stream`: 16 for each lane of a warp
_CHECKED = 64  # rows that each way must return as they were written, before anything is timed


@dataclass(frozen=True)
class Way:
    """A way over its samples.

    Attributes:
        run: the rows of a sample, [N, D], or bytes.
        asked: of host memory in a sample, the mean over all of them.
        queued: nothing of it waits for the host.
    """

    run: Callable[[int], Tensor]
    asked: Asked
    queued: bool = True


class Reads(AbstractContextManager["Reads"]):
    """Rows, the layouts that the chosen ways need, and the ways; it gives back what it took.

    Args:
        rows: packed fp8 rows of 256 values, in memory that the device reads in place.
        device: where the values are wanted.
        names: of METHODS.
        seed: of the rows' content, and of the row numbers.

    Raises:
        ValueError: rows of another kind, or a layout that does not fit into memory.
    """

    def __init__(self, rows: Rows, device: torch.device, names: Sequence[str], seed: int) -> None:
        self.rows, self.device, self.names, self._seed = rows, device, list(names), seed
        self._bad_row = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self._layouts = Layouts(rows, device)
        try:
            for name in self.names:
                self._layouts[METHODS[name].layout]
        except BaseException:
            self._layouts.__exit__()
            raise

    def check(self) -> None:
        """Refuse a way that does not find what was written.

        Raises:
            ValueError: names it.
        """
        for name in self.names:
            found = self.way(name, _CHECKED, 1).run(0)
            numbers = self._numbers(name, _CHECKED, 1)[0]
            if METHODS[name].by != "stream":
                require_written(name, found, torch.from_numpy(numbers), self.rows.format, self._seed)
            elif not torch.equal(found.cpu(), self._stretches()[numbers]):
                raise ValueError(f"{name} returned other bytes than were written: nothing was measured")

    def way(self, name: str, count: int, samples: int) -> Way:
        """One with row numbers of its own: rows that another one has just read may still lie in a cache."""
        numbers = self._numbers(name, count, samples)  # [S, N]
        # On the device beforehand, so that a way's time is one kernel's.
        given, read = torch.from_numpy(numbers).to(self.device), self._reader(METHODS[name])
        bf16 = ((count, self.rows.format.width), torch.bfloat16)
        shape, dtype = ((numbers.shape[1], _STREAMED), torch.uint8) if METHODS[name].by == "stream" else bf16
        out = torch.empty(shape, dtype=dtype, device=self.device)

        def run(number: int) -> Tensor:
            read(given[number], out)
            return out

        total = asked(self._spans(METHODS[name]), numbers)
        return Way(run, {"lines": total["lines"] / samples, "sectors": total["sectors"] / samples})

    def _numbers(self, name: str, count: int, samples: int) -> np.ndarray:
        """Row numbers of every sample, int64 [S, N]; of stretches, as many as hold three lines for each row."""
        method, rows = METHODS[name], len(self.rows)
        draw = np.random.default_rng((self._seed, count, list(METHODS).index(name)))
        if method.by == "stream":
            rows, count = len(self._stretches()), -(-count * PADDED // _STREAMED)
        if method.by == "stream" or method.order in ("in_order", "shuffled"):
            numbers = (draw.integers(0, rows, (samples, 1)) + np.arange(count)) % rows
            return draw.permuted(numbers, axis=1) if method.order == "shuffled" else numbers
        numbers = draw.integers(0, rows, (samples, count))
        return np.sort(numbers, axis=1) if method.order == "sorted" else numbers

    def _stretches(self) -> Tensor:
        """The table as whole stretches, uint8 [n, 512]."""
        table = self.rows.parts[0].view(-1)
        return table[: table.numel() // _STREAMED * _STREAMED].view(-1, _STREAMED)

    def _reader(self, method: Method) -> Callable[[Tensor, Tensor], None]:
        """What reads row numbers [N] into values [N, D]."""
        codes, scales = self._layouts[method.layout]

        def by_address(rows: Tensor, out: Tensor) -> None:
            ordered, places = rows.sort()
            kernels.read(codes, scales, ordered, out, places=places)

        readers: dict[str, Callable[[Tensor, Tensor], None]] = {
            "library": lambda rows, out: gather_scaled(_parts(codes, scales), rows, out, self._bad_row),
            "sorting": by_address,
            "read": lambda rows, out: kernels.read(codes, scales, rows, out, **method.options),
            "pieces": lambda rows, out: kernels.read_pieces(codes, scales, rows, out),
            "lines": lambda rows, out: kernels.read_lines(codes, rows, out),
            "stream": lambda rows, out: gather_rows(self._stretches(), rows, out, self._bad_row),
        }
        return readers[method.by]

    def _spans(self, method: Method) -> list[Span]:
        """What its loads ask for in host memory."""
        if method.by == "stream":
            return [Span(0, _STREAMED, _STREAMED)]
        if method.by == "lines":  # wherever a row begins, three whole ones
            return [Span(0, PADDED, PADDED)]
        codes, scales = self._layouts[method.layout]
        apart = 0 if method.layout in ("split", "scales_there") else codes.shape[1]
        loads = [(0, codes), (apart, scales)][: 1 if method.layout == "scales_there" else 2]
        cut = 4 if method.by == "pieces" else 1
        return [
            Span(start + i * part.shape[1] // cut, part.stride(0), part.shape[1] // cut)
            for start, part in loads
            for i in range(cut)
        ]

    def __exit__(self, *error: object) -> None:
        self._layouts.__exit__(*error)


def _parts(codes: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    """As the library takes them: side by side in one part, or in two."""
    if codes.is_contiguous():
        return codes, scales
    return (codes.as_strided((len(codes), codes.stride(0)), (codes.stride(0), 1)),)
