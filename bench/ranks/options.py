"""What `--sharded` makes of the hardware benchmark's command line: its own defaults, and nothing that does nothing."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from engram_ref import cli

USED = ("sharded", "out", "device", "dtype", "seed", "table_params", "preset", "steps", "rounds", "fresh")
DEFAULTS = {"preset": "v41-flash", "dtype": "bfloat16", "rounds": 20}
TABLE_PARAMS = 1e7  # values in the rows of all layers: seconds to make, and what travels does not depend on it
STEPS = ("decode:1", "decode:64", "prefill:1x512")


def fill(options: argparse.Namespace, given: Mapping[str, str]) -> None:
    """Set what the command line left open, and refuse what would do nothing.

    Args:
        options: of the command line.
        given: of them, those that stand there, by name.

    Raises:
        ValueError: an option that these runs have no use for, or more than one size of table.
    """
    cli.refuse_idle(given, [name for name in given if name not in USED], "with --sharded: leave it out")
    for name, value in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if "table_params" not in given:
        options.table_params = [TABLE_PARAMS]
    if len(options.table_params) != 1 or options.table_params[0] == "max":
        raise ValueError("--table_params: --sharded takes one number; give another --out for each size")
