"""What a command starts with: Ctrl-C while its modules are imported ends it in one line, as `cli.run` does later.

    engram-plan = "engram_ref.starting:plan"    # in pyproject.toml: nothing else has been imported by then

    if __name__ == "__main__":                  # in a script, before whatever takes time
        from engram_ref.starting import interruptible

        interruptible("gpu_wall")

No exception is raised: torch, imported, would abort at one. What is imported is no part of a run: there is nothing to
undo. An interpreter that is interrupted before it comes here prints its own traceback.

    python -m pytest tests/ref/test_starting.py
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType


def interruptible(prog: str) -> None:
    """Let Ctrl-C end the process in one line, with code 130, until `engram_ref.cli.run` takes over.

    Args:
        prog: name of the command, for the line.
    """

    def end(number: int, frame: FrameType | None) -> None:
        try:
            os.write(2, f"\n{prog}: interrupted; nothing was written\n".encode())
        finally:  # whatever has become of stderr
            os._exit(128 + number)

    here = threading.current_thread() is threading.main_thread()  # Python lets no other thread do this
    if here and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, end)


def plan() -> None:
    """The console script `engram-plan`."""
    interruptible("engram-plan")
    from engram_ref import cli
    from engram_ref import plan as command

    cli.run(command.main, command.PROG)
