"""How fast token ids become row indices: the plain way, the NumPy definition and the compiled loop, one thread.

The baseline hashes one layer as the public demo does, in NumPy: a padded copy per shift, a product per order,
one remainder per head, then one stack, all int64. All three run in one process, interleaved, on fresh random
ids, through the public call `hasher(ids, layer_id)`, after a check that their indices are equal. Ratios are
medians of paired samples.

Two limits are measured beside them: `bare`, an object that is called in the same way and only makes the array
of indices with `np.empty`, which is nearly all of a call for one token; and the bytes of the indices over what
`np.copyto` moves into memory of the same size.

    python bench/hashing_speed.py
    python bench/hashing_speed.py --repeats 50 --out hashing_speed.json
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan, LayerPlan, NgramHasher

COMPRESSED_SIZE, PAD_COMPRESSED = 98_627, 2  # DeepSeek-V3's vocabulary, the demo's tokenizer
SIZES = ((1, 1), (1, 4096), (64, 4096))
POOL_TOKENS = 1 << 20  # ids made before the clock starts
SAMPLE_SECONDS = 0.002  # a sample repeats the call at least this long, so that the clock's steps do not count
NAMES = ("baseline", "numpy", "numba", "bare")
HASHES = NAMES[1:3]
FEW_BYTES = 1 << 16  # below this, copyto is timed as a call, not as a copy
Hash = Callable[[np.ndarray, int], np.ndarray]


def demo_way(plan: HashPlan, ids: np.ndarray, layer_id: int) -> np.ndarray:
    """Row indices within their columns, hashed the public demo's way, for ids without DEAD. [B, T, C]"""
    layer = plan.layer(layer_id)
    x = np.asarray(ids, dtype=np.int64)
    multipliers = np.array(layer.multipliers, dtype=np.int64)
    tokens = [x]
    for k in range(1, plan.max_ngram):
        padded = np.pad(x, ((0, 0), (k, 0)), mode="constant", constant_values=plan.pad_compressed)
        tokens.append(padded[:, : x.shape[1]])
    columns = []
    for n in range(2, plan.max_ngram + 1):
        mix = tokens[0] * multipliers[0]
        for k in range(1, n):
            mix = np.bitwise_xor(mix, tokens[k] * multipliers[k])
        for head in range(plan.heads):
            columns.append(mix % layer.primes[(n - 2) * plan.heads + head])
    return np.stack(columns, axis=2)


class BareCall:
    """What any Python hash costs at least: a call, and an array for the indices, left unwritten. [B, T, C]"""

    def __init__(self, columns: int) -> None:
        self.columns = columns

    def __call__(self, ids: np.ndarray, layer_id: int) -> np.ndarray:
        batch, length = ids.shape
        return np.empty((batch, length, self.columns), np.int32)


def contenders(plan: HashPlan) -> dict[str, Hash]:
    """The three ways to hash and the bare call, each called as `way(ids, layer_id)`, with nothing around it."""
    return {
        "baseline": functools.partial(demo_way, plan),
        "numpy": NgramHasher(plan, "numpy"),
        "numba": NgramHasher(plan, "numba"),
        "bare": BareCall(len(plan.layers[0].primes)),
    }


def make_pool(shape: tuple[int, int], size: int) -> list[np.ndarray]:
    """Random batches of this shape, enough that a call does not meet the ids of the call before."""
    count = max(4, min(1024, POOL_TOKENS // (shape[0] * shape[1])))
    rng = np.random.default_rng(0)
    return [rng.integers(0, size, shape) for _ in range(count)]


def check_equal(ways: dict[str, Hash], layer: LayerPlan, pool: list[np.ndarray]) -> None:
    """Stop unless all three give the same indices (the baseline has no offsets: they are added here)."""
    for ids in pool[:16]:
        expected = ways["baseline"](ids, layer.layer_id) + np.array(layer.offsets)
        for name in HASHES:
            if not np.array_equal(ways[name](ids, layer.layer_id), expected):
                raise SystemExit(f"{name} differs from the baseline on ids of shape {ids.shape}: no times given")


def sample(way: Hash, layer_id: int, pool: list[np.ndarray], calls: int) -> float:
    """Seconds per call, over `calls` calls on successive batches of the pool."""
    batches = [pool[i % len(pool)] for i in range(calls)]
    start = time.perf_counter_ns()
    for ids in batches:
        way(ids, layer_id)
    return (time.perf_counter_ns() - start) / calls / 1e9


def calls_per_sample(way: Hash, layer_id: int, pool: list[np.ndarray]) -> int:
    """Calls that fill one sample; measuring it also warms the way up."""
    sample(way, layer_id, pool, 3)
    once = min(sample(way, layer_id, pool, 3) for _ in range(3))
    return max(1, round(SAMPLE_SECONDS / once))


def measure(ways: dict[str, Hash], layer_id: int, pool: list[np.ndarray], repeats: int) -> dict[str, list[float]]:
    """Seconds per call of every way, `repeats` samples each, the ways taking turns."""
    calls = {name: calls_per_sample(ways[name], layer_id, pool) for name in NAMES}
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(repeats):
        for name in NAMES:
            times[name].append(sample(ways[name], layer_id, pool, calls[name]))
    return times


def copy_bandwidth(size: int, repeats: int) -> float:
    """Bytes per second that np.copyto writes into an array of `size` bytes, median."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    calls = max(1, round(SAMPLE_SECONDS / max(1e-7, size / 1e10)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        for _ in range(calls):
            np.copyto(target, source)
        times.append((time.perf_counter_ns() - start) / calls / 1e9)
    return size / statistics.median(times)


def spread(values: list[float]) -> dict[str, float]:
    p20, p50, p80 = np.percentile(values, [20, 50, 80])
    return {"p20": float(p20), "p50": float(p50), "p80": float(p80)}


def report(shape: tuple[int, int], times: dict[str, list[float]], written: int, bandwidth: float) -> dict[str, Any]:
    """Print one size and give back its row for the JSON."""
    ratios = {name: spread([slow / fast for slow, fast in zip(times["baseline"], times[name])]) for name in NAMES[1:]}
    tokens = shape[0] * shape[1]
    limit = written / bandwidth
    fastest = statistics.median(times["numba"])
    print(f"{shape[0]} x {shape[1]} tokens")
    few = written < FEW_BYTES
    for name in NAMES if few else NAMES[:-1]:
        median = statistics.median(times[name])
        line = f"  {name:9s} {median * 1e6:12.2f} us {median / tokens * 1e9:9.1f} ns/token"
        if name in ratios:
            r = ratios[name]
            line += f"   x{r['p50']:.1f} (p20 x{r['p20']:.1f}, p80 x{r['p80']:.1f})"
        print(line)
    share = f"copyto writes {bandwidth / 1e9:.1f} GB/s, {limit * 1e6:.1f} us: {100 * limit / fastest:.0f} %"
    if few:
        share = f"the bare call is {100 * statistics.median(times['bare']) / fastest:.0f} %"
    print(f"  {written} bytes of indices; {share} of numba's time")
    return {
        "shape": shape,
        "seconds": {name: spread(times[name]) for name in NAMES},
        "ratio_to_baseline": ratios,
        "ns_per_token": fastest / tokens * 1e9,
        "bytes_written": written,
        "copyto_bytes_per_second": bandwidth,
        "limit_share": limit / fastest,
        "samples": times,
    }


def environment() -> dict[str, Any]:
    """What the times depend on."""
    import numba

    models = [line for line in _cpuinfo().splitlines() if line.startswith("model name")]
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "cpu": models[0].split(":", 1)[1].strip() if models else platform.processor() or "unknown",
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Under another name first, so that a reader never sees half a file."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time three ways from compressed ids to row indices on one thread, and print how many times "
        "faster than the public demo's way each is.",
        epilog="One token is the case of decoding: there calling Python and making an array cost more than the "
        "hash. 64 x 4096 is the case of prefill: there writing the indices takes a good part. Close other "
        "programs: a busy machine changes all times, and the ratios less.",
    )
    parser.add_argument("--out", type=Path, help="write every sample and the environment to this JSON file")
    parser.add_argument("--repeats", type=int, default=30, help="samples per way and size (default %(default)s)")
    parser.add_argument("--preset", default="demo", help="geometry to hash for (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: give at least 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    start = time.perf_counter()
    config = EngramConfig.preset(options.preset)
    size = config.compressed_size or COMPRESSED_SIZE
    plan = HashPlan.build(config, size, PAD_COMPRESSED)
    ways, layer = contenders(plan), plan.layers[0]
    ready = time.perf_counter() - start
    card = environment()
    print(f"{card['cpu']}, python {card['python']}, numpy {card['numpy']}, numba {card['numba']}")
    print(f"plan and compiled loop ready after {ready:.1f} s (less once numba has cached the loop)")
    rows = []
    for shape in SIZES:
        pool = make_pool(shape, size)
        check_equal(ways, layer, pool)
        written = ways["numba"](pool[0], layer.layer_id).nbytes
        times = measure(ways, layer.layer_id, pool, options.repeats)
        rows.append(report(shape, times, written, copy_bandwidth(written, options.repeats)))
    if options.out:
        content = {"preset": options.preset, "ready_seconds": ready, "environment": card, "sizes": rows}
        write_json(options.out, content)


if __name__ == "__main__":
    main()
