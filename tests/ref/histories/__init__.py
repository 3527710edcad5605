"""Tests of engram_ref.histories."""
