"""Tests of engram_ref.prefetch."""
