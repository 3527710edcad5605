"""Tests of bench.setup."""
