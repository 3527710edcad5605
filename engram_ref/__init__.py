"""The reference Engram layer: hash, embed, gate, exact to the bit.

config, vocab, hashing         from text to row indices, without torch
hashing_torch, kernels         the same on the device
tables, prefetch               where rows live, and when they are fetched
fusion, layer, checkpoint      from rows to the residual stream; weights in and out
"""
