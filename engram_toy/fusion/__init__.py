"""The twin of `engram_ref.fusion`: demo, the form of the demo and the paper; v41, that of DeepSeek-V4.1-Flash."""
