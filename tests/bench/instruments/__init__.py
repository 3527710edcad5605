"""Tests of bench.instruments."""
