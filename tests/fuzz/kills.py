"""A command that is killed at random moments and started again gives the results of one that was left alone.

python -m tests.fuzz --only kills
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (
    "bench/bytedmd_toy.py", "--quick", "--sweep", "padding", "--model", "engram", "--text", "docs/log.md",
    "--seq_len", "16", "--jobs", "1", "--out",
)  # fmt: skip
RESULTS = "sweeps.json"
LIMIT = 300  # seconds for one run
KILLS_OF_A_RUN = 5  # then it is let finish, and the next begins


def run(count: int, seed: int) -> dict[str, Any]:
    """So many kills -9 of a sweep, a few of each run before it may finish."""
    chance, faults, left = random.Random(seed), [], count
    with tempfile.TemporaryDirectory() as place:
        began = time.monotonic()
        _start(Path(place) / "whole").wait(LIMIT)
        seconds = time.monotonic() - began
        wanted = _evidence(Path(place) / "whole")
        while left > 0:
            out = Path(place) / f"killed{left}"
            for _ in range(min(left, KILLS_OF_A_RUN)):
                process = _start(out)
                time.sleep(chance.uniform(0, seconds))
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                left -= 1
            if code := _start(out).wait(LIMIT):
                faults.append(f"exit {code} after kills")
            elif _evidence(out) != wanted:
                faults.append("other results after kills")
            faults += [f"{path.name} stayed" for path in out.glob(".*")]
    return {"cases": count, "faults": faults}


def _start(out: Path) -> subprocess.Popen[bytes]:
    quiet = subprocess.DEVNULL
    command = [sys.executable, *COMMAND, str(out)]
    return subprocess.Popen(command, cwd=ROOT, stdout=quiet, stderr=quiet, stdin=quiet, start_new_session=True)


def _evidence(out: Path) -> Any:
    """The prices that a run wrote."""
    return json.loads((out / RESULTS).read_bytes())["points"]
