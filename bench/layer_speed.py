"""How fast the layer's parts are on a CPU, against what one would write without thinking, in one interleaved run.

  gather        rows into a reused buffer, against F.embedding with a fresh output, from a 4 GiB table
  convolution   causal, channel last, against Conv1d on the transposed tensor, (1, 1024, 4, 1024) float32
  layer         hash, gather and fusion at the demo's size, against an implementation done the demo's way
  construction  the demo-size layer with N(0, 1) rows, against nn.Embedding's default initialisation
  fp8_gather    rows of 256 values as fp8, packed and split, stored and decoded, against bfloat16 rows and torch's own
  cold          12,288 random rows of 256 B from a 2 GiB file, page cache dropped, against a purpose-built store

Outputs are compared before anything is timed. Ratios are medians of paired samples with a 95 % interval; each case
states its limit: memcpy of the output, the first touch of the memory, the disk's random reads (fio).

    python bench/layer_speed.py                                     the first five, three minutes, 12 GiB of memory
    python bench/layer_speed.py --cases cold --store SITE-PACKAGES  with engramdb-python installed in a folder apart
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Threads that spin while they wait stall everybody for milliseconds when another program needs a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # Ctrl-C ends the imports that follow, too, in one line
    from engram_ref.starting import interruptible

    interruptible("layer_speed")

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.hashing_speed import COMPRESSED_SIZE, PAD_COMPRESSED
from bench.hashing_speed import demo_way as hash_as_demo
from bench.instruments.output import finish, printed_anyway, require_writable_file, say
from bench.instruments.results import results_head, write_json
from bench.instruments.timing import Prepared, interleave, paired_ratio, prepared_samples
from bench.rivals import fp8_gather
from bench.rivals.demo_layer import DemoWay, transposed_conv
from bench.rivals.engramdb import STORE, ColdRace
from bench.setup import table_content
from engram_ref import cli
from engram_ref.config import EngramConfig
from engram_ref.fusion import DemoFusion, causal_conv
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.layer import Engram, build_engram
from engram_ref.rows.filling import fill_normal
from engram_ref.rows.format import RowFormat
from engram_ref.rows.memory import HUGE_PAGE, HostMemory
from engram_ref.tables.host import HostTable

PROG = "layer_speed"
CASES = ("gather", "convolution", "layer", "construction", fp8_gather.CASE, "cold")
GATHER_ROWS = 1 << 19  # 64 MiB of rows
COLD_TABLE_ROWS, COLD_ROW_BYTES = 1 << 23, 256  # 2 GiB: of the most rows at once some 2 % share a page of 4 KiB
COLD_ROWS = (12_288, 1_536, 48)  # fetched at once: of 24 columns, as a layer of V4.1 has, 512, 64 and 2 tokens
TOKENS = 1024
Ways = dict[str, Callable[[], object]]


def gather_case(repeats: int) -> dict[str, Any]:
    """Random rows of 128 B out of 4 GiB: ours on huge pages, F.embedding on the same memory and on ordinary memory."""
    row_format = RowFormat(torch.bfloat16, 64)
    rows = (4 << 30) // row_format.row_bytes
    with HostMemory(rows * row_format.row_bytes) as memory:
        content = table_content.rows_in(memory.bytes, row_format, rows)
        table_content.fill(content, seed=0)
        values = content.values()
        ordinary = values.clone()  # in torch's own memory, which asks for no huge pages
        table, out = HostTable(values, "cpu"), torch.empty((GATHER_ROWS, 64), dtype=torch.bfloat16)
        draw = np.random.default_rng(0)

        def fresh() -> Tensor:
            return torch.from_numpy(draw.integers(0, rows, GATHER_ROWS))

        numbers = fresh()
        require_equal(table.start(numbers, out).wait(), F.embedding(numbers, ordinary))
        target = np.empty(out.nbytes, np.uint8)
        source = np.ones(out.nbytes, np.uint8)  # written: untouched memory is one page of zeros, and always cached
        pool = itertools.cycle([fresh() for _ in range(4)])  # drawn before the clock starts, [N] each
        samples = interleave(
            {
                "ours": lambda: table.start(next(pool), out).wait(),
                "F.embedding, ordinary memory": lambda: F.embedding(next(pool), ordinary),
                "F.embedding, huge pages": lambda: F.embedding(next(pool), values),
                "memcpy of the output, one thread": lambda: np.copyto(target, source),
            },
            repeats,
            warmup=2,
        )
        facts = {"rows": GATHER_ROWS, "row_bytes": row_format.row_bytes, "table_bytes": memory.nbytes}
        return record("gather", samples, "F.embedding, ordinary memory", {**facts, "huge": memory.huge_page_share()})


def convolution_case(repeats: int) -> dict[str, Any]:
    """(1, 1024, 4, 1024) float32, four taps, dilation 3."""
    copies, hidden, taps, dilation = 4, 1024, 4, 3
    x = torch.randn(1, TOKENS, copies, hidden)  # [B, T, G, H]
    channels = copies * hidden
    conv = nn.Conv1d(
        channels, channels, taps, groups=channels, bias=False, padding=(taps - 1) * dilation, dilation=dilation
    )
    weight = conv.weight.detach().view(copies, hidden, taps).permute(2, 0, 1).contiguous()  # [K, G, H]
    flat = x.view(1, TOKENS, channels)
    with torch.inference_mode():
        require_close(causal_conv(x, weight, dilation).view_as(flat), transposed_conv(conv, flat), 1e-5)
        target = torch.empty_like(x)
        samples = interleave(
            {
                "ours": lambda: causal_conv(x, weight, dilation),
                "Conv1d, transposed": lambda: transposed_conv(conv, flat),
                "memcpy of the output": lambda: target.copy_(x),
            },
            repeats,
            warmup=2,
        )
    return record("convolution", samples, "Conv1d, transposed", {"shape": list(x.shape)})


def layer_case(repeats: int) -> dict[str, Any]:
    """One sequence of 1,024 fresh tokens through hash, gather and fusion at the demo's size, float32."""
    config = EngramConfig.preset("demo").replace(row_dtype="float32")
    plan = HashPlan.build(config, COMPRESSED_SIZE, PAD_COMPRESSED)
    layer, hasher = plan.layers[0], NgramHasher(plan)
    draw = np.random.default_rng(0)
    pool = itertools.cycle([draw.integers(0, COMPRESSED_SIZE, (1, TOKENS)) for _ in range(8)])
    hidden = torch.randn(1, TOKENS, config.hc_mult, config.hidden)  # [B, T, G, H]
    e = torch.randn(1, TOKENS, config.embedding_width)  # [B, T, C*D]
    with HostMemory(layer.rows * config.row_bytes()) as memory, torch.inference_mode():
        values = memory.bytes.view(torch.float32).view(layer.rows, config.row_width)
        fill_normal(values, seed=0)
        fusion = DemoFusion(config)
        ours = Engram(fusion, HostTable(values, "cpu"))
        as_demo = demo_layer(fusion, plan, values.clone())

        def as_ours(ids: np.ndarray) -> Tensor:
            return ours(hidden, hasher(ids, layer.layer_id))

        ids = next(pool)
        require_close(as_ours(ids), as_demo(ids, hidden), 1e-4)
        ways: Ways = {
            "ours": lambda: as_ours(next(pool)),
            "the demo's way": lambda: as_demo(next(pool), hidden),
            "projections alone": lambda: F.linear(e, fusion.projection_weight, fusion.projection_bias),
        }
        samples = interleave(ways, repeats, warmup=2)
    return record("layer", samples, "the demo's way", {"tokens": TOKENS, "preset": "demo"})


def demo_layer(fusion: DemoFusion, plan: HashPlan, weight: Tensor) -> Callable[[np.ndarray, Tensor], Tensor]:
    """The first layer of `plan` as the demo computes it, with the same weights."""
    plain, layer = DemoWay(fusion.config), plan.layers[0]
    plain.load_state_dict(fusion.state_dict())
    offsets = torch.tensor(layer.offsets)

    def run(ids: np.ndarray, hidden: Tensor) -> Tensor:
        # The demo hashes for all layers in every layer, and keeps one.
        rows = {x.layer_id: hash_as_demo(plan, ids, x.layer_id) for x in plan.layers}[layer.layer_id]
        return hidden + plain(F.embedding(torch.from_numpy(rows) + offsets, weight).flatten(-2), hidden)

    return run


def construction_case(repeats: int) -> dict[str, Any]:
    """The demo-size layer with its 2.6 GB of rows, made and thrown away."""
    config = EngramConfig.preset("demo").replace(row_dtype="float32")
    layer = HashPlan.build(config, COMPRESSED_SIZE, PAD_COMPRESSED).layers[0]
    nbytes = layer.rows * config.row_bytes()

    def ours() -> None:
        build_engram(config, layer, placement="host", device="cpu", dtype=torch.float32).table.close()

    def default() -> None:
        nn.Embedding(layer.rows, config.row_width)
        DemoWay(config)

    def first_touch() -> None:
        with HostMemory(nbytes) as memory:
            memory.bytes.fill_(1)

    def fresh_memory(_: np.ndarray) -> None:
        # A virtual machine gets memory that it gave back again slowly, which would say nothing of the ways.
        with HostMemory(nbytes + HUGE_PAGE) as memory:
            memory.bytes.fill_(1)

    ways = {"ours": ours, "nn.Embedding": default, "first touch of the memory": first_touch}
    prepared = {name: Prepared(fresh_memory, lambda _, run=run: run()) for name, run in ways.items()}  # type: ignore[misc]
    samples = prepared_samples(prepared, lambda: None, repeats)
    return record("construction", samples, "nn.Embedding", {"table_bytes": nbytes})


def cold_cases(folder: Path, store: Path, repeats: int) -> list[dict[str, Any]]:
    """Random rows from a file of 2 GiB that is not in the page cache, many at once and as few as one token's."""
    found = []
    with ColdRace(folder, COLD_TABLE_ROWS, COLD_ROW_BYTES, store) as race:
        facts = {"row_bytes": COLD_ROW_BYTES, "table_bytes": COLD_TABLE_ROWS * COLD_ROW_BYTES}
        for count in COLD_ROWS:
            samples = race.against_limit(count, repeats)
            found.append(record("cold", samples, STORE, {"rows": count, "store_version": race.store.version, **facts}))
    return found


def record(case: str, samples: dict[str, list[float]], rival: str, facts: dict[str, Any]) -> dict[str, Any]:
    """One case of the results: what was measured; `rival` is what ours is held against, the last way is the limit."""
    return {"case": case, "samples_s": samples, "rival": rival, "limit": list(samples)[-1], **facts}


def require_equal(found: Tensor, expected: Tensor) -> None:
    """Stop unless both have the same bits: nothing is timed that is wrong."""
    if not torch.equal(found.view(torch.uint8), expected.view(torch.uint8)):
        raise SystemExit(f"{PROG}: outputs differ: no times given")


def require_close(found: Tensor, expected: Tensor, limit: float) -> None:
    """Stop unless both agree to `limit`, the rounding of float32 sums in another order."""
    error = float((found - expected).abs().max())
    if not error <= limit:
        raise SystemExit(f"{PROG}: outputs differ by {error}, more than {limit}: no times given")


def report(results: dict[str, Any]) -> str:
    """Medians, ratios and limits, a few lines per case."""
    return "\n".join(line for case in results["cases"] for line in _case_lines(case))


def _case_lines(case: dict[str, Any]) -> list[str]:
    if case["case"] == fp8_gather.CASE:
        return fp8_gather.lines(case)
    samples, rival = case["samples_s"], case["rival"]
    ours = statistics.median(samples["ours"])
    lines = [_title(case)]
    for name, values in samples.items():
        per_row = f"  {1e9 * statistics.median(values) / case['rows']:9.1f} ns/row" if "rows" in case else ""
        lines.append(f"  {name:34s} {1e3 * statistics.median(values):11.3f} ms{per_row}")
    ratio = paired_ratio(samples[rival], samples["ours"])
    lines.append(f"  {rival} / ours: x{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]")
    limit = statistics.median(samples[case["limit"]])
    lines.append(f"  limit: {case['limit']}, {100 * limit / ours:.0f} % of ours")
    return lines


def _title(case: dict[str, Any]) -> str:
    facts = {
        "gather": lambda: f"{case['rows']:,} rows of {case['row_bytes']} B from {case['table_bytes'] / 2**30:.1f} GiB",
        "convolution": lambda: f"{tuple(case['shape'])} float32",
        "layer": lambda: f"{case['tokens']} tokens, {case['preset']} size, float32",
        "construction": lambda: f"{case['table_bytes'] / 1e9:.2f} GB of rows",
        "cold": lambda: f"{case['rows']:,} rows of {case['row_bytes']} B, page cache dropped",
    }
    return f"{case['case']}: {facts[case['case']]()}"


def parse_arguments() -> argparse.Namespace:
    """Command-line options; see `--help`."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES[:-1]), help="default: all but cold")
    parser.add_argument("--repeats", type=cli.at_least(1), default=9, help="samples per way")
    parser.add_argument("--store", type=Path, metavar="DIR", help="folder in which engramdb-python is installed")
    parser.add_argument("--folder", type=Path, default=Path("out/cold"), metavar="DIR", help="for the files of `cold`")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write every sample and the environment here")
    options, given = parser.parse_given()
    if "cold" not in options.cases:
        with cli.one_line_errors(PROG):
            cli.refuse_idle(given, ("store", "folder"), "without the case cold: add it to --cases")
    if "cold" in options.cases and options.store is None:
        parser.error("--cases cold needs --store: pip install --target DIR engramdb-python==0.3.0, then --store DIR")
    return options


def main() -> None:
    """The command."""
    options = parse_arguments()
    runs: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "gather": lambda: [gather_case(options.repeats)],
        "convolution": lambda: [convolution_case(3 * options.repeats)],
        "layer": lambda: [layer_case(options.repeats)],
        "construction": lambda: [construction_case(options.repeats)],
        fp8_gather.CASE: lambda: fp8_gather.measure(options.repeats),
        "cold": lambda: cold_cases(options.folder, options.store, options.repeats),
    }
    results: dict[str, Any] = {**results_head(PROG), "threads": torch.get_num_threads(), "cases": []}
    with cli.one_line_errors(PROG):
        require_writable_file(options.out)
        with printed_anyway(lambda: report(results)):
            for case in options.cases:
                say(f"measuring {case}")
                results["cases"] += runs[case]()
                if options.out:
                    write_json(options.out, results)
        finish(results, options.out)


if __name__ == "__main__":
    cli.run(main, PROG)
