"""Tests of engram_ref.hashing."""
