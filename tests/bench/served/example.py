"""A hand-made end-to-end results file whose numbers can be checked in the head.

Without Engram a round takes 1 s of prefill and 10 s of decoding, in 100 steps of 100 ms; own compute adds 2 %, the
lookup 1 %, what prefetching could not hide half a per cent. All samples of a round share one factor of `DRIFT`, so that
paired shares are exact; only the second `resident` differs, by 0.1 %.
"""

from typing import Any

from bench.served.numbers import NO_LOOKUP
from tests.bench.wall.example import DIGEST, environment, limits

DRIFT = [1.0, 1.1, 0.9, 1.05, 0.95]
JITTER = [1.0, 1.001, 0.999, 1.001, 0.999]
STEPS = 100
NO_ENGRAM = 1.0
OWN, LOOKUP, NOT_HIDDEN = 0.02, 0.01, 0.005
WINDOW = 300e-6
ROWS: list[tuple[str, str, float, float | None]] = [  # label, schedule, time, latency of a bus
    ("no_engram", "none", NO_ENGRAM, None),
    ("own_compute", "none", NO_ENGRAM + OWN, None),
    ("resident", "in place", NO_ENGRAM + OWN + LOOKUP, None),
    ("resident again", "in place", NO_ENGRAM + OWN + LOOKUP, None),
    ("offload_naive", "synchronous", 1.2, None),
    ("offload_prefetch", "prefetched", NO_ENGRAM + OWN + LOOKUP + NOT_HIDDEN, None),
    ("throttled 56 us", "prefetched", NO_ENGRAM + OWN + LOOKUP + NOT_HIDDEN, 56e-6),
    ("throttled 2000 us", "prefetched", 1.05, 2e-3),
    ("throttled 5000 us", "prefetched", 1.08, 5e-3),
]


def example(device: str = "cuda", rounds: int = len(DRIFT)) -> dict[str, Any]:
    """A valid results dict of one case, measured on `device`."""
    cpu = device == "cpu"
    known = {**environment(cpu), "packages": {"torch": "2.13.0", "transformers": "5.23.0"}}
    return {
        "schema_version": 1,
        "benchmark": "end_to_end",
        "device": device,
        "device_name": "Example",
        "configuration": {"seed": 0},
        "code_sha256": DIGEST,
        "environment": {key: value for key, value in known.items() if key not in ("huge_pages", "pinned")},
        "git": {"commit": "c0ffee" + 34 * "0", "dirty": False},
        "limits": {key: value for key, value in limits(cpu).items() if key != "disk"},
        "processes": [{"started": "2026-01-01T00:00:00+00:00", "kept": 0, "dropped": 0}],
        "cases": [case(device, rounds)],
    }


def case(device: str = "cuda", rounds: int = len(DRIFT)) -> dict[str, Any]:
    """One backbone, batch and stream."""
    return {
        "backbone": "qwen3-8b",
        "blocks": 36,
        "parameters": 8_000_000_000,
        "weights": "random",
        "weight_bytes": {"model": 15_000_000_000, "engram": 50_000_000},
        "dtype": "bfloat16",
        "device": device,
        "batch": 4,
        "sequences": 8,
        "prompt_tokens": [100, 1024],
        "output_tokens": [100, 1024],
        "stream": {"kind": "text", "name": "python-stdlib", "sha256": DIGEST},
        "layer_id": 1,
        "table": {
            "preset": "v41-flash",
            "parameters": 25_600,
            "rows": 100,
            "row_bytes": 264,
            "columns": 24,
            "bytes": 26_400,
            "row_dtype": "float8_e4m3fn",
            "huge_pages": 1.0,
        },
        "needs": {"device": {"weights": 1, "keys and values": 1 << 30}, "host": {"table": 26_400}},
        "rounds": [
            {"round": r, "prompt_tokens": 900, "output_tokens": 408, "rows_requested": 1000, "rows_unique": 500}
            for r in range(rounds)
        ],
        "labels": [label for label, *_ in ROWS],
        "rows": [row(number, device, rounds) for number in range(len(ROWS))],
    }


def row(number: int, device: str, rounds: int) -> dict[str, Any]:
    """A variant."""
    label, schedule, times, latency = ROWS[number]
    resident = label.startswith("resident")
    where = None if label in NO_LOOKUP else "device" if resident else "disk" if "disk" in label else "host"
    return {
        "label": label,
        "variant": "throttled" if latency else label.removesuffix(" again"),
        "schedule": "in graph" if resident and device == "cuda" else schedule,
        "repeat": int(label.endswith("again")),
        "hot_share": None,
        "bus": latency and {"bytes_per_s": None, "latency_s": latency},
        "page_cache": None,
        "device": device,
        "device_label": "CPU Example" if device == "cpu" else "GPU Example",
        "graphs": {"used": device == "cuda", "why": None if device == "cuda" else "not on CUDA"},
        "held": {place: 26_400 * (place == where) for place in ("device", "host", "disk")},
        "freed": {"value": 0 if resident else 26_400, "why": None},
        "weights": {"value": None, "why": "a CPU"},
        "pcie": {"value": None, "why": "no driver"},
        "energy": {"value": None, "why": "not asked for: --energy"},
        "rounds": [
            sample(r, times * (JITTER[r] if label == "resident again" else 1), 264_000 * (where in ("host", "disk")))
            for r in range(rounds)
        ],
    }


def sample(number: int, times: float, copied: int) -> dict[str, Any]:
    """A pass of one round."""
    scale = times * DRIFT[number]
    return {
        "round": number,
        "process": 0,
        "prefill_s": [0.5 * scale, 0.5 * scale],
        "decode_s": [10.0 / STEPS * scale] * STEPS,
        "first_token_s": [0.5 * scale] * 8,
        "window_s": [WINDOW] * STEPS,
        "prefill_exposed_s": [0.0, 0.0],
        "decode_exposed_s": [1e-5] * STEPS,
        "tokens_sha256": DIGEST,
        "copied": copied,
        "lookups": 0,
        "hits": 0,
        "board": {"value": None, "why": "no driver"},
    }
