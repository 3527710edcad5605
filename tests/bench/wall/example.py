"""A hand-made wall-time results file whose numbers can be checked in the head.

Copies run at 10 GB/s and a step needs 10,000 unique rows of 100 B, so the floor is 100 us. `resident` takes 10 ms;
each other run takes a round number more. The table has a 640th of the rows of one that was published. All samples
of a round share one factor of `DRIFT`, so that paired ratios are exact and medians are those at factor 1; only the
second `resident` differs from round to round, by 1 %.
"""

from typing import Any

DRIFT = [1.0, 1.1, 0.9, 1.05, 0.95]
JITTER = [1.0, 1.01, 0.99, 1.01, 0.99]
MS = 1e-3
UNIQUE_BYTES = 1_000_000
COPY = 10e9
DISK_READS = 4e6
FLOOR = UNIQUE_BYTES / COPY
GATHER_FLOOR = 2e-6
ROWS = 10_737_418
STORED = {"preset": "v41-flash", "row_dtype": "float8_e4m3fn", "layout": "packed"}
NAMES = {"cpu": "Example CPU 9000", "cuda": "Example GPU 100"}
DIGEST = "ab" * 32


def example(device: str = "cuda", steps: int = 1) -> dict[str, Any]:
    """A valid results dict of `steps` shapes, measured on `device`."""
    cpu = device == "cpu"
    return {
        "benchmark": "gpu_wall",
        "device": device,
        "device_name": NAMES[device],
        "configuration": {"seed": 0},
        "environment": environment(cpu),
        "git": {"commit": "c0ffee" + 34 * "0", "dirty": False},
        "stream": {"name": "python-stdlib", "sha256": DIGEST, "tokens": 1_000_000},
        "limits": limits(cpu),
        "steps": [step(device, number) for number in range(steps)],
        "components": components(device),
        "components_skipped": [{"case": "up_embed", "why": "no CUDA device"}] if cpu else [],
    }


def older(results: dict[str, Any]) -> dict[str, Any]:
    """The same as results were written before they said how rows are stored and of which table they are."""
    for one in results["steps"]:
        for name in ("published_rows", *STORED):
            del one["table"][name]
        for found in one["runs"]:
            del found["table"]
    return results


def environment(cpu: bool) -> dict[str, Any]:
    """The machine."""
    accelerator = {
        "name": NAMES["cuda"],
        "driver": "570.1",
        "cuda": "12.8",
        "torch": "2.13.0",
        "pcie_generation": 5,
        "pcie_width": 16,
        "clocks_mhz": {"sm": 1980, "memory": 2619},
        "power_limit_w": 700.0,
        "memory_bytes": 150_000_000_000,
        "numa_node": 0,
        "unknown": {},
    }
    return {
        "python": "3.11.7",
        "implementation": "CPython",
        "platform": "Linux",
        "cpu": NAMES["cpu"],
        "cpu_count": 2,
        "memory_bytes": 32 << 30,
        "packages": {"torch": "2.13.0"},
        "accelerator": None if cpu else accelerator,
        "huge_pages": 0.995,
        "page_size": 4096,
        "pinned": not cpu,
    }


def limits(cpu: bool) -> dict[str, Any]:
    """What the machine can do at most: copies at 10 GB/s, 4 million reads/s from the disk."""
    copy = {"bytes_per_s": COPY, "samples_s": [0.1] * 3, "bytes": 1 << 30}
    return {
        "copy": {**copy, "what": "memcpy in RAM" if cpu else "pinned host to device"},
        "gather": None if cpu else {**copy, "bytes_per_s": 1e12, "what": "device to device"},
        "disk": {
            "reads_per_s": DISK_READS,
            "bytes_per_s": 4096 * DISK_READS,
            "what": "fio 4 KiB random reads, O_DIRECT, depth 64",
        },
    }


def step(device: str, number: int = 0) -> dict[str, Any]:
    """Number 0: 4,096 tokens of prefill, the layer alone. Odd ones decode, later ones have a backbone."""
    decode = number % 2 == 1
    names = ["no_engram", "resident", "offload_naive", "offload_prefetch"] if device == "cuda" else ["resident"]
    return {
        "shape": {"phase": "decode", "batch": 64, "tokens": 1, "context": 1024}
        if decode
        else {"phase": "prefill", "batch": 1, "tokens": 4096, "context": 0},
        "table": {
            "params": 1e9 * (1 + number // 2),
            "rows": ROWS,
            "row_bytes": 100,
            "bytes": 1 << 30,
            "columns": 16,
            "layer_ids": [1],
            "published_rows": 640 * ROWS,
            **STORED,
        },
        "backbone": "qwen3-4b" if number > 1 else "none",
        "blocks": 2,
        "dtype": "bfloat16",
        "device": device,
        "prediction": {
            "rows": 16_000,
            "unique_rows": 10_000,
            "bytes_requested": 1.6e6,
            "bytes_unique": 1e6,
            "bytes_paged": 4.096e7,
            "disk_reads": 1e4,
        },
        "runs": [*(plain_run(name) for name in names), *other_runs(device)],
    }


def plain_run(variant: str) -> dict[str, Any]:
    """The first run of a variant that needs nothing special: step and exposed time in ms by its name."""
    times = {
        "no_engram": (9.0, None),  # -10 %
        "resident": (10.0, 0.01),  # waits 10 us for its own memory: 5 x the floor
        "offload_naive": (10.4, 0.4),  # +4 %, 4 x the floor
        "offload_prefetch": (10.05, 0.04),  # +0.5 %, within the noise; 90 % hidden
    }
    schedule = {"offload_naive": "synchronous", "offload_prefetch": "prefetched"}.get(variant, "in place")
    return run(variant, schedule, *times[variant], fetches=variant.startswith("offload"))


def other_runs(device: str) -> list[dict[str, Any]]:
    """The second `resident`, the placements on the accelerator's side, and the disk cold and warm."""
    again = run("resident", "in place", 10.0, 0.01, fetches=False)
    again.update(repeat=1, step_s=[s * jitter for s, jitter in zip(again["step_s"], JITTER)])
    disk = [
        run("offload_disk", "synchronous", 15.0, 5.0, "cold"),  # +50 %, 2 x the floor
        run("offload_disk", "prefetched", 11.0, 0.5, "cold"),  # +10 %, 90 % hidden
        run("offload_disk", "synchronous", 12.0, 2.0, "warm"),
        run("offload_disk", "prefetched", 10.2, 0.5, "warm"),  # 75 % hidden
    ]
    for one in disk:
        cold = one["page_cache"] == "cold"
        one["limit_s"] = 10_000 / DISK_READS if cold else None
        one["limit_why"] = "unique rows / the disk's reads per second" if cold else "the page cache has no known limit"
        one["bytes"]["counter_what"] = "/proc/self/io read_bytes"
    if device == "cpu":
        return [again, *disk]
    uva = run("offload_uva", "prefetched", 10.2, 0.2)  # +2 %, 50 % hidden against offload_naive
    uva["bytes"]["copied"] = uva["bytes"]["predicted"] = None
    hot = run("offload_hot", "prefetched", 10.3, 0.1)  # +3 %, 75 % hidden against offload_naive
    hot["hot"] = {"hit_rate": 0.75, "used_share": 0.02, "hot_rows": 100_000}
    return [again, uva, hot, *disk]


def run(
    variant: str, schedule: str, step_ms: float, exposed_ms: float | None, page_cache=None, fetches=True
) -> dict[str, Any]:
    """One run of five rounds; `exposed_ms` None: it has no Engram layer; `fetches`: rows come from elsewhere."""
    count = len(DRIFT)
    place = "disk" if page_cache else "host" if fetches else "device"
    return {
        "variant": variant,
        "schedule": schedule,
        "page_cache": page_cache,
        "repeat": 0,
        "table": {"share": 1 / 640, **STORED},
        "step_s": [step_ms * MS * drift for drift in DRIFT],
        "exposed_s": [] if exposed_ms is None else [exposed_ms * MS * drift for drift in DRIFT],
        "limit_s": None if exposed_ms is None else FLOOR if fetches else GATHER_FLOOR,
        "limit_why": "no rows are fetched" if exposed_ms is None else "unique bytes / copy bandwidth",
        "bytes": {
            "from_ids": [] if exposed_ms is None else [UNIQUE_BYTES] * count,
            "copied": [] if exposed_ms is None else [UNIQUE_BYTES] * count if fetches else None,
            "counter": [UNIQUE_BYTES + 50_000] * count if fetches else None,
            "counter_what": "NVML PCIe receive" if fetches else None,
            "predicted": [UNIQUE_BYTES] * count if fetches else None,
            "predicted_counter": None,
        },
        "held": {"device": 0, "host": 0, "disk": 0, place: 0 if exposed_ms is None else 1 << 30},
        "hot": None,
        "energy": None,
        "energy_why": "the window is shorter than 10 s",
        "spans": spans(schedule, step_ms * MS, None if exposed_ms is None else exposed_ms * MS),
        "rows_sha256": None if exposed_ms is None else DIGEST,
    }


def spans(schedule: str, end: float, exposed: float | None) -> list[list[Any]]:
    """A step of two blocks: the fetch before the second one in the same lane, or beside the first in others."""
    whole = ["step", "main", 0.0, end]
    if exposed is None:
        return [whole, ["compute", "main", 0.0, end]]
    half = (end - exposed) / 2
    tail = [["wait", "main", half, half + exposed], ["compute", "main", half + exposed, end]]
    if schedule == "prefetched":
        fetch = [["hash", "background", 0.0, 0.3 * half], ["gather", "background", 0.3 * half, half]]
        return [whole, *fetch, ["copy", "stream", half, half + exposed], ["compute", "main", 0.0, half], *tail]
    return [whole, ["hash", "main", 0.0, 0.1 * half], ["compute", "main", 0.1 * half, half], *tail]


def components(device: str) -> list[dict[str, Any]]:
    """Hash: 5 MB in 1 ms, twice its limit. Compute: 8 GFLOP in 2 ms, no limit known."""
    common = {"device": device, "batch": 64, "tokens": 4096, "dtype": "bfloat16"}
    hashing = {"case": "hash", "what": "row numbers of all columns", "bytes": 5_000_000, "flops": None}
    compute = {"case": "compute", "what": "keys, values and the gate", "bytes": None, "flops": 8_000_000_000}
    return [
        {**common, **hashing, "samples_s": [MS * d for d in DRIFT], "limit_s": 0.5 * MS, "limit_why": "bytes / copy"},
        {**common, **compute, "samples_s": [2 * MS * d for d in DRIFT], "limit_s": None, "limit_why": "peak unknown"},
    ]
