"""The answer: every placement of a model's table on a machine, what it takes and what it costs; and which one to take.

answer = answer(Question(model, machine, reads, batches=(1, 64)))     # a dict that JSON takes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from engram_ref.place import energy, price
from engram_ref.place.formulas import (
    FORMULAS,
    HOT,
    OWNED,
    beside_seconds,
    beyond_seconds,
    block_seconds,
    held_bytes,
    moved_bytes,
    seconds,
    tier_shares,
)
from engram_ref.place.group import ALONE, Group
from engram_ref.place.machine import UNITS, Machine
from engram_ref.place.model import Model
from engram_ref.place.reads import Reads
from engram_ref.place.words import in_tokens, percent, size, time

WITH_GPU = ("device", "hot", "uva", "host", "hot file", "file")
WITHOUT_GPU = ("memory", "hot file", "file")
OF_RANKS = ("sharded", "hot sharded", "sharded host")  # more, where several ranks share a table; the last with a GPU
_PHASES = {"decode": "a step", "prefill": "a prompt"}
_WHERE = {"gpu": "GPU memory", "host": "host memory", "disk": "disk"}
TOLERATED = 0.03  # of a step's time that a placement may lose and still be as good as resident: the paper's yardstick


@dataclass(frozen=True)
class Question:
    """What is to be placed, where, and how it is used.

    Attributes:
        reads: of a text, for each of the batch sizes.
        batches: tokens of a decode step of a rank, each of a sequence of its own.
        prompts: tokens of a prompt, each a step of its own.
        group: the ranks, and how they reach each other.
        block_s: seconds of a decoder block in a decode step; None: by its weights and its operations.
        blocks: of the model; None: as many as are known, or at least those up to the last Engram layer.
        hot_share: of all rows, that the hot tier holds.
        weights_over: GPUs, or processes, that split each block's weights. Of so many ranks each has its own attention
            and all compute together, as under expert parallelism; of fewer, several compute for one, as under tensor
            parallelism.
    """

    model: Model
    machine: Machine
    reads: Reads
    batches: tuple[int, ...]
    block_s: float | None = None
    hot_share: float = 0.1
    prompts: tuple[int, ...] = ()
    group: Group = ALONE
    blocks: int | None = None
    weights_over: int = 1

    @property
    def has_gpu(self) -> bool:
        """Whether an accelerator computes."""
        return self.machine.gpu is not None

    @property
    def placements(self) -> tuple[str, ...]:
        """All that this machine and these ranks could serve."""
        found: tuple[str, ...] = WITH_GPU if self.has_gpu else WITHOUT_GPU
        if self.group.ranks > 1:
            found += OF_RANKS if self.has_gpu else OF_RANKS[:-1]
        return tuple(name for name in found if self.hot_share or "hot" not in name)  # a tier of nothing helps nobody

    def kind(self, name: str) -> str:
        """A placement's name among the formulas."""
        return name if self.has_gpu or name == "memory" else f"{name}, no GPU"

    def block(self, tokens: int, phase: str) -> float | None:
        """Seconds of a block in a step of so many tokens of each rank; None where nothing is known of it.

        Where no block time was given, by the machine's rates: the longer of what reading its weights takes, and its
        operations. A given time is that of a decode step; a prompt takes as long, or as its operations.
        """
        backbone = self.model.backbone
        if backbone is None or (self.block_s is not None and phase == "decode"):
            return self.block_s
        # Ranks that split one copy of the experts; what else is no expert, attention before all, each has itself.
        ranks = min(self.weights_over, self.group.ranks)
        together = tokens * ranks
        parts = backbone.blocks * self.weights_over
        computed = block_seconds(backbone.active_values / parts, together, self.machine[self._compute])
        read = backbone.step_bytes(together, ranks) / parts / self.machine[self._weights]
        return max(computed, read if self.block_s is None else self.block_s)

    @property
    def block_source(self) -> str:
        """Where a block's seconds are from."""
        is_given, backbone = self.block_s is not None, self.model.backbone
        if backbone is None and not is_given:
            return "unknown: give --block-time"
        if backbone is None or (is_given and not self.prompts):
            return "given"
        read = "given; of a prompt as long" if is_given else f"reading its weights ({self._weights})"
        if self.weights_over == 1:
            who = "by one that does all: where several split its weights it is less (--weights-over)"
        else:
            who = f"by each of {self.weights_over} that split its weights"
        return f"{read} or its operations ({self._compute}), the longer, {who}; {backbone.source}"

    @property
    def _compute(self) -> str:
        """The rate of operations."""
        return "compute" if self.has_gpu else "processor"

    @property
    def _weights(self) -> str:
        """The rate at which weights are read."""
        return "device" if self.has_gpu else "memory"

    @property
    def step_blocks(self) -> tuple[int, str]:
        """Blocks of a step, and where their number is from."""
        if self.blocks is not None:
            return self.blocks, "given"
        if self.model.backbone is not None:
            return self.model.backbone.blocks, "as published"
        return max(self.model.config.layer_ids) + 1, "at least, for its last Engram layer: say how many with --blocks"


def answer(question: Question) -> dict[str, Any]:
    """Everything that is predicted, and the recommendation.

    Returns:
        model, machine, reads, block, placements and recommendation, as JSON takes them: bytes, seconds and
        joules, each prediction with the name of its formula, `formulas` with what the names mean.
    """
    placements = [_placement(question, name) for name in question.placements]
    return {
        "model": _model(question.model),
        "machine": {**asdict(question.machine), "rates": _rates(question.machine)},
        "reads": asdict(question.reads),
        "batches": list(question.batches),
        "prompts": list(question.prompts),
        "group": asdict(question.group),
        "hot_share": question.hot_share,
        "block": _block(question),
        "placements": placements,
        "recommendation": recommend(placements),
        "formulas": FORMULAS,
    }


def _rates(machine: Machine) -> dict[str, Any]:
    return {name: {**asdict(rate), "unit": UNITS[name]} for name, rate in machine.rates.items()}


def _block(question: Question) -> dict[str, Any]:
    blocks, source = question.step_blocks
    return {
        "seconds": question.block_s,  # those that were given; what is estimated goes by the step, and stands there
        "source": question.block_source,
        "formula": "window",
        "weights_over": question.weights_over,
        "blocks": blocks,
        "blocks_source": source,
    }


def _model(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "config": asdict(model.config),
        "rows": list(model.rows),
        "table_bytes": model.table_bytes,
        "row_bytes": model.config.row_bytes(),
        "rows_per_token": model.config.rows_per_token(),
        "backbone": None if model.backbone is None else asdict(model.backbone),
    }


def _placement(question: Question, name: str) -> dict[str, Any]:
    held = _held(question, name)
    room = {"gpu": question.machine.gpu or 0, "host": question.machine.host, "disk": question.machine.disk}
    lacking = {tier: held[tier] - room[tier] for tier in held if held[tier] > room[tier]}
    resident = _held(question, "device" if question.has_gpu else "memory")
    place = "gpu" if question.has_gpu else "host"
    return {
        "placement": name,
        "fits": not lacking,
        "lacking": lacking,
        "held": held,
        "freed": resident[place] - held[place],
        "freed_where": _WHERE[place],
        "formula": "held",
        "steps": [
            *(_step(question, name, "decode", batch) for batch in question.batches),
            *(_step(question, name, "prefill", prompt) for prompt in question.prompts),
        ],
    }


def _held(question: Question, name: str) -> dict[str, int]:
    model = question.model
    hot_rows = round(question.hot_share * sum(model.rows))  # the share is of all layers' rows together
    largest = max(question.batches + question.prompts)
    held = held_bytes(model.config, model.rows, largest, hot_rows, question.group)
    if name == "memory":
        return {"gpu": 0, "host": model.table_bytes, "disk": 0}
    if question.has_gpu:
        return held[name]
    # Without GPUs each process of the machine has in host memory what its GPU would hold.
    return {**held[name], "gpu": 0, "host": held[name]["host"] + question.group.per_machine * held[name]["gpu"]}


def _step(question: Question, name: str, phase: str, tokens: int) -> dict[str, Any]:
    """What one step of so many tokens moves, takes and costs."""
    config, reads, group = question.model.config, question.reads, question.group
    prompt = phase == "prefill"
    rows, share = tokens * config.rows_per_token(), (reads.prompt_distinct if prompt else reads.distinct)[tokens]
    kind = question.kind(name)
    hits = reads.hits if kind in HOT else 0.0
    layers, row_bytes = len(config.layer_ids), config.row_bytes()
    of_layer = (kind, rows / layers, rows / layers * share, row_bytes, hits, group)
    fetch = [seconds(question.machine, *of_layer)] * layers  # every layer reads as many rows
    block = question.block(tokens, phase)
    beyond = None if block is None else beyond_seconds(fetch, config.layer_ids, block)
    exposed = None if beyond is None else beyond + beside_seconds(question.machine, kind, fetch, beyond)
    return {
        "phase": phase,
        "tokens": tokens,
        "rows": rows,
        "distinct_rows": rows * share,
        "bytes": {tier: layers * nbytes for tier, nbytes in moved_bytes(*of_layer).items()},
        "seconds": sum(fetch),
        "block_s": block,
        "window_formula": "window",
        "beyond_s": beyond,
        "beyond_formula": "beyond",
        "exposed_s": exposed,
        "exposed_formula": "exposed",
        "loss": None if block is None or exposed is None else exposed / (question.step_blocks[0] * block),
        "loss_formula": "loss",
        "formula": f"time.{name}",
        "price": _prices(question, kind, tokens, rows, share),
        "joules": _joules(tier_shares(kind, hits, group), rows, share, row_bytes),
    }


def _joules(tiers: Mapping[str, float], rows: float, distinct: float, row_bytes: int) -> dict[str, Any]:
    """Least and most; repeats within a step come from the tier, too, except where a file is read once for all."""
    parts = [
        energy.joules(energy.TIERS[tier], rows * share * (distinct if tier == "file" else 1.0), row_bytes)
        for tier, share in tiers.items()
    ]
    return {"least": sum(low for low, _ in parts), "most": sum(high for _, high in parts), "formula": "energy"}


def _prices(question: Question, kind: str, tokens: int, rows: int, distinct: float) -> dict[str, Any]:
    """The rows' price over that of resident rows, alone and as a part of the whole model's."""
    model, reads, backbone = question.model, question.reads, question.model.backbone

    def rows_price(buried: float, since: float) -> float:
        counts = (reads.first, distinct, reads.reuse_root)
        return price.rows_price(rows, model.config.row_bytes(), model.table_bytes, *counts, buried, since)

    pinned = rows_price(0.0, 0.0)
    found = {"rows": pinned, "over_resident": 1.0, "whole_model": 1.0, "formula": "price"}
    behind = HOT.get(kind, (kind, kind))[1]
    # In fast memory, of whichever rank: as resident, since a wire has no price.
    if OWNED.get(behind, behind) in ("device", "memory"):
        return found
    if backbone is None:
        # Nobody knows what lies above the rows.
        return {**found, "rows": None, "over_resident": None, "whole_model": None}
    read = backbone.step_bytes(tokens)
    far = rows_price(backbone.live_bytes, read)
    if kind in HOT:  # a read that hits is a read of a table above the weights
        far = reads.hits * pinned + (1 - reads.hits) * far
    weights = price.weights_price(read, backbone.blocks)
    return {**found, "rows": far, "over_resident": far / pinned, "whole_model": (weights + far) / (weights + pinned)}


def recommend(placements: list[dict[str, Any]]) -> dict[str, Any]:
    """The placement to take, and why, in a sentence.

    Of those that fit: one that frees the most of the accelerator's memory among those that lose no more than TOLERATED
    of any step, of equals the one that loses less of decode steps; if there is none, the one that loses the least of
    that step of which it loses the most.
    """
    fitting = [p for p in placements if p["fits"]]
    if not fitting:
        least = min(placements, key=lambda p: (sum(p["lacking"].values()), sum(p["held"].values())))
        lacks = ", ".join(f"{size(n)} of {_WHERE[tier]}" for tier, n in least["lacking"].items())
        return {
            "placement": None,
            "reason": f"No placement fits: {least['placement']} comes closest and lacks {lacks}.",
        }
    if any(None in _losses(p) for p in fitting):
        best = min(fitting, key=lambda p: sorted((step["seconds"] for step in p["steps"]), reverse=True))
        why = "it fits and its longest fetch is the shortest; with --block-time it can be said what of it is hidden."
        return {"placement": best["placement"], "reason": f"{best['placement']}: {why}"}
    tolerable = [p for p in fitting if _losses(p)[0] <= TOLERATED]
    # A per cent of the most that any holds is as good as nothing: a buffer's size is to decide nothing.
    least = max((p["freed"] for p in tolerable), default=0) - max(max(p["held"].values()) for p in placements) / 100
    equals = [p for p in tolerable if p["freed"] >= least]
    best = min(equals, key=lambda p: [worst["loss"] for worst in _worst(p)]) if equals else min(fitting, key=_losses)
    return {"placement": best["placement"], "reason": _reason(best, placements, bool(tolerable))}


def _losses(placement: dict[str, Any]) -> list[Any]:
    """The shares of the steps that the placement loses, the largest first; None where that is not known."""
    losses = [step["loss"] for step in placement["steps"]]
    return losses if None in losses else sorted(losses, reverse=True)


def _worst(placement: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the decode steps, and of the prompts, if there are any, that of which the placement loses the most."""
    steps = sorted(placement["steps"], key=lambda step: step["loss"])
    return [found[-1] for phase in _PHASES if (found := [step for step in steps if step["phase"] == phase])]


def _reason(best: dict[str, Any], placements: list[dict[str, Any]], tolerable: bool) -> str:
    losses = " and ".join(
        f"{percent(step['loss'])} ({time(step['exposed_s'])}) of {_PHASES[step['phase']]} of "
        f"{in_tokens(step['tokens'])}"
        for step in _worst(best)
    )
    least = f"nothing that fits loses less than {percent(TOLERATED)} of every step; at its worst it loses the least"
    says = "it loses at most" if tolerable else f"{least},"
    frees = f", and holds {size(best['freed'])} less {best['freed_where']} than a resident table" * (best["freed"] > 0)
    no_room = [p["placement"] for p in placements if not p["fits"]]
    without = f"; {', '.join(no_room)} would not fit" if no_room else ""
    unmeasured = "; what blocks lose beside rows of other ranks was never measured" * (best["placement"] in OF_RANKS)
    return f"{best['placement']}: {says} {losses}{frees}{unmeasured}{without}."
