"""Command lines that fail in one line: wrong input is a sentence on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import argparse
import math
import os
import re
import select
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from typing import Any, NoReturn

from engram_ref import __version__
from engram_ref.quoting import one_line, quoted

MOST = 100_000  # of samples, rounds, processes: whatever an option counts and says no other limit of
MOST_SEED = 2**63 - 1
_LONGEST_ERROR = 2000  # characters
_LEAST_COLUMNS = 40  # nothing is folded to less
_RULE = re.compile(r"-+(  -+)+")
_ABSENT = object()  # what no command line can say
_MOST_DIGITS = 25  # of a number: more than any limit of ours has, and computed with exactly
_NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,9})?\s*", re.ASCII)
_POWER = re.compile(r"\s*(\d{1,2})\^(\d{1,3})\s*", re.ASCII)
_UNIT = re.compile(r"([^a-zA-Zµμ]*(?:[eE][+-]?\d+)?)\s*([a-zA-Zµμ]*)")
_BYTES = {"b": 1, **{f"{prefix}b": 1000**n for n, prefix in enumerate("kmgt", 1)}}
_BYTES |= {f"{prefix}ib": 1024**n for n, prefix in enumerate("kmgt", 1)}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0}


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """A description as it is laid out, folded where COLUMNS, or the terminal, has no room; and every default, once."""

    def _get_help_string(self, action: argparse.Action) -> str:
        said, default = action.help or "", action.default
        if "default" in said or isinstance(default, bool) or default in (None, argparse.SUPPRESS):
            return said
        words = default if isinstance(default, (list, tuple)) else [default]
        shown = " ".join(f"{word:g}" if isinstance(word, float) else str(word) for word in words)
        return f"{said} (default: {shown})".replace("%", "%%") if "%" in shown else f"{said} (default: {shown})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + part for line in text.splitlines() for part in folded(line, width - len(indent)))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and that takes --table-params for --table_params and back."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(formatter_class=_Formatter, **arguments)
        self.add_argument("--version", action="version", version=f"engram-offload {__version__}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it, every option with hyphens and with underscores."""
        return super().parse_known_args(self._spelt(sys.argv[1:] if args is None else list(args)), namespace)

    def _spelt(self, words: list[str]) -> list[str]:
        """The words with options spelt as they were added; what stands behind "--" is no option."""
        known = {option.replace("_", "-"): option for option in self._option_string_actions}
        end = words.index("--") if "--" in words else len(words)
        return [_respelt(word, known) if word.startswith("--") else word for word in words[:end]] + words[end:]

    def error(self, message: str) -> NoReturn:
        """Print the error and leave with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def parse_given(self, argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, str]]:
        """The options, and which of them stand on the command line: by name in the namespace, as they are spelt."""
        spelt = {a.dest: a.option_strings[-1] for a in self._actions if a.option_strings}
        namespace = argparse.Namespace(**dict.fromkeys(spelt, _ABSENT))
        self.parse_args(argv, namespace)
        given = {name: option for name, option in spelt.items() if getattr(namespace, name) is not _ABSENT}
        return self.parse_args(argv), given


def _respelt(word: str, known: Mapping[str, str]) -> str:
    name, equals, value = word.partition("=")
    hyphens = name.replace("_", "-")
    meant = [option for plain, option in known.items() if plain == hyphens] or [
        option for plain, option in known.items() if plain.startswith(hyphens)
    ]
    return meant[0] + equals + value if len(meant) == 1 else word


def folded(line: str, width: int) -> list[str]:
    """A line in parts of at most `width` characters, indented as it is; as it is if it has room."""
    if len(line) <= max(width, _LEAST_COLUMNS):
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(line, max(width, _LEAST_COLUMNS), subsequent_indent=indent, drop_whitespace=True) or [line]


def fitted(text: str, width: int | None = None) -> str:
    """Printed text in the width of the reader: long lines folded, wide tables cut into narrower ones.

    Args:
        width: characters; None for COLUMNS or a terminal's, and no limit where there is neither.
    """
    if width is None:
        if not os.environ.get("COLUMNS", "").isdigit() and not sys.stdout.isatty():
            return text
        width = shutil.get_terminal_size().columns
    width = max(width, _LEAST_COLUMNS)
    lines, found, at = text.split("\n"), list[str](), 0
    while at < len(lines):
        if at + 1 < len(lines) and _RULE.fullmatch(lines[at + 1]) and len(lines[at + 1]) > width:
            end = next((n for n in range(at + 2, len(lines)) if not lines[n].strip()), len(lines))
            found += _narrow(lines[at:end], width)
            at = end
        else:
            found += folded(lines[at], width)
            at += 1
    return "\n".join(found)


def _narrow(table: list[str], width: int) -> list[str]:
    """A ruled table as several of at most `width` characters, each with its first column."""
    spans = [match.span() for match in re.finditer("-+", table[1])]
    first, rest = spans[0], spans[1:]
    parts: list[list[tuple[int, int]]] = []
    used = width + 1
    for span in rest:
        room = span[1] - span[0] + 2
        if used + room > width:
            parts.append([])
            used = first[1] - first[0]
        parts[-1].append(span)
        used += room
    found: list[str] = []
    for part in parts:
        found += ["  ".join(line[a:b].ljust(b - a) for a, b in (first, *part)).rstrip() for line in table] + [""]
    return found[:-1] if found else table


def number(text: str) -> int | float | None:
    """What a number means, in every spelling that an option takes: 12, 2.5, 1e6, 10^6; None where it is none.

    Whole numbers come out as integers, exactly; those of more digits than anything has here, as infinite.
    """
    if power := _POWER.fullmatch(text):
        value = Decimal(power[1]) ** int(power[2])
    elif _NUMBER.fullmatch(text):
        value = Decimal(text.strip())
    else:
        return None
    if value and value.adjusted() > _MOST_DIGITS:
        return math.copysign(math.inf, value)
    if value and value.adjusted() < -_MOST_DIGITS:
        return 0.0
    return int(value) if value == value.to_integral_value() else float(value)


def at_least(least: int, most: int = MOST) -> Callable[[str], int]:
    """An argument type: an integer from `least` to `most`, what memory and patience hold."""

    def parse(text: str) -> int:
        value = number(text)
        if value is None or value < least or (isinstance(value, float) and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{quoted(text)} must be an integer of at least {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{quoted(text)} must be at most {most}")
        return int(value)

    return parse


def positive(text: str) -> float:
    """An argument type: a number above 0, and not infinite."""
    value = number(text)
    if value is None or not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{quoted(text)} must be a number above 0, such as 2.5, 1e6 or 10^6")
    return float(value)


def nbytes(text: str) -> int:
    """An argument type: bytes, as a number alone or with a unit: 80GB, 188.8GiB, 2e9."""
    return round(_with_unit(text, _BYTES, "bytes, such as 80GB, 188.8GiB or 2e9", default=1))


def bytes_per_second(text: str) -> float:
    """An argument type: a bandwidth above 0, such as 50GB/s."""
    what = "a bandwidth, such as 50GB/s"
    value = _with_unit(text.strip().removesuffix("/s"), _BYTES, what, default=1)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{quoted(text)} must be {what}")
    return value


def seconds(text: str) -> float:
    """An argument type: a time with its unit: 56us, 3.6ms, 1s."""
    return _with_unit(text, _SECONDS, "a time with its unit, such as 56us, 3.6ms or 1s", default=None)


def _with_unit(text: str, units: Mapping[str, float], what: str, default: float | None) -> float:
    found = _UNIT.fullmatch(text.strip())
    value = number(found[1]) if found else None
    factor = units.get(found[2].lower(), None if found[2] else default) if found else None
    if value is None or factor is None or not 0 <= value * factor < 2**63:
        raise argparse.ArgumentTypeError(f"{quoted(text)} must be {what}")
    return value * factor


def share(text: str) -> float:
    """An argument type: a number in 0 .. 1."""
    value = number(text)
    if value is None or not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{quoted(text)} must be a number in 0 .. 1")
    return float(value)


def add_fresh(parser: argparse.ArgumentParser) -> None:
    """The one way to resume: the same command goes on where it stopped, unless it is told to begin anew."""
    parser.add_argument("--fresh", action="store_true", help="begin anew; without it the same command continues")


def time_left(elapsed: float, done: float, of: float) -> str:
    """For a line of progress: how long it has taken, and, if the rest goes on like this, how long it will.

    Args:
        elapsed: seconds.
        done, of: work, in whatever unit tells best how long it takes.
    """
    left = "" if done <= 0 else f", about {elapsed * max(0.0, of - done) / done:.0f} s left"
    return f"{elapsed:6.0f} s{left}"


def refuse_idle(given: Mapping[str, str], idle: Iterable[str], why: str) -> None:
    """Refuse what would do nothing: whoever asks for something and gets a run without it is misled.

    Args:
        given: of `Parser.parse_given`.
        idle: names of options that do nothing in this run.
        why: ends the sentence "--option does nothing ...", with what to do instead.

    Raises:
        ValueError: one of them was given.
    """
    if found := [given[name] for name in idle if name in given]:
        raise ValueError(f"{', '.join(found)} {'do' if len(found) > 1 else 'does'} nothing {why}")


@contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Around reading input and writing output: what the user can mend becomes one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            _leave_unread()
        if isinstance(error, ModuleNotFoundError) and error.name != "torch":
            raise
        print(f"{prog}: error: {one_line(error, _LONGEST_ERROR)}", file=sys.stderr)
        sys.exit(2)


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has left; another pipe may have broken as well."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(what & select.POLLERR for _, what in poll.poll(0))
    except (OSError, ValueError):  # stdout is no file, or closed
        return False


def _leave_unread() -> NoReturn:
    """End as other programs do whose reader leaves, by the code of SIGPIPE; what is left to print is dropped."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)


def run(main: Callable[[], None], prog: str, left: str = "nothing was written") -> NoReturn:
    """Run a command; Ctrl-C ends it in one line, which says what is `left` of the run.

    SIGTERM ends it with code 143 as an exception would: what must be given back or removed, is. Where nobody reads on
    (`... | head`), it ends in silence, with code 141.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # what is written last has no reader, perhaps
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        _leave_unread()
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted; {left}", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
