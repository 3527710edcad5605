"""A command that is killed at random moments and started again gives the results of one that was left alone.

Its processes are forked from one that has imported everything, so that kills fall into its work, not into start-up.

python -m tests.fuzz --only kills
"""

import faulthandler
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bench import bytedmd_toy
from engram_ref import cli

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = ("--quick", "--sweep", "padding", "--model", "engram", "--seq_len", "16", "--jobs", "1")
TEXT, RESULTS, STANDS = ROOT / "docs" / "log.md", "sweeps.json", "stands.txt"
LIMIT = 120.0  # seconds for one run, on a machine that does other things, too
TO_TELL = 0.5  # seconds for a process to say where it stands
KILLS_OF_A_RUN = 5  # then it is let finish, and the next begins
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.fuzz.kills", "bench.sweeps.figures", "matplotlib.font_manager", "sympy"])


def alone(out: Path) -> None:
    """Make this process and those that it starts one group, which says where it stands when it is asked to."""
    os.setsid()  # killed together with its workers
    faulthandler.register(signal.SIGUSR1, (out.parent / STANDS).open("a"))  # forked workers keep it


def sweep(out: Path, ready: Connection) -> None:
    """The command, in a process of its own; whoever started it is told that it begins."""
    alone(out)
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(quiet, stream)
    forked = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: forked  # type: ignore[assignment] # workers need no start-up
    sys.argv = ["bytedmd_toy", *ARGUMENTS, "--text", str(out.parent / TEXT.name), "--out", str(out)]
    ready.send_bytes(b"ready")
    cli.run(bytedmd_toy.main, bytedmd_toy.PROG)


COMMAND = sweep


def run(count: int, seed: int) -> dict[str, Any]:
    """So many kills -9 of a sweep, a few of each run before it may finish; `at_work`: those that some prices outlived.

    Raises:
        RuntimeError: the command fails by itself, or does not even begin.
    """
    chance, faults, killed, at_work = random.Random(seed), [], 0, 0
    with tempfile.TemporaryDirectory() as place:
        shutil.copy(TEXT, place)  # whoever works on it meanwhile changes no price
        whole = Path(place) / "whole"
        process, began = _start(whole), time.monotonic()
        if code := _finish(process, whole):
            raise RuntimeError(f"the command ends with {code} where nobody kills it")
        seconds = time.monotonic() - began
        wanted = _evidence(whole)
        places = (Path(place) / f"killed{number}" for number in itertools.count())
        while killed < count:
            out = next(places)
            for _ in range(min(count - killed, KILLS_OF_A_RUN)):
                process, began = _start(out), time.monotonic()
                if not _kill(process, chance.uniform(0, seconds)):
                    seconds = min(seconds, time.monotonic() - began)  # it had ended: the next is killed sooner
                    break
                killed += 1
                at_work += (out / "sweeps.journal").exists() and not (out / RESULTS).exists()
            if code := _finish(_start(out), out):
                faults.append(f"exit {code} after kills")
            elif _evidence(out) != wanted:
                faults.append("other results after kills")
            faults += [f"{path.name} stayed" for path in out.glob(".*")]
    return {"cases": killed, "at_work": at_work, "faults": faults}


def _start(out: Path) -> BaseProcess:
    """The command, as soon as it begins its work."""
    here, there = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=COMMAND, args=(out, there))
    process.start()
    there.close()
    with here:
        if not here.poll(LIMIT):
            process.kill()
            raise RuntimeError(f"the command has not begun within {LIMIT:g} s")
        here.recv_bytes()
    return process


def _kill(process: BaseProcess, after: float) -> bool:
    """Kill it after some seconds; whether it still ran."""
    process.join(after)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.join(LIMIT)
    if process.exitcode is None:
        raise RuntimeError(f"process {process.pid} is killed, and has not ended within {LIMIT:g} s")
    return process.exitcode == -signal.SIGKILL


def _finish(process: BaseProcess, out: Path, limit: float = LIMIT) -> int | str:
    """How it ends that nobody kills; of one that stands still, where."""
    process.join(limit)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGUSR1)
        time.sleep(TO_TELL)
        _kill(process, 0)
        return f"not ended within {limit:g} s: {(out.parent / STANDS).read_text()}"
    return process.exitcode


def _evidence(out: Path) -> Any:
    """The prices that a run wrote."""
    return json.loads((out / RESULTS).read_bytes())["points"]
