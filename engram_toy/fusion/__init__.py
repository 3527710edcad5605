"""The twin of `engram_ref.fusion`: from looked-up rows to the update, in each model's form.

demo   the form of the demo and the paper
v41    that of DeepSeek-V4.1-Flash
qwen   that of Qwen3.8-Flash-Next
"""
