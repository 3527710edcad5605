"""Which record each results file is."""

from __future__ import annotations

from typing import Any

from bench.schemas import definitions, lab, lookup_speed, production, ranges, ranks, served, sweeps, toy, wall

RESULTS: dict[str, Any] = {  # by the file that describes it
    "bench/schemas/sweeps.py": sweeps.Results,
    "bench/schemas/toy.py": toy.Results,
    "bench/schemas/served.py": served.Results,
    "bench/schemas/wall.py": wall.Results,
    "bench/schemas/lookup_speed.py": lookup_speed.Results,
    "bench/schemas/production.py": production.Results,
    "bench/schemas/definitions.py": definitions.Results,
    "bench/schemas/lab.py": lab.Results,
    "bench/schemas/ranks.py": ranks.Results,
    "bench/schemas/ranges.py": ranges.Results,
}
