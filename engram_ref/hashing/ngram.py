"""From compressed ids to row indices: the seam at which both twins meet, exact integers only.

`NgramHasher` applies a `HashPlan`. `TokenHistory` carries the last ids from one chunk to the next, so that
chunked prefill and token-by-token decoding give the indices of one shot.

    plan = HashPlan.for_vocab(config, vocab)
    rows = NgramHasher(plan)(vocab(token_ids), layer_id=1)        # [B, T, C]
    rows, compressed = NgramHasher(plan).from_tokens(token_ids, vocab)      # of all layers in one pass: [L, B, T, C]

The hash of position p, with c_s the compressed id at p - s:

    h = c_0*m_0;  for s = 1 .. N-1:  h ^= c_s*m_s,  and for each head of order n = s+1:
        row = h mod prime + offset

Before the start of a sequence, and from the first DEAD id backwards, every c_s is the pad id. Where a plan has a
`segment_end`, the same holds from the first such id before p backwards; p's own does not end what it belongs to.
Sources: the public demo `deepseek-ai/Engram`; DeepSeek-V4.1-Flash; the class `qwen4_exp` of transformers. Torch is not
imported here.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from engram_ref.compiled import numba_works
from engram_ref.hashing.plan import INT32_MAX, HashPlan, LayerPlan
from engram_ref.ids import DEAD, check_ids

if TYPE_CHECKING:
    from engram_ref.vocab import CompressedVocab

_INT64 = np.dtype(np.int64)


class Hashed(NamedTuple):
    """What `NgramHasher.from_tokens` found.

    Attributes:
        rows: row indices [L, B, T, C], layers in the plan's order; int32 where every layer's table has at most
            2^31 - 1 rows, else int64.
        compressed: compressed ids, int64 [B, T].
    """

    rows: np.ndarray
    compressed: np.ndarray


class TokenHistory:
    """The last max_ngram - 1 compressed ids of each sequence, carried from chunk to chunk.

    A new history stands before the start of its sequences. Hash every layer of a chunk with it, then
    `advance` it once:

        for chunk in chunks:
            rows = {layer: hasher(chunk, layer, history=history) for layer in layer_ids}
            history.advance(chunk)

    `copy` keeps a state to return to, for instance before tokens that may be rejected.
    """

    def __init__(self, plan: HashPlan, batch_size: int) -> None:
        # A position before the start and a DEAD one hash alike, so DEAD stands for both.
        self.ids = np.full((batch_size, plan.max_ngram - 1), DEAD, dtype=np.int64)  # [B, N-1]
        self._size = plan.compressed_size

    def advance(self, compressed_ids: np.ndarray) -> None:
        """Append a chunk [B, T], T = 0 included, and keep what the next one needs; ids are checked as in hashing."""
        ids = np.asarray(compressed_ids)
        if ids.ndim != 2 or len(ids) != len(self.ids):
            raise ValueError(f"chunk of shape {ids.shape}; this history follows {len(self.ids)} sequences: [B, T]")
        if ids.size == 0:
            return
        ids = check_ids(ids, self._size, least=DEAD)
        width = self.ids.shape[1]
        self.ids = np.concatenate([self.ids, ids.astype(np.int64)], axis=1)[:, -width:]

    def copy(self) -> TokenHistory:
        """An independent history in the same state."""
        return copy.deepcopy(self)


class NgramHasher:
    """Row indices of every position, for any layer of a plan.

    Args:
        plan: the integers to hash with.
        backend: "numpy" (readable, the definition), "numba" (one fused loop, the same bits), or None
            for numba where it is installed and can be imported.
    """

    def __init__(self, plan: HashPlan, backend: str | None = None) -> None:
        if backend is None:
            backend = "numba" if numba_works() else "numpy"
        if backend not in ("numpy", "numba"):
            raise ValueError(f"backend={backend!r}: use 'numpy' or 'numba'")
        if backend == "numba" and not numba_works():
            raise ValueError("backend='numba': it is not installed or cannot be imported; use 'numpy', the same bits")
        self.plan = plan
        self.backend = backend
        self._by_row: dict[int, tuple[Any, ...]] = {}  # what the compiled loop needs, per layer_id
        self._by_column: dict[int, tuple[Any, ...]] = {}  # the same without offsets
        self._hash_tokens: Any = None  # the compiled pass over all layers, and its addresses
        self._rows_dtype = np.dtype(np.int32 if all(layer.rows <= INT32_MAX for layer in plan.layers) else np.int64)
        if backend == "numba":
            self._prepare()

    def _prepare(self) -> None:
        from engram_ref.hashing import fused  # compile, or load what was compiled before

        self._hash_rows, self._no_history = fused.hash_rows, fused.NO_HISTORY
        self._constants = []  # the compiled loop is given addresses, so these must live as long as the hasher
        if not fused.can_fuse(self.plan):
            return
        for layer in self.plan.layers:
            dtype = np.dtype(_row_dtype(layer))
            for offsets, table in ((True, self._by_row), (False, self._by_column)):
                constants = fused.pack(self.plan, layer, offsets)
                self._constants.append(constants)
                table.setdefault(layer.layer_id, (constants.ctypes.data, len(layer.primes), dtype))
        together = np.stack([fused.pack(self.plan, layer, True) for layer in self.plan.layers])
        self._constants.append(together)
        self._hash_tokens = fused.hash_tokens, together.ctypes.data, together.strides[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return NgramHasher, (self.plan, self.backend)  # a copy, or another process, needs addresses of its own

    def __call__(
        self,
        compressed_ids: np.ndarray,
        layer_id: int,
        offsets: bool = True,
        history: TokenHistory | None = None,
    ) -> np.ndarray:
        """Hash compressed ids [B, T] into row indices [B, T, C].

        Args:
            compressed_ids: integers in 0 .. compressed_size - 1, or DEAD (-1).
            layer_id: decoder layer, one of the plan's.
            offsets: add each column's offset into the layer's table; without it, an index is within its column.
            history: what came before this chunk; it is read, not advanced.

        Returns:
            int32 where the layer's table has at most 2^31 - 1 rows, else int64.

        Raises:
            ValueError: wrong dtype or shape, an empty batch, an id outside the vocabulary.
        """
        # A call for one token takes a microsecond, so nothing is looked at twice: what the compiled loop is not made
        # for raises or is refused here, and the careful way hashes it or says what is wrong.
        try:
            constants, columns, dtype = (self._by_row if offsets else self._by_column)[layer_id]
            if type(compressed_ids) is np.ndarray and compressed_ids.dtype == _INT64:
                rows = np.empty((*compressed_ids.shape, columns), dtype)
                before = self._no_history if history is None else history.ids
                if self._hash_rows(compressed_ids, before, constants, rows):
                    return rows
        except (AttributeError, KeyError, TypeError, ValueError):
            pass
        return self._hash_carefully(compressed_ids, layer_id, offsets, history)

    def from_tokens(
        self,
        token_ids: np.ndarray,
        vocab: CompressedVocab,
        history: TokenHistory | None = None,
        dead: np.ndarray | None = None,
        out: Hashed | None = None,
    ) -> Hashed:
        """Compress token ids [B, T], check them and hash them for all layers: one call of compiled code.

        Args:
            token_ids, dead: as for a call of the vocabulary.
            vocab: of the plan's size.
            history: what came before this chunk; it is read, not advanced: `history.advance(hashed.compressed)`.
            out: what an earlier call for as many ids has given, to be written over; new memory otherwise, which for
                a long prompt costs as much as the hash.

        Raises:
            ValueError: as a call, and as the vocabulary; a vocabulary of another size, or an `out` that does not fit.
        """
        # As in a call, what the compiled loop is not made for is told by the careful way.
        if self._hash_tokens is not None and dead is None and vocab.size == self.plan.compressed_size:
            try:
                hash_tokens, constants, stride = self._hash_tokens
                found = out or self._room(token_ids.shape)
                before = self._no_history if history is None else history.ids
                fits = out is None or out.rows.dtype == self._rows_dtype  # the loop writes others, too
                if fits and hash_tokens(token_ids, vocab.ids, before, constants, stride, *found):
                    return found
            except (AttributeError, TypeError, ValueError):
                pass
        return self._from_tokens_carefully(token_ids, vocab, history, dead, out)

    def _room(self, shape: tuple[int, ...]) -> Hashed:
        """Unwritten memory for ids of this shape."""
        layers = self.plan.layers
        rows = np.empty((len(layers), *shape, len(layers[0].primes)), self._rows_dtype)
        return Hashed(rows, np.empty(shape, np.int64))

    def _from_tokens_carefully(
        self, token_ids: Any, vocab: CompressedVocab, history: TokenHistory | None, dead: Any, out: Hashed | None
    ) -> Hashed:
        if vocab.size != self.plan.compressed_size:
            raise ValueError(
                f"a vocabulary of {vocab.size} compressed ids; the plan was made for {self.plan.compressed_size}: "
                "build it from this vocabulary"
            )
        compressed = vocab(token_ids, dead)
        room = self._room(compressed.shape)
        found = room if out is None else out
        for name, given, wanted in zip(Hashed._fields, found, room):
            if given.shape != wanted.shape or given.dtype != wanted.dtype or not given.flags.carray:
                raise ValueError(
                    f"out has {name} of {given.dtype} {given.shape}; these token ids need {wanted.dtype} "
                    f"{wanted.shape}, contiguous: leave it out"
                )
        for layer, rows in zip(self.plan.layers, found.rows):
            rows[:] = self(compressed, layer.layer_id, history=history)
        found.compressed[:] = compressed
        return found

    def _hash_carefully(
        self, compressed_ids: Any, layer_id: int, offsets: bool, history: TokenHistory | None
    ) -> np.ndarray:
        layer = self.plan.layer(layer_id)
        ids = check_ids(compressed_ids, self.plan.compressed_size, least=DEAD)
        if layer_id in self._by_row and not (ids is compressed_ids and ids.dtype is _INT64 and ids.flags.carray):
            plain = np.empty(ids.shape, _INT64)
            plain[:] = ids
            return self(plain, layer_id, offsets, history)
        if history is None:
            return hash_columns(self.plan, layer, ids, np.empty((len(ids), 0), np.int64), offsets)
        if history.ids.shape != (len(ids), self.plan.max_ngram - 1):
            raise ValueError(
                f"a history of {history.ids.shape}; {len(ids)} sequences of this plan need "
                f"{(len(ids), self.plan.max_ngram - 1)}: make one with TokenHistory(plan, batch_size)"
            )
        before = check_ids(history.ids, self.plan.compressed_size, least=DEAD, what="the history's ids")
        return hash_columns(self.plan, layer, ids, before, offsets)


def _row_dtype(layer: LayerPlan) -> type[np.signedinteger[Any]]:
    return np.int32 if layer.rows <= INT32_MAX else np.int64


def hash_columns(plan: HashPlan, layer: LayerPlan, ids: np.ndarray, before: np.ndarray, offsets: bool) -> np.ndarray:
    """The definition, in NumPy: one order after the other, all heads of an order at once. [B, T, C]"""
    batch, length = ids.shape
    context = plan.max_ngram - 1
    padded = np.full((batch, context + length), DEAD, dtype=np.int64)
    padded[:, context:] = ids
    if before.shape[1]:
        padded[:, :context] = before
    rows = np.empty((batch, length, len(layer.primes)), dtype=_row_dtype(layer))
    primes = np.array(layer.primes, dtype=np.int64)
    shifts = np.array(layer.offsets, dtype=np.int64) if offsets else np.zeros_like(primes)

    blocked = np.zeros((batch, length), dtype=bool)
    mix = np.zeros((batch, length), dtype=np.int64)
    for s in range(plan.max_ngram):
        shifted = padded[:, context - s : context - s + length]  # ids at p - s
        blocked |= shifted == DEAD
        if s and plan.segment_end is not None:
            blocked |= shifted == plan.segment_end
        mix ^= np.where(blocked, plan.pad_compressed, shifted) * layer.multipliers[s]
        if s:
            order = slice((s - 1) * plan.heads, s * plan.heads)
            rows[:, :, order] = mix[:, :, None] % primes[order] + shifts[order]
    return rows
