"""How fast token ids become row indices: the plain way, the NumPy definition and the compiled loop, one thread.

The baseline hashes one layer as the public demo does, in NumPy: a padded copy per shift, a product per order,
one remainder per head, then one stack, all int64. All three run in one process, interleaved, on fresh random
ids, through the public call `hasher(ids, layer_id)`, after a check that their indices are equal. Ratios are
medians of paired samples.

Two limits are measured beside them: `bare`, an object that is called in the same way and only makes the array
of indices with `np.empty`, which is nearly all of a call for one token; and the bytes of the indices over what
`np.copyto` moves into memory of the same size.

    python bench/hashing_speed.py
    python bench/hashing_speed.py --repeats 50 --out FILE.json

One token is the case of decoding: there calling Python and making an array cost more than the hash. 64 x 4096
is the case of prefill: there writing the indices takes a good part. Close other programs: a busy machine
changes all times, and the ratios less.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
if __package__ in (None, ""):  # started as a script: the repository root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from bench.instruments.output import finish, printed_anyway, require_writable_file
from bench.instruments.results import results_head, write_json
from engram_ref import cli
from engram_ref.config import PRESETS, EngramConfig
from engram_ref.hashing import HashPlan, LayerPlan, NgramHasher

PROG = "hashing_speed"
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
        """Indices [B, T, C] of ids [B, T], whatever memory held."""
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
    """The 20th, 50th and 80th percentile."""
    p20, p50, p80 = np.percentile(values, [20, 50, 80])
    return {"p20": float(p20), "p50": float(p50), "p80": float(p80)}


def report(results: dict[str, Any]) -> str:
    """Medians, ratios to the baseline and the limit, for every size."""
    return "\n".join(line for size in results["sizes"] for line in _size_lines(size))


def _size_lines(size: dict[str, Any]) -> list[str]:
    """The lines of one size: a way each, then what limits it."""
    (batch, length), times, written = size["shape"], size["samples_s"], size["bytes_written"]
    few = written < FEW_BYTES
    lines = [f"{batch} x {length} tokens"]
    for name in NAMES if few else NAMES[:-1]:
        median = statistics.median(times[name])
        line = f"  {name:9s} {median * 1e6:12.2f} us {median / (batch * length) * 1e9:9.1f} ns/token"
        if name != "baseline":
            r = spread([slow / fast for slow, fast in zip(times["baseline"], times[name])])
            line += f"   x{r['p50']:.1f} (p20 x{r['p20']:.1f}, p80 x{r['p80']:.1f})"
        lines.append(line)
    fastest, bandwidth = statistics.median(times["numba"]), size["copyto_bytes_per_second"]
    limit = written / bandwidth
    share = f"copyto writes {bandwidth / 1e9:.1f} GB/s, {limit * 1e6:.1f} us: {100 * limit / fastest:.0f} %"
    if few:
        share = f"the bare call takes {100 * statistics.median(times['bare']) / fastest:.0f} %"
    return [*lines, f"  {written} bytes of indices; {share} of numba's time"]


def parse_arguments() -> argparse.Namespace:
    """Command-line options; see `--help`."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write every sample and the environment here")
    parser.add_argument("--repeats", type=cli.at_least(1), default=30, help="samples per way and size (default: 30)")
    parser.add_argument("--preset", choices=list(PRESETS), default="demo", help="geometry to hash for (default: demo)")
    return parser.parse_args()


def main() -> None:
    """The command."""
    options = parse_arguments()
    with cli.one_line_errors(PROG):
        require_writable_file(options.out)
    start = time.perf_counter()
    config = EngramConfig.preset(options.preset)
    size = config.compressed_size or COMPRESSED_SIZE
    plan = HashPlan.build(config, size, PAD_COMPRESSED)
    ways, layer = contenders(plan), plan.layers[0]
    ready = time.perf_counter() - start
    print(f"plan and compiled loop ready after {ready:.1f} s (less once numba has cached the loop)", file=sys.stderr)
    sizes = []
    for shape in SIZES:
        pool = make_pool(shape, size)
        check_equal(ways, layer, pool)
        written = ways["numba"](pool[0], layer.layer_id).nbytes
        times = measure(ways, layer.layer_id, pool, options.repeats)
        bandwidth = copy_bandwidth(written, options.repeats)
        sizes.append(
            {"shape": shape, "bytes_written": written, "copyto_bytes_per_second": bandwidth, "samples_s": times}
        )
    results = {
        **results_head(PROG),
        "preset": options.preset,
        "repeats": options.repeats,
        "ready_seconds": ready,
        "sizes": sizes,
    }
    with cli.one_line_errors(PROG), printed_anyway(lambda: report(results)):
        if options.out:
            write_json(options.out, results)
    finish(results, options.out)


if __name__ == "__main__":
    cli.run(main, PROG)
