"""Token ids in, rows of all layers out, where the GPU reads the tables: hash and gather without the CPU.

device    the lookup, as torch operations, in two launches or in one
kernels   the one launch, in Triton
"""
