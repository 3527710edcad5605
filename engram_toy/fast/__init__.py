"""What needs numpy or numba: compiled twins of slow loops, and arrays. The only place in `engram_toy` that imports them.

Loaded on demand, never needed: every compiled function returns exactly what its plain Python twin returns.
"""
