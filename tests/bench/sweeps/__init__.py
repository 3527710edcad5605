"""Tests of bench.sweeps."""
