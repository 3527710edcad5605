"""The lookup of a decode step alone: from token ids to rows on the device, in microseconds, per placement.

    python bench/lookup_speed.py --preset v41-flash --table_params 1e9         a GPU where there is one, else the CPU
    python bench/lookup_speed.py --tokens 1 2 4 16 64 256 --repeats 1000 --out out/lookup_speed

  resident   rows in device memory, by `engram_ref.lookup.device`, one kernel for so few rows; twice, which gives the
             noise floor
  uva        rows in pinned host memory, read in place by the same kernel
  staged     hashed and gathered by the CPU, copied to the device through pinned staging

One layer, one new token for each of so many sequences, random ids, other ones in every sample of every way. On CUDA the
clock is the device's events. Kernels are queued behind a delay, so that launching is not in their time; what the CPU
does for staged rows is in theirs, and begins on an idle device. Ways take turns, A B C, B C A; every sample is kept.
Where the time of a staged fetch goes is told by the host's clock: its parts, the hand-over to a thread, and the gather
alone by several threads (`bench.setup.staged_parts`).
`--reads` adds other ways to read the rows of `uva` from row numbers (`bench.reads.methods`), and `uva` by two kernels,
one that hashes and one that reads.

Without CUDA the host's clock times the CPU's own placements, and no GPU figure follows.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

# Threads that spin while they wait stall everybody for milliseconds when another program needs a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":  # Ctrl-C ends the imports that follow, too, in one line
    from engram_ref.starting import interruptible

    interruptible("lookup_speed")

import numpy as np
import torch
from torch import Tensor

from bench.evidence.lookup_table import report
from bench.instruments.bandwidth import copy_bandwidth
from bench.instruments.clocks import Clock, device_clock, total
from bench.instruments.driver import device_head
from bench.instruments.journal import now
from bench.instruments.output import finish, tell
from bench.instruments.results import write_json
from bench.instruments.timing import rounds
from bench.reads import table as reads_table
from bench.reads.methods import METHODS
from bench.schemas.lookup_speed import Case, Head, Skipped
from bench.setup.sizes import LAYER, pick_device, table_config
from bench.setup.staged_parts import SharedGather, StagedParts, disturbance
from bench.setup.variants import TableSet
from bench.wall.options import table_params
from engram_ref import cli
from engram_ref.config import PRESETS
from engram_ref.hashing import HashPlan, TokenHistory
from engram_ref.lookup.device import DeviceLookup
from engram_ref.prefetch import Prefetcher
from engram_ref.rows.memory import require_bytes
from engram_ref.tables.uva import require_uva
from engram_ref.vocab import CompressedVocab

PROG: Final = "lookup_speed"
WARM_UP = 10  # samples of each way that are not kept
DELAY_CYCLES = 1_000_000  # half a millisecond: longer than the host takes to launch two kernels
_CHECKED = (2, 16)  # sequences and tokens whose rows are compared before anything is timed
_TWO = "uva by two"
WHAT = {
    "resident": "device memory, by kernels from token ids to rows",
    "uva": "pinned host memory read in place, by kernels from token ids to rows",
    "staged": "host memory: hashed and gathered by the CPU, brought to the device",
    _TWO: "pinned host memory read in place, by a kernel that hashes and one that reads",
}
ON_CPU = "RAM: hashed and gathered by the CPU"
_NAMES = {"resident": "resident", "uva": "offload_uva", "staged": "offload_naive"}  # way -> variant


def timed(clock: Clock, run: Callable[[], object], delay: Callable[[], object] | None) -> tuple[float, bool]:
    """Seconds of a lookup, and whether the device began with it before all of it was launched.

    Args:
        delay: gives the device something to do, so that what is queued behind it starts without waiting for the host;
            None for a lookup that waits for the host by itself.
    """
    if delay is not None:
        delay()
    clock.begin()
    run()
    late = delay is not None and clock.begun  # asked now: at the end it has begun in any case
    clock.mark("end")
    return total(clock.end()), late


def _delay() -> None:
    """Half a millisecond of nothing on the device."""
    torch.cuda._sleep(DELAY_CYCLES)


class ByKernels:
    """A table that the device reads by itself.

    Args:
        lookup: of the table.
        ids: token ids of every sample, [S, B, 1], on the device.
        before: compressed ids before them, [S, B, N-1].
    """

    queued = True

    def __init__(self, lookup: DeviceLookup, ids: Tensor, before: Tensor) -> None:
        self._lookup, self._ids, self._before = lookup, ids, before
        # Made once: a decode step has its buffers, too.
        self._out = lookup.new_rows(ids.shape[1], 1)
        self._after = lookup.new_tail(ids.shape[1])

    def run(self, number: int) -> Tensor:
        """The rows of a sample."""
        found = self._lookup(self._ids[number], before=self._before[number], after=self._after, out=self._out)
        return found.values[LAYER]


class ByPrefetcher:
    """A table that the CPU gathers from, waited for at once; arguments as for ByKernels, on the CPU."""

    queued = False

    def __init__(
        self, prefetcher: Prefetcher, vocab: CompressedVocab, plan: HashPlan, ids: Tensor, before: Tensor
    ) -> None:
        self._prefetcher, self._vocab = prefetcher, vocab
        self._ids, self._before = ids.numpy(), before.numpy()
        self._history = TokenHistory(plan, ids.shape[1])

    def run(self, number: int) -> Tensor:
        """The rows of a sample."""
        self._history.ids = self._before[number]
        hashed = self._prefetcher.hash_tokens(self._ids[number], self._vocab, self._history)
        with self._prefetcher.start_hashed(hashed) as fetch:
            return fetch[LAYER].wait()


class Lookups:
    """One table in every placement that this machine serves, and the samples of one number of tokens after the other.

    Args:
        options: of the command line.
        stack: closes everything.
    """

    def __init__(self, options: argparse.Namespace, stack: ExitStack) -> None:
        self.options, self.device = options, pick_device(options.device)
        self.vocab = CompressedVocab.from_tokenizer()
        self.config = table_config(options.preset, options.table_params, 1, "bfloat16")  # no model around: hidden is 1
        self.plan = HashPlan.build(self.config, len(self.vocab), self.vocab.pad(self.config.pad_id))
        self.skipped: list[Skipped] = []
        names = [name for name in _NAMES if self._fits(name)]
        wanted, on = [_NAMES[name] for name in names], self.device
        self.tables: TableSet = stack.enter_context(
            TableSet(self.config, self.plan, wanted, on, options.out, options.seed, None, (), packed=True)
        )
        found = {variant.name: variant for variant in reversed(self.tables.variants)}  # of two, the first
        self.variants = {name: found[_NAMES[name]] for name in names}
        draw = np.random.default_rng(options.seed)
        self.tables.check(self.vocab(draw.integers(0, len(self.vocab.ids), _CHECKED)))
        self._lookups = {name: self._kernels(name) for name in names if on.type == "cuda" and name != "staged"}
        self.reads = None if options.reads is None else self._reads(stack)

    def _kernels(self, name: str, launches: int | None = None) -> DeviceLookup:
        table = self.variants[name].table
        assert table is not None
        return DeviceLookup(self.plan, {LAYER: table}, self.vocab, launches=launches)

    def _reads(self, stack: ExitStack) -> Any:
        """Other ways to read the rows of `uva`, each found right; None, and why, where there are none."""
        try:
            if "uva" not in self._lookups:
                raise ValueError("they read the rows of uva, which is left out")
            from bench.reads.ways import Reads  # needs Triton

            chosen = self.options.reads or list(METHODS)
            reads = stack.enter_context(Reads(self.tables.in_host, self.device, chosen, self.options.seed))
        except ValueError as error:
            self.skipped.append({"way": "reads", "why": str(error)})
            return None
        reads.check()
        self._lookups[_TWO] = self._kernels("uva", launches=2)
        return reads

    def _fits(self, name: str) -> bool:
        """Whether this machine serves a placement; why not is kept."""
        nbytes = self.plan.layers[0].rows * self.config.row_bytes()
        try:
            if name == "uva" and self.device.type == "cpu":
                raise ValueError("it needs a CUDA device: a CPU has no bus to read host memory over")
            if name == "uva":
                require_uva(self.device, nbytes)
            elif name == "resident" and self.device.type == "cuda":
                require_bytes(nbytes, self.device)
        except ValueError as error:
            self.skipped.append({"way": name, "why": str(error)})
            return False
        return True

    def labels(self) -> list[str]:
        """The ways, `resident` twice."""
        found = [
            label for name in self.variants for label in ((name, f"{name} again") if name == "resident" else (name,))
        ]
        return [*found, *([_TWO, *self.reads.names] if self.reads else [])]

    def measure(self, tokens: int) -> Case:
        """Samples of every way for a step of so many tokens."""
        options, labels, clock = self.options, self.labels(), device_clock(self.device)
        count = WARM_UP + options.repeats
        ways = {label: self._way(label, tokens, number, count) for number, label in enumerate(labels)}
        samples: dict[str, list[float]] = {label: [] for label in labels}
        late, undisturbed = dict.fromkeys(labels, 0), disturbance()
        for number, turn in rounds(labels, range(count), f"{tokens} tokens", tell):
            for label in turn:
                way = ways[label]
                seconds, began_early = timed(clock, functools.partial(way.run, number), _delay if way.queued else None)
                if number >= WARM_UP:
                    samples[label].append(round(seconds, 9))
                    late[label] += began_early
        for lookup in self._lookups.values():
            lookup.check()
        rows = tokens * self.config.columns
        parts, gathers = self._parts(tokens, len(labels)), self._gathers(rows)
        case: Case = {
            "tokens": tokens,
            "rows": rows,
            "bytes": rows * self.tables.format.row_bytes,
            "samples_s": samples,
            "launched_late": late,
            "parts_s": parts,
            "gather_s": gathers,
            "disturbed": {name: round(now - undisturbed[name], 6) for name, now in disturbance().items()},
        }
        if self.reads:
            case["asked"] = {name: ways[name].asked for name in self.reads.names}
        return case

    def _parts(self, tokens: int, number: int) -> dict[str, list[float]]:
        """Samples of the parts of a staged fetch; `number` as for `_way`."""
        count = WARM_UP + self.options.repeats
        ids, before = (drawn.numpy() for drawn in self._drawn(tokens, number, 2 * count))  # no row is asked for twice
        found: dict[str, list[float]] = {}
        with StagedParts(self.plan, self.vocab, self._table("staged"), tokens) as parts:
            for n, _ in rounds([""], range(count)):
                one = parts.fetch(ids[n], before[n])
                one["handed over"] = parts.hand_over(ids[count + n], before[count + n])
                if n >= WARM_UP:
                    for name, seconds in one.items():
                        found.setdefault(name, []).append(round(seconds, 9))
        return found

    def _gathers(self, count: int) -> dict[str, list[float]]:
        """Samples of the gather alone, by threads."""
        draw, on_gpu = np.random.default_rng((self.options.seed, count)), self.device.type == "cuda"
        found: dict[str, list[float]] = {str(threads): [] for threads in self.options.threads}
        with ExitStack() as stack:
            shared = {n: stack.enter_context(SharedGather(self.tables.in_host, count, int(n), on_gpu)) for n in found}
            for number, turn in rounds(list(found), range(WARM_UP + self.options.repeats)):
                for threads in turn:
                    numbers = torch.from_numpy(draw.integers(0, self.tables.rows, count))
                    seconds = shared[threads].time(numbers)
                    if number >= WARM_UP:
                        found[threads].append(round(seconds, 9))
        return found

    def _drawn(self, tokens: int, number: int, count: int) -> tuple[Tensor, Tensor]:
        """Ids that nobody else has, [count, tokens, 1], and what came before them."""
        draw = np.random.default_rng((self.options.seed, tokens, number))
        ids = torch.from_numpy(draw.integers(0, len(self.vocab.ids), (count, tokens, 1)))
        return ids, torch.from_numpy(draw.integers(0, len(self.vocab), (count, tokens, self.plan.max_ngram - 1)))

    def _way(self, label: str, tokens: int, number: int, count: int) -> Any:
        """A way with ids of its own: rows that another one has just read may still lie in a cache."""
        if self.reads and label in self.reads.names:
            return self.reads.way(label, tokens * self.config.columns, count)
        ids, before = self._drawn(tokens, number, count)
        name = label.removesuffix(" again")
        if name in self._lookups:
            return ByKernels(self._lookups[name], ids.to(self.device), before.to(self.device))
        prefetcher = self.tables.prefetcher(self._table(name), background=False)
        return ByPrefetcher(prefetcher, self.vocab, self.plan, ids, before)

    def _table(self, name: str) -> Any:
        return self.variants[name].table

    def head(self) -> Head:
        """Everything of the results that is known before the first sample."""
        options, table = self.options, self.tables
        asked = {key: value for key, value in vars(options).items() if key not in ("out", "device")}
        on_gpu = self.device.type == "cuda"
        other_ways = {_TWO: WHAT[_TWO], **{n: METHODS[n].what for n in self.reads.names}} if self.reads else {}
        return {
            "schema_version": 1,
            **device_head(PROG, self.device, asked, "bench.lookup_speed"),
            "started": now(),
            "limits": copy_bandwidth(self.device),
            "clock": "device events" if on_gpu else "host clock",
            "stream": "uniform",
            "table": {**table.record(options.preset), "layout": table.layout},
            "ways": {name: WHAT[name] if on_gpu else ON_CPU for name in self.variants} | other_ways,
            "skipped": self.skipped,
            "cases": [],
        }


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Command-line options; see `--help`."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/lookup_speed"), metavar="DIR", help="default: out/lookup_speed")
    add("--preset", choices=list(PRESETS), default="v41-flash", help="geometry (default: v41-flash)")
    add("--table_params", type=table_params, default=1e9, metavar="N", help="values in the rows (default: 1e9)")
    add("--tokens", nargs="+", type=cli.at_least(1), default=[1, 2, 4, 16, 64, 256], metavar="B", help="of a step, one "
        "of each sequence (default: 1 2 4 16 64 256)")  # fmt: skip
    add("--repeats", type=cli.at_least(1), default=1000, help="samples of every way (default: 1000)")
    add("--reads", nargs="*", choices=list(METHODS), metavar="WAY", help="also other ways to read the rows of uva: "
        f"{', '.join(METHODS)} (no WAY: all)")  # fmt: skip
    threads = [count for count in (1, 2, 4, 8, 16) if count <= (os.cpu_count() or 1)]
    add("--threads", nargs="+", type=cli.at_least(1), default=threads, metavar="N", help="that share the "
        "gather, where it is timed alone (default: 1 2 4 .. as many as there are cores, 16 at most)")  # fmt: skip
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: auto, CUDA where there is one")
    add("--seed", type=cli.at_least(0), default=0)
    options = parser.parse_args(given)
    if options.table_params == "max":
        parser.error("--table_params max: give a number of parameters")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The results; the file is written after each number of tokens, complete each time."""
    with ExitStack() as stack:
        lookups = Lookups(options, stack)
        results: Any = lookups.head()  # as whoever reads the file takes it
        for tokens in dict.fromkeys(options.tokens):
            tell(f"{tokens} tokens")
            results["cases"].append(lookups.measure(tokens))
            write_json(options.out / "results.json", {**results, "finished": now()})
    return results


def main() -> None:
    """The command."""
    options = parse_arguments()
    with cli.one_line_errors(PROG):
        results = measure(options)
        print(cli.fitted("\n\n".join(text for text in (report(results), reads_table.report(results)) if text)))
        finish(results, options.out / "results.json")


if __name__ == "__main__":
    cli.run(main, PROG, left="results.json, if there is one, holds what was finished")
