"""Tests of bench.rows."""
