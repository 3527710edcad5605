"""Where should my table live? Predictions for every placement of a model's n-gram table, and a recommendation.

    engram-place --preset v41-flash                          on this machine, in seconds, with assumed rates
    engram-place --preset v41-flash --gpu 40GB --host 512GB --disk 2TB
    engram-place --preset v41-flash --gpu 40GB --host 512GB --model-time 30ms     your own clock: a decode step
    engram-place /models/DeepSeek-V4.1-Flash --measure       a checkpoint (or its config.json); rates measured here
    engram-place --preset v41-flash --gpu 40GB --host 900GB --ranks 8 --weights-over 8     expert parallelism
    engram-place --preset v41-flash --json | jq .recommendation
    engram-place --preset v41-flash --gpu 40GB --host 512GB --engram-config      flags for vLLM and SGLang

--gpu, --host and --disk are what is free for the table, beside weights and caches: the GPU of each rank, host memory
and disk of each machine. Rates that were neither measured nor given are assumed, and said so. --json has every number
with the name of its formula. Torch is not needed, except to --measure a GPU.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from engram_ref import cli
from engram_ref.config import PRESETS
from engram_ref.files.texts import read_text
from engram_ref.place.answer import Question, answer
from engram_ref.place.engines import engine_flags
from engram_ref.place.group import Group
from engram_ref.place.machine import Machine, Rate, this_machine
from engram_ref.place.model import Model
from engram_ref.place.reads import count_reads
from engram_ref.place.table import report
from engram_ref.sharding.on_paper import LINKS

PROG = "engram-place"
_MOST_BATCH = 1 << 20
_RATES = {
    "device": (cli.bytes_per_second, "bandwidth of the accelerator's memory, such as 3TB/s"),
    "bus": (cli.bytes_per_second, "from host memory to it, such as 50GB/s"),
    "uva": (cli.positive, "rows a second that the accelerator reads in host memory, such as 3e7"),
    "memory": (cli.bytes_per_second, "bandwidth of host memory, one thread"),
    "gather": (cli.positive, "rows a second that the CPU gathers, such as 2e7"),
    "compute": (cli.positive, "operations a second of the accelerator, such as 5e14"),
    "processor": (cli.positive, "the same of the CPU, where there is no GPU"),
    "reads": (cli.positive, "random reads a second of the disk, such as 5e5"),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line options; see `--help`."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    add = parser.add_argument
    add("checkpoint", nargs="?", type=Path, help="a checkpoint's folder, or its config.json")
    add("--preset", choices=sorted(PRESETS), help="a published geometry, instead of a checkpoint")
    for name in ("gpu", "host", "disk"):
        add(f"--{name}", type=cli.nbytes, metavar="SIZE", help=f"free for the table, 0 for no {name}")
    add("--folder", type=Path, help="on the disk in question (default: here)")
    add("--measure", action="store_true", help="measure this machine's rates first, under a minute")
    for name, (kind, text) in _RATES.items():
        add(f"--{name}-rate", type=kind, metavar="RATE", help=text)
    when = parser.add_mutually_exclusive_group()
    when.add_argument("--block-time", type=cli.seconds, metavar="TIME", help="of one decoder block, such as 56us")
    when.add_argument("--model-time", type=cli.seconds, metavar="TIME", help="of a whole step, divided by --blocks")
    add("--blocks", type=cli.at_least(1, 10_000), help="decoder blocks of the model (default: those of the preset)")
    add("--weights-over", type=cli.at_least(1, 1 << 10), metavar="GPUS",
        help="that split each block's weights, as tensor or expert parallelism do (default: 1)")  # fmt: skip
    add("--batch", type=cli.at_least(1, _MOST_BATCH), nargs="+", default=[1, 64, 512], metavar="TOKENS",
        help="tokens of a decode step (default: 1 64 512)")  # fmt: skip
    add("--prompt", type=cli.at_least(1, _MOST_BATCH), nargs="*", default=[4096], metavar="TOKENS",
        help="tokens of a prompt; none: no prompts (default: 4096)")  # fmt: skip
    add("--ranks", type=cli.at_least(1, 1 << 10), default=1, help="processes, a GPU and tokens each (default: 1)")
    add("--machines", type=cli.at_least(1, 1 << 10), help="that the ranks run on (default: 1)")
    add(
        "--link", choices=sorted(LINKS), help="between ranks (default: nvlink; ethernet of several machines, or no GPU)"
    )
    add("--link-rate", type=cli.bytes_per_second, metavar="RATE", help="of the link, one way, such as 50GB/s")
    add("--hot-share", type=cli.share, default=0.1, help="of all rows, that the hot tier holds (default: 0.1)")
    add(
        "--text", type=Path, help="a UTF-8 text whose tokens are looked up, - for stdin (default: Python's help topics)"
    )
    add("--tokenizer", metavar="PATH", help="a tokenizer.json for the text (default: DeepSeek-V4's)")
    add("--json", action="store_true", help="everything as JSON on stdout")
    add("--engram-config", action="store_true", help="only the flags that vLLM and SGLang take")
    options = parser.parse_args(argv)
    _check(parser, options)
    return options


def _check(parser: cli.Parser, options: argparse.Namespace) -> None:
    if (options.preset is None) == (options.checkpoint is None):
        parser.error("name a --preset or a checkpoint, and one of them only")
    if options.weights_over is not None and (options.model_time or options.block_time) and not options.prompt:
        parser.error("--weights-over is for blocks whose time is estimated: leave it out, or the time")
    ranks, split = sorted((options.ranks, options.weights_over or 1))
    if split % ranks:
        parser.error(f"--weights-over {options.weights_over} of {options.ranks} --ranks: one must divide the other")
    if options.blocks is not None and options.model_time is None and options.block_time is None:
        parser.error("--blocks does nothing without --block-time or --model-time")
    of_ranks = [name for name in ("machines", "link", "link_rate") if getattr(options, name) is not None]
    if options.ranks == 1 and of_ranks:
        parser.error(f"--{of_ranks[0].replace('_', '-')} does nothing without --ranks")
    if options.link in ("nvlink", "pcie") and (options.machines or 1) > 1:
        parser.error(
            f"--link {options.link} does not reach other machines: give --link ethernet, or a --link-rate alone"
        )
    if options.json and options.engram_config:
        parser.error("--json has everything: leave --engram-config away, or --json")
    if options.folder is not None and options.disk is not None and not (options.measure and options.disk):
        parser.error(
            f"--folder does nothing with {'--disk, without --measure' if options.disk else '--disk 0'}: leave it out"
        )
    if options.measure and (given := [n for n in _RATES if getattr(options, f"{n}_rate") is not None]):
        parser.error(f"--{given[0]}-rate says what --measure would find: leave one of them away")


def question(options: argparse.Namespace) -> Question:
    """What the options ask.

    Raises:
        ValueError: a checkpoint, text or tokenizer that is not what it should be.
        OSError: one cannot be read.
    """
    model = Model.of(options.preset, options.checkpoint)
    batches, prompts = (tuple(sorted(set(tokens))) for tokens in (options.batch, options.prompt))
    machine = _machine(options, model.config.row_bytes())
    _refuse_idle(options, machine.gpu is not None, model.backbone is not None)
    if options.weights_over is not None and model.backbone is None:
        raise ValueError(
            "--weights-over: nothing is known of this model's weights, leave it out; --block-time says more"
        )
    group = _group(options, machine.gpu is not None)
    reads = count_reads(model, read_text(options.text), batches, options.hot_share, options.tokenizer, prompts)
    return Question(
        model,
        machine,
        reads,
        batches,
        _block(options, model),
        options.hot_share,
        prompts=prompts,
        group=group,
        blocks=options.blocks,
        weights_over=options.weights_over or 1,
    )


def _refuse_idle(options: argparse.Namespace, has_gpu: bool, is_known: bool) -> None:
    """Refuse rates that no formula of this question asks for.

    Args:
        is_known: whether something is known of the blocks around the tables.
    """
    given = {name: f"--{name}-rate" for name in _RATES if getattr(options, f"{name}_rate") is not None}
    block_given = options.block_time is not None or options.model_time is not None
    if has_gpu:
        cli.refuse_idle(given, ("memory", "processor"), "where a GPU computes: leave it out")
    else:
        cli.refuse_idle(
            given, ("device", "bus", "uva", "compute"), "where there is no GPU: give --gpu, or leave it out"
        )
    if block_given or not is_known:
        cli.refuse_idle(given, ("memory",), "where no block is estimated: leave it out")
    if not is_known or (block_given and not options.prompt):
        cli.refuse_idle(given, ("compute", "processor"), "where no block is estimated: leave it out")
    # The placements are shown all the same, for what they would hold; none of them can be taken, however fast.
    if options.disk == 0:
        cli.refuse_idle(given, ("reads",), "where there is no disk: leave it out, or --disk 0")
    if options.host == 0:
        cli.refuse_idle(given, ("bus", "uva", "gather", "reads"), "without host memory: leave it out, or --host 0")


def _group(options: argparse.Namespace, has_gpu: bool) -> Group:
    machines = options.machines or 1
    # NVLink joins the GPUs of a machine, and nothing else.
    link = LINKS[options.link or ("nvlink" if has_gpu and machines == 1 else "ethernet")]
    if options.link_rate is not None:
        link = replace(link, bytes_per_s=options.link_rate, source="given")
    return Group(options.ranks, machines, link)


def _machine(options: argparse.Namespace, row_bytes: int) -> Machine:
    folder = options.folder or Path()
    machine = this_machine(folder, options.host)
    sizes = {name: getattr(options, name) for name in ("gpu", "host", "disk")}
    given = {name: value for name, value in sizes.items() if value is not None}
    # Before anything is measured: on no disk nothing is to be written.
    machine = replace(machine, **given)
    if machine.gpu == 0:
        machine = replace(machine, gpu=None)
    rates = {name: getattr(options, f"{name}_rate") for name in _RATES}
    machine = machine.with_rates({name: Rate(float(v), "given") for name, v in rates.items() if v is not None})
    if options.measure:
        from engram_ref.place.measure import measured  # numpy's and torch's time only where it is asked for

        machine = machine.with_rates(measured(folder if machine.disk else None, row_bytes))  # writes half a GiB
    return machine


def _block(options: argparse.Namespace, model: Model) -> float | None:
    blocks = options.blocks or (model.backbone and model.backbone.blocks)
    if not blocks and options.model_time is not None:
        raise ValueError("--model-time: nothing is known of this model's blocks, say how many with --blocks")
    if 0.0 in (options.block_time, options.model_time):
        raise ValueError("a block takes longer than no time: give --block-time, such as 56us, or --model-time")
    last = max(model.config.layer_ids)
    if blocks and blocks <= last:
        raise ValueError(
            f"--blocks {blocks}: this model reads rows before block {last}, the first being 0, so it has {last + 1} at "
            "least"
        )
    return options.block_time if options.model_time is None else options.model_time / blocks


def main(argv: list[str] | None = None) -> None:
    """The command; see `--help`."""
    options = parse(argv)
    with cli.one_line_errors(PROG):
        found = answer(question(options))
        if options.engram_config:
            taken, form = found["recommendation"]["placement"], found["model"]["config"]["form"]
            print("\n".join(engine_flags(taken, form)), flush=True)
        else:
            print(json.dumps(found, indent=1) if options.json else cli.fitted(report(found)), flush=True)
