"""The server that runs the tests' commands on the stand-in: torch and transformers are imported once for all."""

import fcntl
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def on_stand_in(cache_home):
    """The words of a command that runs what follows on the stand-in; one server for all workers of this run."""
    folder = cache_home.parent / "server"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        writing = held_open(folder / "in", folder / "socket")
    watched = select.poll()
    watched.register(writing, 0)
    while not (folder / "socket").exists():
        assert not watched.poll(200), "the server did not start"
    yield [sys.executable, str(ROOT / "tests/rehearsal/server.py"), str(folder / "socket")]
    os.close(writing)


def held_open(pipe: Path, path: Path) -> int:
    """A writing end of the standard input of the server, which runs as long as somebody has one; started if need be."""
    if not pipe.exists():
        os.mkfifo(pipe)
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # nobody reads: no server was started, or it ended with the last of those that had one
        path.unlink(missing_ok=True)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writing = os.open(pipe, os.O_WRONLY)
    os.set_blocking(reading, True)
    command = [sys.executable, "-m", "tests.rehearsal.server", str(path)]
    subprocess.Popen(command, cwd=ROOT, stdin=reading, env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.close(reading)
    return writing
