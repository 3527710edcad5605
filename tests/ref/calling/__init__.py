"""Tests of engram_ref.calling."""
