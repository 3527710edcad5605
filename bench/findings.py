"""Rebuild every result, figure and document of the findings, from nothing.

    make findings                     half an hour on two cores (26 minutes on a Xeon, not quite alone)
    make findings QUICK=1             small versions of every step, under two minutes; committed files untouched
    python bench/findings.py --help

Steps: the toy in both forms, all sweeps, production scale, rows under every definition, the lookup's range, row reads
by tier, the map of classes; then the new results are compared with those committed under bench/results, and the
documents and figures filled from them. Prices are exact and the same everywhere: a committed file that holds the same
ones stays as it is, wall times included, so that the tree does not change when nothing has changed. Steps that have
ended are kept in --out, and of sweeps and production scale every price: a run that is killed, at any moment, continues
there when it is started again. Another text, for one the standard library of another Python, gives other prices and
other files. Texts of other kinds need a network: `make corpora` measures them. The one text among them that is here is
measured again, and has to be as it is committed.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a script: the repository root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # Ctrl-C ends the imports that follow, too, in one line
    from engram_ref.starting import interruptible

    interruptible("findings")

from bench.evidence.committed import RESULTS
from bench.instruments.code_digest import code_sha256
from bench.instruments.output import require_writable
from bench.instruments.reading import read_results
from engram_ref import cli
from engram_ref.files.replacing import replacing

PROG = "findings"
BENCH = Path(__file__).resolve().parent
# What a run of the toy depends on, beside its options; the other steps see for themselves what they have finished.
TOY_CODE = "bench.bytedmd_toy"
# What a run says of when and where it ran, by which code, and of time: nothing that another run has to find again.
_OF_THE_RUN = {"started", "finished", "environment", "git", "code_sha256", "noise_floor", "out", "jobs"}
_OF_TIME = {"wall_time_s", "wall_time_summary_s", "seconds"}


@dataclass(frozen=True)
class Step:
    """One program to run.

    Attributes:
        name: of its folder below --out.
        command: program and options, without --out and --quick.
        results: file that it writes -> name under bench/results.
        code: module that finished it, with all that it imports; None where it finds by itself what it has finished.
    """

    name: str
    command: tuple[str, ...]
    results: dict[str, str]
    code: str | None = None


def _single(name: str) -> Step:
    """A run of `bench/how_far.py`."""
    command = ("how_far.py", name)
    return Step(name, command, {"results.json": name}, f"bench.ranges.{name}")


_QWEN = ("--preset", "qwen38-flash-next", "--part", "scale", "whole_model")
_ROWS = Step("row_definitions", ("row_definitions.py",), {"results.json": "row_definitions"}, "bench.rows.definitions")
STEPS = (
    Step("toy", ("bytedmd_toy.py",), {"results.json": "bytedmd_toy"}, TOY_CODE),
    Step("toy_v41", ("bytedmd_toy.py", "--preset", "v41-flash"), {"results.json": "bytedmd_toy_v41"}, TOY_CODE),
    Step("sweeps", ("bytedmd_toy.py", "--sweep", "all"), {f"{n}.json": f"bytedmd_{n}" for n in ("sweeps", "grid")}),
    Step("production", ("production.py",), {"results.json": "production"}),
    Step("production_qwen", ("production.py", *_QWEN), {"results.json": "production_qwen"}),
    _ROWS,
    *map(_single, ("lookup_range", "energy_by_tier", "verdict_map")),
)
OWN_TEXT = Step(  # of more texts than can be measured here
    "own_text", ("how_far.py", "other_texts", "--only", "python-stdlib"), {}, "bench.ranges.other_texts"
)


def run_step(step: Step, out: Path, quick: bool) -> None:
    """Run a step, unless it has been finished by the same code.

    Raises:
        ValueError: it failed.
    """
    folder = out / step.name
    stamp, by = folder / "finished-by", step.code and code_sha256(step.code)
    # Another Python brings another text along.
    state = f"{by} {sys.version} quick={quick}\n"
    if by and stamp.exists() and stamp.read_text() == state:
        say(f"{step.name}: finished before")
        return
    say(f"{step.name}: {' '.join(step.command)}")
    program, *options = step.command
    command = [sys.executable, str(BENCH / program), *options, "--out", str(folder), *(["--quick"] if quick else [])]
    # Its tables are not for here; progress and errors come on stderr.
    ended = subprocess.run(command, stdout=subprocess.DEVNULL)
    if ended.returncode:
        raise ValueError(f"step {step.name} ended with {ended.returncode}: what it says stands above")
    if by:
        with replacing(stamp) as file:
            file.write(state.encode())


def adopt(new: Path, committed: Path) -> bool:
    """Put a results file in the place of the committed one, unless both hold the same prices; whether it was put."""
    found = read_results(new)
    if committed.exists() and _timeless(found) == _timeless(read_results(committed)):
        return False
    committed.parent.mkdir(parents=True, exist_ok=True)
    with replacing(committed) as file:
        file.write(new.read_bytes())
    return True


def require_same(part: Path, committed: Path) -> None:
    """Compare records with those of the same texts, known by their digests, in a committed file.

    Raises:
        ValueError: these are others.
    """
    stand = {record["text"]: record for record in read_results(committed)["records"]}
    for record in read_results(part)["records"]:
        before = stand.get(record["text"], record)  # a text that is not there contradicts nothing
        if before["sha256"] != record["sha256"]:
            say(f"{committed.name}: another text {record['text']} than here")
        elif before != record:
            raise ValueError(
                f"{committed.name} holds other numbers of the text {record['text']!r} than {part}: "
                f"run make corpora, and put the results.json that it writes in its place"
            )


def _timeless(value: Any) -> Any:
    """Results without what differs from run to run."""
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in _OF_THE_RUN | _OF_TIME}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def say(message: str) -> None:
    """Progress, on stderr."""
    print(f"{PROG}: {message}", file=sys.stderr, flush=True)


def fill_documents(*options: str) -> None:
    """Run `bench/fill_docs.py`, in a process that has read no results yet.

    Raises:
        ValueError: it failed.
    """
    if subprocess.run([sys.executable, str(BENCH / "fill_docs.py"), *options]).returncode:
        raise ValueError("the documents do not follow from the results: what is stale stands above")


def main() -> None:
    """The command."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: out/findings, or out/findings_quick")
    parser.add_argument("--quick", action="store_true", help="small versions, in DIR; nothing else is written")
    options = parser.parse_args()
    out: Path = options.out or Path("out/findings_quick" if options.quick else "out/findings")
    try:
        with cli.one_line_errors(PROG):
            require_writable(out)
            for step in STEPS:
                run_step(step, out, options.quick)
            if options.quick:
                return fill_documents("--check")
            run_step(OWN_TEXT, out, quick=False)
            require_same(out / OWN_TEXT.name / "results.json", RESULTS / "other_texts.json")
            for step in STEPS:
                for made, name in step.results.items():
                    changed = adopt(out / step.name / made, RESULTS / f"{name}.json")
                    say(f"{name}.json {'is new' if changed else 'holds the same prices already'}")
            fill_documents()
            say("documents and figures are filled")
    except KeyboardInterrupt:
        say(f"interrupted; what is finished is kept in {out}, the same command continues")
        sys.exit(130)


if __name__ == "__main__":
    cli.run(main, PROG)
