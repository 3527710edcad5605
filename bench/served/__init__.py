"""A whole model that serves requests, every variant in interleaved rounds (`bench/gpu_wall.py --end-to-end`)."""
