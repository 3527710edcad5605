"""Compiled twins of slow loops in `engram_toy`: the only place there where numpy and numba are imported.

Loaded on demand, never needed: every function here returns exactly what its plain Python twin returns.
"""
