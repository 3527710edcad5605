"""The toy with one setting varied at a time, and a grid of two (`bench/bytedmd_toy.py --sweep`)."""
