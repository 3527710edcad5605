"""The reference Engram layer: hash, embed, gate, exact to the bit.

config, vocab, hashing   from text to row indices, without torch
rows, files              the bytes of a row and its values; rows on disk
tables, prefetch         where rows live, and when they are fetched
sharding                 rows that other processes own
lookup                   from token ids to rows by the GPU alone
fusion                   from rows to the residual stream, in the demo's form and in that of DeepSeek-V4.1-Flash
layer                    the whole layer
attach, histories        the layer in a model of transformers, and what it remembers of sequences
calling, threads         what a captured step asks of the CPU, and work beside the main thread
checkpoint               published weights, in and out
plan                     the constants as a file
place                    where a table should live: predictions for every placement
"""

__version__ = "0.1.0"
