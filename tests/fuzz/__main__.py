"""Stress of every kind, more than the suite has time for; a line per kind, and exit status 1 if there is a fault.

make fuzz                                   the whole, some ten minutes on two cores
python -m tests.fuzz --share 0.02           a fiftieth of it
python -m tests.fuzz --only headers kills   some kinds
"""

import argparse
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.evidence.stress import report
from bench.instruments.output import printed_anyway, require_writable_file
from bench.instruments.results import environment, git_commit, write_json
from engram_ref import cli

PROG = "fuzz"
COUNTS = {
    "programs": 9000, "headers": 30_000, "folders": 3060, "prefetch": 10_000, "forks": 200, "leaks": 1000, "kills": 50,
}  # fmt: skip
MOST_SHOWN = 20  # faults of a kind in the results


def measure(kinds: list[str], share: float, seed: int) -> list[dict[str, Any]]:
    """Run so much of each kind."""
    found = []
    for name in kinds:
        began = time.monotonic()
        kind = importlib.import_module(f"tests.fuzz.{name}").run(max(1, round(share * COUNTS[name])), seed)
        found.append({"kind": name, **kind, "seconds": round(time.monotonic() - began, 1)})
        print(f"{name}: {kind['cases']:,} cases, {len(kind['faults'])} faults", file=sys.stderr, flush=True)
        for fault in kind["faults"][:MOST_SHOWN]:
            print(f"    {fault}", file=sys.stderr, flush=True)
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line options; see `--help`."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(COUNTS), default=list(COUNTS), metavar="KIND", help="of all")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases of each kind (default: 1)")
    parser.add_argument("--seed", type=cli.at_least(0, cli.MOST_SEED), default=0, help="of all chance (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="keep what was found")
    return parser.parse_args(argv)


def main() -> None:
    """The command."""
    options = parse()
    with cli.one_line_errors(PROG):
        if not 0 < options.share <= 1:
            raise ValueError(f"--share {options.share}: must be above 0 and at most 1")
        require_writable_file(options.out)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        kinds = measure(options.only, options.share, options.seed)
    results = {
        "benchmark": PROG,
        "configuration": {"share": options.share, "seed": options.seed},
        "environment": environment(),
        "git": git_commit(),
        "kinds": kinds,
    }
    with cli.one_line_errors(PROG), printed_anyway(lambda: report(results)):
        if options.out:
            write_json(options.out, results)
    sys.exit(1 if any(kind["faults"] for kind in kinds) else 0)


if __name__ == "__main__":
    cli.run(main, PROG)
