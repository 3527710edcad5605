"""Command lines that fail in one line: wrong input is a sentence on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from engram_ref.quoting import one_line, quoted

MOST = 100_000  # of samples, rounds, processes: whatever an option counts and says no other limit of
MOST_SEED = 2**63 - 1
_LONGEST_ERROR = 2000  # characters
_ABSENT = object()  # what no command line can say


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **arguments)

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


def at_least(least: int, most: int = MOST) -> Callable[[str], int]:
    """An argument type: an integer from `least` to `most`, what memory and patience hold."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = most + 1 if text.strip().isdigit() else least - 1  # thousands of digits, or no number
        if value < least:
            raise argparse.ArgumentTypeError(f"{quoted(text)} must be an integer of at least {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{quoted(text)} must be at most {most}")
        return value

    return parse


def share(text: str) -> float:
    """An argument type: a number in 0 .. 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{quoted(text)} must be a number in 0 .. 1")
    return value


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
    except (ValueError, OSError) as error:
        print(f"{prog}: error: {one_line(error, _LONGEST_ERROR)}", file=sys.stderr)
        sys.exit(2)


def run(main: Callable[[], None], prog: str, left: str = "nothing was written") -> NoReturn:
    """Run a command; Ctrl-C ends it in one line, which says what is `left` of the run.

    SIGTERM ends it with code 143 as an exception would: what must be given back or removed, is.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted; {left}", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
