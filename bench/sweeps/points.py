"""What is swept: each sweep varies one setting of a base configuration; the grid varies four at once.

A sweep is a list of points, a point is a case (settings, model, boundary, variant) under the name of a sweep and the
value that it varies. The same case may stand in several sweeps; it is priced once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.price.models import MODELS_OF
from engram_toy.definitions import DEFINITIONS
from engram_toy.models.layouts import VARIANTS
from engram_toy.models.programs import BOUNDARIES

FLOOR = "floor"  # no definition of depth, but what every manager must pay at least
HOT_PREFETCH = "offload_hot_prefetch"  # of the grid: hot rows above, the others below and prefetched
GRID = "grid"


@dataclass(frozen=True)
class Settings:
    """All that a price depends on besides the model, the boundary and the variant.

    Attributes:
        preset: form of Engram.
        stream: name of the text: "text" is that of the command line.
        seq_len, d_model, seed, padding, bytes_per_element, definition: as the command line names them.
        share: of the lookups, those to rows of the offloaded tier.
        hot: share of all rows that a hot tier keeps above.
        wrong: share of the prefetch's copies that are of a row which nobody asked for.
    """

    preset: str
    stream: str
    seq_len: int
    d_model: int
    seed: int
    padding: int
    share: float
    hot: float
    bytes_per_element: int
    definition: str
    wrong: float


@dataclass(frozen=True)
class Case:
    """One number to find: a price."""

    settings: Settings
    model: str
    boundary: str
    variant: str

    @property
    def prefetches(self) -> bool:
        """Whether rows are copied up before they are needed."""
        return self.variant in ("offload_prefetch", HOT_PREFETCH)

    @property
    def hot(self) -> float:
        """Share of all rows that are kept above for being frequent."""
        return self.settings.hot if self.variant in ("offload_hot", HOT_PREFETCH) else 0.0

    @property
    def recording(self) -> tuple[Any, ...]:
        """What must be run for it. Layouts and paddings, definitions and bytes are found without another run."""
        s = self.settings
        # Copies are a part of what runs; where rows start is not.
        schedule = (s.share, self.hot, s.wrong) if self.prefetches else None
        return (s.preset, s.stream, s.seq_len, s.d_model, s.seed, self.model, self.boundary, schedule)


@dataclass(frozen=True)
class Point:
    """A case as a point of a sweep; of the grid, `value` names all that it varies."""

    sweep: str
    value: Any
    case: Case


@dataclass(frozen=True)
class Sweep:
    """One setting and the values that it takes.

    Attributes:
        setting: field of `Settings`.
        values: what it is set to; of `seed`, what is added to the base configuration's.
        quick: a smaller choice.
        label: what it is, for people.
    """

    setting: str
    values: tuple[Any, ...]
    quick: tuple[Any, ...]
    label: str


PADDINGS = (0, 1000, 10_000, 100_000, 1_000_000, 10_000_000)  # the question's million, and what is around it
SWEEPS = {
    "padding": Sweep("padding", PADDINGS, PADDINGS, "padding M, in values"),
    "tokens": Sweep("seq_len", (16, 32, 64, 128, 256), (4, 8, 16), "tokens"),
    "share": Sweep("share", (0.01, 0.03, 0.1, 0.3, 0.5, 1.0), (0.1, 1.0), "share p of the lookups that are offloaded"),
    "hot": Sweep("hot", (0.0, 0.01, 0.03, 0.1, 0.3, 1.0), (0.0, 0.1, 1.0), "share of all rows in the hot tier"),
    "reuse": Sweep("stream", ("uniform", "zipf", "text", "python-stdlib"), ("uniform", "text"), "what is read"),
    "bytes": Sweep("bytes_per_element", (1, 2, 4), (1, 2, 4), "bytes per value"),
    "compute": Sweep("d_model", (8, 16, 32, 64, 128), (4, 8), "width of the model"),
    "wrong": Sweep("wrong", (0.0, 0.01, 0.05, 0.2, 0.5), (0.0, 0.2), "share of the copies that are mispredicted"),
    "definition": Sweep("definition", (*DEFINITIONS, FLOOR), ("lru", "two-stack", "stationary", FLOOR), "definition"),
    "seed": Sweep("seed", (0, 1, 2), (0, 1), "seed"),
    "preset": Sweep("preset", ("tiny", "v41-flash"), ("tiny",), "form of Engram"),
}
NAMES = (*SWEEPS, GRID)
_OPTIONS = {"hot": "hot_share", "seed": ""}  # of settings whose option has another name; a seed is added to


def varied(names: Sequence[str]) -> set[str]:
    """The options that none of these sweeps looks at, since each of them varies their setting itself."""
    of_grid = {"padding", "hot_share", "d_model"}  # its fourth axis, `share`, is no option
    settings = {name: sweep.setting for name, sweep in SWEEPS.items()}
    found = [of_grid if name == GRID else {_OPTIONS.get(settings[name], settings[name])} for name in names]
    return set.intersection(*found)


def points_of(name: str, base: Settings, models: Sequence[str], quick: bool = False) -> Iterator[Point]:
    """The points of a sweep in their canonical order."""
    sweep = SWEEPS[name]
    for value in sweep.quick if quick else sweep.values:
        settings = replace(base, **{sweep.setting: value + base.seed if name == "seed" else value})
        for model in models:
            # A bank has no forms to compare.
            if model not in MODELS_OF[settings.preset] or (name == "preset" and model != "engram"):
                continue
            for boundary in BOUNDARIES:
                for variant in VARIANTS:
                    yield Point(name, getattr(settings, sweep.setting), Case(settings, model, boundary, variant))


@dataclass(frozen=True)
class Axes:
    """The joint grid: a price at every combination. `compute` is the width of the layer, 0 the lookup alone."""

    padding: tuple[int, ...] = (0, 100, 1000, 10_000, 100_000, 1_000_000, 10_000_000)
    share: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    hot: tuple[float, ...] = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
    compute: tuple[int, ...] = (0, 4, 8, 16, 32, 64)


QUICK_AXES = Axes((0, 1000, 1_000_000), (0.1, 1.0), (0.0, 0.1, 1.0), (0, 4))
# What the page calls the two: with a hot tier of no rows they are what their names say.
GRID_VARIANTS = {"resident": "resident", "offload_naive": "offload_hot", "offload_prefetch": HOT_PREFETCH}


def grid_points(base: Settings, axes: Axes) -> Iterator[Point]:
    """Every combination, of the model `engram`; value is the place on each axis."""
    # Padding innermost: it needs no other recording, nor another layout.
    places = [(p, s, h, c) for c in axes.compute for s in axes.share for h in axes.hot for p in axes.padding]
    for padding, share, hot, compute in places:
        for variant in GRID_VARIANTS.values():
            yield Point(GRID, (padding, share, hot, compute), grid_case(base, padding, share, hot, compute, variant))


def grid_case(base: Settings, padding: int, share: float, hot: float, compute: int, variant: str) -> Case:
    """The case behind one number of the grid; a resident table knows neither share nor hot rows."""
    if variant == "resident":
        share, hot = 1.0, 0.0
    settings = replace(base, padding=padding, share=share, hot=hot, d_model=compute or base.d_model)
    return Case(settings, "engram", "layer" if compute else "lookup", variant)
