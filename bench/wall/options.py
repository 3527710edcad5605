"""Command-line options of the hardware benchmark that need more than a type: shapes, sizes, devices, what fits."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence

import torch

from bench.schemas.common import PLACEMENTS
from bench.setup.sizes import MOST_TOKENS
from bench.setup.variants import ON_CPU, chosen
from bench.wall import components
from bench.wall.step import Shape
from engram_ref import cli
from engram_ref.config import EngramConfig
from engram_ref.quoting import quoted
from engram_ref.rows.format import RowFormat

STEPS_GPU = ["prefill:1x4096", "prefill:8x4096"]
STEPS_CPU = ["prefill:1x256", "decode:4"]
ROW_LAYOUTS = ("packed", "split")
# Options of single steps that an end-to-end run has no use for, and of steps that a run without any has none for.
_OF_STEPS = (
    *("backbone", "steps", "context", "stream", "page_cache", "hot_share", "profile", "rows"),
    *("cases", "iterations", "batch_size", "seq_len"),
)
_OF_VARIANTS = (
    *("table_params", "fit", "preset", "rows", "backbone", "blocks", "steps", "context", "page_cache", "hot_share"),
    *("rounds", "warmup", "energy", "profile"),
)


def step_shape(text: str) -> Shape:
    """An argument type: `prefill:BATCHxTOKENS` or `decode:BATCH`."""
    prefill = re.fullmatch(r"prefill:([1-9]\d{0,8})x([1-9]\d{0,8})", text)
    decode = re.fullmatch(r"decode:([1-9]\d{0,8})", text)
    if prefill:
        shape = Shape("prefill", int(prefill[1]), int(prefill[2]))
    elif decode:
        shape = Shape("decode", int(decode[1]), 1)
    else:
        raise argparse.ArgumentTypeError(f"{quoted(text)} must be prefill:BATCHxTOKENS or decode:BATCH")
    if shape.batch * shape.tokens > MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"{quoted(text)} must be at most {MOST_TOKENS} tokens")
    return shape


def require_steps(shapes: Sequence[Shape], on_gpu: bool) -> None:
    """Refuse decode steps where the host would launch every kernel of them.

    Raises:
        ValueError: one is wanted on a GPU.
    """
    for shape in shapes:
        if on_gpu and shape.phase == "decode":
            raise ValueError(
                f"--steps decode:{shape.batch}: on CUDA a decode step without graphs measures the host's launching; "
                f"use --end-to-end --batches {shape.batch}, which decodes from CUDA graphs, or prefill:BATCHxTOKENS"
            )


def table_params(text: str) -> float | str:
    """An argument type: parameters of a table, such as 1e9, or `max`."""
    if text == "max":
        return text
    value = cli.number(text)
    if value is None or not 1e5 <= value <= 1e12:
        raise argparse.ArgumentTypeError(f"{quoted(text)} must be max or a number of parameters from 1e5 to 1e12")
    return float(value)


def row_layout(preset: str, wanted: str | None) -> str:
    """How the rows of a table lie: as wanted, packed if nothing is wanted; plain rows have one part.

    Raises:
        ValueError: a layout is wanted of rows that have no scales.
    """
    if RowFormat.of(EngramConfig.preset(preset)).scaled:
        return wanted or ROW_LAYOUTS[0]
    if wanted is not None:
        raise ValueError(
            f"--rows {wanted}: the rows of {preset} have no scales to lay beside or apart; leave --rows out, or take "
            "--preset v41-flash"
        )
    return "plain"


def wanted_variants(names: Sequence[str] | None, device: torch.device) -> list[str]:
    """The variants to run; by default all that make sense on the device.

    Raises:
        ValueError: a variant that needs an accelerator, on a CPU.
    """
    if names == ["none"]:
        return []
    return chosen(names, PLACEMENTS if device.type == "cuda" else ON_CPU, ", or none")


def refuse_idle_options(
    options: argparse.Namespace, given: Mapping[str, str], on_gpu: bool, end_to_end_only: Sequence[str]
) -> None:
    """Refuse options that this run would ignore.

    Args:
        given: options that stand on the command line, by name.
        end_to_end_only: names of options that only an end-to-end run has.

    Raises:
        ValueError: one that does nothing, or a component case that this machine cannot run.
    """
    if not on_gpu:
        cli.refuse_idle(given, ("energy",), "without CUDA: the driver of a GPU measures it; leave it out")
        cli.refuse_idle(given, ("eager",), "without CUDA: there are no graphs to do without; leave it out")
    if options.end_to_end:
        cli.refuse_idle(given, _OF_STEPS, "with --end-to-end: leave it out, or see --help for what it has instead")
        _refuse_idle_of_variants(options, given, {"offload_hot": ("hot_shares",), "throttled": ("buses",)})
        return
    cli.refuse_idle(given, end_to_end_only, "without --end-to-end: add it")
    _check_cases(options.cases, on_gpu)
    if options.cases == ["none"]:
        cli.refuse_idle(given, ("iterations", "batch_size", "seq_len"), "with --cases none: leave it out")
    if options.variants == ["none"]:
        cli.refuse_idle(given, _OF_VARIANTS, "with --variants none: leave it out")
        return
    _refuse_idle_of_variants(options, given, {"offload_hot": ("hot_share",), "offload_disk": ("page_cache",)})
    if options.steps and all(shape.phase == "prefill" for shape in options.steps):
        cli.refuse_idle(given, ("context",), "without a decode step: leave it out")
    if options.backbone == "none":
        cli.refuse_idle(given, ("blocks",), "with --backbone none: leave it out")
    if options.no_trace:
        cli.refuse_idle(given, ("profile",), "with --no_trace: leave one of them out")
    if options.stream == "uniform" and (not on_gpu or "offload_hot" not in (options.variants or ["offload_hot"])):
        cli.refuse_idle(given, ("text",), "with --stream uniform, where no hot rows are chosen: leave it out")


def _refuse_idle_of_variants(
    options: argparse.Namespace, given: Mapping[str, str], only: Mapping[str, tuple[str, ...]]
) -> None:
    for variant, names in only.items():
        if options.variants is not None and variant not in options.variants:
            cli.refuse_idle(given, names, f"without {variant} among --variants: leave it out, or add the variant")


def _check_cases(cases: Sequence[str], on_gpu: bool) -> None:
    if "none" in cases and len(cases) > 1:
        raise ValueError(f"--cases {' '.join(cases)}: none stands alone; leave it out, or the others")
    runnable = {*(components.CASES if on_gpu else components.ON_CPU), "all", "none"}
    if wrong := [case for case in cases if case not in runnable]:
        raise ValueError(f"--cases {wrong[0]}: there is no CUDA device to upload to; leave it out")
