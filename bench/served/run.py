"""A whole model with Engram in it, served under every variant: what `gpu_wall.py --end-to-end` runs.

What is to be measured is settled, checked against memory and written down first; then table, models and caches are
built, one case after the other: a backbone, a batch, a stream. `rounds` measures a case; what samples mean is computed
in `numbers` and shown by `table` and `figures`.

    python -m bench.served.run RESULTS.json             the tables and figures of a file again
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Final

import torch
from torch import Tensor

from bench.instruments.bandwidth import copy_bandwidth
from bench.instruments.drawing import redraw
from bench.instruments.driver import device_head
from bench.instruments.words import device_label, measured_on
from bench.schemas.served import Head
from bench.served.figures import draw_all
from bench.served.memory import Plan, device_room, estimate, largest_batch
from bench.served.model import ATTENTION, ServedModel, register_attention
from bench.served.numbers import Json
from bench.served.one_pass import Server
from bench.served.options import FIT, check
from bench.served.record import Case, Record
from bench.served.requests import TokenSource
from bench.served.rounds import Rounds
from bench.served.table import report
from bench.served.variants import Choice, Contenders, chosen_names
from bench.setup.backbones import Backbone, build_backbone, measure_backbone, parameter_bytes
from bench.setup.decoder_sizes import QWEN3_VOCABULARY
from bench.setup.sizes import LAYER, largest, pick_device, require_disk, table_config
from bench.setup.slow_bus import Bus
from bench.setup.streams import Source, halves
from bench.setup.variants import row_sample
from engram_ref.config import EngramConfig
from engram_ref.fusion.factory import make_fusion
from engram_ref.hashing import HashPlan
from engram_ref.vocab import vocab_for

PROG: Final = "end_to_end"
# Token ids with an embedding, and those that the head can choose; ours is smaller, or it would be all that counts.
VOCABULARY = {"tiny": (None, 8192)}
_CHECKED_TOKENS = (2, 16)  # sequences and tokens whose rows are compared before anything is timed
# Options that change no sample of such a run: another that differs in these goes on with its results.
_NOT_COMPARED = ("out", "fresh", "device", "end_to_end", "cases", "iterations", "batch_size", "seq_len", "steps",
                 "context", "stream", "page_cache", "hot_share", "profile", "backbone")  # fmt: skip
Tell = Callable[[str], None]


class EndToEnd:
    """One run: what is the same for all cases, and the record.

    Args:
        options: of the command line, defaults filled in.
        tell: progress.
    """

    def __init__(self, options: argparse.Namespace, tell: Tell) -> None:
        check(options)
        self.options, self.tell = options, tell
        self.device = pick_device(options.device)
        self.dtype = getattr(torch, options.dtype)
        self.choice = Choice(
            chosen_names(options.variants, self.device),
            tuple(options.hot_shares),
            tuple(Bus.parse(text) for text in options.buses),
            self.device.type == "cuda" and not options.eager,
            options.asking,
        )
        if options.asking and not (self.choice.graphs and "offload_prefetch" in self.choice.names):
            raise ValueError("--asking: it is offload_prefetch from CUDA graphs: not on a CPU, not --eager")
        self.vocab = vocab_for(EngramConfig.preset(options.preset))
        self.config = table_config(options.preset, self._table_params(), 1, options.dtype)
        self.plan = HashPlan.for_vocab(self.config, self.vocab)
        self.cases = self._fitting()  # refuses what does not fit, before anything is allocated
        self.record = Record.open(options.out / "results.json", self._head(), options.fresh)

    def _table_params(self) -> float:
        """Values in the rows: as asked for, or as many as memory holds beside everything else."""
        wanted, options = self.options.table_params[0], self.options
        if wanted != "max":
            return wanted
        if FIT in options.batches:
            raise ValueError("--table_params max and --batches fit: memory cannot be filled by both, give one a number")
        params = largest(options.preset, options.dtype)
        if self.device.type == "cuda" and "resident" in self.choice.names:
            config = table_config(options.preset, 1e6, 1, options.dtype)
            # What is left beside the case that needs most; hot rows are copies, too.
            others = max(
                estimate(self._sizes(backbone, batch, config, 0), self.device).total  # 0 rows: all but the table
                for backbone in options.backbones
                for batch in options.batches
            )
            copies = 1 + sum(options.hot_shares)
            room = max(0, device_room(self.device) - others) / copies
            params = min(params, room * config.row_width / config.row_bytes())
        return max(1e5, params)

    def _fitting(self) -> list[tuple[str, int, Plan]]:
        """The cases as planned; with `--fit` without the file or the resident table, if that is what does not fit."""
        self._or_without("offload_disk", self._require_disk)
        return self._or_without("resident", self._planned)

    def _or_without(self, name: str, attempt: Callable[[], Any]) -> Any:
        """An attempt; with `--fit` it is made again without a variant, where that may help."""
        try:
            return attempt()
        except ValueError as error:
            if not (self.options.fit and name in self.choice.names):
                raise
            print(f"{name} is left out: {error}", flush=True)
            self.choice = replace(self.choice, names=tuple(x for x in self.choice.names if x != name))
            return attempt()

    def _require_disk(self) -> None:
        if "offload_disk" in self.choice.names:
            require_disk(self.plan.layers[0].rows * self.config.row_bytes(), self.options.out)

    def _planned(self) -> list[tuple[str, int, Plan]]:
        """Backbone, batch and sizes of every case, checked against free memory."""
        cases = []
        for backbone in self.options.backbones:
            for batch in self.options.batches:
                rows = self.plan.layers[0].rows
                sizes = self._sizes(backbone, 1 if batch == FIT else batch, self.config, rows)
                if batch == FIT:
                    batch = largest_batch(sizes, self.device)
                    sizes = self._sizes(backbone, batch, self.config, rows)
                estimate(sizes, self.device).require(self.device)
                cases.append((backbone, batch, sizes))
        return cases

    def _sizes(self, backbone: str, batch: int, config: EngramConfig, rows: int) -> Plan:
        options = self.options
        embedded, chosen = self._vocabulary(backbone)
        shape, blocks, parameters = measure_backbone(backbone, options.blocks, embedded)
        sequences = batch if options.sequences == "batch" else options.sequences
        return Plan(
            shape, blocks, parameters, chosen * shape.hidden, self.dtype.itemsize, config.replace(hidden=shape.hidden),
            rows, batch, options.prompt_tokens[1], options.output_tokens[1],
            sequences, options.prefill_tokens, self.choice,
        )  # fmt: skip

    def _vocabulary(self, backbone: str) -> tuple[int, int]:
        embedded, chosen = VOCABULARY.get(backbone, (QWEN3_VOCABULARY, QWEN3_VOCABULARY))
        return max(embedded or 0, len(self.vocab.ids)), chosen

    def _head(self) -> Head:
        """What the results file says of the run as a whole."""
        kept = {key: value for key, value in vars(self.options).items() if key not in _NOT_COMPARED}
        kept["text"] = str(kept["text"]) if kept["text"] else None
        about = device_head(PROG, self.device, kept, "bench.gpu_wall")
        return {"schema_version": 1, **about, "limits": copy_bandwidth(self.device)}

    def run(self) -> dict[str, Any]:
        """Measure what is not there yet."""
        record, options = self.record, self.options
        if record.kept or record.dropped:
            self.tell(f"continued: {record.kept} passes kept, {record.dropped} of unfinished rounds measured again\n")
        self.tell("tokenizing the text")
        served = max((n for n in (options.sequences, *options.batches) if isinstance(n, int)), default=0)
        longest = options.prompt_tokens[1] + options.output_tokens[1]
        # Hot rows are chosen by one half, and the other one, which is served, has room for a round.
        calibration, text = halves(options.text, self.vocab, 2 * served * longest)
        missing = {backbone: self._missing(backbone, text) for backbone in options.backbones}
        if not any(missing.values()):
            return record.results  # a table of 96 GiB takes a minute
        sample = row_sample(self.plan, calibration)
        nbytes = self.plan.layers[0].rows * self.config.row_bytes()
        self.tell(f"building a table of {nbytes / 2**30:.2f} GiB")
        with Contenders(
            self.config, self.plan, self.vocab, self.choice, self.device, options.out, options.seed, sample
        ) as contenders:
            batch, length = _CHECKED_TOKENS
            contenders.check_tokens(text.tokens[: batch * length].reshape(batch, length))
            for backbone, cases in missing.items():
                if cases:
                    self._measure_backbone(backbone, cases, contenders, text)
        return record.results

    def _missing(self, backbone: str, text: Source) -> list[tuple[int, Plan]]:
        """Batches of a backbone of which a stream has not been measured to the end."""
        streams = [self._stream(stream, text)[1] for stream in self.options.streams]

        def finished(batch: int) -> bool:
            return all(self.record.finished(backbone, batch, stream, self.options.rounds) for stream in streams)

        return [(batch, sizes) for name, batch, sizes in self.cases if name == backbone and not finished(batch)]

    def _stream(self, stream: str, text: Source) -> tuple[TokenSource, Json]:
        """Where a stream's tokens come from, and what the file says of it."""
        ids, name = (text.tokens, text.name) if stream == "text" else (None, "uniform")
        source = TokenSource(ids, len(self.vocab.ids), self.options.seed)
        return source, {"kind": stream, "name": name, "sha256": source.sha256}

    def _measure_backbone(
        self, backbone: str, cases: list[tuple[int, Plan]], contenders: Contenders, text: Source
    ) -> None:
        self.tell(f"building {backbone}")
        register_attention()
        decoder, head = self._build(backbone)
        torch.manual_seed(self.options.seed)  # the layer draws its weights from torch's own generator
        fusion = make_fusion(self.config.replace(hidden=decoder.hidden), self.device, self.dtype).eval()
        for batch, sizes in cases:  # of one model: weights are drawn once
            positions = sizes.prompt + sizes.output
            options, table = self.options, next((one.table for one in contenders.variants if one.table), None)
            model = ServedModel(decoder, head, fusion, self.plan, self.vocab, batch, positions, self.choice.graphs)
            model.prepare(options.prompt_tokens[0], table or contenders.source, contenders.in_graph)
            server = Server(model, self.vocab, self.plan)
            weights = {"model": decoder.parameters_bytes + head.nbytes, "engram": parameter_bytes(fusion)}
            for stream in options.streams:
                source, described = self._stream(stream, text)
                case = self._case(backbone, sizes, described, contenders, weights)
                label, limits = device_label(self.record.results), self.record.results["limits"]
                Rounds(case, server, model, source, contenders, options, self.tell, label, limits).measure()
            del model, server  # keys and values make room for the next batch's

    def _build(self, backbone: str) -> tuple[Backbone, Tensor]:
        embedded, chosen = self._vocabulary(backbone)
        decoder = build_backbone(
            backbone, self.options.blocks, self.device, self.dtype, 0, vocabulary=embedded, attention=ATTENTION
        )
        generator = torch.Generator(self.device).manual_seed(self.options.seed)  # all variants choose by one head
        head = torch.empty((chosen, decoder.hidden), dtype=self.dtype, device=self.device)
        return decoder, head.normal_(0.0, 0.02, generator=generator)

    def _case(
        self,
        backbone: str,
        sizes: Plan,
        stream: Json,
        contenders: Contenders,
        weights: dict[str, int],
    ) -> Case:
        description = {
            "backbone": backbone,
            "blocks": sizes.blocks,
            "parameters": sizes.parameters + sizes.head,
            "weights": "random",
            "weight_bytes": weights,
            "dtype": self.options.dtype,
            "device": self.device.type,
            "batch": sizes.slots,
            "sequences": sizes.sequences,
            "prompt_tokens": list(self.options.prompt_tokens),
            "output_tokens": list(self.options.output_tokens),
            "stream": stream,
            "layer_id": LAYER,
            "table": contenders.record(self.options.preset),
            "needs": asdict(estimate(sizes, self.device)),
            "rounds": [],
        }
        return self.record.case(description, [one.label for one in contenders.variants])


def measure(options: argparse.Namespace, tell: Tell) -> Json:
    """The command's results."""
    run = EndToEnd(options, tell)
    print(measured_on(run.record.results), flush=True)
    return run.run()


def main() -> None:
    """Show a file that the command line names."""
    redraw(draw_all, "bench.served.run", report, PROG)


if __name__ == "__main__":
    main()
