"""Command-line options of `gpu_wall.py --end-to-end`, and what they default to on each kind of device."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from bench.setup.backbones import SIZES
from bench.setup.sizes import MOST_TOKENS
from bench.setup.slow_bus import Bus
from engram_ref import cli

FIT = "fit"
STREAMS = ("text", "uniform")
# Of options that mean something in both kinds of runs: name -> without --end-to-end, with it on CUDA, with it on a CPU.
SHARED_DEFAULTS: dict[str, tuple[Any, Any, Any]] = {
    "rounds": (20, 8, 12),
    "warmup": (2, 1, 1),
    "preset": ("paper-27b", "v41-flash", "tiny"),
    "dtype": ("bfloat16", "bfloat16", "float32"),
    "table_params": ([1e9], [1e9], [2e7]),
}
# Of the options below, likewise.
_OWN_DEFAULTS: dict[str, tuple[Any, Any, Any]] = {
    "backbones": (None, ["qwen3-4b", "qwen3-8b"], ["tiny"]),
    "batches": (None, [FIT], [1, 8]),
    "sequences": (None, 64, "batch"),
    "prompt_tokens": (None, [100, 1024], [16, 32]),
    "output_tokens": (None, [100, 1024], [12, 16]),
    "buses": (
        None,
        ["64", "16", "4", "1", "0.25", "0.0625", "inf:20", "inf:56", "inf:200"],
        ["0.1", "0.003", "0.0005", "inf:56", "inf:1000", "inf:3000", "inf:10000"],
    ),
}


# Options that only an end-to-end run has.
OWN_OPTIONS = (*_OWN_DEFAULTS, "streams", "prefill_tokens", "hot_shares", "eager", "asking")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The group of options."""
    group = parser.add_argument_group(
        "end to end",
        """Serve sequences with a whole model, random weights, prompts and outputs of uniform lengths, and take the
overhead apart: the layer's own compute, the lookup, what prefetching could not hide. A round is a number of
sequences that every variant serves; batches are sequences at a time. Of the options above, --variants,
--table_params, --preset, --blocks, --rounds, --warmup, --text, --energy, --fit, --dtype, --seed and --out
count, too; defaults here: on CUDA 8 rounds, v41-flash, bfloat16; on a CPU 12 rounds, tiny, float32, 2e7. The
results are on disk after every pass; the same command again continues a run that was cut.""",
    )
    add = group.add_argument
    add("--end-to-end", action="store_true", help="measure this instead of single steps")
    models = f"{', '.join(SIZES)} or a config.json (default: qwen3-4b qwen3-8b; tiny on a CPU)"
    add("--backbones", nargs="+", metavar="NAME", help=models)
    add("--batches", nargs="+", type=_count_or(FIT), metavar="N", help="sequences at a time, or fit: as many as memory "
        "holds (default: fit; 1 8 on a CPU)")  # fmt: skip
    add("--sequences", type=_count_or("batch"), metavar="N", help="of a round, or batch: as many as are served at a "
        "time (default: 64, so that 8 rounds serve 512; batch on a CPU)")  # fmt: skip
    for phase in ("prompt", "output"):
        add(f"--{phase}_tokens", nargs=2, type=cli.at_least(1, 1 << 20), metavar=("LOW", "HIGH"), help="default: "
            f"100 1024; {'16 32' if phase == 'prompt' else '12 16'} on a CPU")  # fmt: skip
    add("--streams", nargs="+", choices=STREAMS, default=list(STREAMS), help="token ids: real text, or random")
    add("--prefill_tokens", type=cli.at_least(1, MOST_TOKENS), default=16384, help="of prompts processed together")
    kept = "of the rows kept on the device by offload_hot, one variant each"
    add("--hot_shares", nargs="+", type=cli.share, default=[0.001, 0.01, 0.1], metavar="SHARE", help=kept)
    slow = "slowed buses, one variant each: bandwidth, and time to the first byte; inf:56 is only the latter"
    add("--buses", nargs="+", type=_bus, metavar="GB/s[:us]", help=slow)
    add("--eager", action="store_true", help="no CUDA graphs: the host launches every kernel of every token")
    add("--asking", action="store_true", help="also offload_prefetch with graphs that ask the CPU for their rows "
        "while they run; that has never run on CUDA, so give it an --out of its own")  # fmt: skip
    cli.add_fresh(parser)


def fill_defaults(options: argparse.Namespace, on_gpu: bool) -> None:
    """Set what the command line left open."""
    column = (1 if on_gpu else 2) if options.end_to_end else 0
    for name, defaults in {**SHARED_DEFAULTS, **_OWN_DEFAULTS}.items():
        if getattr(options, name) is None:
            setattr(options, name, defaults[column])


def check(options: argparse.Namespace) -> None:
    """Refuse what contradicts itself.

    Raises:
        ValueError: bounds in the wrong order, outputs without a decode step, or more than one table.
    """
    for name in ("prompt_tokens", "output_tokens"):
        low, high = getattr(options, name)
        if low > high:
            raise ValueError(f"--{name} {low} {high}: give the lower bound first")
    if options.output_tokens[0] < 2:
        raise ValueError("--output_tokens 1: the first is the prompt's, and no step decodes another; give 2 at least")
    if len(options.table_params) != 1:
        raise ValueError("--table_params: end to end takes one table; give one size and another --out for each")


def _count_or(word: str) -> Callable[[str], int | str]:
    """An argument type: a number, or the word that stands for one."""
    return lambda text: word if text == word else cli.at_least(1)(text)


def _bus(text: str) -> str:
    try:
        Bus.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
