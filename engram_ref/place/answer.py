"""The answer: every placement of a model's table on a machine, what it takes and what it costs; and which one to take.

answer = answer(Question(model, machine, reads, batches=(1, 64)))     # a dict that JSON takes
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from engram_ref.place import energy, price
from engram_ref.place.formulas import FORMULAS, exposed_seconds, held_bytes, moved_bytes, seconds
from engram_ref.place.machine import Machine
from engram_ref.place.model import Model
from engram_ref.place.reads import Reads

WITH_GPU = ("device", "hot", "uva", "host", "file")
WITHOUT_GPU = ("memory", "file")
_WHERE = {"gpu": "GPU memory", "host": "host memory", "disk": "disk"}
TOLERATED = 0.03  # of a block's time before the layers that a placement may expose and still be as good as resident


@dataclass(frozen=True)
class Question:
    """What is to be placed, where, and how it is used.

    Attributes:
        reads: of a text, for each of the batch sizes.
        batches: tokens of a decode step, each of a sequence of its own.
        block_s: seconds of a decoder block; None: at least its weights' bytes over the bandwidth.
        hot_share: of all rows, that the hot tier holds.
    """

    model: Model
    machine: Machine
    reads: Reads
    batches: tuple[int, ...]
    block_s: float | None = None
    hot_share: float = 0.1

    @property
    def has_gpu(self) -> bool:
        """Whether an accelerator computes."""
        return self.machine.gpu is not None

    def block(self) -> tuple[float | None, str]:
        """Seconds of a block, and where they are from."""
        if self.block_s is not None:
            return self.block_s, "given"
        backbone = self.model.backbone
        if backbone is None:
            return None, "unknown: give --block-time"
        name = "device" if self.has_gpu else "memory"
        least = backbone.step_bytes / backbone.blocks / self.machine[name]
        return least, f"at least: active weights of a block / {name} bandwidth ({backbone.source})"


def answer(question: Question) -> dict[str, Any]:
    """Everything that is predicted, and the recommendation.

    Returns:
        model, machine, reads, block, placements and recommendation, as JSON takes them: bytes, seconds and
        joules, each prediction with the name of its formula, `formulas` with what the names mean.
    """
    block, why = question.block()
    placements = [_placement(question, name, block) for name in (WITH_GPU if question.has_gpu else WITHOUT_GPU)]
    return {
        "model": _model(question.model),
        "machine": asdict(question.machine),
        "reads": asdict(question.reads),
        "batches": list(question.batches),
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


def _placement(question: Question, name: str, block: float | None) -> dict[str, Any]:
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
        "steps": [_step(question, name, batch, block) for batch in question.batches],
    }


def _held(question: Question, name: str) -> dict[str, int]:
    model = question.model
    hot_rows = round(question.hot_share * sum(model.rows))
    held = held_bytes(model.config, model.rows, max(question.batches), hot_rows)
    if name == "memory":
        return {"gpu": 0, "host": model.table_bytes, "disk": 0}
    return held[name] if question.has_gpu else {**held[name], "gpu": 0}


def _step(question: Question, name: str, batch: int, block: float | None) -> dict[str, Any]:
    """What one step of so many tokens moves, takes and costs."""
    config, reads = question.model.config, question.reads
    rows, share = batch * config.rows_per_token(), reads.distinct[batch]
    hits = reads.hits if name == "hot" else 0.0
    kind = "file, no GPU" if name == "file" and not question.has_gpu else name
    per_layer = rows / len(config.layer_ids)
    row_bytes = config.row_bytes()
    layer = seconds(question.machine, kind, per_layer, per_layer * share, row_bytes, hits)
    fetch = [layer] * len(config.layer_ids)
    return {
        "tokens": batch,
        "rows": rows,
        "distinct_rows": rows * share,
        "bytes": moved_bytes(kind, rows, rows * share, row_bytes, hits),
        "seconds": sum(fetch),
        "exposed_s": None if block is None else exposed_seconds(fetch, config.layer_ids, block),
        "formula": f"time.{name}",
        "price": _prices(question, name, batch),
        "joules": _joules(name, rows, share, row_bytes, hits),
    }


def _joules(name: str, rows: float, share: float, row_bytes: int, hits: float) -> dict[str, Any]:
    """Least and most; repeats within a step come from the tier, too, except where a file is read once for all."""
    tiers = energy.TIERS
    if name == "hot":
        parts = [
            energy.joules(tiers["device"], rows * hits, row_bytes),
            energy.joules(tiers["host"], rows - rows * hits, row_bytes),
        ]
    else:
        tier = {"uva": "host"}.get(name, name)
        parts = [energy.joules(tiers[tier], rows * share if name == "file" else rows, row_bytes)]
    return {"least": sum(low for low, _ in parts), "most": sum(high for _, high in parts), "formula": "energy"}


def _prices(question: Question, name: str, batch: int) -> dict[str, Any]:
    """The rows' price over that of resident rows, alone and as a part of the whole model's."""
    model, reads, backbone = question.model, question.reads, question.model.backbone
    rows, nbytes = batch * model.config.rows_per_token(), model.config.row_bytes()

    def rows_price(buried: float, unread: float) -> float:
        return price.rows_price(
            rows, nbytes, model.table_bytes, reads.first, reads.distinct[batch], reads.reuse_root, buried, unread
        )

    pinned = rows_price(0.0, 0.0)
    found = {"rows": pinned, "over_resident": 1.0, "whole_model": 1.0, "formula": "price"}
    if name in ("device", "memory"):
        return found
    if backbone is None:
        return {**found, "rows": None, "over_resident": None, "whole_model": None}
    far = rows_price(backbone.step_bytes, backbone.live_bytes)
    if name == "hot":  # a read that hits is a read of a table above the weights
        far = reads.hits * pinned + (1 - reads.hits) * far
    weights = price.weights_price(backbone.step_bytes, backbone.blocks)
    return {**found, "rows": far, "over_resident": far / pinned, "whole_model": (weights + far) / (weights + pinned)}


def recommend(placements: list[dict[str, Any]], block: float | None) -> dict[str, Any]:
    """The placement to take, and why, in a sentence.

    Of those that fit: one that frees the most of the accelerator's memory among those whose fetches hide behind the
    blocks before the layers; if none hides, the one that waits the shortest, and the largest batch counts.
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
        best = min(fitting, key=lambda p: p["steps"][-1]["seconds"])
        why = "it fits and its fetch is the shortest; with --block-time it can be said what of it is hidden."
        return {"placement": best["placement"], "reason": f"{best['placement']}: {why}"}
    hidden = [p for p in fitting if p["steps"][-1]["exposed_s"] <= TOLERATED * block]
    best = max(hidden, key=_freed_then_fast) if hidden else min(fitting, key=lambda p: p["steps"][-1]["exposed_s"])
    return {"placement": best["placement"], "reason": _reason(best, placements, bool(hidden))}


def _freed_then_fast(placement: dict[str, Any]) -> tuple[float, float]:
    """Freed memory counts in steps of a per cent of what is held, so that a buffer's size decides nothing."""
    largest = max(placement["held"].values()) or 1
    return round(100 * placement["freed"] / largest), -placement["steps"][-1]["seconds"]


def _reason(best: dict[str, Any], placements: list[dict[str, Any]], hidden: bool) -> str:
    step = best["steps"][-1]
    wait = (
        f"at {step['tokens']:,} tokens a step its {time(step['seconds'])} of fetching hide behind the blocks before it"
        if hidden
        else f"nothing that fits hides its fetch at {step['tokens']:,} tokens a step, and it waits the shortest, "
        f"{time(step['exposed_s'])}"
    )
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
