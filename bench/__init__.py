"""Benchmarks: each script prints what it measures, and can write it as evidence."""
