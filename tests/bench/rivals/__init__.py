"""Tests of bench.rivals."""
