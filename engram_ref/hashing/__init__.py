"""From compressed ids to row indices: the seam at which both twins meet, exact integers only; without torch.

plan      the constants, as data
ngram     the hash and the history, in NumPy: the definition
fused     the same, compiled: all columns of a token in one pass, from token ids on if wanted; needs numba
device    the same in torch operations, where the ids are; needs torch; device_ids: vocabulary and history there
kernels   the same as a Triton kernel, from token ids on; needs torch and Triton
"""

from engram_ref.hashing.ngram import Hashed, NgramHasher, TokenHistory, hash_columns
from engram_ref.hashing.plan import INT32_MAX, INT64_MAX, HashPlan, LayerPlan, checksum
from engram_ref.ids import DEAD, check_ids

__all__ = [
    "DEAD", "INT32_MAX", "INT64_MAX", "HashPlan", "Hashed", "LayerPlan", "NgramHasher", "TokenHistory", "check_ids",
    "checksum", "hash_columns",
]  # fmt: skip
