"""Tests of engram_ref.place."""
