"""Tests of engram_ref.vocab."""
