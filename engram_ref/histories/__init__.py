"""What Engram remembers of sequences: the last few compressed ids of each, and the short convolution's past.

cache      of the sequences that a cache of keys and values holds, always as long as that
places     of sequences that come and go in a server's places, each at a position of its own
following  carried by a cache of transformers, so that what is done to the one is done to the other
"""
