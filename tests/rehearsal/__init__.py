"""A CUDA stand-in for the CPU, and the tests that rehearse on it whatever will run on a GPU.

    python -m tests.rehearsal bench/gpu_wall.py --device cuda ...       a command on the stand-in
    python -m pytest tests/rehearsal

It models devices, capture, graphs and page-locked memory: what raises on a GPU raises here. It models no time and no
concurrency, so races and speed stay untested. It changes torch for the whole process: never import `install` in a test.
"""
