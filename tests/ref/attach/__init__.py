"""Tests of engram_ref.attach."""
