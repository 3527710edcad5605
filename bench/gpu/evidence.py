"""Pack what a call of `gpu_checks.sh` has measured so far: at most eight files that can come back, and a summary.

    python bench/gpu/evidence.py WORK OUT

OUT gets evidence.tar.gz, everything of WORK that is no table, wheel or compiled kernel, and by name what tells most.
Each is complete or as it was before, whenever this is cut.
"""

from __future__ import annotations

# The standard library alone: this runs every 20 seconds beside what is measured.
import fcntl
import itertools
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as xml
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PROG = "gpu_evidence"
LARGEST = 16 << 20  # bytes of a file that comes back
SUMMARY = 12_000  # characters
_LEFT_OUT = ("wheels", "triton", "*.safetensors", "*.lock", ".*")
_SERVED = ("hundred_asking", "hundred_billion", "served_8b", "served_asking", "served_many", "served_4b",
           "short_served", "short_asking")  # fmt: skip
_TOLD = 1200  # characters of a failed step's log in the summary
_ROUNDS = re.compile(r": (?:warm-up|round \d+ of \d+) +(\d+) s")  # as `bench.instruments.timing.time_left` ends it
_DAY = 24 * 3600


def main() -> None:
    """The command."""
    if len(sys.argv) != 3:
        sys.exit("usage: python bench/gpu/evidence.py WORK OUT")
    work, out = Path(sys.argv[1]), Path(sys.argv[2])
    with (work / "pack.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the one of every 20 seconds and that behind a step take turns
        pack(work, out)


def pack(work: Path, out: Path) -> None:
    """Write the files that come back, the summary last."""
    named: dict[str, Callable[[Path], object]] = {
        "evidence.tar.gz": lambda path: _archive(work, path),
        "hundred_billion.json": lambda path: _copy(_hundred(work), path),
        "served_8b.json": lambda path: _copy(work / "served_8b/results.json", path),
        "wall.json": lambda path: _copy(work / "prefill/results.json", path),
        "lookup.json": lambda path: _copy(work / "lookup/results.json", path),
        "tests.xml": lambda path: _merge_tests(work, path),
        "machine.txt": lambda path: _copy(work / "machine.txt", path),
        "summary.txt": lambda path: path.write_text(summary(work), encoding="utf-8"),
    }
    with _staging(work, out) as folder:
        for name, write in named.items():
            part = Path(folder) / name
            write(part)
            if part.exists() and part.stat().st_size <= LARGEST:
                part.replace(out / name)  # complete, or as it was: what watches OUT may fetch it at any moment


def _staging(work: Path, out: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder whose files can be renamed into OUT, outside of it: in WORK, or beside OUT on another file system."""
    same = work.stat().st_dev == out.stat().st_dev
    return tempfile.TemporaryDirectory(prefix=".packing-", dir=work if same else out.parent)


def _copy(source: Path, target: Path) -> None:
    if source.exists():
        shutil.copyfile(source, target)


def _hundred(work: Path) -> Path:
    """What was measured with 100 B parameters: with steps that ask if that ended well, or there is nothing else."""
    asking, plain = (work / name / "results.json" for name in ("hundred_asking", "hundred_billion"))
    whole = re.search(r"^hundred_asking ended with 0,", _text(work / "steps.txt"), re.MULTILINE)
    return asking if whole or not plain.exists() else plain


def _archive(work: Path, path: Path) -> None:
    """Everything; where that is too large, without the largest files, whose names the summary of the archive gives."""
    parts = {file: map(Path, file.relative_to(work).parts) for file in sorted(work.rglob("*")) if file.is_file()}
    files = [file for file, names in parts.items() if not any(name.match(p) for name in names for p in _LEFT_OUT)]
    left_out = []
    while True:
        with tarfile.open(path, "w:gz", compresslevel=1) as archive:
            for file in files:
                archive.add(file, arcname=file.relative_to(work).as_posix())
        if path.stat().st_size <= LARGEST or not files:
            break
        left_out.append(files.pop(max(range(len(files)), key=lambda at: files[at].stat().st_size)))
    for file in left_out:
        print(f"{PROG}: {file.relative_to(work)} is too large for the archive", file=sys.stderr)


def _merge_tests(work: Path, path: Path) -> None:
    """All suites whose file is whole, as one."""
    root = xml.Element("testsuites")
    for file in sorted(work.glob("tests_*.xml")):
        try:
            root.extend(xml.parse(file).getroot().iter("testsuite"))
        except xml.ParseError:
            continue  # being written: its log says as much
    xml.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def summary(work: Path) -> str:
    """What a reader wants first, at most SUMMARY characters: steps, figures, tests, then the ends of failed logs."""
    steps = _text(work / "steps.txt")
    served = [_served(work / name) for name in _SERVED]
    parts = [steps, *_setups(work), _preflight(work), *served, *_prefills(work)]
    parts += [_printed(work / "reads.log", 4000), _printed(work / "lookup.log"), _tests(work)]
    head = "\n".join(part for part in parts if part)
    last = {line.split()[0]: line for line in steps.splitlines() if " ended with " in line}
    failed = [name for name, line in last.items() if " ended with 0," not in line]
    ends = [f"-- the end of {name}.log\n{_text(work / f'{name}.log')[-_TOLD:]}\n" for name in failed]
    return "\n".join([head, *ends])[:SUMMARY]


def _preflight(work: Path) -> str:
    found = _json(work / "preflight.json")
    return (
        "" if not found else "preflight: " + "; ".join(f"{key} {value}" for key, value in found.items())[:2000] + "\n"
    )


def _setups(work: Path) -> Iterator[str]:
    """Seconds of each step, from its begin to its first round, and what they went into; to the nearest two."""
    told: dict[str, list[tuple[int, str]]] = {}
    for at, name, text in re.findall(r"^(\d\d:\d\d:\d\d) (\w+): (.*)$", _text(work / "progress.txt"), re.MULTILINE):
        if text == "starting":
            told[name] = []
        if name in told:
            told[name].append((sum(int(n) * unit for n, unit in zip(at.split(":"), (3600, 60, 1))), text))
    for name, lines in told.items():
        if found := _setup(lines):
            yield f"{name}: {found}"


def _setup(lines: list[tuple[int, str]]) -> str | None:
    """Of one step's lines, each with its second of the day; None where no round has begun."""
    for number, (at, text) in enumerate(lines):
        if rounds := _ROUNDS.search(text):
            ended = at - int(rounds[1])  # the line says for how long rounds have been measured
            begins = [*lines[:number], (ended, "")]
            spent = [((after - before) % _DAY, what) for (before, what), (after, _) in itertools.pairwise(begins)]
            parts = ", ".join(f"{seconds} s {what.strip()[:60]}" for seconds, what in spent if 1 < seconds < _DAY - 60)
            return f"setup {(ended - lines[0][0]) % _DAY} s ({parts})"
    return None


def _prefills(work: Path) -> Iterator[str]:
    """Median seconds of a step, by variant, from whatever rounds there are."""
    for step in (_json(work / "prefill/results.json") or {}).get("steps", []):
        shape, rounds = step["shape"], len(step["runs"][0]["step_s"])
        yield f"prefill: {shape['batch']} x {shape['tokens']} tokens, {rounds} rounds"
        for run in step["runs"]:
            name = run["variant"] + (" again" if run["repeat"] else "")
            yield f"  {name:24} {1e3 * sorted(run['step_s'])[rounds // 2]:.3f} ms a step"


def _served(folder: Path) -> str:
    """Milliseconds a token and overhead of every variant, from whatever passes there are."""
    lines = []
    for case in (_json(folder / "results.json") or {}).get("cases", []):
        control = _per_token(next((row for row in case["rows"] if row["label"] == "no_engram"), {"rounds": []}))
        lines.append(
            f"{folder.name}: {case['backbone']}, batch {case['batch']}, {case['table']['parameters']:.3g} parameters"
        )
        graphs = case["rows"][0].get("graphs", {})
        if graphs.get("used") is False:
            lines.append(f"  no graphs: {graphs['why']}")
        for row in case["rows"]:
            common = sorted(set(control) & (own := _per_token(row)).keys())
            ratios = sorted(own[number] / control[number] for number in common)
            over = f"{100 * (ratios[len(ratios) // 2] - 1):+.2f} % of no_engram" if ratios else "no common round"
            times = sorted(own.values())
            time = f"{1e3 * times[len(times) // 2]:.4f} ms a decode step" if times else "no pass"
            lines.append(f"  {row['label']:24} {time}, {over} ({len(own)} rounds)")
    return "\n".join(lines)


def _per_token(row: dict[str, Any]) -> dict[int, float]:
    """Mean seconds of a decode step, by round."""
    return {s["round"]: sum(s["decode_s"]) / len(s["decode_s"]) for s in row["rounds"] if s["decode_s"]}


def _printed(log: Path, most: int = 1800) -> str:
    """The end of a table that was printed, without the last line, which is everything once more as JSON."""
    return _text(log).rpartition("\n{")[0][-most:]


def _tests(work: Path) -> str:
    lines = []
    for file in sorted(work.glob("tests_*.xml")):
        try:
            suites = list(xml.parse(file).getroot().iter("testsuite"))
        except xml.ParseError:
            continue
        for suite in suites:
            counts = ", ".join(f"{suite.get(key)} {key}" for key in ("tests", "failures", "errors", "skipped"))
            lines.append(f"{file.stem}: {counts}")
            bad = [c for c in suite.iter("testcase") if c.find("failure") is not None or c.find("error") is not None]
            lines.extend(f"  failed: {case.get('classname')}::{case.get('name')}"[:160] for case in bad[:15])
    return "\n".join(lines)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


if __name__ == "__main__":
    os.nice(10)
    main()
