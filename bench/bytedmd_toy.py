"""Does "under 3 % offload overhead" survive ByteDMD? Real text in, a verdict out, on any laptop.

    python bench/bytedmd_toy.py                     a minute or two; prints a table, writes out/bytedmd_toy/
    python bench/bytedmd_toy.py --quick             a small version in seconds
    python bench/bytedmd_toy.py --text FILE         your own text
    python bench/bytedmd_toy.py --preset v41-flash  DeepSeek-V4.1-Flash's form of Engram; three minutes, 4 GB, two cores
    python bench/bytedmd_toy.py --sweep all         every sweep, prices only; resumable (--sweep padding share: some)

Text goes through DeepSeek's tokenizer and Engram's hash; the rows that it names are read by two small models
written in plain Python, and every read is priced: ceil(sqrt(d)) for a value at depth d of one LRU stack.

  presets     tiny       a small Engram in the demo's form, with one residual copy
              v41-flash  orders 2 to 4, 24 fp8 rows a token with block scales, one projection, no convolution; cut to
                         what a laptop traces, by the scale that every line of the table states. A stored byte is one
                         value here. It has no kv-bank.
              qwen38-flash-next  Qwen3.8-Flash-Next's table: orders 2 and 3, 16 rows a token, token ids hashed as they
                         are, an end of text that closes a segment; cut likewise. It has no kv-bank.
  models      engram   hash, rows, gate, short convolution: the twin of the real layer
              kv-bank  attention over the key-and-value rows that the same kind of lookup names
  variants    resident          the table above the padding: the baseline
              offload_naive     the table below the padding
              offload_prefetch  the same, the next position's rows copied up before they are needed
              offload_hot       the same, but the rows most frequent in other text start above
  boundaries  lookup            the row reads alone
              layer             with hash, projections, gate or attention over the rows
              block             with the decoder block's self-attention

  sweeps      prices only, one setting varied at a time from the configuration given by the other options:
              padding     0 to 10^7 values
              tokens      16 to 256
              share       of the lookups that go to the offloaded tier, 0.01 to 1
              hot         share of all rows in the hot tier, 0 to 1
              reuse       uniform ids, independent Zipf ids, the text, Python's own sources
              bytes       1, 2, 4 per value
              compute     width of the model, 8 to 128
              wrong       share of the prefetch's copies that are of another row, 0 to 0.5
              definition  every definition of the price
              seed        another window of the text, other weights
              preset      tiny, v41-flash
              grid        padding, share, hot tier and width jointly, for the model engram

Sweeps take some minutes on two cores. Finished prices are kept in sweeps.journal: a sweep that was stopped goes on
where it stopped. Results are sweeps.json, grid.json and a figure per sweep in --out.

All variants compute the same output, to the bit; only the layout of memory differs. The verdict classifies
the price of offload_prefetch against resident: up to 5x WIN for the claim, over 20x LOSS, in between
INCONCLUSIVE. It depends on the boundary, that is, on what stands in the denominator.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

if __package__ in (None, ""):  # started as a script: the repository root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # Ctrl-C ends the imports that follow, too, in one line
    from engram_ref.starting import interruptible

    interruptible("bytedmd_toy")

from bench.instruments.journal import now
from bench.instruments.output import draw_where_possible, require_writable, say
from bench.instruments.results import conclude, results_head
from bench.instruments.timing import interleave, paired_ratio, summary
from bench.price.job import Job, output_digest, price_job, upstream
from bench.price.models import MODELS_OF, digest, make_workload, row_stream, scale_of, toy_config
from bench.price.table import verdict_table
from bench.schemas.toy import ModelRead, NoiseFloor, Priced, Results, Run, Timed
from bench.setup.parallel import add_jobs, in_parallel
from bench.setup.streams import Stream, text_source
from bench.sweeps.command import chosen, run_sweeps
from bench.sweeps.points import NAMES, varied
from engram_ref import cli
from engram_ref.config import EngramConfig
from engram_ref.hashing import HashPlan
from engram_ref.vocab import CompressedVocab, vocab_for
from engram_toy.definitions import DEFINITIONS
from engram_toy.hashing import NgramHasher
from engram_toy.models.cuts import CUTS
from engram_toy.models.layouts import VARIANTS, Layout, most_frequent
from engram_toy.models.programs import BOUNDARIES, MODELS
from engram_toy.tracer.stack import check_definition

PROG: Final = "bytedmd_toy"
SCHEMA_VERSION: Final = 1
QUICK = {"seq_len": 16, "d_model": 8, "padding": 10_000, "repeats": 3}  # fewer repeats have no spread


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line options; see `--help`."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    add = parser.add_argument
    add("--preset", choices=CUTS, default="tiny", help="form of Engram")
    add("--model", choices=[*MODELS, "both"], default="both", help="default: both; with other presets than tiny engram")
    add("--text", metavar="FILE", help="a UTF-8 text file (default: Python's help topics, pydoc_data.topics)")
    add(
        "--tokenizer", metavar="PATH", help="a tokenizer.json, its folder or a Hugging Face name (default: DeepSeek-V4)"
    )
    add("--seq_len", type=cli.at_least(2, 1 << 13), default=128, metavar="T", help="tokens to read")
    add("--d_model", type=cli.at_least(1, 1 << 10), default=64, metavar="H", help="width of the model")
    add("--padding", type=cli.at_least(0, 10**7), default=10**6, metavar="M", help="values that bury the table")
    add("--hot_share", type=cli.share, default=0.1, metavar="S", help="rows offload_hot keeps above")
    add("--bytes_per_element", type=cli.at_least(1, 1 << 10), default=1, metavar="B", help="bytes per value")
    add("--seed", type=cli.at_least(0, cli.MOST_SEED), default=0, help="which window of the text, which weights")
    add("--definition", choices=DEFINITIONS, default="lru", help="of ByteDMD (default: lru, one stack)")
    add("--tracer", choices=["own", "upstream"], default="own", help="upstream: check every depth with the original")
    # Of five, the interval is from the least to the most; of nine, one slow round decides neither end.
    add("--repeats", type=cli.at_least(1), default=9, metavar="N", help="wall-time samples per case; default: 9")
    add_jobs(parser)
    add("--out", type=Path, default=Path("out/bytedmd_toy"), metavar="DIR", help="results.json and figures go here")
    add(
        "--sweep",
        nargs="+",
        choices=[*NAMES, "all"],
        metavar="NAME",
        help=f"vary one setting at a time from those given here, prices only: {', '.join(NAMES)}, or all",
    )
    cli.add_fresh(parser)
    add("--quick", action="store_true", help=f"small defaults: {', '.join(f'{k} {v}' for k, v in QUICK.items())}")
    first, _ = parser.parse_known_args(argv)
    if len(MODELS_OF[first.preset]) == 1:
        parser.set_defaults(model=MODELS_OF[first.preset][0])
    if first.quick:
        parser.set_defaults(**QUICK)
    options, given = parser.parse_given(argv)
    idle, why = ("fresh",), "without --sweep: a single run begins anew each time, leave it out"
    if options.sweep:
        idle, why = ("repeats",), "with --sweep, which measures no wall time: leave it out"
    with cli.one_line_errors(PROG):
        cli.refuse_idle(given, idle, why)
        if options.sweep:
            cli.refuse_idle(given, varied(chosen(options)), "where every sweep varies it: leave it out")
    return options


def configs_of(options: argparse.Namespace) -> dict[str, EngramConfig]:
    """The geometry of every model that is to be priced."""
    models = MODELS if options.model == "both" else (options.model,)
    return {model: toy_config(model, options.d_model, options.preset) for model in models}


def make_jobs(
    options: argparse.Namespace, stream: Stream, vocab: CompressedVocab
) -> tuple[list[Job], dict[str, ModelRead]]:
    """Every program to price, and per model what it reads (for the results file)."""
    jobs: list[Job] = []
    models: dict[str, ModelRead] = {}
    for model, config in configs_of(options).items():
        plan = HashPlan.for_vocab(config, vocab)
        layer = plan.layer(config.layer_ids[0])
        workload = make_workload(model, config, plan, stream.measured, options.seed)
        indices = row_stream(plan, layer.layer_id, stream.measured)
        if indices.tolist() != workload.row_indices():
            raise AssertionError(f"{model}: the twin's row indices are not the reference's")
        hot_count = int(options.hot_share * layer.rows)
        hot = most_frequent(NgramHasher(workload.plan)(stream.calibration, layer.layer_id), hot_count)
        models[model] = {
            "config": asdict(config),
            "plan": dict(workload.plan),
            "row_stream_sha256": digest(indices),
            "lookups": int(indices.size),
            "distinct_rows": len(set(indices.ravel().tolist())),
            "hot_rows": len(hot),
        }
        if CUTS[options.preset]:
            models[model]["scale"] = scale_of(config, plan, options.preset)
        for boundary in BOUNDARIES:
            for variant in VARIANTS:
                layout = Layout.variant(variant, layer.rows, hot)
                common = (options.padding, options.definition, options.bytes_per_element, options.tracer)
                jobs.append(Job(workload, boundary, layout, *common))
    return jobs, models


def measure_wall_time(jobs: list[Job], repeats: int) -> tuple[list[Timed], list[NoiseFloor]]:
    """Untraced runs, variants interleaved: per job its samples and output, per boundary the noise floor."""
    records: list[Timed] = []
    floors: list[NoiseFloor] = []
    for start in range(0, len(jobs), len(VARIANTS)):
        group = jobs[start : start + len(VARIANTS)]
        model, boundary = group[0].workload.model, group[0].boundary
        say(f"wall time   {model} {boundary}: {repeats} rounds")
        programs = {job.layout.name: job.program() for job in group}
        outputs = {name: output_digest(p.function(*p.arguments)) for name, p in programs.items()}  # warms up, too
        cases = {name: lambda p=p: p.function(*p.arguments) for name, p in programs.items()}
        samples = interleave({**cases, "resident again": cases["resident"]}, repeats, warmup=0)
        for name in programs:
            wall = samples[name]
            records.append(
                {"wall_time_s": wall, "wall_time_summary_s": summary(wall), "untraced_output_sha256": outputs[name]}
            )
        again = samples["resident again"]
        ratio = paired_ratio(again, samples["resident"])
        floors.append({"model": model, "boundary": boundary, "again_s": again, "ratio": ratio})
    return records, floors


def price_all(jobs: list[Job], processes: int) -> list[Priced]:
    """Trace and price every job, in parallel; records in the order of the jobs."""
    # The long ones first: the last to end is then a short one, and no core waits long for it.
    order = sorted(range(len(jobs)), key=lambda i: -BOUNDARIES.index(jobs[i].boundary))
    records: list[Any] = [None] * len(jobs)
    began = time.perf_counter()
    priced = in_parallel(price_job, [jobs[i] for i in order], processes)
    for done, (place, record) in enumerate(priced, start=1):
        records[order[place]] = record
        name = f"{record['model']} {record['boundary']} {record['variant']}"
        elapsed = time.perf_counter() - began
        say(f"price {done:2d}/{len(jobs)}  {name:<34}{record['cost']:>15,}  {cli.time_left(elapsed, done, len(jobs))}")
    return records


def measure(options: argparse.Namespace, stream: Stream, jobs: list[Job], models: dict[str, ModelRead]) -> Results:
    """Run everything; the content of results.json."""
    started = now()
    walls, floors = measure_wall_time(jobs, options.repeats)
    prices = price_all(jobs, options.jobs)
    runs: list[Run] = [
        {**price, "cost_per_token": price["cost"] / options.seq_len, **wall} for price, wall in zip(prices, walls)
    ]
    for run in runs:
        if "scale" in models[run["model"]]:
            run["scale"] = models[run["model"]]["scale"]
    configuration = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    return {
        "schema_version": SCHEMA_VERSION,
        **results_head(PROG),
        "started": started,
        "finished": now(),
        "configuration": configuration,
        "stream": {"name": stream.name, "sha256": stream.sha256, "tokens": stream.tokens, "start": stream.start},
        "models": models,
        "noise_floor": floors,
        "runs": runs,
    }


def main() -> None:
    """The command."""
    options = parse()
    if options.sweep:
        with cli.one_line_errors(PROG):
            check_definition(options.definition)  # only these can be laid down anew from one recording
        return run_sweeps(options, PROG)
    with cli.one_line_errors(PROG):
        if options.tracer == "upstream":
            _check_upstream(options)
        configs = configs_of(options)  # refuses before anything is read
        vocab = vocab_for(next(iter(configs.values())), options.tokenizer)
        stream = text_source(options.text, vocab, options.tokenizer).window(options.seq_len, options.seed)
        jobs, models = make_jobs(options, stream, vocab)
        require_writable(options.out)  # after bad input was refused, which leaves nothing behind
    say(f"text        {stream.name}: tokens {stream.start} .. {stream.start + options.seq_len} of {stream.tokens:,}")
    results: Any = measure(options, stream, jobs, models)  # as whoever reads the file takes them
    with cli.one_line_errors(PROG):
        conclude(results, options.out / "results.json", verdict_table)
        draw_where_possible("bench.price.figures", results, options.out)


def _check_upstream(options: argparse.Namespace) -> None:
    upstream()
    if options.definition != "lru":
        raise ValueError("--tracer upstream prices one stack: use it with --definition lru")
    if options.padding > 10_000:
        hours = 13 * (options.padding / 10_000) ** 2 / 3600  # quadratic; 13 s measured at 10^4 live values
        say(f"the original tracer is quadratic: {options.padding:,} values of padding take about {hours:.1f} h a run")


if __name__ == "__main__":
    cli.run(main, PROG)
