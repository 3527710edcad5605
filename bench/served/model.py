"""A whole model that serves several sequences from one static cache, cut in two just before its second block.

    model = ServedModel(decoder, head, fusion, slots=64, positions=2048)
    first_tokens = model.prefill(ids, lengths, slots, join)         # [b, T] padded on the right -> [b]
    model.next_tokens.copy_(ids); model.positions.copy_(at)
    tokens = model.decode(span, True, begin, join)                  # [slots]

What is looked up is the caller's business: `join` is called between the first block and the second and gives the rows
of every position, or None where the model has no Engram layer or the first piece has looked them up. On CUDA the two
pieces of a decode step are graphs (`end_to_end_graphs`), so that time is the device's and not the host's launching; a
step reads the cache up to the next multiple of SPAN positions, with a graph for each.

Prompts are padded on the right, where a causal model does not look, so a prefill needs no mask. In a decode step the
query heads that share a key head are rows of one product, so keys are not repeated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.schemas.served import Graphs
from bench.served.graphs import Pieces
from bench.setup.backbones import Backbone
from bench.setup.lookup import ResidentLookup
from engram_ref.fusion import DemoFusion, ShortConvHistory
from engram_ref.fusion.base import Fusion

SPAN = 256  # positions
ATTENTION = "engram_served"  # under which transformers knows `served_attention`
Join = Callable[[], "Tensor | None"]
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
    if mask is None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None
    grouped = query.reshape(batch, key.shape[1], -1, width)  # [B, KV heads, heads / KV heads, D]
    mask = mask.expand(batch, key.shape[1], grouped.shape[2], -1)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, 1, heads, width), None


def register_attention() -> None:
    """Make it known to transformers, which lets masks pass as they are given."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, served_attention)


def rounded_span(position: int) -> int:
    """Positions that a decode step reads when the furthest token stands at `position`."""
    return -(-(position + 1) // SPAN) * SPAN


class ServedModel:
    """Decoder, vocabulary, one Engram layer and the keys and values of all places.

    Args:
        decoder: built with `attention=ATTENTION`.
        head: output weights [outputs, H].
        fusion: of the Engram layer; it stands before the second block.
        slots: sequences at a time.
        positions: of the longest sequence.
        graphs: decode with CUDA graphs.

    Attributes:
        next_tokens: [slots, 1] int64, the tokens of the next decode step; to be written by the caller.
        positions: [slots] int64, where they stand.
    """

    def __init__(
        self, decoder: Backbone, head: Tensor, fusion: Fusion, slots: int, positions: int, graphs: bool
    ) -> None:
        self._decoder, self._head, self._fusion = decoder, head, fusion
        device = head.device
        self.slots = slots
        self.next_tokens = torch.zeros((slots, 1), dtype=torch.int64, device=device)
        self.positions = torch.zeros(slots, dtype=torch.int64, device=device)
        self._all = torch.arange(slots, device=device)
        self._length = rounded_span(positions - 1)
        size = (slots, decoder.shape.kv_heads, self._length, decoder.shape.head_dim)
        self._stored = [
            (torch.zeros(size, dtype=head.dtype, device=device), torch.zeros(size, dtype=head.dtype, device=device))
            for _ in range(decoder.blocks)
        ]
        self._cache = _slot_cache()
        self._conv = ShortConvHistory(fusion, slots) if isinstance(fusion, DemoFusion) and fusion.reach else None
        columns = fusion.config.columns
        self._rows: Tensor | None = None  # [slots * C, D], where a graph finds them
        self._columns, self._width = columns, fusion.config.row_width
        self._pieces = Pieces(device) if graphs else None

    @property
    def graphs(self) -> Graphs:
        """Whether decoding runs as CUDA graphs, and why not."""
        if self._pieces is None:
            return {"used": False, "why": "not on CUDA, or --eager"}
        return self._pieces.report()

    def prefill(self, ids: Tensor, lengths: Tensor, slots: Tensor, join: Join) -> Tensor:
        """Process prompts and put their keys and values into places.

        Args:
            ids: token ids [b, T], padded on the right.
            lengths: tokens of each prompt, [b].
            slots: place of each, [b].
            join: gives rows [b*T*C, D].

        Returns:
            The model's choice of the first token of each, [b].
        """

        def insert(hidden: Tensor) -> Tensor:
            rows = join()
            return hidden if rows is None else self._fuse_prompts(hidden, rows, lengths, slots)

        self._cache.begin_prefill(self._stored, slots)
        with torch.inference_mode():
            hidden = self._run(ids, insert)
            last = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]  # [b, H]
            return torch.cat([self._choose(part) for part in last.split(_CHOSEN_AT_ONCE)])

    def decode(
        self, span: int, with_engram: bool, begin: Callable[[], object], join: Join, inside: bool = False
    ) -> Tensor:
        """One token for every place.

        Args:
            span: positions of the cache to read; `rounded_span` of the furthest.
            with_engram: whether `join` gives rows.
            begin: called when the first block has been given to the device, before it is waited for.
            join: gives rows [slots*C, D], or None.
            inside: the first graph looks the rows up, as `prepare` was told; `join` gives None where there are graphs.

        Returns:
            The model's choice for each place, [slots]; those of places without a sequence mean nothing.
        """
        if self._pieces is None:
            begin()
            return self._decode_once(span, lambda hidden: self._fuse_tokens(hidden, join()))
        with torch.inference_mode():
            key = (span, "inside" if inside else with_engram)
            return self._pieces.replay(key, begin, lambda: self._keep_rows(join()))

    def prepare(self, shortest: int, row_dtype: torch.dtype, resident: ResidentLookup | None = None) -> None:
        """Capture all decode steps that will be met, where there are graphs.

        Args:
            shortest: tokens of the shortest prompt.
            row_dtype: of the rows that will be joined.
            resident: looked up inside the first graph, in steps of their own.
        """
        if self._pieces is None:
            return
        self._rows = torch.zeros((self.slots * self._columns, self._width), dtype=row_dtype, device=self._head.device)
        for span in range(rounded_span(shortest), self._length + 1, SPAN):
            for rows in (None, self._rows):
                self._pieces.prepare(
                    (span, rows is not None),
                    functools.partial(self._decode_once, span),
                    functools.partial(self._fuse_tokens, rows=rows),
                )
            if resident is not None:
                self._pieces.prepare(
                    (span, "inside"),
                    functools.partial(self._looked_up, span, resident),
                    functools.partial(self._fuse_tokens, rows=resident.rows),
                )

    def _looked_up(self, span: int, resident: ResidentLookup, insert: Callable[[Tensor], Tensor]) -> Tensor:
        resident.step(self.next_tokens)
        return self._decode_once(span, insert)

    def _decode_once(self, span: int, insert: Callable[[Tensor], Tensor]) -> Tensor:
        self._cache.begin_decode(self._stored, self._all, self.positions, span)
        seen = torch.arange(span, device=self.positions.device) <= self.positions[:, None]  # [slots, span]
        mask = torch.zeros(seen.shape, dtype=self._head.dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
        with torch.inference_mode():
            hidden = self._run(
                self.next_tokens,
                insert,
                position_ids=self.positions[:, None],
                attention_mask=mask[:, None, None],
            )
            return self._choose(hidden[:, -1])

    def _run(self, ids: Tensor, insert: Callable[[Tensor], Tensor], **where: Tensor | None) -> Tensor:
        """The decoder's output, with something added to the stream [B, T, H] before its second block."""
        second = self._decoder.model.layers[1]
        hook = second.register_forward_pre_hook(_replacing_input(insert), with_kwargs=True)
        try:
            return self._decoder.step(ids, self._cache, **where)
        finally:
            hook.remove()

    def _choose(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self._head).argmax(-1)

    def _keep_rows(self, rows: Tensor | None) -> None:
        if rows is not None:
            assert self._rows is not None
            self._rows.copy_(rows)

    def _embedded(self, hidden: Tensor, rows: Tensor) -> Tensor:
        return rows.to(hidden.dtype).view(*hidden.shape[:2], -1)  # [B, T, C*D]

    def _fuse_tokens(self, hidden: Tensor, rows: Tensor | None) -> Tensor:
        if rows is None:
            return hidden
        return self._fusion.add_to(hidden.unsqueeze(2), self._embedded(hidden, rows), self._conv).squeeze(2)

    def _fuse_prompts(self, hidden: Tensor, rows: Tensor, lengths: Tensor, slots: Tensor) -> Tensor:
        e = self._embedded(hidden, rows)
        if self._conv is not None:
            self._keep_conv_history(hidden, e, lengths, slots)
        return self._fusion.add_to(hidden.unsqueeze(2), e).squeeze(2)

    def _keep_conv_history(self, hidden: Tensor, e: Tensor, lengths: Tensor, slots: Tensor) -> None:
        """What the convolution needs of a prompt's last tokens, which stand at another place in each row.

        It is made of the values of these tokens alone, each by itself, so they are computed again, without the others.
        """
        assert isinstance(self._fusion, DemoFusion) and self._conv is not None
        reach = self._fusion.reach
        at = lengths[:, None] - reach + torch.arange(reach, device=lengths.device)  # [b, reach]
        rows = torch.arange(len(at), device=at.device)[:, None]
        history = ShortConvHistory(self._fusion, len(at))
        self._fusion.add_to(hidden[rows, at].unsqueeze(2), e[rows, at], history)
        self._conv.values[slots] = history.values

    def shortest_prompt(self) -> int:
        """Tokens that a prompt must have at least."""
        return max(1, 0 if self._conv is None else self._conv.values.shape[1])


def _replacing_input(insert: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Any, Any]]:
    """A forward pre-hook; some releases of transformers give the residual stream by position, some by name."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (insert(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": insert(kwargs["hidden_states"])}

    return hook


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
            self.at: Tensor | None = None

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
                return key_states, value_states  # [b, KV heads, T, D]
            keys[self.slots, :, self.at] = key_states[:, :, 0]
            values[self.slots, :, self.at] = value_states[:, :, 0]
            return keys[:, :, : self.span], values[:, :, : self.span]  # [slots, KV heads, span, D]

        def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
            return 0  # positions are given, where they are not those of a prompt

    return SlotCache()
