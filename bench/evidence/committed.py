"""Committed results by name: the single numbers that the findings speak of, each computed in one place.

    evidence = Evidence()                                             # bench/results
    evidence.ratio("engram", "lookup", "offload_prefetch")            # price over that of the resident table
    evidence.step("dense-4b")                                         # rows of a step as a share of the weights

A file is read when it is first asked for.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bench.instruments.reading import read_results
from bench.price.table import find_run
from bench.rows.table import TEXT, crossing_of, one, row_share, select
from bench.sweeps.table import ratios
from engram_toy.tracer.stack import read_price

RESULTS = Path(__file__).resolve().parents[1] / "results"
STEP = 512  # tokens: the sequences of the paper's run, one token each
COMPARED_TOKENS = 10**6  # of text and of random ids
Results = dict[str, Any]


class Evidence:
    """The results files of a folder, each read when it is asked for."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder
        self._read: dict[str, Results] = {}

    def __getitem__(self, name: str) -> Results:
        if name not in self._read:
            path = self.folder / f"{name}.json"
            if not path.exists():
                raise ValueError(f"{path} is missing: make findings writes it")
            self._read[name] = read_results(path)
        return self._read[name]

    @property
    def toy(self) -> Results:
        """Of `bench/bytedmd_toy.py`."""
        return self["bytedmd_toy"]

    @property
    def sweeps(self) -> Results:
        """Of `bench/bytedmd_toy.py --sweep`."""
        return self["bytedmd_sweeps"]

    @property
    def production(self) -> Results:
        """Of `bench/production.py`."""
        return self["production"]

    # --- single numbers ------------------------------------------------------------------------

    def ratio(self, model: str, boundary: str, variant: str, toy: str = "bytedmd_toy") -> float:
        """Price of a variant of the toy over that of the resident table."""
        run, resident = (find_run(self[toy], model, boundary, name) for name in (variant, "resident"))
        return run["cost"] / resident["cost"]

    def swept(self, sweep: str, value: Any, model: str, boundary: str, variant: str) -> float:
        """The same ratio at one value of a sweep."""
        return ratios(self.sweeps, sweep, model, boundary, variant)[self.sweeps["sweeps"][sweep]["values"].index(value)]

    def cheaper_copies(self) -> int:
        """Points of the sweeps at which the prefetch is cheaper than the naive layout."""
        names = ("sweep", "value", "model", "boundary", "variant")
        cost = {tuple(point[name] for name in names): point["cost"] for point in self.sweeps["points"]}
        naive = {where[:-1]: price for where, price in cost.items() if where[-1] == "offload_naive"}
        return sum(price < naive[where[:-1]] for where, price in cost.items() if where[-1] == "offload_prefetch")

    def longest(self, table: str, layout: str = "held live") -> dict[str, Any]:
        """The record of a table on all of the text."""
        found = select(self.production, part="scale", table=table, stream=TEXT, layout=layout)
        return max(found, key=lambda record: record["tokens"])

    def compared(self, table: str, stream: str = TEXT, layout: str = "held live") -> dict[str, Any]:
        """The record of a table on as much of a stream as there is of every stream."""
        wanted = dict(part="scale", table=table, stream=stream, layout=layout)
        return one(self.production, tokens=COMPARED_TOKENS, **wanted)

    def step(self, model: str, layout: str = "held live", stream: str = TEXT, mode: str = "decode") -> float:
        """Price of a table's rows in a step of STEP tokens, as a share of the weights' price."""
        return row_share(self.model_step(model, layout, stream, mode))

    def crossing(self, model: str, layout: str = "held live", stream: str = TEXT, mode: str = "decode") -> str:
        """Tokens per step at which the rows reach 3 % of the weights, as text."""
        wanted = dict(part="whole_model", table=model, layout=layout, stream=stream, mode=mode)
        line = select(self.production, **wanted)
        tokens = [record["tokens_per_step"] for record in line]
        at = crossing_of(tokens, [row_share(record) for record in line])
        return f"more than {tokens[-1]:,}" if at is None else f"about {float(f'{at:.2g}'):,.0f}"

    def placed(self, table: str, layout: str, padding: int) -> float:
        """Price of the lookups below so many bytes, over that above them."""
        record = one(self.production, part="place", table=table, layout=layout, padding_bytes=padding)
        return record["offload_naive"] / record["resident"]

    def saved(self, table: str, share: float, layout: str = "held live") -> float:
        """Share of the price that a hot tier saves."""
        base, tier = (self.tier(table, s, layout) for s in (0.0, share))
        return 1 - tier["price"] / base["price"]

    def tier(self, table: str, share: float, layout: str = "held live") -> dict[str, Any]:
        """The record of a hot tier."""
        return one(self.production, part="hot", table=table, layout=layout, hot_share=share)

    def model_step(self, model: str, layout: str = "held live", stream: str = TEXT, mode: str = "decode") -> Results:
        """The record of a whole model at STEP tokens a step."""
        wanted = dict(part="whole_model", table=model, layout=layout, stream=stream, mode=mode)
        return one(self.production, tokens_per_step=STEP, **wanted)

    def prefetched_share(self, model: str) -> float:
        """What prefetching from below costs more than the table on top, at most, as a share of the whole step.

        The copies of a step are read once more, and until then may lie above every row that is copied after them: the
        root of a sum is at most the sum of the roots.
        """
        record = self.model_step(model)
        steps = record["steps"]
        copies = record["reads"] * record["row_bytes"] // steps  # bytes, of a step
        more = record["offload_naive"] - record["resident"]
        more += steps * (record["staged_at_most"] + copies * read_price(copies))
        return more / (record["resident"] + steps * record["weights_step_price"])


def rounded_up(value: float) -> str:
    """A positive value to one digit, upwards: what follows "less than" must not be less."""
    unit = 10.0 ** math.floor(math.log10(value))
    return f"{math.ceil(value / unit) * unit:.1g}"
