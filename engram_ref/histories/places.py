"""The past of sequences that come and go in a server's places, each at a position of its own.

Nothing is compared with the cache, whose places need not be equally long.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import engram_ref.needs_torch  # noqa: F401

import torch
from torch import Tensor

from engram_ref.fusion.base import ShortConvHistory
from engram_ref.hashing.plan import HashPlan
from engram_ref.histories.cache import CacheHistory
from engram_ref.ids import DEAD
from engram_ref.layer import Engram
from engram_ref.tables.base import Pending, Ready


class Places(CacheHistory):
    """The pasts of sequences that come and go, each in a place of its own and at a position of its own.

        places = Places(plan, 64, attached.index_device, {1: ShortConvHistory(fusion, 64)})
        attached.seat(cache, places)
        places.admit(slots, lengths)
        model(prompts, past_key_values=cache)               # [b, T], padded on the right
        model(tokens, past_key_values=cache, ...)           # [64, 1], one more token in every place

    On an accelerator the ids stay in the same memory, so that a captured lookup finds them there in every replay.

    Of a forward that fails halfway, some layers have advanced the past of its places and others have not. These are in
    doubt then, and no step of all places is taken before they are cleared, or prompts admitted to them. The replay of a
    captured forward, of which nothing is known here, leaves none in doubt.

    Args:
        plan: of the hash.
        count: places.
        device: where token ids are hashed.
        convolutions: by layer id, the past of every layer that has a convolution; other Places may share them.
    """

    slack = 0

    def __init__(
        self,
        plan: HashPlan,
        count: int,
        device: torch.device,
        convolutions: Mapping[int, ShortConvHistory] | None = None,
    ) -> None:
        with torch.inference_mode(False):  # written to in whatever mode the model runs
            super().__init__(plan, count, device, {})
        self.convolutions = dict(convolutions or {})
        self.in_doubt: set[int] = set()
        self._admitted: Prompts | None = None

    def clear(self, slots: Any = None) -> None:
        """No place has a sequence, or none of these; prompts that were admitted are forgotten.

        Args:
            slots: places, [b], integers on the CPU; None for all.

        Raises:
            ValueError: a place that does not exist or is named twice, or no list of integers.
        """
        slots = torch.arange(self.batch_size, device="cpu") if slots is None else _integers("places", slots)
        named = self._named(slots)
        self._admitted = None
        self._put(self.recent.index_fill(0, slots.to(self.recent.device), DEAD))
        for past in self.convolutions.values():
            past.values.index_fill_(0, slots.to(past.values.device), 0)
        self.in_doubt.difference_update(named)

    def admit(self, slots: Any, lengths: Any) -> None:
        """The next forward is of prompts that take places; all other places stay as they are.

        If that forward fails halfway, its places are in doubt, too. One that is refused before it begins changes
        nothing: the prompts stay admitted until a forward of them begins, others are admitted, or places are cleared.

        Args:
            slots: the place of each prompt, [b], integers on the CPU.
            lengths: its tokens, [b]; those behind them fill the batch up, on the right.

        Raises:
            ValueError: a place that does not exist or is named twice, a prompt without a token, or no list of integers.
        """
        slots, lengths = _integers("places", slots), _integers("lengths", lengths)
        named = self._named(slots)
        if not named or lengths.shape != slots.shape or lengths.min() < 1:
            raise ValueError(f"prompts of {lengths.tolist()} tokens for places {named}: give one at least for each")
        self._admitted = Prompts(self, slots, lengths)

    def _named(self, slots: Tensor) -> list[int]:
        named: list[int] = slots.tolist()
        if len(set(named)) < len(named) or not all(0 <= slot < self.batch_size for slot in named):
            raise ValueError(f"places {named} of {self.batch_size}: name different ones, 0 .. {self.batch_size - 1}")
        return named

    def next_step(self, shape: torch.Size) -> Places | Prompts:
        """Whose past the step with token ids of this shape, [B, T], goes on: that of all places, or of new prompts.

        Prompts stay admitted until their step begins.

        Raises:
            ValueError: another number of sequences than that, prompts longer than T, or places in doubt.
        """
        step = self._admitted or self
        if step.batch_size != shape[0]:
            raise ValueError(
                f"{shape[0]} sequences, where {step.batch_size} {'places go on' if step is self else 'were admitted'}: "
                "give a chunk for every place, or admit() the prompts that are given"
            )
        if isinstance(step, Prompts):
            step.require_within(shape[1])
        else:
            self.require_whole()
        return step

    def begin(self) -> None:
        """A step of all places begins."""
        self.in_doubt.update(range(self.batch_size))

    def end(self) -> None:
        """It has ended well, or no block has run."""
        self.in_doubt.clear()

    def require_whole(self) -> None:
        """Refuse to go on in places whose last step was broken off.

        Raises:
            ValueError: there are some.
        """
        if self.in_doubt:
            raise ValueError(
                f"an earlier step of places {sorted(self.in_doubt)} was broken off, so cache and Engram may differ: "
                "admit() prompts to them, or clear() them"
            )

    def room_after(self, count: int) -> Tensor:
        """The ids themselves: a lookup advances them where they lie."""
        return self.recent

    def go_on(self, recent: Pending, count: int) -> None:
        """Every place has got so many more positions."""
        self._put(recent.wait())

    def take(self, slots: Tensor, ids: Tensor) -> None:
        """Sequences stand in these places now, [b], behind these ids, [b, N-1]."""
        self._put(self.recent.index_copy(0, slots.to(ids.device), ids))

    def _put(self, ids: Tensor) -> None:
        if ids.device.type == "cpu":
            self.recent = ids  # beside the old ones, which a fetch may still be reading
        elif ids.data_ptr() != self.recent.data_ptr():
            self.recent.copy_(ids)  # where a captured graph reads them

    def require_movable(self) -> None:
        """Places are not reordered.

        Raises:
            ValueError: always.
        """
        raise ValueError("a cache of places, which cannot be reordered, selected or repeated: admit() prompts instead")

    def reset(self) -> None:
        """As `clear`."""
        self.clear()


class Prompts(CacheHistory):
    """Sequences that begin, [b, T] padded on the right, and are to take places: the history of one step.

    Args:
        places: that they take.
        slots: which, [b].
        lengths: tokens of each, [b].
    """

    slack = 1 << 32  # all ids are remembered until the step ends, since the prompts end at different ones

    def __init__(self, places: Places, slots: Tensor, lengths: Tensor) -> None:
        super().__init__(places.plan, len(slots), places.recent.device, {})
        self._places, self._slots, self._lengths = places, slots, lengths

    def require_within(self, length: int) -> None:
        """Refuse prompts that are longer than the chunk they come in."""
        longest = int(self._lengths.max())
        if longest > length:
            raise ValueError(f"a prompt of {longest} tokens was admitted; the token ids have {length} positions")

    def begin(self) -> None:
        """Blocks write to the places that the prompts take."""
        self._places._admitted = None
        self._places.in_doubt.update(self._slots.tolist())

    def end(self) -> None:
        """It has ended well, or no block has run."""
        self._places.in_doubt.difference_update(self._slots.tolist())

    def go_on(self, recent: Pending, count: int) -> None:
        """The prompts have been read: what came last in each goes to its place."""
        ids = recent.wait()  # [b, N-1 + T]
        last = self._lengths.to(ids.device)[:, None] + torch.arange(self._context, device=ids.device)  # [b, N-1]
        self._places.take(self._slots, ids.gather(1, last))

    def keep_convolved(self, layer_id: int, engram: Engram, hidden: Tensor, rows: Tensor) -> None:
        """Let the convolution's past of a layer go to the places.

        Args:
            hidden: the stream before the layer, [b, T, H].
            rows: looked up for it, [b*T*C, D].
        """
        if layer_id not in self._places.convolutions:
            return
        reach, device, batch = engram.fusion.reach, hidden.device, len(hidden)
        at = self._lengths.to(device)[:, None] - reach + torch.arange(reach, device=device)  # [b, reach]
        each = torch.arange(batch, device=device)[:, None]
        of_last = rows.view(batch, hidden.shape[1], -1)[each, at.clamp_min(0)]  # [b, reach, C*D]
        # What is kept of a token depends on that token alone: the last ones are computed once more, without the others.
        past = ShortConvHistory(engram.fusion, batch)
        engram(hidden[each, at.clamp_min(0)], Ready(of_last.reshape(-1, rows.shape[1])), past)
        before = (at < 0)[..., None, None]  # where a prompt has not begun
        self._places.convolutions[layer_id].values[self._slots.to(device)] = past.values.masked_fill(before, 0)


def _integers(what: str, given: Any) -> Tensor:
    """What the user gave for places or lengths, int64 [b] on the CPU.

    Raises:
        ValueError: something else than one integer for each.
    """
    numbers = torch.as_tensor(given, device="cpu")
    integers = not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)
    if numbers.ndim != 1 or (len(numbers) and not integers):
        raise ValueError(f"{what} {numbers.tolist()}: give integers, one for each sequence")
    return numbers.to(torch.int64)
