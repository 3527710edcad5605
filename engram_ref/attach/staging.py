"""What an attached model does where forwards start nothing: steps are staged, and graphs read what was laid down.

    with attached.staging():
        attached.stage(ids, cache)
        graph.replay()

`begin` and `lay_down` are the two halves of `stage`; `answer` is for steps that ask the CPU themselves. Which buffers
graphs read, and how they wait for them, is in `graphs`.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from engram_ref.attach.blocks import Given, is_on_accelerator
from engram_ref.attach.graphs import Staged
from engram_ref.attach.lookup import Room, Source
from engram_ref.attach.packing import borders_of
from engram_ref.attach.step import ForBlock, Step, give_back, note_joined
from engram_ref.histories.cache import CacheHistory, LengthsOnDevice
from engram_ref.histories.following import history_of
from engram_ref.histories.places import Places, Prompts
from engram_ref.layer import Engram
from engram_ref.tables.base import Ready

_PACKED_AND_STAGED = "several sequences in one row of a staged step: stage a padded batch"
_PROMPTS_AND_STAGED = "prompts that take places are not staged: call the model outside of staging()"

_Attached = TypeVar("_Attached", bound="StagedSteps")


class StagedSteps(ABC):
    """The part of `Attached` that stages steps; the other part begins them (`_start`)."""

    decoder: nn.Module
    engrams: dict[int, Engram]
    _source: Source
    _key: str
    _list: str  # the decoder's name for its blocks
    _device: torch.device
    _lengths: LengthsOnDevice
    _read: Callable[[tuple[Any, ...], dict[str, Any]], Given]

    def __init__(self) -> None:
        self._staged: Staged | None = None  # inside of `staging`
        self._between: Callable[[], object] | None = None  # likewise
        self._begun: Callable[[], Step] | None = None  # by `begin`, until `lay_down`
        self._entered = False  # a staged forward runs as it is written: of a replay, or a whole graph, nothing is known
        self._advancing: CacheHistory | None = None  # by it
        self._joined: set[int] = set()  # layers with a past whose blocks have begun in it
        self._staging_thread = 0
        # By overlap and asking; captured graphs read their buffers as long as we live.
        self._stagings: dict[tuple[bool, bool], Staged] = {}
        self._asking: set[Staged] = set()  # whose steps we answer

    @abstractmethod
    def _start(self, given: Given, decoder: Any, room: Room | None = None, waited_for: bool = False) -> Step:
        """Begin to fetch for token ids [B, T], into `room` where the source can. `waited_for`: see the prefetcher."""

    @abstractmethod
    def _require_hooks(self, blocks: nn.ModuleList) -> None:
        """Refuse to start what nobody would join."""

    @contextmanager
    def staging(
        self: _Attached,
        overlap: bool = False,
        between: Callable[[], object] | None = None,
        staged: Staged | None = None,
        asking: bool = False,
    ) -> Iterator[_Attached]:
        """Inside, forwards start nothing: each reads what the last `stage` before it has laid down.

        A graph that was captured in one staging may be replayed in another, until Engram is detached; and longer, if
        its buffers are `staged`, which are the caller's.

        A cache whose forward failed halfway is refused at the next `stage`, if the forward ran as it is written, block
        by block. Of a replay, and of a forward compiled as one graph, nothing is known here but that it was staged:
        where one fails, begin with a new cache, or reset this one.

        Args:
            overlap: on CUDA, let the graph itself wait for the rows, just before the block that needs them.
            between: called in a forward where the first layer is about to read its rows: to end one capture there and
                begin another, or to `lay_down` what was begun before the forward.
            staged: the buffers, instead of own ones; then `overlap` and `asking` are as they were made.
            asking: on CUDA, for tables that the CPU gathers from: `stage` is captured with the forward, and the graph
                itself asks for its rows; `answer` before each replay. For a cache of places (`seat`).

        Raises:
            RuntimeError: inside of another one.
            ValueError: overlap without CUDA.
        """
        if self._staged is not None:
            raise RuntimeError("staging() inside of staging(), of this thread or another: leave the first one before")
        if staged is None and (overlap, asking) not in self._stagings:
            self._stagings[overlap, asking] = Staged(self._device, overlap, asking)
        try:
            self._staged, self._staging_thread = staged or self._stagings[overlap, asking], threading.get_ident()
            self._between = between
            self._staged.forget()
            yield self
        except BaseException:
            self._call_off()  # the replay that an answer waits for may not have been made
            raise
        finally:
            self._staged = self._between = self._begun = None
            self._forget_entered()

    def stage(self, input_ids: Tensor, past_key_values: Any = None, attention_mask: Any = None) -> None:
        """Fetch the rows of a step, and lay them down for the forward, or the graph's replay, that follows.

        Args:
            input_ids, past_key_values, attention_mask: as the forward will get them; a mask for all steps of a shape
                or for none.

        Raises:
            RuntimeError: outside of `staging`.
            ValueError: as the forward would raise.
        """
        if self._staged is not None and self._staged.asking:
            self._forget_entered()
            self._ask(self._staged, input_ids, past_key_values)
            return
        self.begin(input_ids, past_key_values, attention_mask, waited_for=True)
        self.lay_down()

    def answer(self, input_ids: Tensor, past_key_values: Any) -> None:
        """Let a thread answer the next replay of a step that was captured with its question; at once, this returns.

        The ids that count are those that lie there when the replay runs. Until `check`, or the next forward that is no
        replay, the places belong to the thread. If the replay is not made after all, the answer would be the next
        one's: `check` forgets it, and so does `staging` that is left by an error.

        Args:
            input_ids, past_key_values: as they were given to `stage`.

        Raises:
            RuntimeError: outside of `staging`.
            ValueError: a staging that does not ask, or a cache without places.
            CallError: an earlier step asked for rows and did not get them.
        """
        if self._staged is None or not self._staged.asking:
            raise ValueError("answer() for steps that ask: write `with attached.staging(asking=True):` around it")
        self._answer(self._staged, input_ids, past_key_values)

    def _answer(self, staged: Staged, ids: Tensor, cache: Any) -> None:
        self._require_staging_thread()
        places = self._asking_places(ids, cache)
        self._asking.add(staged)
        staged.call(ids.shape, *self._source.answer_of(ids.shape)).expect(partial(self._source.answer, places))

    def _ask(self, staged: Staged, ids: Tensor, cache: Any) -> None:
        """Stage a step that asks for its rows itself: captured, in each replay; otherwise now, and it is answered."""
        blocks: Any = self.decoder.get_submodule(self._list)
        self._require_hooks(blocks)
        places = self._asking_places(ids, cache)
        values, dtype = self._source.answer_of(ids.shape)
        self._joined.clear()
        layers, room = self._source.answered_layers, self._room_in(staged)
        new_rows = partial(torch.empty, values, dtype=dtype, device=self._device)
        call = staged.call(ids.shape, values, dtype)
        with staged.beside():
            if ids.is_cuda:  # the caller may let go of it
                ids.record_stream(torch.cuda.current_stream(self._device))
            out = None if room is None else room(ids.shape, layers, new_rows)
            out = new_rows() if out is None else out
            if not self._is_capturing():
                self._answer(staged, ids, cache)
            call.make(ids, out)
        rows = {layer_id: Ready(found) for layer_id, found in zip(layers, out)}
        staged.fill(Step(rows, ids.shape, None, places, None), self.engrams)

    def _asking_places(self, ids: Tensor, cache: Any) -> Places:
        """The places of a cache whose step asks for its rows."""
        places = history_of(cache, self._key)
        if not isinstance(places, Places):
            raise ValueError("a step that asks for its rows needs a cache of places: seat(cache, Places(...)) first")
        if not isinstance(places.next_step(ids.shape), Places):
            raise ValueError(_PROMPTS_AND_STAGED)
        return places

    def _settle(self) -> None:
        """Wait for whoever answers steps that ask; what they asked for in vain is raised."""
        for staged in self._asking:
            staged.settle()

    def _settle_with_device(self) -> None:
        """Likewise, and for the steps themselves: one that waited in vain says so when it goes on."""
        self._call_off()
        self._settle()

    def _call_off(self) -> None:
        """Wait for the device; who has not asked by then is not waited for."""
        if not self._asking or self._is_capturing():  # a device that captures cannot be waited for
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for staged in self._asking:
            staged.call_off()

    def _is_capturing(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _close_stagings(self) -> None:
        for staged in self._stagings.values():
            staged.close()
        self._stagings.clear()
        self._asking.clear()

    def begin(
        self, input_ids: Tensor, past_key_values: Any = None, attention_mask: Any = None, *, waited_for: bool = False
    ) -> None:
        """The first half of `stage`, which waits for nothing: the blocks before the first layer may be launched next.

        Where the accelerator reads the tables, or the ids are at hand, the fetch begins; where the CPU needs ids that
        the accelerator has, they are sent for.

        Args and errors: as for `stage`; `waited_for`: nothing is launched before `lay_down`.
        """
        if self._staged is None:
            raise RuntimeError("stage() outside of staging(): write `with attached.staging():` around it")
        self._require_staging_thread()
        if self._staged.asking:
            raise ValueError("begin() where steps ask for their rows themselves: capture stage(), then answer()")
        places = history_of(past_key_values, self._key)
        if isinstance(places, Places) and isinstance(places.next_step(input_ids.shape), Prompts):
            raise ValueError(_PROMPTS_AND_STAGED)  # while they have not begun, so that they stay admitted
        given = Given(input_ids, past_key_values, attention_mask, past_key_values is not None)
        room = self._room_in(self._staged)
        self._forget_entered()
        self._staged.forget()
        self._staged.shape = input_ids.shape
        arrived = self._source.send_for(input_ids)
        if arrived is None:
            self._begun = [self._start(given, self.decoder, room, waited_for)].pop  # nobody has it once it is taken
        else:  # `lay_down` begins it, and waits
            self._begun = lambda: self._start(given._replace(ids=arrived()), self.decoder, room, waited_for=True)

    def _room_in(self, staged: Staged) -> Room | None:
        """The buffers that graphs read, if rows are stored as these hold them."""
        as_stored = all(engram.fusion.dtype == engram.table.format.dtype for engram in self.engrams.values())
        return staged.room if as_stored else None

    def lay_down(self) -> None:
        """The second half of `stage`: wait for the rows of the step that was begun, and lay them down.

        Raises:
            RuntimeError: none was begun.
            ValueError: as for `stage`.
        """
        if self._staged is None or self._begun is None:
            raise RuntimeError("lay_down() without a step: call begin(input_ids, cache) before it, inside of staging()")
        step, filled, ended = None, False, False
        self._joined.clear()
        try:
            step = self._begun()
            self._begun = None
            if step.packing is not None:
                raise ValueError(_PACKED_AND_STAGED)
            if isinstance(step.history, Prompts):  # admitted since `begin`
                raise ValueError(_PROMPTS_AND_STAGED)
            self._staged.fill(step, self.engrams)
            filled = True
            step.end()
            ended = True
        finally:
            self._begun = None
            if step is not None and not ended:
                give_back(step.fetch)
                if not filled and step.history is not None and not self._entered:
                    step.history.end()  # no block has run, so the cache is as it was
        if self._entered:  # the blocks behind the first layer are still to come
            self._let_advance(step.history)

    def _require_staging_thread(self) -> None:
        if threading.get_ident() != self._staging_thread:
            raise RuntimeError("another thread is inside of staging(): one thread at a time can use it")

    @torch.compiler.disable
    def _compare_staged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward that runs as it is written, not as part of a graph, must be the one that was staged."""
        assert self._staged is not None
        self._require_staging_thread()
        given = self._read(args, kwargs)
        cached = given.cache is not None or bool(given.use_cache)
        if borders_of(given, 0, cached, self.decoder.config) is not None:
            raise ValueError(_PACKED_AND_STAGED)
        if given.ids.shape != self._staged.shape:
            raise ValueError(f"token ids of {tuple(given.ids.shape)}; staged were {self._staged.shape}: stage() first")
        history = history_of(given.cache, self._key)
        if history is not None and self._begun is None:  # before `lay_down` a step is open, and has no length
            history.require_whole()
            self._compare_length(given, history)
        self._entered = True
        self._joined.clear()
        self._let_advance(history)

    def _compare_length(self, given: Given, history: CacheHistory) -> None:
        if isinstance(history, Places):
            return  # each is at a position of its own
        length = given.cache.get_seq_length() + given.ids.shape[1]
        if is_on_accelerator(length):
            if not torch.cuda.is_current_stream_capturing():
                self._lengths.compare(length, history.length)
        elif int(length) != history.length:
            raise ValueError(
                f"a step that ends at position {int(length)}; staged was one that ends at {history.length}: call "
                "stage() once before every forward"
            )

    def _let_advance(self, history: CacheHistory | None) -> None:
        """A forward writes to this history, and to its cache, until it leaves."""
        self._advancing = history
        if history is not None:
            history.begin()

    @torch.compiler.disable
    def _leave_staged(self, output: Any) -> None:
        """The forward has ended; without output, by an exception, after which its history stays open."""
        if output is not None and self._advancing is not None:
            self._advancing.end()
        self._forget_entered()

    def _forget_entered(self) -> None:
        self._entered, self._advancing = False, None

    def _laid_down(self, staged: Staged, layer_id: int) -> ForBlock:
        """What a block of the forward that was staged reads."""
        if self._between is not None and layer_id == min(self.engrams):
            self._between()
        needed = staged.at(layer_id)
        note_joined(self._joined, layer_id, needed.past)
        return needed
