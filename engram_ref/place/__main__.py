"""Where should my table live? `python -m engram_ref.place --preset v41-flash`, or, installed, `engram-place`."""

from engram_ref import cli
from engram_ref.place.command import PROG, main

if __name__ == "__main__":
    cli.run(main, PROG)
