"""One pass: a variant serves the sequences of one round, and every step of it is timed.

    server = Server(model, vocab, plan)
    work = server.prepare(round_, most_tokens)              # uploaded beforehand, shared by all variants
    samples = server.serve(work, variant)

A step ends when its tokens have been chosen; what lies between the ends of two steps is the time of the second.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.instruments.clocks import Lap, device_clock
from bench.schemas.served import PassSamples
from bench.served.model import ServedModel, rounded_span
from bench.served.requests import Decode, Prefill, Round, schedule
from bench.setup.sizes import LAYER
from bench.setup.variants import ASKING, BESIDE, UNSEEN, Variant
from engram_ref.attach.exposed import Place
from engram_ref.attach.on_hand import HandedOut, OnHand
from engram_ref.hashing import DEAD, HashPlan, NgramHasher, TokenHistory
from engram_ref.rows.format import RowFormat
from engram_ref.tables.base import Ready, Table
from engram_ref.tables.staging import crossing_bytes
from engram_ref.vocab import CompressedVocab


@dataclass(frozen=True)
class Prompts:
    """A group of prompts on the device, and what the host knows of it."""

    group: Prefill
    ids: Tensor  # [b, T]
    lengths: np.ndarray  # [b]
    slots: np.ndarray  # [b]


@dataclass(frozen=True)
class Tokens:
    """A decode step on the device: what is fed into every place, and where it stands there."""

    step: Decode
    ids: Tensor  # [slots]
    positions: Tensor  # [slots]
    span: int


@dataclass(frozen=True)
class Work:
    """A round, uploaded."""

    round: Round
    steps: list[Prompts | Tokens]


class FetchedBefore(OnHand):
    """The rows of every step of a round, fetched beforehand: what is left is the layer's own compute.

    Args:
        table: that they are of.
        rows: of each step in turn, [B*T*C, D]; pass after pass.
    """

    def __init__(self, table: Table, rows: list[Tensor]) -> None:
        self.table = table
        self._each = itertools.cycle(rows)

    def start(self, ids: Any, history: Any = None) -> HandedOut:
        """Those of the next step."""
        return HandedOut({LAYER: Ready(next(self._each))})


class Server:
    """Serves rounds on one model.

    Args:
        model: with all places free.
        vocab: token id -> compressed id.
        plan: of the table.
    """

    def __init__(self, model: ServedModel, vocab: CompressedVocab, plan: HashPlan) -> None:
        self._model, self._vocab, self._plan = model, vocab, plan
        self._clock = device_clock(model.device)

    def prepare(self, round_: Round, most_tokens: int) -> Work:
        """Put a round's ids onto the device."""
        steps = schedule(round_.lengths, self._model.slots, most_tokens)
        return Work(round_, [self._upload(step, round_) for step in steps])

    def _upload(self, step: Prefill | Decode, round_: Round) -> Prompts | Tokens:
        if isinstance(step, Prefill):
            ids, lengths = round_.prompts(step)
            return Prompts(step, self._put(ids), lengths, np.array(step.slots))
        # [slots] each. A place without a sequence has id 0 at position 0, which its next prompt overwrites.
        ids, positions = np.zeros((2, self._model.slots), np.int64)
        for slot, sequence, given in step.running:
            positions[slot] = round_.lengths[sequence].prompt + given - 1  # the first is given by the prefill
            ids[slot] = round_.tokens[sequence][positions[slot]]
        return Tokens(step, self._put(ids), self._put(positions), rounded_span(int(positions.max())))

    def _put(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._model.device)

    def serve(
        self,
        work: Work,
        variant: Variant,
        on_hand: FetchedBefore | None = None,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> PassSamples:
        """Run all steps with one variant.

        Args:
            work: of this server.
            variant: the variant.
            on_hand: its rows, for the variant that looks nothing up.
            meanwhile: called when every step has been given to the device, before it is waited for.
        """
        table, prefetcher = (on_hand.table, on_hand) if on_hand else (variant.table, variant.prefetcher)
        # The others wait before the second block, or for nothing.
        self._waits_at_entry = variant.schedule not in ("prefetched", BESIDE, ASKING, "none")
        chosen: list[Tensor] = []
        with self._model.serving(table, prefetcher, variant.schedule, self):
            self._clock.begin()
            # The host runs ahead of the device, but where a variant must see the ids to hash them on the CPU.
            for step in work.steps:
                if isinstance(step, Prompts):
                    chosen.append(self._model.prefill(step.ids, step.lengths, step.slots))
                else:
                    chosen.append(self._model.decode(step.ids, step.positions, step.span))
                self._clock.mark("end")
            meanwhile()
            seen = not (variant.schedule in UNSEEN and self._model.graphs["used"])
            return _samples(work, self._clock.end(), chosen, seen)

    @contextmanager
    def around(self, place: Place) -> Iterator[None]:
        """What `attach` tells of every wait, on the pass's clock; where nothing is waited for, nothing is noted."""
        if place == "start" and not self._waits_at_entry:
            yield
            return
        self._clock.mark("entered" if place == "start" else "join")
        yield
        self._clock.mark("joined")

    def fetch(self, work: Work, table: Table) -> FetchedBefore:
        """The rows of every step, without the model."""
        numbers = (torch.from_numpy(rows).reshape(-1).to(table.index_device) for rows in self._row_numbers(work))
        return FetchedBefore(table, [table.start(rows).wait() for rows in numbers])

    def count_rows(self, work: Work, row_format: RowFormat) -> tuple[int, int, int]:
        """From the ids alone: rows that a pass asks for, how many if each step asks for each once, bytes that cross.

        The last where the CPU gathers and copies.
        """
        sizes = [(rows.size, len(np.unique(rows))) for rows in self._row_numbers(work)]
        requested, unique = zip(*sizes)
        return sum(requested), sum(unique), sum(crossing_bytes(row_format, count) for count in requested)

    def _row_numbers(self, work: Work) -> Iterator[np.ndarray]:
        """Of every step [B, T, C], hashed apart from what is measured."""
        hasher, before = NgramHasher(self._plan), TokenHistory(self._plan, self._model.slots)
        context = self._plan.max_ngram - 1
        for step in work.steps:
            ids = step.ids.cpu().numpy()
            if isinstance(step, Prompts):
                compressed = self._vocab(ids)
                yield hasher(compressed, LAYER)
                for slot, prompt, length in zip(step.slots, compressed, step.lengths):
                    # Its last tokens, padding left out; before a short prompt nothing stood.
                    before.ids[slot] = [*[DEAD] * context, *prompt[:length]][-context:]
            else:
                compressed = self._vocab(ids[:, None])
                yield hasher(compressed, LAYER, history=before)
                before.advance(compressed)


def _samples(work: Work, spans: Sequence[Lap], chosen: list[Tensor], seen: bool) -> PassSamples:
    """Spans by step: those up to and with each `end`; `seen`: whether a clock was told of the waits of decode steps."""
    steps: list[dict[str, float]] = [{"all": 0.0, "joined": 0.0, "window": 0.0}]
    waiting = False  # before the join
    for name, seconds in spans:
        step = steps[-1]
        step["all"] += seconds
        if name == "joined":
            step["joined"] += seconds
        elif not waiting:
            step["window"] += seconds  # up to the join; all of a step that has none
        waiting = name == "join" or (waiting and name != "end")
        if name == "end":
            steps.append({"all": 0.0, "joined": 0.0, "window": 0.0})
    timed = list(zip(work.steps, steps))  # the last of `steps` was begun by the last end, and is empty
    prefill = [(step, times) for step, times in timed if isinstance(step, Prompts)]
    decode = [times for step, times in timed if isinstance(step, Tokens)]
    return {
        "prefill_s": [times["all"] for _, times in prefill],
        "decode_s": [times["all"] for times in decode],
        "first_token_s": [times["all"] for step, times in prefill for _ in step.lengths],
        "window_s": [times["window"] for times in decode],
        "prefill_exposed_s": [times["joined"] for _, times in prefill],
        "decode_exposed_s": [times["joined"] for times in decode] if seen else None,
        "tokens_sha256": _digest(work, chosen),
    }


def _digest(work: Work, chosen: list[Tensor]) -> str:
    """Of the choices for running sequences, in the order of the steps."""
    digest = hashlib.sha256()
    for step, tokens in zip(work.steps, chosen):
        values: Any = tokens.cpu().numpy()
        if isinstance(step, Tokens):
            values = values[[slot for slot, _, _ in step.step.running]]
        digest.update(values.astype("<i8").tobytes())  # the same on every machine
    return digest.hexdigest()
