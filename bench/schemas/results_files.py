"""Which record each results file is."""

from __future__ import annotations

from typing import Any

from bench.schemas import lookup_speed, production, served, sweeps, toy, wall

RESULTS: dict[str, Any] = {
    "bytedmd_sweeps": sweeps.Results,
    "bytedmd_toy": toy.Results,
    "end_to_end": served.Results,
    "gpu_wall": wall.Results,
    "lookup_speed": lookup_speed.Results,
    "production": production.Results,
}
