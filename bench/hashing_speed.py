"""How fast token ids become row indices: the plain way, the NumPy definition and the compiled loop, one thread.

Of the hash alone, from compressed ids on, and of the whole path from token ids:

  baseline    one layer hashed as the public demo does, in NumPy: a padded copy per shift, a product per order, one
              remainder per head, then one stack, all int64
  numpy       the definition, `NgramHasher(plan, "numpy")(ids, layer_id)`
  numba       the compiled loop, called in the same way
  demo path   token ids looked up in the vocabulary's map as the demo does, then hashed as `baseline`
  steps       `hasher(vocab(token_ids), layer_id)`
  one pass    `hasher.from_tokens(token_ids, vocab, out=before)`: mapped, checked and hashed by one compiled call, into
              the memory of the call before

All run in one process, interleaved, on fresh random ids, after a check that their indices are equal. Ratios are medians
of paired samples, against the first of each group.

Limits are measured beside them: `bare`, an object that is called in the same way and only makes the array of indices
with `np.empty`; the bytes of the indices over what `np.copyto` moves into memory of the same size; and `in cache`, the
compiled loop into memory that it has just written, 4,096 tokens at a time, where writing costs nothing: what is left is
its arithmetic.

    python bench/hashing_speed.py
    python bench/hashing_speed.py --repeats 50 --out FILE.json

One token is the case of decoding: there calling Python and making an array cost more than the hash. 64 x 4096 is the
case of prefill. Close other programs: a busy machine changes all times, and the ratios less.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read as NumPy is imported, below
if __package__ in (None, ""):  # started as a script: the repository root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # Ctrl-C ends the imports that follow, too, in one line
    from engram_ref.starting import interruptible

    interruptible("hashing_speed")

import numpy as np

from bench.instruments.output import require_writable_file
from bench.instruments.results import conclude, results_head
from bench.instruments.timing import median_and_spread
from engram_ref import cli
from engram_ref.config import PRESETS, EngramConfig
from engram_ref.hashing import HashPlan, LayerPlan, NgramHasher
from engram_ref.vocab import CompressedVocab

PROG = "hashing_speed"
COMPRESSED_SIZE, PAD_COMPRESSED = 98_627, 2  # DeepSeek-V3's vocabulary, the demo's tokenizer
TOKENS = 129_280  # token ids of that tokenizer
SIZES = ((1, 1), (1, 4096), (16, 4096), (64, 4096))  # sequences and tokens: from decoding to a batch of prompts
POOL_TOKENS = 1 << 20  # ids made before the clock starts
SAMPLE_SECONDS = 0.002  # a sample repeats the call at least this long, so that the clock's steps do not count
HASHES = ("baseline", "numpy", "numba", "bare")
PATHS = ("demo path", "steps", "one pass")
NAMES = (*HASHES, *PATHS)
IN_CACHE = 4096  # tokens whose indices, 256 KB, stay in the second-level cache
FEW_BYTES = 1 << 16  # below this, copyto is timed as a call, not as a copy
Hash = Callable[[np.ndarray, int], np.ndarray]
Pools = dict[str, list[np.ndarray]]  # ids by way


def demo_way(plan: HashPlan, ids: np.ndarray, layer_id: int) -> np.ndarray:
    """Row indices within their columns, hashed the public demo's way, for ids without DEAD. [B, T, C]"""
    layer = plan.layer(layer_id)
    x = np.asarray(ids, dtype=np.int64)
    multipliers = np.array(layer.multipliers, dtype=np.int64)
    tokens = [x]  # by how far back, each [B, T]
    for k in range(1, plan.max_ngram):
        padded = np.pad(x, ((0, 0), (k, 0)), mode="constant", constant_values=plan.pad_compressed)
        tokens.append(padded[:, : x.shape[1]])
    columns = []
    for n in range(2, plan.max_ngram + 1):
        mix = tokens[0] * multipliers[0]  # [B, T]
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


def demo_path(plan: HashPlan, vocab: CompressedVocab, token_ids: np.ndarray, layer_id: int) -> np.ndarray:
    """The same from token ids on: those that are not negative are looked up in the map, as the demo does."""
    ids = np.asarray(token_ids, dtype=np.int64)
    known = ids >= 0
    compressed = ids.copy()
    compressed[known] = vocab.ids[ids[known]]
    return demo_way(plan, compressed, layer_id)


class OnePass:
    """Token ids to indices, [L, B, T, C], into memory that is kept for each shape."""

    def __init__(self, hasher: NgramHasher, vocab: CompressedVocab) -> None:
        self._look_up, self._vocab = hasher.from_tokens, vocab
        self._kept: dict[tuple[int, ...], Any] = {}

    def __call__(self, token_ids: np.ndarray, layer_id: int) -> np.ndarray:
        """Indices of the plan's only layer."""
        self._kept[token_ids.shape] = found = self._look_up(token_ids, self._vocab, out=self._kept.get(token_ids.shape))
        return found.rows[0]


def sample_vocab(size: int) -> CompressedVocab:
    """A map of as many token ids as DeepSeek-V3 has, random behind the first of every compressed id."""
    more = np.random.default_rng(1).integers(0, size, max(0, TOKENS - size))
    return CompressedVocab.from_map(np.concatenate([np.arange(size), more]))


def contenders(plan: HashPlan, vocab: CompressedVocab) -> dict[str, Hash]:
    """The ways, each called as `way(ids, layer_id)`, with nothing around it; of PATHS with token ids."""
    numba = NgramHasher(plan, "numba")
    return {
        "baseline": functools.partial(demo_way, plan),
        "numpy": NgramHasher(plan, "numpy"),
        "numba": numba,
        "bare": BareCall(len(plan.layers[0].primes)),
        "demo path": functools.partial(demo_path, plan, vocab),
        "steps": lambda token_ids, layer_id: numba(vocab(token_ids), layer_id),
        "one pass": OnePass(numba, vocab),
    }


def make_pool(shape: tuple[int, int], size: int) -> list[np.ndarray]:
    """Random batches of this shape, enough that a call does not meet the ids of the call before."""
    count = max(4, min(1024, POOL_TOKENS // (shape[0] * shape[1])))
    rng = np.random.default_rng(0)
    return [rng.integers(0, size, shape) for _ in range(count)]


def check_equal(ways: dict[str, Hash], layer: LayerPlan, pools: Pools) -> None:
    """Stop unless all of a group give the same indices (the demo's have no offsets: they are added here)."""
    for names in (HASHES[:3], PATHS):  # `bare` has no indices
        for ids in pools[names[0]][:16]:
            expected = ways[names[0]](ids, layer.layer_id) + np.array(layer.offsets)
            for name in names[1:]:
                if not np.array_equal(ways[name](ids, layer.layer_id), expected):
                    raise SystemExit(f"{name} differs from {names[0]} on ids of shape {ids.shape}: no times given")


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


def measure(ways: dict[str, Hash], layer_id: int, pools: Pools, repeats: int) -> dict[str, list[float]]:
    """Seconds per call of every way, `repeats` samples each, the ways taking turns."""
    calls = {name: calls_per_sample(ways[name], layer_id, pools[name]) for name in NAMES}
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(repeats):
        for name in NAMES:
            times[name].append(sample(ways[name], layer_id, pools[name], calls[name]))
    return times


def loop_in_cache(way: Hash, layer_id: int, size: int, repeats: int) -> float:
    """Seconds that the compiled loop takes for a token, median, where its output is in the cache."""
    pool = make_pool((1, IN_CACHE), size)
    calls = calls_per_sample(way, layer_id, pool)
    return statistics.median(sample(way, layer_id, pool, calls) for _ in range(repeats)) / IN_CACHE


def measure_size(
    ways: dict[str, Hash],
    layer: LayerPlan,
    vocab: CompressedVocab,
    shape: tuple[int, int],
    repeats: int,
    in_cache: float,
) -> dict[str, Any]:
    """Samples of one size, and its limits."""
    compressed, tokens = make_pool(shape, len(vocab)), make_pool(shape, len(vocab.ids))
    pools = {name: tokens if name in PATHS else compressed for name in NAMES}
    check_equal(ways, layer, pools)
    written = ways["numba"](compressed[0], layer.layer_id).nbytes
    return {
        "shape": shape,
        "bytes_written": written,
        "copyto_bytes_per_second": copy_bandwidth(written, repeats),
        "in_cache_s_per_token": in_cache,
        "samples_s": measure(ways, layer.layer_id, pools, repeats),
    }


def copy_bandwidth(size: int, repeats: int) -> float:
    """Bytes per second that np.copyto writes into an array of `size` bytes, median."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    # A guess of what one takes, at 10 GB/s: it decides nothing but how many are timed together.
    calls = max(1, round(SAMPLE_SECONDS / max(1e-7, size / 1e10)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        for _ in range(calls):
            np.copyto(target, source)
        times.append((time.perf_counter_ns() - start) / calls / 1e9)
    return size / statistics.median(times)


def report(results: dict[str, Any]) -> str:
    """Medians, ratios to the baseline and the limit, for every size."""
    return "\n".join(line for size in results["sizes"] for line in _size_lines(size))


def _size_lines(size: dict[str, Any]) -> list[str]:
    """The lines of one size: a way each, then what limits it."""
    (batch, length), times, written = size["shape"], size["samples_s"], size["bytes_written"]
    few = written < FEW_BYTES
    lines = [f"{batch} x {length} tokens"]
    for first, *names in (HASHES if few else HASHES[:-1], PATHS):
        for name in (first, *names):
            median = statistics.median(times[name])
            line = f"  {name:9s} {median * 1e6:12.2f} us {median / (batch * length) * 1e9:9.1f} ns/token"
            if name != first:
                ratio, p20, p80 = median_and_spread([a / b for a, b in zip(times[first], times[name])])
                line += f"   x{ratio:.1f} (p20 x{p20:.1f}, p80 x{p80:.1f})"
            lines.append(line)
    return [*lines, *_limits(size, few)]


def _limits(size: dict[str, Any], few: bool) -> list[str]:
    times, written, bandwidth = size["samples_s"], size["bytes_written"], size["copyto_bytes_per_second"]
    fastest, limit = statistics.median(times["numba"]), written / bandwidth
    share = f"copyto writes {bandwidth / 1e9:.1f} GB/s, {limit * 1e6:.1f} us: {100 * limit / fastest:.0f} %"
    if few:
        share = f"the bare call takes {100 * statistics.median(times['bare']) / fastest:.0f} %"
    lines = [f"  {written} bytes of indices; {share} of numba's time"]
    if not few and "in_cache_s_per_token" in size:
        tokens = size["shape"][0] * size["shape"][1]
        alone, whole = size["in_cache_s_per_token"] * tokens, statistics.median(times["one pass"])
        at_most = statistics.median(slow / alone for slow in times["demo path"])
        lines.append(
            f"  in cache the loop takes {alone * 1e6:.0f} us for as many tokens, {100 * alone / whole:.0f} % of one "
            f"pass: with writing for nothing it would be x{at_most:.1f}"
        )
    return lines


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
    vocab = sample_vocab(size)
    plan = HashPlan.build(config, size, PAD_COMPRESSED)
    plan = replace(plan, layers=plan.layers[:1])  # `from_tokens` hashes for every layer, the other ways for one
    ways, layer = contenders(plan, vocab), plan.layers[0]
    ready = time.perf_counter() - start
    print(f"plan and compiled loop ready after {ready:.1f} s (less once numba has cached the loop)", file=sys.stderr)
    in_cache = loop_in_cache(ways["one pass"], layer.layer_id, len(vocab.ids), options.repeats)
    sizes = [measure_size(ways, layer, vocab, shape, options.repeats, in_cache) for shape in SIZES]
    about = {"preset": options.preset, "repeats": options.repeats, "ready_seconds": ready}
    with cli.one_line_errors(PROG):
        conclude({**results_head(PROG), **about, "sizes": sizes}, options.out, report)


if __name__ == "__main__":
    cli.run(main, PROG)
