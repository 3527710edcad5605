"""Tests of bench.reads."""
