"""The hardware benchmark, case by case: every table size and step shape, each variant in interleaved rounds."""

from __future__ import annotations

import argparse
import functools
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.instruments.bandwidth import copy_bandwidth, fio_random_read
from bench.instruments.board import count_beside
from bench.instruments.driver import device_head
from bench.instruments.journal import earlier, note_process
from bench.instruments.output import tell
from bench.instruments.results import write_json
from bench.setup.backbones import Backbone, build_backbone, check_backbone
from bench.setup.sizes import pick_device, require_disk, table_config
from bench.setup.streams import halves
from bench.setup.token_batches import TokenBatches, text_batches, uniform_batches
from bench.setup.variants import TableSet, Variant, row_sample
from bench.wall import components
from bench.wall import step as steps
from bench.wall import table as wall_table
from bench.wall.options import wanted_variants
from bench.wall.record import StepRecord
from bench.wall.timeline import SpanLog, trace_step
from engram_ref.config import EngramConfig
from engram_ref.fusion.factory import make_fusion
from engram_ref.hashing import HashPlan
from engram_ref.rows.memory import require_bytes
from engram_ref.vocab import vocab_for

PROG = "gpu_wall"
FIO_SECONDS = 4


class Benchmark:
    """One run of the program: what is the same for all table sizes and shapes, and the results so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = pick_device(options.device)
        self.dtype = getattr(torch, options.dtype)
        self.variants = wanted_variants(options.variants, self.device)
        if self.variants:
            check_backbone(options.backbone, options.blocks)  # before the text is tokenized
        self.vocab = vocab_for(EngramConfig.preset(options.preset))
        self.published_rows = self.plan_of(EngramConfig.preset(options.preset)).layers[0].rows
        tell("tokenizing the text")
        wanted = 4 * max(shape.batch * shape.tokens for shape in options.steps)  # two batches, and as many to calibrate
        self.calibration, self.text = halves(options.text, self.vocab, wanted)
        self.results = self.begun(options.out / "results.json")

    def begun(self, path: Path) -> dict[str, Any]:
        """The results that are gone on with, or everything of them that is known before the first step."""
        options = {name: plain(value) for name, value in vars(self.options).items()}
        stream = self.batches(1, 1024)  # for its name and digest alone
        # The device that was picked: what was asked for says less.
        about = device_head(PROG, self.device, {**options, "device": self.device.type}, "bench.gpu_wall")
        # How many pages are huge is known when there is a table.
        pinned = {"huge_pages": None, "pinned": self.device.type == "cuda"}
        head: dict[str, Any] = {**about, "environment": {**about["environment"], **pinned}}
        found = earlier(path, head, self.options.fresh) or {
            **head,
            "stream": {"name": stream.name, "sha256": stream.sha256, "tokens": stream.tokens},
            "limits": {
                **copy_bandwidth(self.device),
                "disk": {"reads_per_s": None, "why": "no file was read"},
            },
            "processes": [],
            "steps": [],
            "components": [],
            "components_skipped": [],
        }
        note_process(found, kept=sum(len(run["step_s"]) for step in found["steps"] for run in step["runs"]))
        return found

    def batches(self, batch: int, tokens: int, plan: HashPlan | None = None) -> TokenBatches:
        """Token ids of the chosen stream; with a plan, sequences that go on from step to step."""
        if self.options.stream == "uniform":
            return uniform_batches(self.vocab, batch, tokens, self.options.seed, plan)
        return text_batches(self.text, batch, tokens, self.options.seed, plan)

    def run(self) -> dict[str, Any]:
        """Measure what is not there yet; the file is written after each round, complete each time."""
        print(wall_table.measured_on(self.results), flush=True)
        missing = {params: self.missing_shapes(params) for params in self.options.table_params}
        if self.results["steps"]:
            rounds = sum(len(step["process_of_round"]) for step in self.results["steps"])
            tell(f"continued: {rounds} rounds of {len(self.results['steps'])} shapes kept")
        if self.variants and any(missing.values()):
            backbone = self.build_backbone()
            for params, shapes in missing.items():
                if shapes:
                    self.measure_table(backbone, params, shapes)
            del backbone
        # They come last: an earlier run that has them has everything.
        if not (self.results["components"] or self.results["components_skipped"]):
            self.measure_components()
        self.save()
        return self.results

    def missing_shapes(self, params: float) -> list[steps.Shape]:
        """Shapes that have not been measured on a table of so many parameters, or not to the end."""
        done = [(step["table"]["params"], step["shape"]) for step in self.results["steps"] if step["finished"]]
        return [shape for shape in self.options.steps if (params, asdict(shape)) not in done]

    def save(self) -> None:
        """Write the results so far."""
        write_json(self.options.out / "results.json", self.results)

    def build_backbone(self) -> Backbone:
        """The blocks around the Engram layer."""
        tell(f"building {self.options.backbone}")
        hidden = EngramConfig.preset(self.options.preset).hidden
        return build_backbone(
            self.options.backbone, self.options.blocks, self.device, self.dtype, hidden, len(self.vocab)
        )

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
            for shape in [] if options.no_trace else self.untraced(shapes):
                self.trace(stepper(shape), params, log)
                self.save()

    def untraced(self, shapes: list[steps.Shape]) -> list[steps.Shape]:
        """The first shape of each phase that no step has spans of: a profiled step takes a second."""
        traced = {step["shape"]["phase"] for step in self.results["steps"] if any(run["spans"] for run in step["runs"])}
        # Reversed, so that the first of a phase is what stays.
        first = {shape.phase: shape for shape in reversed(shapes) if shape.phase not in traced}
        return [shape for shape in shapes if first.get(shape.phase) is shape]

    def trace(self, stepper: steps.Stepper, params: float, log: SpanLog) -> None:
        """Spans of one step of every variant, put beside its samples; a profiler that fails is named."""
        step = next(
            s for s in self.results["steps"] if (s["table"]["params"], s["shape"]) == (params, asdict(stepper.shape))
        )
        # The runs stand in the order of the variants.
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
        return row_sample(plan, self.calibration), max(1, int(self.options.hot_share * plan.layers[0].rows))

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
        }
        digest = tables.check(stepper.next_ids()[0])  # rows that differ are never timed
        print("\n".join(wall_table.step_header(self.results, step)))
        print(wall_table.prediction(self.results, step), flush=True)
        record = StepRecord(self.results, step, variants, self.results["limits"], digest, self.save)
        steps.measure(stepper, variants, record.samples, self.options.rounds, self.options.warmup, tell, record.keep)
        besides = {}
        for variant in variants:
            asked = int(step["prediction"]["bytes_requested"]) if variant.prefetcher else 0
            one_step = functools.partial(stepper.run, variant, None)
            besides[variant.label] = count_beside(self.device, one_step, asked, self.options.energy)
        record.finish(besides)

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
        memory = copy_bandwidth(torch.device("cpu"))["copy"]
        assert memory is not None  # a CPU copies in any case
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


def plain(value: Any) -> Any:
    """An option as JSON holds it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, steps.Shape):
        return str(value)
    return [plain(item) for item in value] if isinstance(value, list) else value


def variants_of(stepper: steps.Stepper) -> list[Variant]:
    """What a step is measured with, in the order of its runs: the control first, where there is a backbone."""
    return [*([steps.control()] if stepper.backbone.blocks else []), *stepper.tables.variants]
