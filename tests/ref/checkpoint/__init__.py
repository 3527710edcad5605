"""Tests of engram_ref.checkpoint."""
