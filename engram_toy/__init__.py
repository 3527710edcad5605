"""Engram's lookup in plain Python, every read traced and priced; the standard library only.

hashing, layer, kv_bank   the twin of `engram_ref`, names as there
layouts, programs         what is compared: where the table lies, and how much of the model is priced
bytedmd                   the tracer; `tracked` and `wrapping` are the values that it watches
stack, tally              the exact LRU stack distances behind it, and the counts by kind of value
fast/                     the same distances compiled; needs numpy and numba, loaded on demand, never required
"""
