"""What needs numpy or numba: compiled twins of slow loops, and arrays. Nothing else in `engram_toy` imports them.

Loaded on demand, never needed: every compiled function returns exactly what its plain Python twin returns.
"""
