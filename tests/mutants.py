"""Do the tests notice? Random one-place mutants of the files whose faults would be silent, each run against its tests.

    make mutants                                              every file of TARGETS, some 40 minutes on two cores
    python -m tests.mutants --only prefetch hot --mutants 30  some files, more mutants of each
    python -m tests.mutants --list                            what would be run
    python -m tests.mutants --out FILE.json                   keep what was found

A mutant is the file with one place changed: a comparison, an operator, a constant, a condition, or a statement left
out. Its tests run on a copy of the project; a failure, or more than ten times the time that they take on the
unchanged file, means that it was noticed. Mutants that compute the same as the original are listed by name in
tests/equivalent_mutants.txt, each with its reason. The command fails if a file's tests notice fewer than 95 of 100.
"""

from __future__ import annotations

import argparse
import ast
import copy
import fcntl
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EQUIVALENT = ROOT / "tests" / "equivalent_mutants.txt"
ENOUGH = 0.95
PACKAGES = ("engram_ref", "engram_toy")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "torch", "numba", "sympy", "hypothesis", "tokenizers", "matplotlib.pyplot"])
_SLOWER = 10  # times as long as the unchanged file: the mutant does not end
_LEAST_SECONDS = 60.0
_CONTEXT = 40  # characters on either side of a change

# File -> its tests, the quickest to fail first.
TARGETS: dict[str, tuple[str, ...]] = {
    "engram_ref/hashing/ngram.py": (
        "tests/ref/hashing/test_ngram.py",
        "tests/ref/hashing/test_recorded.py",
        "tests/cross/test_hash_v41.py",
        "tests/cross/test_hash_qwen.py",
        "tests/ref/hashing/test_fused.py",
    ),
    "engram_ref/hashing/fused.py": ("tests/ref/hashing/test_fused.py",),
    "engram_ref/hashing/plan.py": (
        "tests/ref/hashing/test_identity.py",
        "tests/ref/hashing/test_plan.py",
        "tests/ref/hashing/test_recorded.py",
        "tests/ref/hashing/test_ngram.py",
        "tests/cross/test_hash_qwen.py",
    ),
    "engram_ref/prefetch/prefetcher.py": (
        "tests/ref/prefetch/test_prefetcher.py",
        "tests/ref/prefetch/test_streams.py",
        "tests/ref/prefetch/test_slots.py",
    ),
    "engram_ref/prefetch/fetch.py": ("tests/ref/prefetch/test_slots.py", "tests/ref/prefetch/test_prefetcher.py"),
    "engram_ref/prefetch/slots.py": ("tests/ref/prefetch/test_slots.py", "tests/ref/prefetch/test_prefetcher.py"),
    "engram_ref/tables/hot.py": ("tests/ref/tables/test_hot.py", "tests/ref/tables/test_counters.py"),
    "engram_ref/tables/staging.py": ("tests/ref/tables/test_staging.py",),
    "engram_ref/files/read_plan.py": ("tests/ref/files/test_read_plan.py", "tests/ref/files/test_shards.py"),
    "engram_ref/rows/fp8.py": ("tests/ref/rows/test_fp8.py",),
    "engram_toy/hashing.py": (
        "tests/toy/test_hashing.py",
        "tests/cross/test_index_stream.py",
        "tests/cross/test_hash_qwen.py",
    ),
    "engram_toy/tracer/stack.py": ("tests/toy/tracer/test_stack.py", "tests/toy/test_bytedmd.py"),
    "engram_toy/tracer/first_reads.py": ("tests/toy/tracer/test_first_reads.py",),
    "engram_toy/fast/first_reads.py": ("tests/toy/tracer/test_first_reads.py",),
    "engram_toy/models/layouts.py": ("tests/toy/models/test_programs.py",),
    "bench/rows/cases.py": ("tests/bench/rows/test_cases.py", "tests/bench/test_production.py"),
    "bench/sweeps/readdressed.py": (
        "tests/bench/sweeps/test_readdressed.py",
        "tests/bench/sweeps/test_lookup_range.py",
        "tests/toy/tracer/test_first_reads.py",
    ),
    "bench/rows/whole_model.py": ("tests/bench/rows/test_whole_model.py",),
    "bench/instruments/journal.py": ("tests/bench/instruments/test_journal.py",),
    "bench/instruments/results.py": ("tests/bench/instruments/test_results.py",),
    "bench/served/numbers.py": ("tests/bench/served/test_numbers.py",),
    "bench/wall/numbers.py": ("tests/bench/wall/test_table.py",),
}

_COMPARISONS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.BitXor: ast.BitOr, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.Pow: ast.Mult,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A file with one place changed.

    Attributes:
        path: of the file, from the root.
        name: what was changed, in which function: stays the same when lines move.
        line: where.
        source: the whole changed file.
    """

    path: str
    name: str
    line: int
    source: str


def mutants_of(path: str, source: str) -> Iterator[Mutant]:
    """Every mutant of a file, in the order of its places."""
    tree = ast.parse(source)
    owners = dict(_owners(tree))
    for number, node in enumerate(ast.walk(tree)):
        for change in _changes(node) if node in owners else ():
            changed = copy.deepcopy(tree)
            places = list(ast.walk(changed))
            place, statement, function = places[number], owners[node].statement, owners[node].function
            twin = next(other for other, known in zip(places, ast.walk(tree)) if known is statement)
            change(place)
            difference = _difference(_head(statement), _head(twin))
            if difference:
                name = f"{path}: {function}: {difference}"
                yield Mutant(path, name, statement.lineno, ast.unparse(ast.fix_missing_locations(changed)))


class _Owner(NamedTuple):
    statement: ast.stmt
    function: str


def _owners(node: ast.AST, statement: ast.stmt | None = None, function: str = "module") -> Iterator[tuple[Any, _Owner]]:
    """Every node that computes something, with the statement and the function that it stands in.

    Left out: annotations, which nothing evaluates, and the words of error messages.
    """
    if isinstance(node, ast.stmt):
        statement = node
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        function = node.name
    if statement is not None:
        yield node, _Owner(statement, function)
    for field, inner in ast.iter_fields(node):
        if field in ("annotation", "returns") or isinstance(node, (ast.Raise, ast.JoinedStr)):
            continue
        for child in inner if isinstance(inner, list) else [inner]:
            if isinstance(child, ast.AST):
                yield from _owners(child, statement, function)


def _head(statement: ast.stmt) -> str:
    """A statement on one line."""
    return " ".join(line.strip() for line in ast.unparse(statement).splitlines())


def _difference(before: str, after: str) -> str:
    """What differs, with some characters around it; empty if nothing does."""
    if before == after:
        return ""
    first = next((i for i, (a, b) in enumerate(zip(before, after)) if a != b), min(len(before), len(after)))
    last = next((i for i, (a, b) in enumerate(zip(before[::-1], after[::-1])) if a != b), 0)
    last = min(last, min(len(before), len(after)) - first)
    around = _CONTEXT
    left, right = before[max(0, first - around) : first], before[len(before) - last :][:around]
    return f"{left}[{before[first : len(before) - last]} -> {after[first : len(after) - last]}]{right}"


def _changes(node: ast.AST) -> Iterator[Any]:
    """Functions that change a copy of this node, in place."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
        yield lambda n: n.ops.__setitem__(0, _COMPARISONS[type(n.ops[0])]())
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in _OPERATORS:
        yield lambda n: setattr(n, "op", _OPERATORS[type(n.op)]())
    if isinstance(node, ast.BoolOp):
        yield lambda n: setattr(n, "op", ast.And() if isinstance(n.op, ast.Or) else ast.Or())
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield lambda n: setattr(n, "value", not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield lambda n: setattr(n, "value", n.value + 1)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield lambda n: setattr(n, "op", ast.UAdd())
    for field in ("body", "orelse", "finalbody"):
        for place, inner in enumerate(getattr(node, field, []) if not isinstance(node, ast.IfExp | ast.Lambda) else []):
            if _can_be_left_out(inner):
                yield lambda n, field=field, place=place: getattr(n, field).__setitem__(place, ast.Pass())


def _can_be_left_out(statement: ast.stmt) -> bool:
    """Calls, raises and changes of something; a name that is bound for the first time would only be missed by name."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, (ast.Call, ast.Await))
    if isinstance(statement, ast.Assign):
        return all(isinstance(target, (ast.Attribute, ast.Subscript)) for target in statement.targets)
    return isinstance(statement, (ast.AugAssign, ast.Raise, ast.Delete))


def sample(path: str, source: str, count: int, seed: int, known: set[str]) -> list[Mutant]:
    """So many random mutants of a file, none of them known to be equivalent."""
    found = [mutant for mutant in mutants_of(path, source) if mutant.name not in known]
    return random.Random(f"{path} {seed}").sample(found, min(count, len(found)))


class Copies:
    """Copies of the project, one per worker, in which one file at a time is changed."""

    def __init__(self, folder: Path, count: int) -> None:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
        names = [name for name in listed.decode().split("\0") if name and not name.startswith("docs/figures")]
        # Machine code of loops that no changed file is compiled into: numba knows it by its sources.
        names += [str(p.relative_to(ROOT)) for package in PACKAGES for p in (ROOT / package).rglob("*.nb[ic]")]
        self._free = []
        for number in range(count):
            copied = folder / f"copy{number}"
            for name in names:
                if (ROOT / name).is_file():
                    (copied / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(ROOT / name, copied / name)
            self._free.append(copied)

    def tried(self, path: str, source: str, tests: Sequence[str], limit: float) -> tuple[bool, float]:
        """Whether the tests pass on the changed file, and the seconds that they took."""
        copied = self._free.pop()
        original = (copied / path).read_bytes()
        began, passed = time.monotonic(), False
        try:
            (copied / path).write_text(source, encoding="utf-8")
            here, there = SERVER.Pipe(duplex=False)
            process = SERVER.Process(target=_pytest, args=(copied, tests, there))
            process.start()
            there.close()
            with here, suppress(EOFError):  # of one that crashed
                passed = here.poll(limit) and here.recv() == 0
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
            return passed, time.monotonic() - began
        finally:
            (copied / path).write_bytes(original)
            self._free.append(copied)


def _pytest(copied: Path, tests: Sequence[str], told: Connection) -> None:
    """Run tests on a copy and tell how they ended.

    It is done in a process that has imported what others wrote, and nothing of the project but this file.
    """
    os.setsid()  # ended together with what the tests start
    _end_with(told.fileno())
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(quiet, stream)
    os.chdir(copied)
    os.environ["PYTHONPATH"] = str(copied)
    sys.path[:] = [str(copied), *(place for place in sys.path if place not in ("", str(ROOT)))]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "bench", *PACKAGES)]:
        del sys.modules[name]
    # Without written bytecode: a change within the clock's resolution could be taken for the file before it.
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    import pytest

    told.send(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests])))


def _end_with(pipe: int) -> None:
    """Have this process and what its tests start killed as soon as nobody reads the pipe: the command was killed.

    By the system: a mutant that loops in compiled code lets no thread of its process run.
    """
    fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)


def equivalent() -> set[str]:
    """Names of mutants that compute the same as the original."""
    lines = EQUIVALENT.read_text(encoding="utf-8").splitlines() if EQUIVALENT.exists() else []
    return {line for line in lines if line and not line.startswith("#")}


def measure(path: str, copies: Copies, count: int, seed: int, jobs: int) -> dict[str, Any]:
    """Try mutants of one file.

    Raises:
        SystemExit: the tests fail on the file as it is.
    """
    source, tests = (ROOT / path).read_text(encoding="utf-8"), TARGETS[path]
    passed, seconds = copies.tried(path, ast.unparse(ast.parse(source)), tests, 900)
    if not passed:
        raise SystemExit(f"mutants: {' '.join(tests)} fail on {path} as it is")
    chosen = sample(path, source, count, seed, equivalent())
    limit = max(_LEAST_SECONDS, _SLOWER * seconds)

    def noticed(mutant: Mutant) -> bool:
        return not copies.tried(path, mutant.source, tests, limit)[0]

    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(noticed, chosen))
    missed = [f"{m.name} (line {m.line})" for m, seen in zip(chosen, results) if not seen]
    print(f"{path:<40} {sum(results):3d} of {len(results)} noticed, tests {seconds:.0f} s", file=sys.stderr, flush=True)
    for name in missed:
        print(f"    not noticed: {name}", file=sys.stderr, flush=True)
    return {"path": path, "tests": tests, "mutants": len(results), "noticed": sum(results), "missed": missed}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command-line options; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="WORD", help="files whose path holds one of these words")
    parser.add_argument("--mutants", type=int, default=12, metavar="N", help="of each file (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="which mutants (default: 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="at a time (default: cores)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="keep what was found")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    return parser.parse_args(argv)


def main() -> None:
    """The command."""
    options = parse()
    os.environ["OMP_NUM_THREADS"] = "1"  # tensors are small, and what the tests fork could not use threads of OpenMP
    paths = [path for path in TARGETS if not options.only or any(word in path for word in options.only)]
    if options.list:
        for path in paths:
            for mutant in sample(path, (ROOT / path).read_text("utf-8"), options.mutants, options.seed, equivalent()):
                print(mutant.name)
        return
    with tempfile.TemporaryDirectory() as folder:
        copies = Copies(Path(folder), options.jobs)
        files = [measure(path, copies, options.mutants, options.seed, options.jobs) for path in paths]
    noticed, tried = sum(entry["noticed"] for entry in files), sum(entry["mutants"] for entry in files)
    if options.out:
        found = {"seed": options.seed, "equivalent": sorted(equivalent()), "files": files}
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{noticed} of {tried} mutants noticed, {len(equivalent())} known to be equivalent")
    if noticed < ENOUGH * tried:
        sys.exit(f"mutants: fewer than {ENOUGH:.0%} were noticed: what was missed stands above")


if __name__ == "__main__":
    main()
