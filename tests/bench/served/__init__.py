"""Tests of bench.served."""
