"""One pass: a variant serves the sequences of one round, and every step of it is timed.

    server = Server(model, vocab, plan, layer_id)
    work = server.prepare(round_, slots, most_tokens)       # uploaded beforehand, shared by all variants
    samples = server.serve(work, variant)

A step ends when its tokens have been chosen; what lies between the ends of two steps is the time of the second. The
host waits for the device only where a variant must (to hash on the CPU it has to see the ids) and at the pass's end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.instruments.clocks import Clock, Lap, device_clock
from bench.served.model import ServedModel, rounded_span
from bench.served.requests import Decode, Prefill, Round, schedule
from bench.setup.lookup import Lookup, NoLookup, OnHand, ResidentLookup, Sequences, TableLookup
from bench.setup.variants import Variant
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.vocab import CompressedVocab


@dataclass(frozen=True)
class Prompts:
    """A group of prompts on the device, and what the host knows of it."""

    group: Prefill
    ids: Tensor  # [b, T]
    lengths: np.ndarray  # [b]
    device_lengths: Tensor
    slots: np.ndarray  # [b]
    device_slots: Tensor


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


@dataclass(frozen=True)
class PassSamples:
    """What one pass took, in seconds, a value per step.

    Attributes:
        prefill_s, decode_s: of each step.
        first_token_s: of each sequence, from when its group's ids are given until its first token is chosen.
        window_s: of each decode step, from its begin to the join, less what was waited there before.
        prefill_exposed_s, decode_exposed_s: how long the model waited for rows.
        tokens_sha256: of the model's choices.
    """

    prefill_s: list[float]
    decode_s: list[float]
    first_token_s: list[float]
    window_s: list[float]
    prefill_exposed_s: list[float]
    decode_exposed_s: list[float]
    tokens_sha256: str


class Server:
    """Serves rounds on one model.

    Args:
        model: with all places free.
        vocab: token id -> compressed id.
        plan: of the table.
        layer_id: of its layer.
        clock: of a device; None for the model's.
        resident: serves the variants that are looked up by kernels alone, in the graphs where there are any.
    """

    def __init__(
        self,
        model: ServedModel,
        vocab: CompressedVocab,
        plan: HashPlan,
        layer_id: int,
        clock: Clock | None = None,
        resident: ResidentLookup | None = None,
    ) -> None:
        self._model, self._vocab, self._plan, self._layer_id = model, vocab, plan, layer_id
        self._resident = resident
        self._device = model.positions.device
        self._clock = clock or device_clock(self._device)

    def prepare(self, round_: Round, most_tokens: int) -> Work:
        """Put a round's ids onto the device.

        Raises:
            ValueError: a prompt is shorter than what the layer's convolution looks back.
        """
        least = self._model.shortest_prompt()
        if round_.lengths[0].prompt < least:
            raise ValueError(f"a prompt of {round_.lengths[0].prompt} tokens: this layer needs {least} at least")
        steps = schedule(round_.lengths, self._model.slots, most_tokens)
        return Work(round_, [self._upload(step, round_) for step in steps])

    def _upload(self, step: Prefill | Decode, round_: Round) -> Prompts | Tokens:
        if isinstance(step, Prefill):
            ids, lengths = round_.prompts(step)
            slots = np.array(step.slots)
            return Prompts(step, self._put(ids), lengths, self._put(lengths), slots, self._put(slots))
        ids, positions = np.zeros((2, self._model.slots), np.int64)
        for slot, sequence, given in step.running:
            positions[slot] = round_.lengths[sequence].prompt + given - 1
            ids[slot] = round_.tokens[sequence][positions[slot]]
        return Tokens(step, self._put(ids), self._put(positions), rounded_span(int(positions.max())))

    def _put(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)

    def serve(
        self,
        work: Work,
        variant: Variant,
        rows: list[Tensor] | None = None,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> PassSamples:
        """Run all steps with one variant.

        Args:
            work: of this server.
            variant: the variant.
            rows: of every step, for the variant that has them on hand.
            meanwhile: called when every step has been given to the device, before it is waited for.
        """
        lookup = self._lookup(variant, rows)
        chosen: list[Tensor] = []
        self._clock.begin()
        for step in work.steps:
            if isinstance(step, Prompts):
                chosen.append(self._prefill(step, lookup))
            else:
                chosen.append(self._decode(step, lookup, variant))
            lookup.leave()
            self._clock.mark("end")
        meanwhile()
        return _samples(work, self._clock.end(), chosen)

    def _lookup(self, variant: Variant, rows: list[Tensor] | None) -> Lookup:
        if rows is not None:
            return OnHand(rows)
        if variant.prefetcher is None:
            return NoLookup()
        if variant.kernels is not None:
            assert self._resident is not None
            self._resident.restart()
            return self._resident
        sequences = Sequences(self._vocab, self._plan, self._model.slots, variant.hashing_device)
        return TableLookup(variant.prefetcher, variant.schedule, self._layer_id, sequences, self._clock)

    def _prefill(self, step: Prompts, lookup: Lookup) -> Tensor:
        lookup.enter(step.ids, step.lengths, step.slots)
        lookup.begin()
        return self._model.prefill(step.ids, step.device_lengths, step.device_slots, self._timed(lookup.join))

    def _decode(self, step: Tokens, lookup: Lookup, variant: Variant) -> Tensor:
        model = self._model
        model.next_tokens.copy_(step.ids[:, None])
        model.positions.copy_(step.positions)
        lookup.enter(model.next_tokens)
        # A copy, for a graph writes every step's choice to the same place.
        join, inside = self._timed(lookup.join), variant.kernels is not None
        return model.decode(step.span, variant.has_engram, lookup.begin, join, inside).clone()

    def _timed(self, join: Callable[[], Tensor | None]) -> Callable[[], Tensor | None]:
        def joined() -> Tensor | None:
            self._clock.mark("join")
            rows = join()
            self._clock.mark("joined")
            return rows

        return joined

    def rows_of(self, work: Work, variant: Variant) -> list[Tensor]:
        """The rows of every step [B*T*C, D], fetched from a variant, without the model."""
        lookup = self._lookup(variant, None)
        found = []
        for step in work.steps:
            if isinstance(step, Prompts):
                lookup.enter(step.ids, step.lengths, step.slots)
            else:
                lookup.enter(step.ids[:, None])
            rows = lookup.join()
            assert rows is not None
            found.append(rows.clone())
            lookup.leave()
        return found

    def count_rows(self, work: Work) -> tuple[int, int]:
        """Rows that a pass asks for, and how many are left when each step asks for each once: from the ids alone."""
        hasher, requested, unique = NgramHasher(self._plan), 0, 0
        sequences = Sequences(self._vocab, self._plan, self._model.slots, None)
        for step in work.steps:
            ids = step.ids.cpu()
            compressed = sequences.compress(ids if isinstance(step, Prompts) else ids[:, None])
            before = None if isinstance(step, Prompts) else sequences.history
            rows = hasher(compressed, self._layer_id, history=before)
            requested, unique = requested + rows.size, unique + len(np.unique(rows))
            if isinstance(step, Prompts):
                sequences.start(compressed, step.lengths, step.slots)
            else:
                sequences.advance(compressed)
        return requested, unique


def _samples(work: Work, spans: Sequence[Lap], chosen: list[Tensor]) -> PassSamples:
    """Spans by step: those up to and with each `end`."""
    steps: list[dict[str, float]] = [{"all": 0.0, "joined": 0.0, "window": 0.0}]
    waiting = False  # before the join
    for name, seconds in spans:
        step = steps[-1]
        step["all"] += seconds
        if name == "joined":
            step["joined"] += seconds
        elif not waiting:
            step["window"] += seconds
        waiting = name == "join" or (waiting and name != "end")
        if name == "end":
            steps.append({"all": 0.0, "joined": 0.0, "window": 0.0})
    timed = list(zip(work.steps, steps))
    prefill = [(step, times) for step, times in timed if isinstance(step, Prompts)]
    decode = [times for step, times in timed if isinstance(step, Tokens)]
    return PassSamples(
        [times["all"] for _, times in prefill],
        [times["all"] for times in decode],
        [times["all"] for step, times in prefill for _ in step.lengths],
        [times["window"] for times in decode],
        [times["joined"] for _, times in prefill],
        [times["joined"] for times in decode],
        _digest(work, chosen),
    )


def _digest(work: Work, chosen: list[Tensor]) -> str:
    """Of the choices for running sequences, in the order of the steps."""
    digest = hashlib.sha256()
    for step, tokens in zip(work.steps, chosen):
        values: Any = tokens.cpu().numpy()
        if isinstance(step, Tokens):
            values = values[[slot for slot, _, _ in step.step.running]]
        digest.update(values.astype("<i8").tobytes())
    return digest.hexdigest()
