"""Tests of bench.wall."""
