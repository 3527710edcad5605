"""Two results files of one kind side by side: ratios with an interval, what is not resolved, and the machines.

    python bench/compare.py A.json B.json                    every quantity of both, B over A, as Markdown
    python bench/compare.py A.json B.json --format csv|json
    python bench/compare.py A.json B.json --only resident --tolerance 0.05

A ratio is of medians with a 95 % bootstrap interval. It is paired, round by round, where both files have equally many
samples of the same machine and the same configuration; else both are drawn by themselves. It is not resolved where the
interval holds 1, or on fewer than three samples. Of what was mostly nothing, such as bytes copied, there is no ratio:
it is worse where every sample is more than all of A's. Prices and counts of reads are exact: any difference is one.

Compared are times, bytes that crossed the bus, and prices; not the energy and the clocks of a board.

Exit status: 0 if nothing is resolved to be worse, that is, larger in B by more than --tolerance; 1 if something is, or
something that A has is missing in B; 2 for files that cannot be compared.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __package__ in (None, ""):  # started as a script: the repository root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # Ctrl-C ends the imports that follow, too, in one line
    from engram_ref.starting import interruptible

    interruptible("compare")

from bench.instruments.quantities import Quantity, quantities
from bench.instruments.reading import read_results
from bench.instruments.timing import LEAST_SAMPLES, paired_ratio, quantile
from bench.instruments.words import markdown
from engram_ref import cli

PROG = "compare"
_RESAMPLES = 1000  # of both sides, where they are not paired
_SAMPLES = 2000  # of a quantity that has more, evenly chosen, so that a comparison takes seconds
_FIELDS = ("quantity", "a", "b", "ratio", "low", "high", "how", "verdict")
_MACHINE = ("cpu", "cpu_count", "memory_bytes", "python", "platform", "accelerator")


class Line(NamedTuple):
    """One quantity of both files.

    Attributes:
        a, b: medians; None where the file does not have it.
        ratio, low, high: B over A, and its interval; None where one of them is or may be 0, or is missing.
        how: "paired", "unpaired", "exact" or "one sample".
        verdict: "worse", "better", "same", "not resolved", "within tolerance", "only in A" or "only in B".
    """

    quantity: str
    a: float | None
    b: float | None
    ratio: float | None
    low: float | None
    high: float | None
    how: str
    verdict: str


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line options; see `--help`."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    add = parser.add_argument
    add("a", type=Path, metavar="A.json", help="the baseline")
    add("b", type=Path, metavar="B.json", help="what is held against it")
    add("--format", choices=["md", "csv", "json"], default="md", help="default: md")
    add("--only", metavar="TEXT", help="quantities whose name has this in it")
    add("--tolerance", type=cli.share, default=0.0, help="share by which B may be larger and no worse")
    return parser.parse_args(argv)


def compare(a: dict[str, Any], b: dict[str, Any], tolerance: float = 0.0, only: str | None = None) -> list[Line]:
    """Every quantity of two results files.

    Raises:
        ValueError: files of two benchmarks, or nothing to compare.
    """
    if a.get("benchmark") != b.get("benchmark"):
        raise ValueError(
            f"results of {a.get('benchmark')!r} and of {b.get('benchmark')!r}: compare two of one benchmark"
        )
    left, right = quantities(a), quantities(b)
    names = [name for name in (*left, *(n for n in right if n not in left)) if only is None or only in name]
    if not names:
        raise ValueError("no quantity to compare" + (f" has {only!r} in its name: leave --only away" if only else ""))
    pairs = _same_inputs(a, b)
    return [_line(name, left.get(name), right.get(name), pairs, tolerance) for name in names]


def _same_inputs(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether round n of both read the same on the same machine."""
    machine = _hardware(a["environment"]) == _hardware(b["environment"])
    ignored = {"out"}
    left, right = ({k: v for k, v in f.get("configuration", {}).items() if k not in ignored} for f in (a, b))
    return machine and left == right


def _hardware(environment: dict[str, Any]) -> tuple[Any, ...]:
    """Not what an accelerator was found at, such as its clocks, which differ from run to run."""
    accelerator = environment.get("accelerator") or {}
    return *(environment.get(key) for key in ("cpu", "cpu_count")), accelerator.get("name")


def _line(name: str, a: Quantity | None, b: Quantity | None, pairs: bool, tolerance: float) -> Line:
    if a is None or b is None:
        left, right = (None if q is None else q.median for q in (a, b))
        return Line(name, left, right, None, None, None, "", f"only in {'A' if b is None else 'B'}")
    if a.exact or b.exact:
        verdict = "same" if a.samples == b.samples else _judged(b.median, b.median, a.median, tolerance)
        ratio = b.median / a.median if a.median else None
        return Line(name, a.median, b.median, ratio, ratio, ratio, "exact", verdict)
    if a.median <= 0 or b.median <= 0:
        return Line(name, a.median, b.median, None, None, None, "unpaired", _without_ratio(a.samples, b.samples))
    # Round n of both met the same input, and has one ratio.
    paired = pairs and len(a.samples) == len(b.samples) and min(a.samples) > 0  # each is divided by
    found = _ratio(_some(a.samples), _some(b.samples), paired)
    if found is None:
        return Line(name, a.median, b.median, None, None, None, "unpaired", "not resolved")
    few = min(len(a.samples), len(b.samples)) < LEAST_SAMPLES
    verdict = "not resolved" if few else _judged(found["low"], found["high"], 1.0, tolerance)
    how = "one sample" if few else "paired" if paired else "unpaired"
    return Line(name, a.median, b.median, found["median"], found["low"], found["high"], how, verdict)


def _judged(low: float, high: float, one: float, tolerance: float) -> str:
    if high < one:
        return "better"
    if low > (one * (1 + tolerance) if tolerance else one):  # a price may have more digits than a product
        return "worse"
    return "within tolerance" if low > one else "not resolved"


def _without_ratio(a: Sequence[float], b: Sequence[float]) -> str:
    """Of what may be 0: apart where all samples of the one lie beyond all of the other."""
    if a == b:
        return "same"
    if min(len(a), len(b)) < LEAST_SAMPLES or min(b) <= max(a) <= max(b) or min(a) <= max(b) <= max(a):
        return "not resolved"
    return "worse" if min(b) > max(a) else "better"


def _some(samples: Sequence[float]) -> list[float]:
    step = max(1, -(-len(samples) // _SAMPLES))
    return list(samples[::step])


def _ratio(a: Sequence[float], b: Sequence[float], paired: bool) -> dict[str, float] | None:
    """B over A: of pairs, or of medians that are drawn anew from each; None where that of A may be 0."""
    if paired:
        return paired_ratio(b, a)
    # Not paired: what the machine did meanwhile happened to one of the two alone, so each is drawn by itself.
    draw = random.Random(0)
    drawn = [
        tuple(statistics.median(draw.choices(each, k=len(each))) for each in (b, a))
        for _ in range(_RESAMPLES if len(a) + len(b) < 200 else 200)
    ]
    if not all(one for _, one in drawn):
        return None
    found = sorted(other / one for other, one in drawn)
    median = statistics.median(b) / statistics.median(a)
    return {"median": median, "low": quantile(found, 0.025), "high": quantile(found, 0.975)}


def machines(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What the two ran on and by which code, a line a fact: name, A, B. Packages only where they differ."""
    left, right = a["environment"], b["environment"]
    found = [(key, _word(left.get(key)), _word(right.get(key))) for key in _MACHINE]
    versions = [e.get("packages", {}) for e in (left, right)]
    for package in dict.fromkeys([*versions[0], *versions[1]]):
        one, other = (_word(v.get(package)) for v in versions)
        if one != other:
            found.append((package, one, other))
    one, other = (_word((f.get("git") or {}).get("commit"))[:12] + dirty(f) for f in (a, b))
    return [*found, ("commit", one, other)]


def dirty(results: dict[str, Any]) -> str:
    """A mark for code that had changes beyond its commit."""
    return " with changes" if (results.get("git") or {}).get("dirty") else ""


def _word(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("name") or json.dumps(value)
    return "-" if value is None else str(value)


def report(lines: list[Line], sides: list[tuple[str, str, str]], shape: str) -> str:
    """The comparison in a format."""
    counts = Counter(line.verdict for line in lines)
    if shape == "json":
        body = {"machines": sides, "counts": counts, "quantities": [line._asdict() for line in lines]}
        return json.dumps(body, indent=1)
    if shape == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([_FIELDS, *lines])
        return out.getvalue().rstrip("\n")
    said = ", ".join(f"{count:,} {verdict}" for verdict, count in counts.items())
    about, head = markdown(["", "A", "B"], sides), ["quantity", "A", "B", "B / A", "95 % interval", "how", "verdict"]
    return "\n".join([about, "", markdown(head, map(_row, lines), right={1, 2, 3}), "", said])


def _row(line: Line) -> list[str]:
    interval = "-" if line.low is None or line.how == "exact" else f"[{line.low:.3f}, {line.high:.3f}]"
    ratio = "-" if line.ratio is None else f"{line.ratio:.3f}"
    return [line.quantity, _figure(line.a), _figure(line.b), ratio, interval, line.how or "-", line.verdict]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def main(argv: list[str] | None = None) -> None:
    """The command; see `--help`."""
    options = parse(argv)
    with cli.one_line_errors(PROG):
        a, b = read_results(options.a), read_results(options.b)
        for path, results in ((options.a, a), (options.b, b)):
            if not isinstance(results.get("environment"), dict):
                raise ValueError(f"{path} does not say where it was measured: compare files that a benchmark wrote")
        lines = compare(a, b, options.tolerance, options.only)
        print(report(lines, machines(a, b), options.format), flush=True)
    if any(line.verdict in ("worse", "only in A") for line in lines):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, PROG)
