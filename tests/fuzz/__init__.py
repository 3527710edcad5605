"""Stress: random programs, files and moments, far more of them than the suite runs; a module per kind.

make fuzz       all of it; `python -m tests.fuzz --help` says more
"""
