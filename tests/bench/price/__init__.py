"""Tests of bench.price."""
