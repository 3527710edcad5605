"""Tests of engram_ref.fusion."""
