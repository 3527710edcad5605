"""Ctrl-C while a command imports its modules: one line and code 130, as later, whatever is being imported."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = dict(re.findall(r'^(engram-\w+) = "([\w.:]+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
SCRIPTS = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if path.stem != "__init__")

# Presses Ctrl-C when one of some modules is looked for, as a user would who waits for it.
INTERRUPTED = """
import signal, sys

_, wanted, handler = sys.argv
sys.argv[1:] = ["--help"]

class Press:
    def find_spec(self, name, path=None, target=None):
        if name in wanted.split():
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, getattr(signal, handler))
sys.meta_path.insert(0, Press())
"""
ENTRY = """
from {0} import {1}
{1}()
"""
SCRIPT = """
import runpy
runpy.run_path("bench/{0}.py", run_name="__main__")
"""
STARTS = {
    **{name: ENTRY.format(*entry.split(":")) for name, entry in ENTRIES.items()},
    **{name: SCRIPT.format(name) for name in SCRIPTS},
}


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)


def interrupted(name, module, handler="default_int_handler"):
    return run(INTERRUPTED + STARTS[name], module, handler)


def test_every_installed_command_is_tried():
    assert len(ENTRIES) == 3


@pytest.mark.parametrize(
    ("name", "module"),
    [
        *((name, "numpy engram_ref.cli") for name in SCRIPTS),
        *((n, m) for n in ENTRIES for m in ("numpy", "engram_ref.cli")),
    ],
)
def test_ctrl_c_during_imports_ends_in_one_line(name, module):
    done = interrupted(name, module)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", f"{name}: interrupted; nothing was written")


def command(before):
    """A command that is interrupted once its modules are there."""
    return run(
        "import signal; from engram_ref import cli, starting\n"
        f"signal.signal(signal.SIGINT, {before})\n"
        "starting.interruptible('other')\n"
        "cli.run(lambda: signal.raise_signal(signal.SIGINT), 'name', left='what is done is kept')"
    )


def test_ctrl_c_after_the_imports_is_the_commands():
    """It may have something to undo, or to say of what is left."""
    done = command("signal.default_int_handler")
    assert (done.returncode, done.stderr.strip()) == (130, "name: interrupted; what is done is kept")


def test_who_ignores_ctrl_c_goes_on_ignoring_it():
    """As a job of a shell in the background does."""
    done = interrupted("engram-plan", "engram_ref.cli", "SIG_IGN")
    assert done.returncode == 0 and "--help" in done.stdout
    assert command("signal.SIG_IGN").returncode == 0


def test_a_command_starts_in_any_thread():
    """Where Python lets nobody handle a signal."""
    program = "import sys, threading; from engram_ref.starting import plan; sys.argv = ['x', '--version'];"
    program += "thread = threading.Thread(target=plan); thread.start(); thread.join()"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout and "Traceback" not in done.stderr, done.stderr
