"""The plan is data: the multipliers, primes and offsets of every Engram layer, computed once.

    plan = HashPlan.for_vocab(config, vocab)
    Path("plan.json").write_text(plan.to_json())        # with a checksum; `python -m engram_ref.plan` does it

A plan follows from the configuration, the size of the compressed vocabulary and its pad id; it knows by a digest which
vocabulary it was made for. Torch is not imported here.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_ref.config import EngramConfig, require_int
from engram_ref.quoting import one_line, quoted

if TYPE_CHECKING:
    from engram_ref.vocab import CompressedVocab

INT64_MAX = 2**63 - 1
INT32_MAX = 2**31 - 1
_LAYER_SEED_STEP = 10007  # between the seeds of two layers, in every published form
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio, made odd
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class LayerPlan:
    """Hash constants of one layer; `primes` and `offsets` in column order (order-major, then head).

    What else decides which rows a token reads is said by the plan that the layer belongs to, so that it can be recorded
    with the layer's rows: `pad_compressed` and `vocab_digest`, None where nobody said, and `segment_end`, None where no
    id ends one. The table has `rows_multiple` times any rows.
    """

    layer_id: int
    multipliers: tuple[int, ...]
    primes: tuple[int, ...]
    offsets: tuple[int, ...]
    pad_compressed: int | None = field(default=None, compare=False, repr=False)
    vocab_digest: str | None = field(default=None, compare=False, repr=False)
    segment_end: int | None = field(default=None, compare=False, repr=False)
    rows_multiple: int = 1

    def __post_init__(self) -> None:
        require_int("layer_id", self.layer_id, 0)
        for name, least in (("multipliers", 1), ("primes", 2), ("offsets", 0)):
            for value in getattr(self, name):
                require_int(f"{name} of layer {self.layer_id}", value, least)
        require_int("rows_multiple", self.rows_multiple, 1)

    def constants(self) -> dict[str, Any]:
        """The integers of this layer alone, as they stand in a plan's JSON."""
        return {name: getattr(self, name) for name in ("layer_id", "multipliers", "primes", "offsets")}

    def to_json(self) -> str:
        """All of this layer, to stand in the metadata of a file that holds its rows; what is unknown is left out."""
        return json.dumps(_without_defaults(asdict(self)))

    def require_recorded(self, text: str, where: str) -> None:
        """Refuse rows that were hashed otherwise than by this layer, as their file records it; see `to_json`.

        Warns where one of the two says which vocabulary or pad it is, and the other does not.

        Raises:
            ValueError: a constant, the pad or the vocabulary differs, or the record is damaged.
        """
        mine = json.loads(self.to_json())
        try:
            recorded = json.loads(text)
            unknown = mine.keys() ^ recorded.keys()
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{where}: its hash constants are damaged: {one_line(error)}; download it again") from None
        for name in sorted(mine.keys() | recorded.keys()):
            if name in unknown and name in ("pad_compressed", "vocab_digest"):
                continue
            if name in unknown or mine[name] != recorded[name] or type(mine[name]) is not type(recorded[name]):
                raise ValueError(
                    f"{where}: hash constants differ from those of the plan for layer {self.layer_id}: {name} is "
                    f"{quoted(recorded.get(name))} there and {quoted(mine.get(name))} in the plan; use the vocabulary "
                    "and the configuration that the table was made with"
                )
        if unknown:
            told = "the file" if recorded.keys() - mine.keys() else "the plan"
            warnings.warn(
                f"{where}: only {told} says {' and '.join(sorted(unknown))}: whether the rows were hashed with this "
                "vocabulary is unknown; HashPlan.for_vocab(config, vocab) says it, and save_layer records it",
                stacklevel=3,
            )

    @property
    def rows(self) -> int:
        """Rows of this layer's table: the sum of its primes, filled up to a multiple of `rows_multiple`."""
        return -(-sum(self.primes) // self.rows_multiple) * self.rows_multiple


@dataclass(frozen=True)
class HashPlan:
    """All integers that turn compressed ids into row indices, and the digest of the vocabulary that gives these ids.

    Attributes:
        compressed_size: ids of the compressed vocabulary.
        pad_compressed: the one that stands before the start of a sequence.
        max_ngram, heads: longest n-gram, and columns of each order.
        layers: the constants of each layer.
        vocab_digest: `CompressedVocab.digest`, or None for a plan that was given a size only: then nobody can tell
            whether a vocabulary of this size is the one that the rows were hashed with.
        segment_end: the compressed id that closes a segment, and belongs to the one that it closes: of the ids before a
            position, those up to the last such one are the pad. None where no id does.
        rows_multiple: of the rows of each layer's table.

    Raises:
        ValueError: the numbers contradict each other, or a product could exceed 2^63 - 1.
    """

    compressed_size: int
    pad_compressed: int
    max_ngram: int
    heads: int
    layers: tuple[LayerPlan, ...]
    vocab_digest: str | None = None
    segment_end: int | None = None
    rows_multiple: int = 1

    def __post_init__(self) -> None:
        least_of = {"compressed_size": 1, "pad_compressed": 0, "max_ngram": 2, "heads": 1, "rows_multiple": 1}
        for name, least in least_of.items():
            require_int(name, getattr(self, name), least)
        if self.segment_end is not None:
            require_int("segment_end", self.segment_end, 0, self.compressed_size - 1)
        ids = [layer.layer_id for layer in self.layers]
        if not ids or len(set(ids)) != len(ids):
            raise ValueError(f"layers {quoted(ids)}: a plan has at least one layer, each once")
        if self.vocab_digest is not None and not _is_sha256(self.vocab_digest):
            raise ValueError(f"vocab_digest={quoted(self.vocab_digest)}: must be 64 lower-case hexadecimal digits")
        if not 0 <= self.pad_compressed < self.compressed_size:
            raise ValueError(
                f"pad_compressed={self.pad_compressed}: must be in 0 .. {self.compressed_size - 1}, "
                "a compressed id (vocab.pad(config.pad_id))"
            )
        for layer in self.layers:
            self._check_layer(layer)
        told = (self.pad_compressed, self.vocab_digest, self.segment_end, self.rows_multiple)
        layers = (LayerPlan(x.layer_id, x.multipliers, x.primes, x.offsets, *told) for x in self.layers)
        object.__setattr__(self, "layers", tuple(layers))

    def _check_layer(self, layer: LayerPlan) -> None:
        columns = (self.max_ngram - 1) * self.heads
        if len(layer.multipliers) != self.max_ngram or len(layer.primes) != columns:
            raise ValueError(
                f"layer {layer.layer_id}: {len(layer.multipliers)} multipliers and {len(layer.primes)} primes; "
                f"max_ngram={self.max_ngram} and heads={self.heads} need {self.max_ngram} and {columns}"
            )
        if max(layer.primes) > INT32_MAX:
            raise ValueError(f"layer {layer.layer_id}: prime {max(layer.primes)} exceeds 2^31 - 1")
        if max(layer.multipliers) > INT64_MAX:
            raise ValueError(f"layer {layer.layer_id}: multiplier {max(layer.multipliers)} exceeds 2^63 - 1")
        if (self.compressed_size - 1) * max(layer.multipliers) > INT64_MAX:
            raise ValueError(
                f"layer {layer.layer_id}: id {self.compressed_size - 1} times multiplier {max(layer.multipliers)} "
                "exceeds 2^63 - 1; this plan was not made for this compressed size"
            )
        if layer.offsets != _exclusive_sum(layer.primes):
            raise ValueError(f"layer {layer.layer_id}: offsets are not the running sum of the primes")

    @classmethod
    def for_vocab(cls, config: EngramConfig, vocab: CompressedVocab) -> HashPlan:
        """The plan of `config` for a vocabulary; no other one of the same size will be taken for it.

        Raises:
            ValueError: a vocabulary of another size than the configuration's trained table needs.
        """
        return cls.build(config, len(vocab), vocab.pad(config.pad_id), vocab.digest)

    @classmethod
    def build(
        cls, config: EngramConfig, compressed_size: int, pad_compressed: int, vocab_digest: str | None = None
    ) -> HashPlan:
        """The plan of `config` for a vocabulary of `compressed_size` ids.

        Args:
            pad_compressed: compressed id of `config.pad_id`.
            vocab_digest: which vocabulary of this size it is.

        Raises:
            ValueError: `compressed_size` is not the one that the configuration's trained table needs.
        """
        require_int("compressed_size", compressed_size, 1)
        if compressed_size > INT64_MAX:
            raise ValueError(f"compressed_size={compressed_size} exceeds 2^63 - 1: ids are 64-bit integers")
        if config.compressed_size not in (None, compressed_size):
            raise ValueError(
                f"compressed vocabulary of {compressed_size} ids; this configuration needs exactly "
                f"{config.compressed_size}: every multiplier derives from it, so use the model's own tokenizer"
            )
        multipliers = _qwen_multipliers if config.form == "qwen" else _multipliers
        layers = tuple(
            LayerPlan(layer_id, drawn, primes, _exclusive_sum(primes))
            for layer_id, drawn, primes in zip(
                config.layer_ids, multipliers(config, compressed_size), _prime_columns(config)
            )
        )
        return cls(
            compressed_size,
            pad_compressed,
            config.max_ngram,
            config.heads,
            layers,
            vocab_digest,
            segment_end=pad_compressed if config.form == "qwen" else None,
            rows_multiple=config.rows_multiple,
        )

    def require_vocab(self, vocab: CompressedVocab) -> None:
        """Refuse a vocabulary that this plan was not made for, and warn where the plan cannot tell.

        Raises:
            ValueError: another size, or another map of the same size.
        """
        if len(vocab) != self.compressed_size:
            raise ValueError(
                f"a vocabulary of {len(vocab)} compressed ids; the plan was made for {self.compressed_size}: "
                "build it from this vocabulary"
            )
        if self.vocab_digest is None:
            warnings.warn(
                f"this plan knows the size of its vocabulary, {self.compressed_size}, and not which one it is: with "
                "another map of that size every row is wrong; HashPlan.for_vocab(config, vocab) records it",
                stacklevel=2,
            )
        elif vocab.digest != self.vocab_digest:
            raise ValueError(
                f"a vocabulary whose map has digest {vocab.digest}; the plan was made for {self.vocab_digest}, another "
                "one of the same size: use the tokenizer that the rows were hashed with"
            )

    def layer(self, layer_id: int) -> LayerPlan:
        """The constants of decoder layer `layer_id`."""
        for layer in self.layers:
            if layer.layer_id == layer_id:
                return layer
        raise ValueError(f"layer_id={layer_id}: this plan has layers {[x.layer_id for x in self.layers]}")

    def to_json(self) -> str:
        """The plan as JSON, with a sha256 over its canonical form under `checksum`."""
        body = _without_defaults(asdict(self) | {"layers": [layer.constants() for layer in self.layers]})
        return json.dumps({**body, "checksum": checksum(body)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> HashPlan:
        """Read what `to_json` wrote; a missing field, a wrong type or a wrong checksum is refused."""
        try:
            body = json.loads(text)
            claimed = body.pop("checksum")
            actual = checksum(body)
            if claimed != actual:
                raise ValueError(f"its checksum is {quoted(claimed)}, its content gives {actual}: it was altered")
            layers = tuple(LayerPlan(**{k: _frozen(v) for k, v in _constants(x).items()}) for x in body.pop("layers"))
            return cls(**body, layers=layers)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a hash plan: {one_line(error)}; write one with HashPlan.to_json()") from error


def _constants(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer of a plan's JSON, refused if it says by itself what the plan says for all."""
    if layer.keys() - {"layer_id", "multipliers", "primes", "offsets"}:
        raise ValueError(f"a layer with {quoted(sorted(layer))}")
    return layer


def _is_sha256(text: object) -> bool:
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def checksum(body: dict[str, Any]) -> str:
    """sha256 of a JSON object in its canonical form: sorted keys, no white space, ASCII."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _without_defaults(body: dict[str, Any]) -> dict[str, Any]:
    """Fields of a plan, or a layer of one, for its JSON: those left out that say what is so without them."""
    return {name: value for name, value in body.items() if value is not None and (name, value) != ("rows_multiple", 1)}


def _multipliers(config: EngramConfig, compressed_size: int) -> list[tuple[int, ...]]:
    """Per layer, odd multipliers small enough that no id times multiplier exceeds 2^63 - 1."""
    bound = _multiplier_bound(compressed_size)
    layers = []
    for layer_id in config.layer_ids:
        generator = np.random.default_rng(config.seed + _LAYER_SEED_STEP * layer_id)
        drawn = generator.integers(0, bound, size=config.max_ngram, dtype=np.int64)
        layers.append(tuple(2 * int(r) + 1 for r in drawn))
    return layers


def _qwen_multipliers(config: EngramConfig, compressed_size: int) -> list[tuple[int, ...]]:
    """The same in the form qwen, from splitmix64; a layer counts as the how many-th it is, not by its block."""
    bound = _multiplier_bound(compressed_size)
    starts = [config.seed + _LAYER_SEED_STEP * index for index in range(len(config.layer_ids))]
    return [
        tuple(2 * (_splitmix64(start + _GOLDEN_GAMMA * (j + 1)) % bound) + 1 for j in range(config.max_ngram))
        for start in starts
    ]


def _multiplier_bound(compressed_size: int) -> int:
    return max(1, INT64_MAX // compressed_size // 2)


def _splitmix64(state: int) -> int:
    """One step of the generator splitmix64 (Steele, Lea and Flood, 2014) from a state, taken modulo 2^64."""
    x = (state + _GOLDEN_GAMMA) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def _prime_columns(config: EngramConfig) -> list[tuple[int, ...]]:
    """Per layer, one prime per column: the next one from the order's size up that nobody has taken yet."""
    from sympy import nextprime  # slow to import, needed once

    taken: set[int] = set()
    reached: dict[int, int] = {}  # from each size on: everything up to there is taken
    layers = []
    for _ in config.layer_ids:
        columns = []
        for size in config.table_size_per_order:
            prime = reached.get(size, size - 1)
            for _ in range(config.heads):
                prime = int(nextprime(prime))
                while prime in taken:
                    prime = int(nextprime(prime))
                taken.add(prime)
                columns.append(prime)
            reached[size] = prime
        layers.append(tuple(columns))
    return layers


def _exclusive_sum(values: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(accumulate(values[:-1], initial=0))
