"""What `bench/gpu_checks.sh` calls before and after it measures on a CUDA machine."""
