"""Engram's lookup in plain Python, every read traced and priced; the standard library only.

hashing, layer, kv_bank   the twin of `engram_ref`, names as there
fp8, layer_v41            its form of DeepSeek-V4.1-Flash: stored bytes to numbers, and the layer that reads them
layouts, programs         what is compared: where the table lies, and how much of the model is priced
bytedmd                   the tracer; `tracked` and `wrapping` are the values that it watches
stack, tally              the exact LRU stack distances behind it, and the counts by kind of value
fast/                     the same distances compiled; needs numpy and numba, loaded on demand, never required
"""
