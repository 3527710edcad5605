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
    exposed_seconds,
    held_bytes,
    moved_bytes,
    prompt_block_seconds,
    seconds,
    tier_shares,
)
from engram_ref.place.group import ALONE, Group
from engram_ref.place.machine import Machine
from engram_ref.place.model import Model
from engram_ref.place.reads import Reads

WITH_GPU = ("device", "hot", "uva", "host", "hot file", "file")
WITHOUT_GPU = ("memory", "hot file", "file")
OF_RANKS = ("sharded", "hot sharded", "sharded host")  # more, where several ranks share a table; the last with a GPU
_WHERE = {"gpu": "GPU memory", "host": "host memory", "disk": "disk"}
TOLERATED = 0.03  # of a block's time before the layers that a placement may expose and still be as good as resident


@dataclass(frozen=True)
class Question:
    """What is to be placed, where, and how it is used.

    Attributes:
        reads: of a text, for each of the batch sizes.
        batches: tokens of a decode step of a rank, each of a sequence of its own.
        prompts: tokens of a prompt, each a step of its own.
        group: the ranks, and how they reach each other.
        block_s: seconds of a decoder block; None: at least its weights' bytes over the bandwidth.
        hot_share: of all rows, that the hot tier holds.
    """

    model: Model
    machine: Machine
    reads: Reads
    batches: tuple[int, ...]
    block_s: float | None = None
    hot_share: float = 0.1
    prompts: tuple[int, ...] = ()
    group: Group = ALONE

    @property
    def has_gpu(self) -> bool:
        """Whether an accelerator computes."""
        return self.machine.gpu is not None

    @property
    def placements(self) -> tuple[str, ...]:
        """All that this machine and these ranks could serve."""
        alone = WITH_GPU if self.has_gpu else WITHOUT_GPU
        if self.group.ranks == 1:
            return alone
        return alone + (OF_RANKS if self.has_gpu else OF_RANKS[:-1])

    def kind(self, name: str) -> str:
        """A placement's name among the formulas."""
        return name if self.has_gpu or name == "memory" else f"{name}, no GPU"

    def prompt_block(self, tokens: int) -> float | None:
        """Seconds of a block on a prompt, at least: those of a decode step, or what its operations take."""
        block, _ = self.block()
        backbone = self.model.backbone
        if backbone is None or block is None:
            return block
        rate = self.machine["compute" if self.has_gpu else "processor"]
        return max(block, prompt_block_seconds(backbone.active_values / backbone.blocks, tokens, rate))

    def block(self) -> tuple[float | None, str]:
        """Seconds of a block in a decode step, and where they are from."""
        if self.block_s is not None:
            return self.block_s, "given"
        backbone = self.model.backbone
        if backbone is None:
            return None, "unknown: give --block-time"
        name = "device" if self.has_gpu else "memory"
        # The experts of one token alone: a batch reads more.
        least = backbone.step_bytes / backbone.blocks / self.machine[name]
        return least, f"at least: active weights of a block / {name} bandwidth ({backbone.source})"


def answer(question: Question) -> dict[str, Any]:
    """Everything that is predicted, and the recommendation.

    Returns:
        model, machine, reads, block, placements and recommendation, as JSON takes them: bytes, seconds and
        joules, each prediction with the name of its formula, `formulas` with what the names mean.
    """
    block, why = question.block()
    placements = [_placement(question, name) for name in question.placements]
    return {
        "model": _model(question.model),
        "machine": asdict(question.machine),
        "reads": asdict(question.reads),
        "batches": list(question.batches),
        "prompts": list(question.prompts),
        "group": asdict(question.group),
        "block": {"seconds": block, "source": why, "formula": "window"},
        "placements": placements,
        "recommendation": recommend(placements, block),
        "formulas": FORMULAS,
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
    block = question.prompt_block(tokens) if prompt else question.block()[0]
    return {
        "phase": phase,
        "tokens": tokens,
        "rows": rows,
        "distinct_rows": rows * share,
        "bytes": {tier: layers * nbytes for tier, nbytes in moved_bytes(*of_layer).items()},
        "seconds": sum(fetch),
        "block_s": block,
        "window_formula": "window.prompt" if prompt else "window",
        "exposed_s": None if block is None else exposed_seconds(fetch, config.layer_ids, block),
        "formula": f"time.{name}",
        "price": _prices(question, kind, rows, share),
        "joules": _joules(tier_shares(kind, hits, group), rows, share, row_bytes),
    }


def _joules(tiers: Mapping[str, float], rows: float, distinct: float, row_bytes: int) -> dict[str, Any]:
    """Least and most; repeats within a step come from the tier, too, except where a file is read once for all."""
    parts = [
        energy.joules(energy.TIERS[tier], rows * share * (distinct if tier == "file" else 1.0), row_bytes)
        for tier, share in tiers.items()
    ]
    return {"least": sum(low for low, _ in parts), "most": sum(high for _, high in parts), "formula": "energy"}


def _prices(question: Question, kind: str, rows: int, distinct: float) -> dict[str, Any]:
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
    far = rows_price(backbone.live_bytes, backbone.step_bytes)
    if kind in HOT:  # a read that hits is a read of a table above the weights
        far = reads.hits * pinned + (1 - reads.hits) * far
    weights = price.weights_price(backbone.step_bytes, backbone.blocks)
    return {**found, "rows": far, "over_resident": far / pinned, "whole_model": (weights + far) / (weights + pinned)}


def recommend(placements: list[dict[str, Any]], block: float | None) -> dict[str, Any]:
    """The placement to take, and why, in a sentence.

    Of those that fit: one that frees the most of the accelerator's memory among those whose fetches hide behind the
    blocks before the layers; if none hides, the one that waits the shortest. The largest batch counts, and the longest
    prompt.
    """
    fitting = [p for p in placements if p["fits"]]
    if not fitting:
        least = min(placements, key=lambda p: sum(p["lacking"].values()))
        lacks = ", ".join(f"{size(n)} of {_WHERE[tier]}" for tier, n in least["lacking"].items())
        return {
            "placement": None,
            "reason": f"No placement fits: {least['placement']} comes closest and lacks {lacks}.",
        }
    if block is None:
        # The decode step decides; of equals, the prompt.
        best = min(fitting, key=lambda p: [step["seconds"] for step in _largest(p)])
        why = "it fits and its fetch is the shortest; with --block-time it can be said what of it is hidden."
        return {"placement": best["placement"], "reason": f"{best['placement']}: {why}"}
    hidden = [p for p in fitting if all(s["exposed_s"] <= TOLERATED * s["block_s"] for s in _largest(p))]
    waits = {p["placement"]: [step["exposed_s"] for step in _largest(p)] for p in fitting}
    best = max(hidden, key=_freed_then_fast) if hidden else min(fitting, key=lambda p: waits[p["placement"]])
    return {"placement": best["placement"], "reason": _reason(best, placements, bool(hidden))}


def _largest(placement: dict[str, Any]) -> list[dict[str, Any]]:
    """The step of the largest batch, and that of the longest prompt, if there is one."""
    # Ascending, so the last of a phase is the largest.
    return list({step["phase"]: step for step in placement["steps"]}.values())


def _freed_then_fast(placement: dict[str, Any]) -> tuple[float, float]:
    """The more freed memory the better; of equals, the faster fetch."""
    largest = max(placement["held"].values()) or 1
    # In steps of a per cent of what is held: a buffer's size is to decide nothing.
    return round(100 * placement["freed"] / largest), -_largest(placement)[0]["seconds"]


def _reason(best: dict[str, Any], placements: list[dict[str, Any]], hidden: bool) -> str:
    step, *prompt = _largest(best)
    at = f"at {step['tokens']:,} tokens a step"
    if hidden:
        prompts = "".join(f", and {time(p['seconds'])} in a prompt of {p['tokens']:,}," for p in prompt)
        wait = f"{time(step['seconds'])} of fetching {at}{prompts} hide behind the blocks before it"
    else:
        prompts = "".join(f", and {time(p['exposed_s'])} in a prompt of {p['tokens']:,}" for p in prompt)
        waits = f"{time(step['exposed_s'])}{prompts}"
        wait = f"nothing that fits hides its fetches {at}, and it waits the shortest, {waits}"
    frees = f", and it leaves {size(best['freed'])} of memory to others" if best["freed"] > 0 else ""
    no_room = [p["placement"] for p in placements if not p["fits"]]
    without = f"; {', '.join(no_room)} would not fit" if no_room else ""
    return f"{best['placement']}: {wait}{frees}{without}."


def size(nbytes: float) -> str:
    """Bytes in words."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(nbytes) >= unit:
            return f"{nbytes / unit:.4g} {name}"
    return f"{nbytes:.4g} B"


def time(value: float | None) -> str:
    """Seconds in words."""
    if value is None:
        return "-"
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{1e6 * value:.3g} us"
