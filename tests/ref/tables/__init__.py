"""Tests of engram_ref.tables."""
