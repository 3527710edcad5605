"""What it costs in time, and what crosses the bus, to keep Engram's table off the accelerator.

  python bench/gpu_wall.py                                        on a CUDA machine: every variant, 4B-class model
  python bench/gpu_wall.py --table_params 1e9 1e10 max            several table sizes; max is what memory holds
  python bench/gpu_wall.py --preset v41-flash --rows split        DeepSeek-V4.1-Flash: 4-grams, 24 columns, fp8 rows
  python bench/gpu_wall.py --backbone none --steps prefill:1x64   the layer by itself
  python bench/gpu_wall.py --out out/gpu_wall                     again, after a cut: finished shapes are kept
  python bench/gpu_wall.py --cases hash compute --variants none   the parts of the lookup only
  python bench/gpu_wall.py --end-to-end --table_params 1e11       a whole model, served; the overhead taken apart
  python bench/lookup_speed.py                                    the lookup alone, in microseconds
  make bench-cpu                                                  without a GPU: RAM against a real file
  make end-to-end-cpu                                             the same for the whole model, a tiny one

Variants (where rows live, how they arrive):
  resident          device memory, gathered on the device: the control; measured twice, which gives the noise floor;
                    end to end on CUDA by two kernels from token ids to rows, in the model's first graph
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
disk after every shape, and the same command with the same OUT goes on behind the last; --fresh begins anew. Without
CUDA the variants are resident (RAM) and offload_disk, and no GPU figure follows.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

# Threads that spin while they wait stall everybody for milliseconds when another program needs a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from bench.harness import components, end_to_end_options, end_to_end_report, steps, wall_figures, wall_table
from bench.harness.accelerator import copy_bandwidth, describe
from bench.harness.backbones import BACKBONES, Backbone, build_backbone
from bench.harness.end_to_end_contenders import chosen_names
from bench.harness.end_to_end_records import code_sha256, found_at, require_same
from bench.harness.output import require_writable
from bench.harness.results import environment, git_commit, write_json
from bench.harness.rivals import fio_random_read
from bench.harness.timeline import SpanLog, trace_step
from bench.harness.token_batches import TokenBatches, standard_library, text_batches, text_file, uniform_batches
from bench.harness.variants import TableSet, Variant
from bench.harness.wall_options import (
    LAYER,
    LAYOUTS,
    STEPS_CPU,
    STEPS_GPU,
    largest,
    pick_device,
    refuse_idle_options,
    require_disk,
    require_steps,
    row_layout,
    step_shape,
    table_config,
    table_params,
    wanted_variants,
)
from bench.harness.wall_records import run_record
from engram_ref import cli
from engram_ref.config import PRESETS, EngramConfig
from engram_ref.fusion.factory import make_fusion
from engram_ref.hashing import HashPlan, NgramHasher
from engram_ref.rows.memory import require_bytes
from engram_ref.vocab import CompressedVocab

PROG = "gpu_wall"
DTYPES = ("float32", "float16", "bfloat16")
FIO_SECONDS = 4
HOT_TOKENS = 1 << 19  # of text before the measured one, to choose the most frequent rows from
_GROWN = ("steps", "components", "components_skipped")
COPY_BYTES, COPIES = 1 << 28, 9  # of the copies that bandwidth is measured with


def parse_arguments() -> argparse.Namespace:
    """Command-line options; see `--help`."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("out/gpu_wall"),
        metavar="DIR",
        help="results, figures and the table's file (default: out/gpu_wall)",
    )
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: auto, CUDA where there is one")
    add(
        "--dtype",
        choices=DTYPES,
        help="of the model, and of the table where the preset has no fp8 rows (default: bfloat16)",
    )
    add("--seed", type=cli.at_least(0, cli.MOST_SEED), default=0)

    steps_group = parser.add_argument_group("steps of a model with an Engram layer")
    add = steps_group.add_argument
    add("--variants", nargs="+", metavar="NAME", help="default: all that this machine can serve; none for no steps")
    add(
        "--table_params",
        nargs="+",
        type=table_params,
        metavar="N",
        help="values in the rows: 1e9 ... 1e11, or max, what memory holds as stored (default: 1e9)",
    )
    add("--fit", action="store_true", help="name and leave out a variant that does not fit, instead of refusing")
    add("--preset", choices=list(PRESETS), help="geometry (default: paper-27b)")
    add(
        "--rows",
        choices=LAYOUTS,
        help="v41-flash only: scales of a row beside its codes, or apart from them (default: packed)",
    )
    add(
        "--backbone",
        default="qwen3-4b",
        metavar="NAME",
        help=f"{', '.join(BACKBONES)} or a config.json (default: qwen3-4b)",
    )
    add("--blocks", type=cli.at_least(2, 1 << 10), help="decoder blocks (default: all on CUDA, 2 on a CPU)")
    add(
        "--steps",
        nargs="+",
        type=step_shape,
        metavar="SHAPE",
        help="prefill:BATCHxTOKENS, or on a CPU decode:BATCH (default: two)",
    )
    add("--context", type=cli.at_least(0, 1 << 20), default=512, help="tokens before a decode step (default: 512)")
    add("--stream", choices=("text", "uniform"), default="text", help="token ids: the standard library, or random")
    add("--text", type=Path, metavar="FILE", help="UTF-8 text for the stream (default: the standard library's sources)")
    add("--page_cache", nargs="+", choices=("cold", "warm"), default=["cold", "warm"], help="for offload_disk")
    add(
        "--hot_share", type=cli.share, default=0.1, help="of the rows, kept on the device by offload_hot (default: 0.1)"
    )
    add("--rounds", type=cli.at_least(1), help="samples per variant and shape (default: 20)")
    add("--warmup", type=cli.at_least(1), help="rounds that are not kept (default: 2)")
    add("--energy", action="store_true", help="board energy, 30 s per variant and shape (CUDA); try --backbone none")
    add("--no_trace", action="store_true", help="no profiled step per phase and variant after each table")
    add("--profile", type=Path, metavar="FILE.json", help="a Chrome trace per phase and variant, beside FILE")

    parts_group = parser.add_argument_group("component cases")
    add = parts_group.add_argument
    add("--cases", nargs="+", choices=(*components.CASES, "all", "none"), default=["all"], help="default: all")
    add("--iterations", type=cli.at_least(1), default=50, help="samples per case (default: 50)")
    add("--batch_size", type=cli.at_least(1), help="default: 64; 1 on a CPU")
    add("--seq_len", type=cli.at_least(1, 1 << 20), default=4096, help="default: 4096")
    end_to_end_options.add_arguments(parser)
    return complete(*parser.parse_given())


def complete(options: argparse.Namespace, given: Mapping[str, str]) -> argparse.Namespace:
    """Defaults that depend on the machine or on other options; what would do nothing is refused.

    Args:
        given: options that stand on the command line, by name.
    """
    with cli.one_line_errors(PROG):
        device = pick_device(options.device)
        on_gpu = device.type == "cuda"
        (chosen_names if options.end_to_end else wanted_variants)(options.variants, device)  # refuses unknown ones
        refuse_idle_options(options, given, on_gpu)
        end_to_end_options.fill_defaults(options, on_gpu)
        options.rows = row_layout(options.preset, options.rows)
        preset, dtype = options.preset, options.dtype
        require_steps(options.steps or [], on_gpu and not options.end_to_end)
        options.table_params = [
            largest(preset, dtype) if n == "max" and not options.end_to_end else n for n in options.table_params
        ]
    if options.steps is None:
        options.steps = [step_shape(text) for text in (STEPS_GPU if on_gpu else STEPS_CPU)]
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
        if options.end_to_end:
            return end_to_end_report.measure(options, tell, (COPY_BYTES, COPIES))
        results = Benchmark(options).run()
        print(f"\n{wall_table.wall_table(results)}\n\n{options.out / 'results.json'}")
        for figure in wall_figures.draw_all(results, options.out) if results["steps"] else []:
            print(figure)


class Benchmark:
    """One run of the program: what is the same for all table sizes and shapes, and the results so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = pick_device(options.device)
        self.dtype = getattr(torch, options.dtype)
        self.variants = wanted_variants(options.variants, self.device)
        self.vocab = CompressedVocab.from_tokenizer()
        self.published_rows = self.plan_of(EngramConfig.preset(options.preset)).layers[0].rows
        tell("tokenizing the text")
        wanted = 4 * max(shape.batch * shape.tokens for shape in options.steps)  # two batches, and as many to calibrate
        whole = text_file(options.text, self.vocab, tokens=wanted) if options.text else standard_library(self.vocab)
        half = len(whole.ids) // 2
        self.calibration = whole.ids[:half]  # the hot rows are chosen on text that is not measured
        self.corpus = whole.since(half)
        self.results = continued(options.out / "results.json", self.head(), options.fresh)

    def head(self) -> dict[str, Any]:
        """Everything of the results that is known before the first step."""
        options = {name: plain(value) for name, value in vars(self.options).items()}
        accelerator = describe(self.device)
        machine = environment()
        stream = self.batches(1, 1024)
        return {
            "benchmark": PROG,
            "device": self.device.type,
            "device_name": accelerator["name"] if accelerator else machine["cpu"],
            "configuration": {**options, "device": self.device.type},
            "environment": {
                **machine,
                "accelerator": accelerator,
                "huge_pages": None,
                "page_size": os.sysconf("SC_PAGE_SIZE"),
                "pinned": self.device.type == "cuda",
            },
            "git": git_commit(),
            "code_sha256": code_sha256(),
            "stream": {"name": stream.name, "sha256": stream.sha256, "tokens": stream.tokens},
            "limits": {
                **copy_bandwidth(self.device, COPY_BYTES, COPIES),
                "disk": {"reads_per_s": None, "why": "no file was read"},
            },
            "steps": [],
            "components": [],
            "components_skipped": [],
        }

    def batches(self, batch: int, tokens: int, plan: HashPlan | None = None) -> TokenBatches:
        """Token ids of the chosen stream; with a plan, sequences that go on from step to step."""
        if self.options.stream == "uniform":
            return uniform_batches(self.vocab, batch, tokens, self.options.seed, plan)
        return text_batches(self.vocab, batch, tokens, self.options.seed, plan, self.corpus)

    def run(self) -> dict[str, Any]:
        """Measure what is not there yet; the file is written after each shape, complete each time."""
        print(wall_table.measured_on(self.results), flush=True)
        missing = {params: self.missing_shapes(params) for params in self.options.table_params}
        if self.results["steps"]:
            tell(f"continued: {len(self.results['steps'])} shapes kept")
        if self.variants and any(missing.values()):
            backbone = self.build_backbone()
            for params, shapes in missing.items():
                if shapes:
                    self.measure_table(backbone, params, shapes)
            del backbone
        if not (self.results["components"] or self.results["components_skipped"]):
            self.measure_components()
        self.save()
        return self.results

    def missing_shapes(self, params: float) -> list[steps.Shape]:
        """Shapes that have not been measured on a table of so many parameters."""
        done = [(step["table"]["params"], step["shape"]) for step in self.results["steps"]]
        return [shape for shape in self.options.steps if (params, asdict(shape)) not in done]

    def save(self) -> None:
        """Write the results so far."""
        write_json(self.options.out / "results.json", self.results)

    def build_backbone(self) -> Backbone:
        """The blocks around the Engram layer."""
        tell(f"building {self.options.backbone}")
        hidden = EngramConfig.preset(self.options.preset).hidden
        return build_backbone(self.options.backbone, self.options.blocks, self.device, self.dtype, hidden)

    def measure_table(self, backbone: Backbone, params: float, shapes: list[steps.Shape]) -> None:
        """These steps on one table size, then the traces: whatever becomes of those, the steps are on disk."""
        options = self.options
        config = table_config(options.preset, params, backbone.hidden, options.dtype)
        plan = self.plan_of(config)
        names = self.fitting(config, plan)
        hot = self.hot_rows(plan) if "offload_hot" in names else None
        tell(f"building a table of {plan.layers[0].rows * config.row_bytes() / 2**30:.2f} GiB: {', '.join(names)}")
        log = SpanLog()
        packed = options.rows != "split"
        with TableSet(
            config, plan, names, self.device, options.out, options.seed, hot, options.page_cache, log, packed
        ) as tables:
            self.results["environment"]["huge_pages"] = tables.memory.huge_page_share()
            self.measure_disk_limit(tables)
            fusion = make_fusion(config, self.device, self.dtype).eval()

            def stepper(shape: steps.Shape) -> steps.Stepper:
                batches = self.batches(shape.batch, shape.tokens, plan if shape.phase == "decode" else None)
                return steps.Stepper(tables, fusion, backbone, shape, batches)

            for shape in shapes:
                self.measure_step(stepper(shape), config, params)
                self.save()
            for shape in [] if options.no_trace else self.untraced(shapes):
                self.trace(stepper(shape), params, log)
                self.save()

    def untraced(self, shapes: list[steps.Shape]) -> list[steps.Shape]:
        """The first shape of each phase that no step has spans of: a profiled step takes a second."""
        traced = {step["shape"]["phase"] for step in self.results["steps"] if any(run["spans"] for run in step["runs"])}
        first = {shape.phase: shape for shape in reversed(shapes) if shape.phase not in traced}
        return [shape for shape in shapes if first.get(shape.phase) is shape]

    def trace(self, stepper: steps.Stepper, params: float, log: SpanLog) -> None:
        """Spans of one step of every variant, put beside its samples; a profiler that fails is named."""
        step = next(
            s for s in self.results["steps"] if (s["table"]["params"], s["shape"]) == (params, asdict(stepper.shape))
        )
        for variant, run in zip(variants_of(stepper), step["runs"]):
            try:
                spans = trace_step(stepper, variant, log, self.chrome_trace(stepper.shape, variant))
            except Exception as error:  # whatever a profiler raises: what was measured must outlive it
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"warning: no trace of {variant.label}, {stepper.shape}: {why}", file=sys.stderr, flush=True)
                continue
            run["spans"] = [list(span) for span in spans]

    def plan_of(self, config: EngramConfig) -> HashPlan:
        """The hash plan of a geometry with this run's vocabulary."""
        return HashPlan.for_vocab(config, self.vocab)

    def fitting(self, config: EngramConfig, plan: HashPlan) -> list[str]:
        """The variants whose table fits; the others are refused, or with --fit named and left out."""
        fit = []
        nbytes = plan.layers[0].rows * config.row_bytes()
        on_device = 0  # of the variants so far: they are all there at once
        for name in self.variants:
            share = {"resident": 1.0, "offload_hot": self.options.hot_share}.get(name, 0.0)
            needed = int(share * nbytes) if self.device.type == "cuda" else 0
            try:
                if name == "offload_disk":
                    require_disk(nbytes, self.options.out)
                if needed:
                    require_bytes(on_device + needed, self.device)
                fit.append(name)
                on_device += needed
            except ValueError as error:
                if not self.options.fit:
                    raise
                print(f"{name} is left out: {error}", flush=True)
        return fit

    def hot_rows(self, plan: HashPlan) -> tuple[torch.Tensor, int]:
        """Row numbers of calibration text, and how many of the most frequent to keep on the device."""
        rows = NgramHasher(plan)(self.calibration[None, :HOT_TOKENS], LAYER)
        return torch.from_numpy(rows), max(1, int(self.options.hot_share * plan.layers[0].rows))

    def measure_disk_limit(self, tables: TableSet) -> None:
        """What the device under the table's file can do, once per run."""
        files = [found for found in map(steps.file_behind, tables.variants) if found is not None]
        if files and self.results["limits"]["disk"]["reads_per_s"] is None:
            tell("measuring random reads with fio")
            self.results["limits"]["disk"] = fio_random_read(files[0].source.path, FIO_SECONDS)

    def measure_step(self, stepper: steps.Stepper, config: EngramConfig, params: float) -> None:
        """Predict, print, measure and record one shape."""
        tables, shape, backbone = stepper.tables, stepper.shape, stepper.backbone
        variants = variants_of(stepper)
        step = {
            "shape": asdict(shape),
            "table": {
                "params": params,
                "rows": tables.rows,
                "row_bytes": tables.format.row_bytes,
                "bytes": tables.nbytes,
                "columns": config.columns,
                "layer_ids": list(config.layer_ids),
                "preset": self.options.preset,
                "published_rows": self.published_rows,
                "row_dtype": config.row_dtype,
                "layout": tables.layout,
            },
            "backbone": self.options.backbone,
            "blocks": backbone.blocks,
            "dtype": self.options.dtype,
            "device": self.device.type,
            "prediction": stepper.predict(),
            "runs": [],
        }
        digest = tables.check(stepper.next_ids()[0])  # rows that differ are never timed
        print("\n".join(wall_table.step_header(self.results, step)))
        print(wall_table.prediction(self.results, step), flush=True)
        samples = steps.measure(stepper, variants, self.options.rounds, self.options.warmup, tell)
        for variant in variants:
            asked = int(step["prediction"]["bytes_requested"]) if variant.prefetcher else 0
            counted = steps.count_on_bus(stepper, variant, self.options.energy, asked)
            step["runs"].append(
                run_record(variant, samples[variant.label], step, self.results["limits"], digest, counted, [])
            )
        self.results["steps"].append(step)

    def chrome_trace(self, shape: steps.Shape, variant: Variant) -> Path | None:
        """Where `--profile` wants the trace of a variant in a phase."""
        path = self.options.profile
        return path and path.with_name(f"{path.stem}-{shape.phase}-{variant.label.replace(' ', '-')}.json")

    def measure_components(self) -> None:
        """The component cases that this machine can run."""
        options = self.options
        runnable = components.CASES if self.device.type == "cuda" else components.ON_CPU
        for case in options.cases:
            if case not in runnable:
                self.results["components_skipped"].append({"case": case, "why": "there is no CUDA device to upload to"})
        cases = [case for case in options.cases if case in runnable]
        if not cases:
            return
        tell(f"components {', '.join(cases)}: {options.batch_size} x {options.seq_len} tokens")
        config = EngramConfig.preset("demo").replace(row_dtype=options.dtype)
        plan = self.plan_of(config)
        batches = self.batches(options.batch_size, options.seq_len)
        memory = copy_bandwidth(torch.device("cpu"), COPY_BYTES, COPIES)["copy"]
        assert memory is not None
        rates = components.Rates(
            memcpy=memory["bytes_per_s"],
            upload=self.results["limits"]["copy"]["bytes_per_s"] if self.device.type == "cuda" else None,
            matmul=components.matmul_rate(self.dtype),
        )
        parts = components.Components(config, plan, batches, self.device, self.dtype)
        try:
            self.results["components"] = components.measure(parts, cases, options.iterations, rates, tell)
        finally:
            parts.close()


def variants_of(stepper: steps.Stepper) -> list[Variant]:
    """What a step is measured with, in the order of its runs: the control first, where there is a backbone."""
    return [*([steps.control()] if stepper.backbone.blocks else []), *stepper.tables.variants]


def continued(path: Path, head: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """The results that an earlier run of the same left there, to be gone on with; else `head`.

    Raises:
        ValueError: the file is of another configuration, machine or code.
    """
    found = None if fresh else found_at(path)
    if found is None:
        return head
    require_same(path, comparable(found), comparable(head))
    return {**head, **{key: found[key] for key in ("environment", "git", "limits", *_GROWN)}}


def comparable(results: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for results to be of one run; where they are written does not matter."""
    settings = {key: value for key, value in results["configuration"].items() if key not in ("out", "fresh", "profile")}
    return {**results, "configuration": settings}


def plain(value: Any) -> Any:
    """An option as JSON holds it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, steps.Shape):
        return str(value)
    return [plain(item) for item in value] if isinstance(value, list) else value


def tell(text: str) -> None:
    """Progress on stderr; on a terminal one line that is overwritten."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main, PROG, left="results.json, if there is one, holds what was finished")
