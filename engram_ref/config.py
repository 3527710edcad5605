"""What an Engram layer looks like, as one frozen, validated value; and what it costs per token.

Everything else in this repository takes an `EngramConfig` as an argument: there are no module
globals, so two configurations live side by side. The presets are the published geometries.

    >>> from engram_ref.config import EngramConfig
    >>> EngramConfig.preset("v41-flash").bytes_per_token()
    12672

Sources: the public demo `deepseek-ai/Engram` (`engram_demo_v1.py`); the Engram paper, arXiv
2601.07372, Appendix A; the DeepSeek-V4.1-Flash checkpoint; Qwen3.8-Flash-Next (transformers' class `qwen4_exp`).
No torch, no numpy is imported here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from engram_ref.quoting import quoted

# Bytes of one value. A float8 row also carries one scale byte per SCALE_BLOCK values.
VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}
SCALE_BLOCK = 32
FORMS = ("demo", "v41", "qwen")
MOST_LAYER_ID = (1 << 16) - 1
MOST_COLUMNS = 1 << 14  # of all layers together; a prime is searched for each
MOST_TABLE_SIZE = 2**31  # of a column: a prime from here up is no 32-bit integer any more
MOST_IDS = 2**31 - 1  # of a vocabulary
V41_NORM_EPS = 1e-20  # of the norms in the form v41: of the gate, and as its config.json must have it


@dataclass(frozen=True, kw_only=True)
class EngramConfig:
    """Geometry of all Engram layers of one model.

    Attributes:
        layer_ids: 0-based decoder layers that hold an Engram layer; the hash depends on them.
        max_ngram: longest n-gram N; orders 2..N are looked up.
        heads: hash heads per order, each with a prime of its own.
        row_width: values in one table row (D).
        table_size_per_order: one size per order 2..N; each head's prime is searched upward from it.
        hidden: width of the residual stream (H).
        hc_mult: copies of the residual stream (G); 1 is the ordinary decoder.
        kernel_size: taps of the short convolution; 0 means that the layer has none.
        pad_id: token id (not compressed) that stands before the start of a sequence. In the form qwen it is the end of
            text (EOS): it also closes a segment, so that what comes behind it sees nothing before it.
        seed: seed of the hash multipliers.
        row_dtype: how a row is stored: float32, float16, bfloat16 or float8_e4m3fn.
        form: how rows become an update: "demo" (key and value projections with bias, short convolution), "v41"
            (one projection without bias, no convolution, one rounding) or "qwen" (projections without bias, norms
            with an eps of the configuration's, short convolution; the hash takes token ids as they are).
        compressed_size: the size that the compressed vocabulary must have, or None where no trained
            table depends on it. Every multiplier derives from it, so a trained table allows one value.
        rows_multiple: a layer's table is filled up to a multiple of so many rows; no token reads those beyond the
            primes.
        norm_eps: in the form qwen, of its three norms; None in the others, whose norms have one of their own.

    Raises:
        ValueError: a field is out of range; the message names field, value and limit.
    """

    layer_ids: tuple[int, ...]
    max_ngram: int
    heads: int
    row_width: int
    table_size_per_order: tuple[int, ...]
    hidden: int
    hc_mult: int = 4
    kernel_size: int = 4
    pad_id: int = 2
    seed: int = 0
    row_dtype: str = "bfloat16"
    form: str = "demo"
    compressed_size: int | None = None
    rows_multiple: int = 1
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        for name in ("layer_ids", "table_size_per_order"):
            object.__setattr__(self, name, _int_tuple(name, getattr(self, name)))
        for name, (least, most) in _RANGES.items():
            require_int(name, getattr(self, name), least, most)
        for layer_id in self.layer_ids:
            require_int("layer_ids", layer_id, 0, MOST_LAYER_ID)
        for size in self.table_size_per_order:
            require_int("table_size_per_order", size, 2, MOST_TABLE_SIZE)
        if not self.layer_ids or len(set(self.layer_ids)) != len(self.layer_ids):
            raise ValueError(f"layer_ids={quoted(self.layer_ids)}: give at least one layer, each once")
        require_columns(len(self.layer_ids), self.columns)
        if len(self.table_size_per_order) != self.max_ngram - 1:
            raise ValueError(
                f"table_size_per_order has {len(self.table_size_per_order)} sizes; "
                f"max_ngram={self.max_ngram} has {self.max_ngram - 1} orders: give one size per order"
            )
        if not isinstance(self.row_dtype, str) or self.row_dtype not in VALUE_BYTES:
            raise ValueError(f"row_dtype={quoted(self.row_dtype)}: use one of {', '.join(VALUE_BYTES)}")
        if self.row_dtype == "float8_e4m3fn" and self.row_width % SCALE_BLOCK:
            raise ValueError(
                f"row_width={self.row_width}: float8 rows need a multiple of {SCALE_BLOCK}, one scale per block"
            )
        if self.form not in FORMS:
            raise ValueError(f"form={quoted(self.form)}: use one of {', '.join(FORMS)}")
        if self.form == "v41" and self.kernel_size:
            raise ValueError(f"kernel_size={self.kernel_size}: form v41 has no convolution, use 0")
        if self.compressed_size is not None:
            require_int("compressed_size", self.compressed_size, 1, MOST_IDS)
        self._check_qwen()

    def _check_qwen(self) -> None:
        """What only the form qwen has, and what only it demands."""
        eps = self.norm_eps
        if self.form != "qwen":
            if eps is not None:
                raise ValueError(
                    f"norm_eps={quoted(eps)}: form {self.form} has norms with an eps of their own, use None"
                )
            return
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < 1:
            raise ValueError(f"norm_eps={quoted(eps)}: form qwen needs a number above 0 and below 1")
        if list(self.layer_ids) != sorted(self.layer_ids):
            raise ValueError(f"layer_ids={quoted(self.layer_ids)}: form qwen numbers its layers upward, sort them")
        if len(set(self.table_size_per_order)) != 1:
            raise ValueError(
                f"table_size_per_order={quoted(self.table_size_per_order)}: form qwen takes all primes from one size "
                "up, give the same for every order"
            )

    @classmethod
    def preset(cls, name: str) -> EngramConfig:
        """The published geometry called `name`: demo, paper-27b, paper-40b, v41-flash, qwen38-flash-next, tiny."""
        if name not in PRESETS:
            raise ValueError(f"no preset {quoted(name)}: use one of {', '.join(PRESETS)}")
        return cls(**PRESETS[name])

    def replace(self, **changes: Any) -> EngramConfig:
        """A copy with `changes`, validated like a new one."""
        unknown = changes.keys() - {field.name for field in dataclasses.fields(self)}
        if unknown:
            raise ValueError(f"EngramConfig has no field {', '.join(sorted(unknown))}")
        return dataclasses.replace(self, **changes)

    @property
    def orders(self) -> tuple[int, ...]:
        """The n of each n-gram that is looked up: 2..max_ngram."""
        return tuple(range(2, self.max_ngram + 1))

    @property
    def columns(self) -> int:
        """Rows read per token and layer (C): one per order and head."""
        return len(self.orders) * self.heads

    @property
    def embedding_width(self) -> int:
        """Values gathered per token and layer (C * D)."""
        return self.columns * self.row_width

    # --- cost per token, over all layers unless said otherwise ---------------------------------

    def row_bytes(self) -> int:
        """Bytes of one stored row, its scales included."""
        scales = self.row_width // SCALE_BLOCK if self.row_dtype == "float8_e4m3fn" else 0
        return self.row_width * VALUE_BYTES[self.row_dtype] + scales

    def rows_per_token(self) -> int:
        """Table rows that one token reads."""
        return len(self.layer_ids) * self.columns

    def bytes_per_token(self) -> int:
        """Bytes of rows that one token reads, as stored."""
        return self.rows_per_token() * self.row_bytes()

    def projection_macs(self) -> int:
        """Multiply-adds of the key and value projections, per token and layer."""
        return (self.hc_mult + 1) * self.hidden * self.embedding_width

    def flops_per_token(self) -> int:
        """Floating-point operations: projections, the gate's inner products, the convolution."""
        gate = self.hc_mult * self.hidden
        convolution = self.kernel_size * self.hc_mult * self.hidden
        # A multiply-add counts as two. Norms and activations, a few per value, are left out.
        return 2 * len(self.layer_ids) * (self.projection_macs() + gate + convolution)


# Least and most. The upper bounds lie far above any published model; they are there so that a number from a damaged
# file is refused before anything is computed, or allocated, from it.
_RANGES = {
    "max_ngram": (2, 64),
    "heads": (1, 1024),
    "row_width": (1, 1 << 20),
    "hidden": (1, 1 << 20),
    "hc_mult": (1, 256),
    "kernel_size": (0, 1024),
    "pad_id": (0, MOST_IDS - 1),
    "seed": (0, 2**63 - 1),
    "rows_multiple": (1, 1 << 20),
}

_PAPER: dict[str, Any] = dict(layer_ids=(2, 15), max_ngram=3, heads=8, row_width=80, hidden=2560)

PRESETS: dict[str, dict[str, Any]] = {
    "demo": dict(
        layer_ids=(1, 15),
        max_ngram=3,
        heads=8,
        row_width=64,
        table_size_per_order=(646_400, 646_400),
        hidden=1024,
    ),
    "paper-27b": dict(_PAPER, table_size_per_order=(2_262_400, 2_262_400)),
    "paper-40b": dict(_PAPER, table_size_per_order=(7_239_680, 7_239_680)),
    "v41-flash": dict(
        layer_ids=(1, 14),
        max_ngram=4,
        heads=8,
        row_width=256,
        table_size_per_order=(16_000_000, 16_000_000, 16_000_000),
        hidden=5120,
        kernel_size=0,
        form="v41",
        row_dtype="float8_e4m3fn",
        compressed_size=99_092,
    ),
    "qwen38-flash-next": dict(
        layer_ids=(1,),
        max_ngram=3,
        heads=8,
        row_width=160,
        table_size_per_order=(20_000_000, 20_000_000),
        hidden=2560,
        pad_id=248_044,
        seed=1234,
        form="qwen",
        compressed_size=248_320,
        rows_multiple=128,
        norm_eps=1e-6,
    ),
    # One plain residual stream, as in the dense backbones on which the paper timed offloading.
    "tiny": dict(
        layer_ids=(1,),
        max_ngram=3,
        heads=8,
        row_width=4,
        table_size_per_order=(1000, 1000),
        hidden=64,
        hc_mult=1,
        row_dtype="float32",
    ),
}


def require_int(name: str, value: object, least: int, most: int | None = None) -> None:
    """Refuse with a ValueError what is not an integer of at least `least`, and of at most `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={quoted(value)}: must be an integer of at least {least}")
    if most is not None and value > most:
        raise ValueError(f"{name}={quoted(value)}: must be at most {most}")


def require_columns(layers: int, columns: int) -> None:
    """Refuse with a ValueError more columns, of so many layers together, than anybody would search primes for."""
    if layers * columns > MOST_COLUMNS:
        raise ValueError(
            f"{layers} layers of {columns} columns, orders times heads: must be at most {MOST_COLUMNS} together"
        )


def _int_tuple(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise ValueError(f"{name}={quoted(value)}: must be a tuple of integers")
    return tuple(value)
