"""What it costs in time, and what crosses the bus, to keep Engram's table off the accelerator.

  python bench/gpu_wall.py                                        on a CUDA machine: every variant, 4B-class model
  python bench/gpu_wall.py --table_params 1e9 1e10 max            several table sizes; max is what memory holds
  python bench/gpu_wall.py --preset v41-flash --rows split        DeepSeek-V4.1-Flash: 4-grams, 24 columns, fp8 rows
  python bench/gpu_wall.py --backbone none --steps prefill:1x64   the layer by itself
  python bench/gpu_wall.py --out out/gpu_wall                     again, after a cut: finished rounds are kept
  python bench/gpu_wall.py --cases hash compute --variants none   the parts of the lookup only
  python bench/gpu_wall.py --end-to-end --table_params 1e11       a whole model, served; the overhead taken apart
  torchrun --standalone --nproc-per-node 4 bench/gpu_wall.py --sharded       tables that four processes share
  python bench/lookup_speed.py                                    the lookup alone, in microseconds
  make bench-cpu                                                  without a GPU: RAM against a real file
  make end-to-end-cpu                                             the same for the whole model, a tiny one

Variants (where rows live, how they arrive):
  resident          device memory, gathered on the device: the control; measured twice, which gives the noise floor;
                    end to end on CUDA by kernels from token ids to rows, in the step's graph
  offload_naive     host memory: CPU gather into staging, copy, wait; nothing overlaps
  offload_prefetch  the same, started when the token ids are known, joined just before the second block
  offload_uva       pinned host memory, read in place by a GPU kernel on a side stream
  offload_hot       the most frequent rows on the device, the others as offload_prefetch
  offload_disk      a safetensors file: synchronous and prefetched, page cache cold and warm
  no_engram         the backbone by itself
  own_compute       end to end: the layer with its rows already on hand, no lookup
  throttled         end to end: offload_prefetch behind a bus that is slowed in software

The run predicts (rows, bytes, measured bandwidth, hence the floor), measures all variants in interleaved rounds with
fresh token ids, and writes every sample to OUT/results.json and figures beside it. Overheads are paired ratios with
a 95 % interval; "not resolved" means that the interval holds 1. On CUDA single steps are prefills: a decode step that
the host launches kernel by kernel measures the host, so decoding is measured end to end, from graphs. Results are on
disk after every round, and the same command with the same OUT goes on behind the last; --fresh begins anew. Without
CUDA the variants are resident (RAM) and offload_disk, and no GPU figure follows.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

# Threads that spin while they wait stall everybody for milliseconds when another program needs a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":  # Ctrl-C ends the imports that follow, too, in one line
    from engram_ref.starting import interruptible

    interruptible("gpu_wall")

from bench.instruments.output import finish, require_writable, tell
from bench.ranks import figures as ranks_figures
from bench.ranks import options as ranks_options
from bench.ranks import run as ranks_run
from bench.ranks import table as ranks_table
from bench.served import options as end_to_end_options
from bench.served import run as end_to_end
from bench.served.variants import chosen_names
from bench.setup.backbones import BACKBONES
from bench.setup.sizes import largest, pick_device
from bench.wall import components
from bench.wall import figures as wall_figures
from bench.wall import options as wall_options
from bench.wall import table as wall_table
from bench.wall.options import ROW_LAYOUTS, STEPS_CPU, STEPS_GPU
from bench.wall.run import PROG, Benchmark
from engram_ref import cli
from engram_ref.config import PRESETS

DTYPES = ("float32", "float16", "bfloat16")


def parse_arguments() -> argparse.Namespace:
    """Command-line options; see `--help`."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/gpu_wall"), metavar="DIR", help="results, figures and the table's file")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: auto, CUDA where there is one")
    add("--dtype", choices=DTYPES, help="of the model, and of rows that the preset has not in fp8 (default: bfloat16)")
    add("--seed", type=cli.at_least(0, cli.MOST_SEED), default=0, help="of ids and weights")

    steps_group = parser.add_argument_group("steps of a model with an Engram layer")
    add = steps_group.add_argument
    add("--variants", nargs="+", metavar="NAME", help="default: all that this machine can serve; none for no steps")
    sizes = "values in the rows: 1e9 ... 1e11, or max, what memory holds as stored (default: 1e9)"
    add("--table_params", nargs="+", type=wall_options.table_params, metavar="N", help=sizes)
    add("--fit", action="store_true", help="name and leave out a variant that does not fit, instead of refusing")
    add("--preset", choices=list(PRESETS), help="geometry (default: paper-27b)")
    add("--rows", choices=ROW_LAYOUTS, help="v41-flash only: scales beside a row's codes, or apart (default: packed)")
    add("--backbone", default="qwen3-4b", metavar="NAME", help=f"{', '.join(BACKBONES)} or a config.json")
    add("--blocks", type=cli.at_least(2, 1 << 10), help="decoder blocks (default: all on CUDA, 2 on a CPU)")
    shapes = "prefill:BATCHxTOKENS, or on a CPU decode:BATCH (default: two)"
    add("--steps", nargs="+", type=wall_options.step_shape, metavar="SHAPE", help=shapes)
    add("--context", type=cli.at_least(0, 1 << 20), default=512, help="tokens before a decode step")
    add("--stream", choices=("text", "uniform"), default="text", help="token ids: the standard library, or random")
    add("--text", type=Path, metavar="FILE", help="UTF-8 text for the stream (default: the standard library's sources)")
    add("--page_cache", nargs="+", choices=("cold", "warm"), default=["cold", "warm"], help="for offload_disk")
    add("--hot_share", type=cli.share, default=0.1, help="of the rows, kept on the device by offload_hot")
    add("--rounds", type=cli.at_least(1), help="samples per variant and shape (default: 20)")
    add("--warmup", type=cli.at_least(1), help="rounds that are not kept (default: 2)")
    add("--energy", action="store_true", help="board energy, 30 s per variant and shape (CUDA); try --backbone none")
    add("--no_trace", action="store_true", help="no profiled step per phase and variant after each table")
    add("--profile", type=Path, metavar="FILE.json", help="a Chrome trace per phase and variant, beside FILE")

    parts_group = parser.add_argument_group("component cases")
    add = parts_group.add_argument
    add("--cases", nargs="+", choices=(*components.CASES, "all", "none"), default=["all"], help="parts of the lookup")
    add("--iterations", type=cli.at_least(1), default=50, help="samples per case")
    add("--batch_size", type=cli.at_least(1), help="default: 64; 1 on a CPU")
    add("--seq_len", type=cli.at_least(1, 1 << 20), default=4096, help="tokens of a sequence")
    end_to_end_options.add_arguments(parser)
    parser.add_argument("--sharded", action="store_true", help="only the fetch from tables that ranks share (torchrun)")
    return complete(*parser.parse_given())


def complete(options: argparse.Namespace, given: Mapping[str, str]) -> argparse.Namespace:
    """Defaults that depend on the machine or on other options; what would do nothing is refused.

    Args:
        given: options that stand on the command line, by name.
    """
    if options.sharded:
        with cli.one_line_errors(PROG):
            ranks_options.fill(options, given)
        options.steps = options.steps or [wall_options.step_shape(text) for text in ranks_options.STEPS]
        return options
    with cli.one_line_errors(PROG):
        device = pick_device(options.device)
        on_gpu = device.type == "cuda"
        known = chosen_names if options.end_to_end else wall_options.wanted_variants
        known(options.variants, device)  # refuses others
        wall_options.refuse_idle_options(options, given, on_gpu, end_to_end_options.OWN_OPTIONS)
        end_to_end_options.fill_defaults(options, on_gpu)
        # Only now the preset is known.
        options.rows = wall_options.row_layout(options.preset, options.rows)
        preset, dtype = options.preset, options.dtype
        wall_options.require_steps(options.steps or [], on_gpu and not options.end_to_end)
        # End to end, `max` is what memory holds beside a model: it is settled where the models' sizes are known.
        options.table_params = [
            largest(preset, dtype) if n == "max" and not options.end_to_end else n for n in options.table_params
        ]
    if options.steps is None:
        options.steps = [wall_options.step_shape(text) for text in (STEPS_GPU if on_gpu else STEPS_CPU)]
    options.steps = [replace(s, context=options.context) if s.phase == "decode" else s for s in options.steps]
    if options.blocks is None and not on_gpu and not options.end_to_end:
        options.blocks = 2
    options.batch_size = options.batch_size or (64 if on_gpu else 1)
    if "all" in options.cases:
        options.cases = list(components.CASES)
    options.cases = [case for case in options.cases if case != "none"]
    return options


def main() -> None:
    """The command."""
    options = parse_arguments()
    with cli.one_line_errors(PROG):
        require_writable(options.out)
        if options.sharded:
            if (found := ranks_run.measure(options, tell)) is not None:  # on rank 0
                show(found, ranks_table.measured_table, ranks_figures.draw_all, options.out)
            return
        if options.end_to_end:
            served = end_to_end.measure(options, tell)
            return show(served, end_to_end.report, end_to_end.draw_all, options.out)
        results = Benchmark(options).run()
        drawn = wall_figures.draw_all if results["steps"] else lambda results, out: []
        show(results, wall_table.wall_table, drawn, options.out)


def show(results: dict[str, Any], table: Callable[[dict[str, Any]], str], draw: Any, out: Path) -> None:
    """Print the table, draw the figures, and end."""
    print(f"\n{cli.fitted(table(results))}\n")
    for figure in draw(results, out):
        print(figure)
    finish(results, out / "results.json")


if __name__ == "__main__":
    cli.run(main, PROG, left="results.json, if there is one, holds what was finished")
