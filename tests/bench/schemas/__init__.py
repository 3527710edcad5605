"""Tests of bench.schemas."""
