"""The results files of sweeps: points in their canonical order, and the grid as nested lists.

What they hold is raw numbers and provenance. Ratios, classes and crossings are computed wherever they are shown
(`bench.sweeps.table`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, cast

from bench.instruments.code_digest import code_sha256
from bench.instruments.results import results_head
from bench.schemas.sweeps import Axes as AxesRecord
from bench.schemas.sweeps import Grid, GridPrices, Priced, Sweeps
from bench.schemas.sweeps import Point as PointRecord
from bench.schemas.toy import Stream as StreamRecord
from bench.setup.streams import Stream
from bench.sweeps.points import GRID_VARIANTS, SWEEPS, Axes, Case, Point, Settings, grid_case
from bench.sweeps.run import PRICING_CODE, stream_name

SCHEMA_VERSION: Final = 1


def sweeps_content(
    configuration: Any, points: Sequence[Point], records: Mapping[Case, Any], windows: Mapping[str, Stream]
) -> Sweeps:
    """The content of sweeps.json."""
    names = dict.fromkeys(point.sweep for point in points)
    return {
        "schema_version": SCHEMA_VERSION,
        **results_head("bytedmd_sweeps"),
        "configuration": configuration,
        "code_sha256": code_sha256(*PRICING_CODE),
        "streams": {name: _stream(window) for name, window in windows.items()},
        "sweeps": {
            name: {
                "setting": SWEEPS[name].setting,
                "values": list(dict.fromkeys(point.value for point in points if point.sweep == name)),
            }
            for name in names
        },
        "points": [_point(point, records[point.case]) for point in points],
    }


def _point(point: Point, record: Priced) -> PointRecord:
    case = point.case
    return {
        "sweep": point.sweep,
        "value": point.value,
        "model": case.model,
        "boundary": case.boundary,
        "variant": case.variant,
        "stream": stream_name(case.settings),
        **record,
    }


def grid_content(configuration: Any, base: Settings, axes: Axes, records: Mapping[Case, Any], window: Stream) -> Grid:
    """The content of grid.json: prices[variant][padding][share][hot][compute]."""

    def record(p: int, s: float, h: float, c: int, variant: str) -> Any:
        return records[grid_case(base, p, s, h, c, variant)]

    def nested(variant: str) -> list[Any]:
        return [
            [[[record(p, s, h, c, variant)["cost"] for c in axes.compute] for h in axes.hot] for s in axes.share]
            for p in axes.padding
        ]

    some = (axes.padding[0], axes.compute[0])  # neither decides which rows lie below
    return {
        "schema_version": SCHEMA_VERSION,
        **results_head("bytedmd_grid"),
        "configuration": configuration,
        "code_sha256": code_sha256(*PRICING_CODE),
        "stream": _stream(window),
        "axes": cast(AxesRecord, {name: list(values) for name, values in asdict(axes).items()}),
        "share_below": [
            [record(some[0], s, h, some[1], "offload_hot")["share_below"] for h in axes.hot] for s in axes.share
        ],
        "prices": cast(GridPrices, {name: nested(variant) for name, variant in GRID_VARIANTS.items()}),
    }


def _stream(window: Stream) -> StreamRecord:
    return {"name": window.name, "sha256": window.sha256, "tokens": window.tokens, "start": window.start}
