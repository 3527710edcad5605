"""Engram's lookup in plain Python, every read traced and priced; the standard library only.

hashing, fp8, fusion       the twin of `engram_ref`, names as there
functional                 vector arithmetic that stays inside the tracer
models                     what is compared: where the table lies, and how much of the model is priced
bytedmd                    the tracer; `tracer` has the values that it watches, their log and the stack distances
definitions, floor         ByteDMD's other definitions; the least that any memory manager must pay
fast                       the same distances compiled; needs numpy and numba, loaded on demand, never required
"""
