"""Command lines that fail in one line: wrong input is a sentence on stderr and exit code 2, never a traceback.

parser     options, in either spelling, and those that would do nothing
numbers    1e6, 10^6, 80GB, 56us
width      what is printed, folded to the reader's width
run        a command from its start to its exit code
"""

from engram_ref.cli.numbers import MOST, MOST_SEED, at_least, bytes_per_second, nbytes, number, positive, seconds, share
from engram_ref.cli.parser import Parser, add_fresh, refuse_idle
from engram_ref.cli.run import one_line_errors, run, time_left
from engram_ref.cli.width import fitted

__all__ = [
    "MOST",
    "MOST_SEED",
    "Parser",
    "add_fresh",
    "at_least",
    "bytes_per_second",
    "fitted",
    "nbytes",
    "number",
    "one_line_errors",
    "positive",
    "refuse_idle",
    "run",
    "seconds",
    "share",
    "time_left",
]
