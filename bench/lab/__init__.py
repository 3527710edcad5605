"""The answer in the form of the lab that asked: files that run in its tree, on its tracer (`verdict.py --export`)."""
