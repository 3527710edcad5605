"""Commands of `bench` run in this process, as a shell would run them: no second interpreter, no second torch."""

import contextlib
import io
import sys
import traceback
from collections.abc import Callable
from subprocess import CompletedProcess
from types import ModuleType

import pytest

from engram_ref import cli


def run(command: ModuleType, *options: object) -> CompletedProcess[str]:
    """What `python bench/NAME.py OPTIONS` prints and the status that it ends with, whatever it raises.

    Args:
        command: the module, with its `main`.
        options: each as a word of the shell.
    """
    name, words = command.__name__.rpartition(".")[2], [str(option) for option in options]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [name, *words])
        status = _status_of(lambda: cli.run(command.main, name))
    return CompletedProcess([name, *words], status, out.getvalue(), err.getvalue())


def _status_of(end: Callable[[], None]) -> int:
    try:
        end()
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 0 if stopped.code is None else 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0
