"""A parser whose errors are one line, whose options take hyphens and underscores, and whose help fits the terminal."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NoReturn

from engram_ref import __version__
from engram_ref.cli.width import wrapped
from engram_ref.quoting import one_line

_ABSENT = object()  # what no command line can say


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """A description as it is laid out, wrapped where COLUMNS, or the terminal, has no room; and every default, once."""

    def _get_help_string(self, action: argparse.Action) -> str:
        said, default = action.help or "", action.default
        if "default" in said or isinstance(default, bool) or default in (None, argparse.SUPPRESS):
            return said
        words = default if isinstance(default, (list, tuple)) else [default]
        shown = " ".join(f"{word:g}" if isinstance(word, float) else str(word) for word in words)
        # argparse formats help by `%`.
        return f"{said} (default: {shown})".replace("%", "%%") if "%" in shown else f"{said} (default: {shown})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.indent(wrapped(text, width - len(indent)), indent)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and that takes --table-params for --table_params and back."""

    def __init__(self, **arguments: Any) -> None:
        # `--model x` would be --model-time, which is not what was meant.
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **arguments)
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
        start, unknown, option = message.partition("unrecognized arguments: ")
        near = get_close_matches(option.partition("=")[0].split(" ")[0], self._option_string_actions, 1, 0.75)
        meant = f", did you mean {near[0]}?" if unknown and not start and near else ""
        self.exit(2, f"{self.prog}: error: {one_line(message + meant, 2000)} (see --help)\n")

    def parse_given(self, argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, str]]:
        """The options, and which of them stand on the command line: by name in the namespace, as they are spelt."""
        spelt = {a.dest: a.option_strings[-1] for a in self._actions if a.option_strings}
        # argparse puts defaults only where a namespace has nothing: what stays _ABSENT was not given.
        namespace = argparse.Namespace(**dict.fromkeys(spelt, _ABSENT))
        self.parse_args(argv, namespace)
        given = {name: option for name, option in spelt.items() if getattr(namespace, name) is not _ABSENT}
        return self.parse_args(argv), given


def _respelt(word: str, known: Mapping[str, str]) -> str:
    name, equals, value = word.partition("=")
    return known.get(name.replace("_", "-"), name) + equals + value


def add_fresh(parser: argparse.ArgumentParser) -> None:
    """The one way to resume: the same command goes on where it stopped, unless it is told to begin anew."""
    parser.add_argument("--fresh", action="store_true", help="begin anew; without it the same command continues")


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
