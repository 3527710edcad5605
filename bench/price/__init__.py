"""The toy: real text to a ByteDMD verdict (`bench/bytedmd_toy.py`)."""
