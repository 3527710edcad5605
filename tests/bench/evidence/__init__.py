"""Tests of bench.evidence."""
