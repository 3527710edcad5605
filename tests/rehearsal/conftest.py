"""The server that runs the tests' commands on the stand-in: torch and transformers are imported once for all."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def on_stand_in(tmp_path_factory):
    """The words of a command that runs what follows on the stand-in."""
    path = tmp_path_factory.mktemp("server") / "socket"
    command = [sys.executable, "-m", "tests.rehearsal.server", str(path)]
    server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        for _ in range(600):
            if path.exists() or server.poll() is not None:
                break
            time.sleep(0.2)
        assert path.exists(), "the server did not start"
        yield [sys.executable, str(ROOT / "tests/rehearsal/server.py"), str(path)]
    finally:
        server.stdin.close()
        server.kill()
        server.wait()
