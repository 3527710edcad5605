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
_LAYER_SEED_STEP = 10007
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class LayerPlan:
    """Hash constants of one layer; `primes` and `offsets` in column order (order-major, then head).

    What else decides which rows a token reads is said by the plan that the layer belongs to, so that it can be recorded
    with the layer's rows: `pad_compressed` and `vocab_digest`, None where nobody said.
    """

    layer_id: int
    multipliers: tuple[int, ...]
    primes: tuple[int, ...]
    offsets: tuple[int, ...]
    pad_compressed: int | None = field(default=None, compare=False, repr=False)
    vocab_digest: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        require_int("layer_id", self.layer_id, 0)
        for name, least in (("multipliers", 1), ("primes", 2), ("offsets", 0)):
            for value in getattr(self, name):
                require_int(f"{name} of layer {self.layer_id}", value, least)

    def constants(self) -> dict[str, Any]:
        """The integers of this layer alone, as they stand in a plan's JSON."""
        return {name: getattr(self, name) for name in ("layer_id", "multipliers", "primes", "offsets")}

    def to_json(self) -> str:
        """All of this layer, to stand in the metadata of a file that holds its rows; what is unknown is left out."""
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None})

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
        """Rows of this layer's table: the sum of its primes."""
        return sum(self.primes)


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

    Raises:
        ValueError: the numbers contradict each other, or a product could exceed 2^63 - 1.
    """

    compressed_size: int
    pad_compressed: int
    max_ngram: int
    heads: int
    layers: tuple[LayerPlan, ...]
    vocab_digest: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("compressed_size", 1), ("pad_compressed", 0), ("max_ngram", 2), ("heads", 1)):
            require_int(name, getattr(self, name), least)
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
        told = (self.pad_compressed, self.vocab_digest)
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
        primes = _prime_columns(config)
        layers = tuple(
            LayerPlan(layer_id, _multipliers(config, layer_id, compressed_size), p, _exclusive_sum(p))
            for layer_id, p in zip(config.layer_ids, primes)
        )
        return cls(compressed_size, pad_compressed, config.max_ngram, config.heads, layers, vocab_digest)

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
        body = asdict(self) | {"layers": [layer.constants() for layer in self.layers]}
        if self.vocab_digest is None:
            del body["vocab_digest"]
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


def _multipliers(config: EngramConfig, layer_id: int, compressed_size: int) -> tuple[int, ...]:
    """Odd multipliers small enough that no id times multiplier exceeds 2^63 - 1."""
    bound = max(1, INT64_MAX // compressed_size // 2)
    generator = np.random.default_rng(config.seed + _LAYER_SEED_STEP * layer_id)
    drawn = generator.integers(0, bound, size=config.max_ngram, dtype=np.int64)
    return tuple(2 * int(r) + 1 for r in drawn)


def _prime_columns(config: EngramConfig) -> list[tuple[int, ...]]:
    """Per layer, one prime per column: the next one from the order's size up that nobody has taken yet."""
    from sympy import nextprime  # slow to import, needed once

    taken: set[int] = set()
    layers = []
    for _ in config.layer_ids:
        columns = []
        for size in config.table_size_per_order:
            prime = size - 1
            for _ in range(config.heads):
                prime = int(nextprime(prime))
                while prime in taken:
                    prime = int(nextprime(prime))
                taken.add(prime)
                columns.append(prime)
        layers.append(tuple(columns))
    return layers


def _exclusive_sum(values: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(accumulate(values[:-1], initial=0))
