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

from bench.instruments.claim import WALL_TIME_CLAIM
from bench.instruments.reading import read_results
from bench.price.table import find_run
from bench.rows import table as rows
from bench.rows.cases import LAYOUTS
from bench.rows.table import TEXT
from bench.rows.whole_model import STEP
from bench.sweeps.table import ratios

RESULTS = Path(__file__).resolve().parents[1] / "results"
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
    def production_and_qwen(self) -> Results:
        """Of `bench/production.py`: DeepSeek's tables, and Qwen3.8-Flash-Next's behind them."""
        return {"records": [*self["production"]["records"], *self["production_qwen"]["records"]]}

    @property
    def sweeps(self) -> Results:
        """Of `bench/bytedmd_toy.py --sweep`."""
        return self["bytedmd_sweeps"]

    @property
    def production(self) -> Results:
        """Of `bench/production.py`."""
        return self["production"]

    # --- single numbers ------------------------------------------------------------------------

    def ratio(self, model: str, boundary: str, variant: str) -> float:
        """Price of a variant of the toy over that of the resident table."""
        run, resident = (find_run(self.toy, model, boundary, name) for name in (variant, "resident"))
        return run["cost"] / resident["cost"]

    def swept(self, sweep: str, value: Any, model: str, boundary: str, variant: str) -> float:
        """The same ratio at one value of a sweep."""
        return ratios(self.sweeps, sweep, model, boundary, variant)[self.sweeps["sweeps"][sweep]["values"].index(value)]

    def cheaper_copies(self) -> int:
        """Points of the sweeps, all on one stack, at which the prefetch is cheaper than the naive layout."""
        names = ("sweep", "value", "model", "boundary", "variant")
        cost = {tuple(point[name] for name in names): point["cost"] for point in self.sweeps["points"]}
        # Under definitions without a stack, where values stay where they lie, a copy made early may save something.
        cost = {where: price for where, price in cost.items() if where[0] != "definition"}
        naive = {where[:-1]: price for where, price in cost.items() if where[-1] == "offload_naive"}
        return sum(price < naive[where[:-1]] for where, price in cost.items() if where[-1] == "offload_prefetch")

    def longest(self, table: str, layout: str = "held live") -> dict[str, Any]:
        """The record of a table on all of the text."""
        found = rows.select(self.production, part="scale", table=table, stream=TEXT, layout=layout)
        return max(found, key=lambda record: record["tokens"])

    def compared(self, table: str, stream: str = TEXT, layout: str = "held live") -> dict[str, Any]:
        """The record of a table on as much of a stream as there is of every stream."""
        wanted = dict(part="scale", table=table, stream=stream, layout=layout)
        return rows.one(self.production, tokens=COMPARED_TOKENS, **wanted)

    def step(self, model: str, experts: str = "", stream: str = TEXT, layout: str = "held live") -> float:
        """Price of a table's rows in a decode step of STEP tokens, as a share of the weights' price."""
        return rows.row_share(self.model_step(model, experts, stream, layout))

    def crossing(self, model: str, experts: str = "", stream: str = TEXT, mode: str = "decode") -> str:
        """Tokens per step at which the rows, held live, reach 3 % of the weights, as text."""
        # Small steps read a part of the text: where they do not reach it, the larger steps of all of it say.
        wanted = {"table": model, "experts": experts, "stream": stream, "mode": mode, "layout": "held live"}
        most = 0
        for line in rows.lines(self.production):
            if wanted.items() <= line[0].items():
                tokens = [record["tokens_per_step"] for record in line]
                at = rows.crossing_of(tokens, [rows.row_share(record) for record in line])
                if at is not None:
                    # Two digits: it is interpolated between steps that were priced.
                    return f"about {float(f'{at:.2g}'):,.0f}"
                most = max(most, tokens[-1])
        return f"more than {most:,}"

    def second_half(self, model: str) -> float:
        """Price of the rows, held live, as a share of the weights' in the second half of the largest decode steps."""
        wanted = dict(part="whole_model", table=model, stream=TEXT, mode="decode", layout="held live", context=0)
        largest = max(rows.select(self.production, **wanted), key=lambda record: record["tokens_per_step"])
        return rows.row_share({**largest, **largest["second_half"]})

    def least_steps(self) -> int:
        """Steps of the whole model's record that has the fewest."""
        return min(record["steps"] for record in rows.select(self.production, part="whole_model"))

    def placed(self, table: str, layout: str, padding: int) -> float:
        """Price of the lookups below so many bytes, over that above them."""
        wanted = dict(part="place", prefetch=False, table=table, layout=layout)
        return rows.placed(rows.one(self.production, padding_bytes=padding, **wanted))

    def saved(self, table: str, share: float, layout: str = "held live") -> float:
        """Share of the price that a hot tier saves."""
        base, tier = (self.tier(table, s, layout) for s in (0.0, share))
        return 1 - tier["price"] / base["price"]

    def tier(self, table: str, share: float, layout: str = "held live") -> dict[str, Any]:
        """The record of a hot tier."""
        return rows.one(self.production, part="hot", table=table, layout=layout, hot_share=share)

    def model_step(
        self,
        model: str,
        experts: str = "",
        stream: str = TEXT,
        layout: str = "held live",
        context: int = 0,
        tokens: int = STEP,
    ) -> Results:
        """The record of a whole model at so many tokens a decode step."""
        wanted = dict(part="whole_model", table=model, experts=experts, stream=stream, layout=layout, mode="decode")
        return rows.one(self.production, tokens_per_step=tokens, context=context, **wanted)

    def added(self, model: str, part: str = "in all", experts: str = "", layout: str = "held live") -> float:
        """What Engram adds to a step of STEP tokens, as a share of the same step without Engram; see `additions`."""
        return rows.additions(self.model_step(model, experts, layout=layout))[part]

    def prefetched_share(self, model: str, experts: str = "") -> float:
        """Offloaded and copied rows as a share of the weights: what offloading adds if resident rows are free."""
        return max(self.added(model, "copied", experts, layout) for layout in LAYOUTS)

    def pinned(self, model: str, experts: str = "", layout: str = "held live") -> tuple[float, float]:
        """Offloaded and copied rows over a table pinned above the weights: of the rows alone, and of the whole step."""
        return rows.against_pinned(self.model_step(model, experts, layout=layout))

    def uncopied(self, model: str, experts: str = "", layout: str = "held live", tokens: int = STEP) -> float:
        """Price of offloaded rows that nobody copies over that of a table pinned above the weights."""
        record = self.model_step(model, experts, layout=layout, tokens=tokens)
        return rows.lookups_against_pinned(record, "offload_naive")

    def uncopied_later(self, model: str, layout: str) -> float:
        """The same over the second half of the text, when much had been read before."""
        return rows.lookups_against_pinned(self.model_step(model, layout=layout)["second_half"], "offload_naive")

    def in_proportion(self, model: str) -> str:
        """Tokens a step at which random rows, held live, would reach 3 % if their share rose on as it does, as text.

        Raises:
            ValueError: it does not rise in proportion to the step.
        """
        wanted = dict(part="whole_model", table=model, stream="uniform", mode="decode", layout="held live", context=0)
        records = sorted(rows.select(self.production, **wanted), key=lambda record: record["tokens_per_step"])[-2:]
        each = [rows.row_share(record) / record["tokens_per_step"] for record in records]
        if abs(each[0] / each[1] - 1) > 0.05:
            raise ValueError(f"{model}: a token costs {each[0]:.3g} of a step and {each[1]:.3g} of a larger one")
        return f"{float(f'{WALL_TIME_CLAIM / each[1]:.2g}'):,.0f}"

    def copies(self, kind: str) -> list[float]:
        """Change of the lookups' price by copies one token ahead, over tables, layouts and bytes above them."""
        found = rows.select(self.production, part="place", prefetch=True)
        return [record[kind] / record["offload_naive"] - 1 for record in found]


def rounded_up(value: float, digits: int = 1) -> str:
    """A positive value to so many digits, upwards: what follows "less than" or "from" must not be less."""
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return f"{math.ceil(value / unit) * unit:.{digits}g}"
