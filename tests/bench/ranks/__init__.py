"""Tests of bench.ranks."""
