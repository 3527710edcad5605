"""A whole model that serves several sequences from one static cache, Engram attached to it or not.

    model = ServedModel(decoder, head, fusion, plan, vocab, slots=64, positions=2048, graphs=True)
    with model.serving(table, prefetcher, schedule, exposed):
        first_tokens = model.prefill(ids, lengths, slots)               # [b, T] padded on the right -> [b]
        tokens = model.decode(ids, positions, span)                     # [slots]

Engram is attached as anybody attaches it, and every row of the cache is a place (`engram_ref.attach.Places`). On CUDA a
decode step is graphs (`bench.served.graphs`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.schemas.served import Graphs
from bench.served.graphs import Pieces
from bench.setup.backbones import Backbone
from bench.setup.sizes import LAYER
from bench.setup.variants import ASKING, BESIDE, IN_GRAPH, Variant
from engram_ref.attach import Attached, Places, Staged, attach
from engram_ref.attach.exposed import Waits
from engram_ref.attach.on_hand import OnHand
from engram_ref.fusion import ShortConvHistory
from engram_ref.fusion.base import Fusion
from engram_ref.hashing import HashPlan
from engram_ref.layer import Engram
from engram_ref.tables.base import Table
from engram_ref.vocab import CompressedVocab

# Positions. A decode step reads the cache up to the next multiple: a graph cannot change how far it reads, so there is
# one for each.
SPAN = 256
ATTENTION = "engram_served"  # under which transformers knows `served_attention`
# Beside schedules that graphs look up in, what a decode step's are captured with: rows laid down before, or at a cut.
BARE, STAGED, CUT = "no layer", "staged", "staged, cut"
_CHOSEN_AT_ONCE = 64  # sequences whose logits are there at the same time


def served_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **unused: Any
) -> tuple[Tensor, None]:
    """Grouped-query attention as transformers calls it: causal without a mask, one query token with one.

    Args:
        query: [B, heads, T, D].
        key, value: [B, KV heads, S, D].
        mask: added to the scores, [B, 1, 1, S]; then T is 1.

    Returns:
        [B, T, heads, D], and no weights.
    """
    batch, heads, _, width = query.shape
    if mask is None:  # a prefill: prompts are padded on the right, where a causal model does not look
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None
    # The query heads that share a key head are rows of one product, so keys are not repeated.
    grouped = query.reshape(batch, key.shape[1], -1, width)  # [B, KV heads, heads / KV heads, D]
    mask = mask.expand(batch, key.shape[1], grouped.shape[2], -1)  # [B, KV heads, heads / KV heads, S]
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, 1, heads, width), None


def register_attention() -> None:
    """Make it known to transformers, which lets masks pass as they are given."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, served_attention)


def rounded_span(position: int) -> int:
    """Positions that a decode step reads when the furthest token stands at `position`."""
    return -(-(position + 1) // SPAN) * SPAN


class Serving(NamedTuple):
    """What is attached while a pass runs; nothing by default."""

    attached: Attached | None = None
    places: Places | None = None
    schedule: str = "none"
    exposed: Waits | None = None


class ServedModel:
    """Decoder, vocabulary, one Engram layer and the keys and values of all places.

    Args:
        decoder: built with `attention=ATTENTION`.
        head: output weights [outputs, H].
        fusion: of the Engram layer; it stands before the second block.
        plan: of its hash.
        vocab: token id -> compressed id.
        slots: sequences at a time.
        positions: of the longest sequence.
        graphs: decode with CUDA graphs, once they are captured.
    """

    def __init__(
        self,
        decoder: Backbone,
        head: Tensor,
        fusion: Fusion,
        plan: HashPlan,
        vocab: CompressedVocab,
        slots: int,
        positions: int,
        graphs: bool,
    ) -> None:
        self._decoder, self._head, self._fusion = decoder, head, fusion
        self._plan, self._vocab = plan, vocab
        self.device = head.device
        self.slots = slots
        self._tokens = torch.zeros((slots, 1), dtype=torch.int64, device=self.device)  # of a decode step
        self._positions = torch.zeros(slots, dtype=torch.int64, device=self.device)  # where they stand
        self._all = torch.arange(slots, device=self.device)
        self._length = rounded_span(positions - 1)
        size = (slots, decoder.shape.kv_heads, self._length, decoder.shape.head_dim)  # [slots, KV heads, positions, D]

        def zeros() -> Tensor:
            return torch.zeros(size, dtype=head.dtype, device=self.device)

        self._stored = [(zeros(), zeros()) for _ in range(decoder.blocks)]
        self._cache = _slot_cache()
        # What graphs read belongs to the model, to which Engram is attached anew for every pass.
        self._convolutions = {LAYER: ShortConvHistory(fusion, slots)} if fusion.reach else {}
        self._places: dict[str, Places] = {}  # by the kind of device that hashes
        self._staged = Staged(self.device)
        self._pieces = Pieces(self.device) if graphs else None  # or time would be the host's launching
        self._beside = Staged(self.device, overlap=True) if graphs else None
        self._asking = Staged(self.device, overlap=True, asking=True) if graphs else None
        self._look_up: list[Attached] = []  # kept for the graphs, which read what is theirs
        self._serving = Serving()

    @property
    def graphs(self) -> Graphs:
        """Whether decode steps are graphs; if not, why."""
        return {"used": self._pieces is not None, "why": None if self._pieces else "not on CUDA, or --eager"}

    @contextmanager
    def serving(
        self, table: Table | None, prefetcher: Any = None, schedule: str = "none", exposed: Waits | None = None
    ) -> Iterator[Serving]:
        """All places are free, and Engram is attached; without a table the model is by itself.

        Args:
            table: of the layer.
            prefetcher: where its rows come from.
            schedule: of a variant: "prefetched" waits before the second block, others at the model's entry.
            exposed: told of every wait.
        """
        if table is None:
            yield self._serving
            return
        engrams, background = {LAYER: Engram(self._fusion, table)}, schedule in ("prefetched", BESIDE, ASKING)
        with attach(
            self._decoder.model, engrams, self._plan, self._vocab,
            background=background, exposed=exposed, prefetcher=prefetcher,
        ) as attached:  # fmt: skip
            device = attached.index_device
            if device.type not in self._places:
                self._places[device.type] = Places(self._plan, self.slots, device, self._convolutions)
            places = self._places[device.type]
            places.clear()
            attached.seat(self._cache, places)
            self._serving = Serving(attached, places, schedule, exposed)
            try:
                yield self._serving
            finally:
                self._serving = Serving()

    def prefill(self, ids: Tensor, lengths: np.ndarray, slots: np.ndarray) -> Tensor:
        """Prompts into places that are free.

        Args:
            ids: token ids [b, T], padded on the right.
            lengths: tokens of each prompt, [b].
            slots: place of each, [b].

        Returns:
            The model's choice of the first token of each, [b].
        """
        if self._serving.places is not None:
            self._serving.places.admit(slots, lengths)
        taken, ends = (torch.from_numpy(values).to(self.device) for values in (slots, lengths))  # [b] each
        self._cache.begin_prefill(self._stored, taken)
        with torch.inference_mode():
            hidden = self._decoder.step(ids, self._cache)
            last = hidden[torch.arange(len(ids), device=self.device), ends - 1]  # [b, H]
            return torch.cat([self._choose(part) for part in last.split(_CHOSEN_AT_ONCE)])

    def decode(self, ids: Tensor, positions: Tensor, span: int) -> Tensor:
        """One token for every place.

        Args:
            ids, positions: the tokens [slots], and where they stand.
            span: positions of the cache to read; `rounded_span` of the furthest.

        Returns:
            The model's choice for each place, [slots]; those of places without a sequence mean nothing.
        """
        self._tokens.copy_(ids[:, None])
        self._positions.copy_(positions)
        if self._pieces is None:
            return self._decode_once(span)
        with torch.inference_mode():
            return self._replayed(self._pieces, span).clone()  # a graph writes every step's choice to the same place

    def _replayed(self, pieces: Pieces, span: int) -> Tensor:
        """A step from its graphs: what the model's hooks do without them is done around and between the pieces."""
        attached, _, schedule, exposed = self._serving
        if attached is None:
            return pieces.replay((span, BARE), lambda: None)
        around = nullcontext if exposed is None else exposed.around

        def join() -> None:
            with around(LAYER):
                if begun:  # set below, before anything is replayed
                    attached.lay_down()

        begun = schedule == "prefetched"
        if schedule in (IN_GRAPH, BESIDE):
            return pieces.replay((span, schedule), join)
        if schedule == ASKING:
            with attached.staging(staged=self._asking):
                attached.answer(self._tokens, self._cache)
                return pieces.replay((span, schedule), join)
        with attached.staging(staged=self._staged):
            if begun:
                attached.begin(self._tokens, self._cache)
                return pieces.replay((span, CUT), join)
            with around("start"):
                attached.stage(self._tokens, self._cache)
            return pieces.replay((span, STAGED), join)  # one graph: nobody pays for a cut that it does not need

    def prepare(self, shortest: int, table: Table | None, in_graph: Sequence[Variant] = ()) -> None:
        """Capture all decode steps that will be met, where there are graphs.

        Args:
            shortest: tokens of the shortest prompt.
            table: any of those that are served, if Engram is.
            in_graph: variants that are looked up inside of graphs, in steps of their own.

        Raises:
            CaptureError: a step cannot be captured.
        """
        pieces = self._pieces
        if pieces is None:
            return

        def capture(kind: str, step: Callable[[int], Tensor]) -> None:
            # A prompt's next token stands right behind it, at its length.
            for span in range(rounded_span(shortest), self._length + 1, SPAN):
                pieces.prepare((span, kind), functools.partial(step, span))

        capture(BARE, self._decode_once)
        for one in in_graph:  # first, so that rows are written where all graphs read them, and not copied there
            staged = {IN_GRAPH: self._staged, BESIDE: self._beside, ASKING: self._asking}[one.schedule]
            with self.serving(one.table, one.prefetcher, one.schedule) as now, self._staging(now, staged) as attached:
                self._look_up.append(attached)
                capture(one.schedule, functools.partial(self._looked_up, attached))
        if table is not None:
            on_hand = OnHand({LAYER: Engram(self._fusion, table)})
            for kind, between in ((CUT, pieces.cut), (STAGED, None)):
                with self.serving(table, on_hand) as now, self._staging(now, self._staged, between) as attached:
                    attached.stage(self._tokens, self._cache)
                    capture(kind, self._decode_once)

    def _staging(
        self, now: Serving, staged: Staged | None, between: Callable[[], object] | None = None
    ) -> AbstractContextManager[Attached]:
        """Forwards that read staged rows, and are cut there when they are captured, if `between` cuts."""
        assert now.attached is not None
        return now.attached.staging(between=between, staged=staged)

    def _looked_up(self, attached: Attached, span: int) -> Tensor:
        attached.stage(self._tokens, self._cache)  # captured with the rest, it reads ids and places where they lie
        return self._decode_once(span)

    def _decode_once(self, span: int) -> Tensor:
        self._cache.begin_decode(self._stored, self._all, self._positions, span)
        seen = torch.arange(span, device=self.device) <= self._positions[:, None]  # [slots, span]
        mask = torch.zeros(seen.shape, dtype=self._head.dtype, device=self.device).masked_fill_(~seen, -torch.inf)
        with torch.inference_mode():
            # [slots, 1], and [slots, 1, 1, span]
            where = {"position_ids": self._positions[:, None], "attention_mask": mask[:, None, None]}
            hidden = self._decoder.step(self._tokens, self._cache, **where)
            return self._choose(hidden[:, -1])

    def _choose(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self._head).argmax(-1)  # [b, outputs] -> [b]


def served_bytes(decoder_shape: Any, blocks: int, slots: int, positions: int, itemsize: int) -> int:
    """Bytes of the keys and values of all places."""
    return 2 * blocks * slots * decoder_shape.kv_heads * rounded_span(positions - 1) * decoder_shape.head_dim * itemsize


def _slot_cache() -> Any:
    """A transformers cache over places, each of which is at a position of its own."""
    from transformers import DynamicCache

    class SlotCache(DynamicCache):
        """Writes a step's keys and values where they belong, and gives back what its tokens may look at."""

        def begin_prefill(self, stored: Sequence[tuple[Tensor, Tensor]], slots: Tensor) -> None:
            """The next step's tokens are the beginning of what stands in these places."""
            self.stored, self.slots, self.span = stored, slots, 0
            self.at: Tensor | None = None  # marks a prefill

        def begin_decode(
            self, stored: Sequence[tuple[Tensor, Tensor]], slots: Tensor, positions: Tensor, span: int
        ) -> None:
            """The next step's token stands in every place at a position of its own."""
            self.stored, self.slots, self.at, self.span = stored, slots, positions, span

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            keys, values = self.stored[layer_idx]
            if self.at is None:
                length = key_states.shape[2]
                keys[self.slots, :, :length] = key_states
                values[self.slots, :, :length] = value_states
                # Prompts begin what stands in their places: there is nothing before them to look at.
                return key_states, value_states  # [b, KV heads, T, D]
            keys[self.slots, :, self.at] = key_states[:, :, 0]
            values[self.slots, :, self.at] = value_states[:, :, 0]
            return keys[:, :, : self.span], values[:, :, : self.span]  # [slots, KV heads, span, D]

        def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
            return 0  # positions are given, where they are not those of a prompt

    return SlotCache()
