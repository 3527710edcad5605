"""The answer in the form of the lab that asked: files that run in its tree, on its own tracer (`verdict.py --export`)."""
