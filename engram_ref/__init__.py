"""The reference Engram layer: hash, embed, gate, exact to the bit.

config, vocab, hashing         from text to row indices, without torch
plan, model_folder             the constants as a file; a published checkpoint, opened where it lies; without torch
hashing_torch, kernels         the same on the device
fp8                            codes with block scales, to values and back
tables, prefetch               where rows live, and when they are fetched
fusion, fusion_v41             from rows to the residual stream, in the demo's form and in that of DeepSeek-V4.1-Flash
layer                          the whole layer; checkpoint, checkpoint_v41: its weights, in and out
attach, on_hand                the layer in a model of transformers; rows that need no lookup
sample_checkpoint              a small checkpoint in the published layout
"""
