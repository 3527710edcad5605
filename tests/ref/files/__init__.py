"""Tests of engram_ref.files."""
