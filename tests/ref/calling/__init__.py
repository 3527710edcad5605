"""Tests of engram_ref.lookup."""
