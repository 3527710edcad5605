"""What Engram remembers of a sequence, kept in the key-value cache it belongs to.

A decoder's cache holds keys and values of all positions so far; Engram needs, of the same positions, the last few
compressed ids and the short convolution's past. `follow` makes a transformers cache carry such a history along: what is
done to the cache (beams reordered, sequences repeated or selected, positions cropped, all reset, the whole copied) is
done to the history, and `CacheHistory.settle` compares the two lengths before every step. So one cannot get ahead of
the other unnoticed.

A server's cache has places, to which sequences come and which they leave, each at a position of its own: what came
before in each is kept in `Places`, and nothing is compared with the cache.

Cropping is followed as far as the ids are remembered (SLACK positions); a layer with a convolution refuses it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engram_ref.fusion.base import ShortConvHistory
from engram_ref.hashing.plan import HashPlan
from engram_ref.ids import DEAD
from engram_ref.layer import Engram
from engram_ref.tables.base import Pending, Ready

SLACK = 64  # positions that may be cropped away
_ATTRIBUTE = "_engram_histories"


def _written_to(tensor: Tensor) -> Tensor:
    """A tensor that may be written to under `no_grad`, even if it was made under `inference_mode`."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def convolved(engrams: Mapping[int, Engram]) -> list[int]:
    """The layers that have a convolution, and so a past besides ids."""
    return [layer_id for layer_id, engram in engrams.items() if engram.fusion.reach]


class CacheHistory:
    """The past of some sequences, for all Engram layers of a model.

    Args:
        plan: of the hash.
        batch_size: sequences.
        device: of the ids.
        engrams: the layers.

    Attributes:
        length: positions so far, padding included.
        recent: compressed ids of the last of them, at least max_ngram - 1 and at most SLACK more: [B, R]. They are
            replaced, never written to, and may still be on their way: reading them lets the current stream wait.
        convolutions: by layer id, the past of those that have a convolution.
        open: a step has begun and not ended.
        packed: several sequences lie in one row, so that none can go on.
        slack: ids that are remembered beyond those that the hash needs.
    """

    slack = SLACK

    def __init__(self, plan: HashPlan, batch_size: int, device: torch.device, engrams: Mapping[int, Engram]) -> None:
        self.plan = plan
        self._context = plan.max_ngram - 1
        self.length = 0
        self.recent = torch.full((batch_size, self._context), DEAD, dtype=torch.int64, device=device)
        self.convolutions: dict[int, ShortConvHistory] = {}
        for layer_id in convolved(engrams):
            past = self.convolutions[layer_id] = ShortConvHistory(engrams[layer_id].fusion, batch_size)
            past.values = _written_to(past.values)
        self.open = False
        self.packed = False

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return len(self.recent)

    @property
    def context(self) -> Tensor:
        """The max_ngram - 1 ids before the next position, [B, N-1]."""
        return self.recent[:, -self._context :]

    @property
    def recent(self) -> Tensor:
        """See the attributes."""
        return self._recent if isinstance(self._recent, Tensor) else self._recent.wait()

    @recent.setter
    def recent(self, ids: Tensor) -> None:
        self._recent: Tensor | Pending = ids

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recent": self.recent}  # a copy has the ids, not an event of a stream

    def followed_by(self, ids: Tensor) -> Tensor:
        """What `recent` is after some more positions [B, T]."""
        return torch.cat([self.recent, ids], dim=1)[:, -(self._context + self.slack) :]

    def room_after(self, count: int) -> Tensor:
        """Memory for what `recent` is after so many more positions."""
        recent = self.recent
        return recent.new_empty((len(recent), min(recent.shape[1] + count, self._context + self.slack)))

    def begin(self) -> None:
        """A step begins: until `end`, blocks write what cannot be taken back."""
        self.open = True

    def end(self) -> None:
        """It has ended well, or no block has run."""
        self.open = False

    def append(self, ids: Tensor) -> None:
        """Go on by some positions, [B, T]."""
        self.go_on(Ready(self.followed_by(ids)), ids.shape[1])

    def go_on(self, recent: Pending, count: int) -> None:
        """Go on by so many positions, which have been put behind the others already."""
        self._recent = recent
        self.length += count

    def settle(self, length: int) -> None:
        """Go back to the `length` positions that the cache holds.

        Raises:
            ValueError: the cache is longer than this history, a step was broken off, or more is gone than remembered.
        """
        if length == 0:
            return self.reset()
        self.require_whole()
        if self.packed:
            raise ValueError("a cache of several sequences packed into one row, of which none can go on: use a new one")
        if length > self.length:
            raise ValueError(_apart(length, self.length))
        if length < self.length:
            self._crop(self.length - length)

    def require_whole(self) -> None:
        """Refuse to go on behind a step that was broken off.

        Raises:
            ValueError: one was.
        """
        if self.open:
            raise ValueError(
                "an earlier step with this cache was broken off, so cache and Engram may differ: begin with a new cache"
            )

    def _crop(self, count: int) -> None:
        if self.convolutions:  # their past is kept for the end alone
            raise ValueError(
                f"the cache was cropped by {count} positions; the short convolution cannot go back: use a form without "
                "one, or generate without an assistant"
            )
        most = self.recent.shape[1] - self._context
        if count > most:
            raise ValueError(
                f"the cache was cropped by {count} positions; what is remembered of it can follow {most}: begin with a "
                "new cache, or tell `remember` of more tokens"
            )
        self.recent = self.recent[:, :-count]
        self.length -= count

    def reset(self) -> None:
        """Back to before the first position."""
        self.length, self.open, self.packed = 0, False, False
        self.recent = torch.full_like(self.recent[:, : self._context], DEAD)
        for past in self.convolutions.values():
            past.values.zero_()  # in place: a captured graph goes on reading there

    def select(self, sequences: Tensor) -> None:
        """The sequences of these numbers, in this order: beams are reordered, or some are left."""
        self.recent = self.recent[sequences.to(self.recent.device)]
        for past in self.convolutions.values():
            chosen = past.values[sequences.to(past.values.device)]
            same = chosen.shape == past.values.shape
            past.values = past.values.copy_(chosen) if same else _written_to(chosen)

    def repeat(self, times: int) -> None:
        """Each sequence so many times, one after the other."""
        self.recent = self.recent.repeat_interleave(times, dim=0)
        for past in self.convolutions.values():
            past.values = _written_to(past.values.repeat_interleave(times, dim=0))


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
            ValueError: a place that does not exist or is named twice.
        """
        slots = torch.arange(self.batch_size, device="cpu") if slots is None else torch.as_tensor(slots, device="cpu")
        named = self._named(slots)
        self._admitted = None
        self._put(self.recent.index_fill(0, slots.to(self.recent.device), DEAD))
        for past in self.convolutions.values():
            past.values.index_fill_(0, slots.to(past.values.device), 0)
        self.in_doubt.difference_update(named)

    def admit(self, slots: Any, lengths: Any) -> None:
        """The next forward is of prompts that take places; all other places stay as they are.

        If that forward fails halfway, its places are in doubt, too.

        Args:
            slots: the place of each prompt, [b], integers on the CPU.
            lengths: its tokens, [b]; those behind them fill the batch up, on the right.

        Raises:
            ValueError: a place that does not exist or is named twice, or a prompt without a token.
        """
        slots, lengths = torch.as_tensor(slots, device="cpu"), torch.as_tensor(lengths, device="cpu")
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

        Raises:
            ValueError: another number of sequences than that, prompts longer than T, or places in doubt.
        """
        step, self._admitted = self._admitted or self, None
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

    def select(self, sequences: Tensor) -> None:
        """Places are not reordered.

        Raises:
            ValueError: always.
        """
        raise ValueError("a cache of places, which cannot be reordered, selected or repeated: admit() prompts instead")

    def repeat(self, times: int) -> None:
        """As `select`."""
        self.select(self.recent)

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


def _apart(length: Any, remembered: Any) -> str:
    return (
        f"the cache holds {length} positions, Engram's history {remembered}: some were put there by another model, or "
        "while nothing was attached; begin with a new cache"
    )


class LengthsOnDevice:
    """Lengths that only the accelerator knows, compared there, so that the CPU need not wait for it."""

    def __init__(self) -> None:
        self._differed: Tensor | None = None  # [2], what the cache held and what was remembered, where they differed

    def compare(self, length: Tensor, remembered: int) -> None:
        """Note whether a cache is as long as its history."""
        pair = torch.stack([length.to(torch.int64).reshape(()), torch.full_like(length, remembered).reshape(())])
        before = torch.zeros_like(pair) if self._differed is None else self._differed
        self._differed = torch.where(pair[0] == pair[1], before, pair)

    def check(self) -> None:
        """Wait for the device, and raise if one was not.

        Raises:
            ValueError: a cache and its history differed.
        """
        if self._differed is None:
            return
        length, remembered = self._differed.tolist()
        self._differed = None
        if length != remembered:
            raise ValueError(_apart(length, remembered))


def history_of(cache: Any, key: str) -> CacheHistory | None:
    """The history that a cache carries under this key."""
    return getattr(cache, _ATTRIBUTE, {}).get(key)


def follow(cache: Any, key: str, history: CacheHistory) -> None:
    """Let a cache carry a history, and do to it what is done to the cache."""
    if not hasattr(cache, _ATTRIBUTE):
        kind: Any = type(cache)
        setattr(cache, _ATTRIBUTE, {})
        cache.__class__ = _following(kind)
    getattr(cache, _ATTRIBUTE)[key] = history


def unfollow(cache: Any, key: str) -> None:
    """Take a history away; a cache without one is as it was before the first."""
    histories = getattr(cache, _ATTRIBUTE, {})
    histories.pop(key, None)
    if not histories and hasattr(cache, _ATTRIBUTE):
        delattr(cache, _ATTRIBUTE)
        cache.__class__ = type(cache).__bases__[0]


@functools.cache
def _following(kind: type) -> type:
    """A subclass of a kind of cache, of the same name, whose methods also act on the histories."""
    namespace = {"__doc__": kind.__doc__, "__module__": kind.__module__, "__reduce_ex__": _reduce}
    for name, act in _ACTS.items():
        if hasattr(kind, name):
            namespace[name] = _and_then(getattr(kind, name), act)
    return type(kind.__name__, (kind,), namespace)


def _reduce(cache: Any, protocol: Any) -> Any:
    """For copies and pickles: as the kind of cache does it, the subclass named by the kind that it follows."""
    kind: Any = type(cache).__bases__[0]
    make, arguments, *rest = kind.__reduce_ex__(cache, protocol)
    if not arguments or arguments[0] is not type(cache):
        raise ValueError(f"a {kind.__name__} with Engram's history, which cannot be copied or pickled: detach() first")
    return _remake, (make, kind, *arguments[1:]), *rest


def _remake(make: Any, kind: type, *arguments: Any) -> Any:
    return make(_following(kind), *arguments)


def _and_then(method: Any, act: Any) -> Any:
    @functools.wraps(method)
    def both(cache: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(cache, *args, **kwargs)
        for history in getattr(cache, _ATTRIBUTE, {}).values():
            act(history, *args, **kwargs)
        return result

    return both


_ACTS = {
    "reorder_cache": lambda history, beam_idx: history.select(beam_idx),
    "batch_select_indices": lambda history, indices: history.select(indices),
    "batch_repeat_interleave": lambda history, repeats: history.repeat(repeats),
    "reset": lambda history: history.reset(),
}
