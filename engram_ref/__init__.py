"""The reference Engram layer: hash, embed, gate, exact to the bit.

config, vocab, hashing    from text to row indices, without torch
"""
