"""The rounds of one case: every round is served by all variants in turn, A B C, B C A, ..., and kept pass by pass.

A pass at the head of each round, and warm-up rounds, are served and not kept, and what an earlier run has kept is not
measured again.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

from bench.instruments.board import BoardWatch, count_beside
from bench.instruments.driver import open_driver
from bench.instruments.timing import CacheFlush, rounds
from bench.schemas.served import Contender as ContenderRecord
from bench.served.model import ServedModel
from bench.served.numbers import case_name, freed, weight_reading
from bench.served.one_pass import FetchedBefore, Server, Work
from bench.served.record import Case, rounds_done
from bench.served.requests import Round, TokenSource
from bench.served.variants import OWN_COMPUTE, Contenders
from bench.setup.variants import Variant
from engram_ref.tables.file import FileTable
from engram_ref.tables.hot import HotTable


class Rounds:
    """The rounds of one case.

    Args:
        case: where samples go.
        server, model: with the case's batch.
        source: of tokens.
        contenders: the variants.
        options: of the command line.
        tell: progress.
        device_label: what every row calls its device.
        limits: bandwidths measured in this run.
    """

    def __init__(
        self,
        case: Case,
        server: Server,
        model: ServedModel,
        source: TokenSource,
        contenders: Contenders,
        options: argparse.Namespace,
        tell: Callable[[str], None],
        device_label: str,
        limits: dict[str, Any],
    ) -> None:
        self._case, self._server, self._model = case, server, model
        self._options, self._tell, self._device_label, self._limits = options, tell, device_label, limits
        self._board = BoardWatch(open_driver(model.device))
        self._source, self._contenders = source, contenders
        self._flush = CacheFlush(model.device)
        self._name = case_name(case.content)

    def measure(self) -> None:
        """Warm up, then measure the rounds that are missing, then what is counted beside the clock."""
        options, done = self._options, rounds_done(self._case.content)
        missing = [number for number in range(options.rounds) if number not in done]
        if missing:
            numbers = [*range(-options.warmup, 0), *missing]
            for number, turn in rounds(self._contenders.variants, numbers, self._name, self._tell):
                self._measure_round(number, turn)
        rows = {row["label"]: row for row in self._case.content["rows"]}
        for variant in self._contenders.variants:
            if rows[variant.label]["pcie"] is None:
                self._case.update(variant.label, **self._counted_beside(self._work(0), variant))
        for label, row in rows.items():  # at the end, over the rounds of earlier runs, too
            self._case.update(label, weights=weight_reading(self._limits, self._case.content, row))

    def _work(self, number: int) -> Work:
        options = self._options
        round_ = self._source.round(
            number, self._case.content["sequences"], tuple(options.prompt_tokens), tuple(options.output_tokens)
        )
        return self._server.prepare(round_, options.prefill_tokens)

    def _measure_round(self, number: int, turn: list[Variant]) -> None:
        work, keep = self._work(number), number >= 0
        rows = self._rows_on_hand(work)
        if keep:
            self._describe_round(work)
        on_hand = {OWN_COMPUTE: rows}
        # Not kept: whoever serves first finds a device that has idled, and its first prompt is slower.
        self._server.serve(work, turn[0], on_hand.get(turn[0].name))
        for variant in turn:
            before = _counts(variant)
            self._flush()  # the rows of a round are the same for all: who comes later would find them in caches
            self._board.begin()
            samples = self._server.serve(work, variant, on_hand.get(variant.name), self._board.look)
            board = self._board.end()
            if keep:
                # Seconds to a tenth of a microsecond: what a clock says beyond that is noise.
                sample = {k: [round(s, 7) for s in v] if isinstance(v, list) else v for k, v in samples.items()}
                counted = {key: now - then for (key, now), then in zip(_counts(variant).items(), before.values())}
                self._case.add(self._row(variant), {"round": number, **sample, **counted, "board": board})
            gc.collect()  # what a pass leaves is much

    def _rows_on_hand(self, work: Work) -> FetchedBefore | None:
        source = self._contenders.source
        return None if source is None else self._server.fetch(work, source)

    def _describe_round(self, work: Work) -> None:
        round_: Round = work.round
        if any(known["round"] == round_.number for known in self._case.content["rounds"]):
            return
        requested, unique, staged = self._server.count_rows(work, self._contenders.format)
        self._case.content["rounds"].append(
            {
                "round": round_.number,
                "prompt_tokens": sum(length.prompt for length in round_.lengths),
                "output_tokens": round_.output_tokens,
                "rows_requested": requested,
                "rows_unique": unique,
                "bytes_staged": staged,
            }
        )

    def _row(self, variant: Variant) -> ContenderRecord:
        held, bus = variant.bytes_held(), variant.bus
        return {
            "label": variant.label,
            "variant": variant.name,
            "schedule": variant.schedule,
            "repeat": variant.repeat,
            "hot_share": variant.hot_share,
            "bus": None if bus is None else {"bytes_per_s": bus.finite_bytes_per_s, "latency_s": bus.latency_s},
            "page_cache": variant.page_cache,
            "device": self._case.content["device"],
            "device_label": self._device_label,
            "graphs": self._model.graphs,
            "held": held,
            "freed": freed(self._case.content, variant.name, held["device"]),
            "weights": None,
            "pcie": None,
            "energy": None,
        }

    def _counted_beside(self, work: Work, variant: Variant) -> dict[str, Any]:
        """Bus counters and energy, over passes that are not timed."""
        # Reading the driver's counters disturbs what runs, so these passes have no place among the samples.
        rows = self._rows_on_hand(work) if variant.name == OWN_COMPUTE else None
        content = self._case.content
        asked = {entry["round"]: entry["rows_requested"] * content["table"]["row_bytes"] for entry in content["rounds"]}
        found = count_beside(
            self._model.device,
            lambda: self._server.serve(work, variant, rows),
            asked[work.round.number] if variant.prefetcher else 0,  # controls fetch nothing
            self._options.energy,
        )
        value = found.energy.value and {**found.energy.value, "output_tokens_per_step": work.round.output_tokens}
        energy = {"value": value, "why": found.energy.why}
        # On a CPU neither is counted, for one reason.
        return {"pcie": found.traffic or energy, "energy": energy}


def _counts(variant: Variant) -> dict[str, int]:
    """What a table counts of itself: bytes that it copied or read, rows looked up and found on the device."""
    table = variant.table
    copied = table.counters()["bytes_disk"] if isinstance(table, FileTable) else table.bytes_copied if table else 0
    hot = table.report() if isinstance(table, HotTable) else None
    return {"copied": copied, "lookups": hot.lookups if hot else 0, "hits": hot.hits if hot else 0}
