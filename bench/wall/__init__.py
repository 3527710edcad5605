"""One step of a decoder with Engram, every variant in interleaved rounds (`bench/gpu_wall.py`)."""
