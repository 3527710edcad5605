"""What is served: sequences with a prompt and an output, their tokens, and the order of steps that serves them.

    lengths = draw_lengths(64, (100, 1024), (100, 1024), seed=(0, 7))
    for step in schedule(lengths, slots=64, most_tokens=16384): ...

The tokens are given, in the prompt and in the output: real text, or random ids. The model's own choice is computed,
kept and compared, but the next token is the text's.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Lengths(NamedTuple):
    """Tokens of one sequence."""

    prompt: int
    output: int


class Prefill(NamedTuple):
    """Prompts that are processed together: `sequences[i]` goes into place `slots[i]`."""

    sequences: tuple[int, ...]
    slots: tuple[int, ...]


class Decode(NamedTuple):
    """One more token for every running sequence: (place, sequence, tokens that it has been given so far)."""

    running: tuple[tuple[int, int, int], ...]


Step = Prefill | Decode


def draw_lengths(count: int, prompt: tuple[int, int], output: tuple[int, int], seed: Sequence[int]) -> list[Lengths]:
    """Uniform lengths, both bounds included, in the order of their prompts."""
    generator = np.random.default_rng(seed)
    prompts = generator.integers(prompt[0], prompt[1], count, endpoint=True)
    # Drawn beforehand, since a model with random weights ends nowhere.
    outputs = generator.integers(output[0], output[1], count, endpoint=True)
    # In order, so that prompts of nearly one length are padded together.
    return sorted(Lengths(int(p), int(o)) for p, o in zip(prompts, outputs))


def schedule(lengths: Sequence[Lengths], slots: int, most_tokens: int) -> list[Step]:
    """The steps that serve all sequences.

    Args:
        lengths: of the sequences, in the order in which they wait.
        slots: sequences that are served at a time.
        most_tokens: of prompts that are processed together, padding included; one prompt may have more.
    """
    waiting, free = deque(range(len(lengths))), list(range(slots))
    running: dict[int, tuple[int, int]] = {}  # place -> sequence, tokens given
    steps: list[Step] = []
    while waiting or running:
        # As nano-vLLM does: prompts first, whenever one waits and a place is free; else a token for all that run.
        if waiting and free:
            group = _admit(waiting, lengths, len(free), most_tokens)
            places, free = free[: len(group)], free[len(group) :]
            steps.append(Prefill(tuple(group), tuple(places)))
            # One is given already: a prefill chooses the first.
            running.update({place: (sequence, 1) for place, sequence in zip(places, group)})
        else:
            steps.append(Decode(tuple((place, *running[place]) for place in sorted(running))))
            running = {place: (sequence, given + 1) for place, (sequence, given) in running.items()}
        done = [place for place, (sequence, given) in running.items() if given >= lengths[sequence].output]
        free = sorted([*free, *done])
        running = {place: state for place, state in running.items() if place not in done}
    return steps


def _admit(waiting: deque[int], lengths: Sequence[Lengths], places: int, most_tokens: int) -> list[int]:
    group = [waiting.popleft()]
    while waiting and len(group) < places:
        longest = max(lengths[sequence].prompt for sequence in (*group, waiting[0]))  # all are padded to it
        if longest * (len(group) + 1) > most_tokens:
            break
        group.append(waiting.popleft())
    return group


@dataclass(frozen=True)
class Round:
    """The sequences of one round, which every variant serves.

    Attributes:
        number: of the round; warm-up rounds are negative.
        lengths: of each sequence.
        tokens: of each sequence, int64 [prompt + output].
    """

    number: int
    lengths: list[Lengths]
    tokens: list[np.ndarray]

    @property
    def output_tokens(self) -> int:
        """Tokens that are generated."""
        return sum(length.output for length in self.lengths)

    def prompts(self, group: Prefill) -> tuple[np.ndarray, np.ndarray]:
        """Prompts of a group [b, T], padded on the right with 0, and their lengths [b]."""
        lengths = np.array([self.lengths[sequence].prompt for sequence in group.sequences])
        ids = np.zeros((len(lengths), lengths.max()), np.int64)
        for row, (sequence, length) in enumerate(zip(group.sequences, lengths)):
            ids[row, :length] = self.tokens[sequence][:length]
        return ids, lengths


class TokenSource:
    """Where the tokens of rounds come from: a text, which is walked through and begun again, or random ids.

    Args:
        text: its token ids, int64; None for random ids.
        vocabulary: random ids are below it.
        seed: of lengths, of random ids, and of where the walk begins.
    """

    def __init__(self, text: np.ndarray | None, vocabulary: int, seed: int) -> None:
        self._text, self._vocabulary, self._seed = text, vocabulary, seed

    @property
    def sha256(self) -> str:
        """Of the token ids, or of what random ones follow from."""
        content = repr((self._vocabulary, self._seed)).encode() if self._text is None else self._text.tobytes()
        return hashlib.sha256(content).hexdigest()

    def round(self, number: int, count: int, prompt: tuple[int, int], output: tuple[int, int]) -> Round:
        """The same for the same number, whichever rounds came before.

        Raises:
            ValueError: the text is shorter than what a round needs.
        """
        # The tokens of outputs are given, too: a random model repeats itself, and its n-grams would be nobody's.
        drawn = 2 * number if number >= 0 else -2 * number - 1  # seeds are not negative
        # The seed last: NumPy pads what it is given with zeros, so seed 0 draws what the round's number alone would.
        # Twice, or a round of the seed's own number would draw its lengths as it draws its ids.
        lengths = draw_lengths(count, prompt, output, (drawn, self._seed, self._seed))
        needed = [length.prompt + length.output for length in lengths]
        if self._text is None:
            generator = np.random.default_rng((self._seed, drawn))
            return Round(number, lengths, [generator.integers(0, self._vocabulary, n) for n in needed])
        if sum(needed) > len(self._text):
            raise ValueError(
                f"the text has {len(self._text):,} tokens, a round needs {sum(needed):,}: "
                "take a longer text, fewer --sequences or shorter ones"
            )
        # A round begins behind all that the one before can have read, and at the end of the text over again.
        most = count * (prompt[1] + output[1])
        first = (self._seed + (number % 1000) * most) % (len(self._text) - sum(needed) + 1)
        ends = first + np.cumsum(needed)
        return Round(number, lengths, [self._text[end - n : end] for end, n in zip(ends.tolist(), needed)])
