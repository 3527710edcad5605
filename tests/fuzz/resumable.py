"""A command of a moment, for the kills to be tried on; torch is not imported, as every process imports this anew."""

import json
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

from tests.fuzz.kills import RESULTS, alone


def resumable(out: Path, ready: Connection, fault: str | None = None) -> None:
    """In place of the sweep: it has its fault where it has been before."""
    alone(out)
    again = out.exists()
    out.mkdir(exist_ok=True)
    ready.send_bytes(b"ready")
    time.sleep(0.2)
    if again and fault == "exit 2":
        sys.exit(2)
    if again and fault == ".part stayed":
        (out / ".part").touch()
    if again and fault == "not ended":
        time.sleep(100)
    points = [2 if again and fault == "other results" else 1]
    (out / RESULTS).write_text(json.dumps({"points": points}))
