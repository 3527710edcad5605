"""Inside the tracer: watched values, the log that they write, and what it says.

tracked      the values; arrays: NumPy arrays of them, needs numpy
wrapping     arguments to watched values, and results back
recorder     the log of one run, and the operators that write it
stack        exact LRU stack distances of a log, and their price
first_reads  one log laid down in any layout, at any padding, without running it again
"""
